"""`diffalign train-reward` for the weights of a checklist: VisionReward's regression on a file of answers."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.checklist_regression import fit_checklist
from diffalign.config import dump_config
from diffalign.data.folder import read_index
from diffalign.resumable import write_atomically
from diffalign.reward_config import ChecklistRun

__all__ = ["read_answers", "train_checklist"]

WEIGHTS_FILE = "weights.json"
_SHARES = 10_000


def train_checklist(run: ChecklistRun) -> str:
    """Fits the weights and writes `weights.json`; gives what the terminal shows last.

    The file has the published one's two keys, `coef`, in the order of the features, and `intercept`, [0.0], and beside
    them the features' names, those that were dropped, and the accuracies. The same input gives the same bytes.

    Raises:
        ValueError: If the answers cannot be read, or none is usable.
    """
    names, differences, preference, held_out, unusable = read_answers(run)
    train = ~held_out
    if not train.any():
        raise ValueError(f"{run.reward.answers} has no usable row left to learn from ({unusable} without answers)")
    fit = fit_checklist(differences[train], preference[train], ridge=run.reward.ridge)
    decided = held_out & (preference != 0.5)
    right = ((differences[decided] @ fit.weights * (preference[decided] - 0.5)).sign() / 2 + 0.5).mean()
    content = {
        "coef": fit.weights.tolist(),
        "intercept": [0.0],
        "features": names,
        "dropped": [names[i] for i in fit.dropped],
        "pairs": int(train.sum()),
        "unusable": unusable,
        "accuracy": None if math.isnan(fit.accuracy) else fit.accuracy,
        "held_out_accuracy": float(right) if decided.any() else None,
    }
    folder = Path(run.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.yaml", dump_config(run).encode())
    write_atomically(folder / WEIGHTS_FILE, (json.dumps(content, indent=2) + "\n").encode())
    shown = "none held out" if content["held_out_accuracy"] is None else f"{content['held_out_accuracy']:.4f}"
    kept = len(names) - len(fit.dropped)
    return (
        f"{kept} of {len(names)} questions kept, from {content['pairs']} pairs ({unusable} without answers left out)\n"
        f"held-out accuracy: {shown}\nweights: {folder / WEIGHTS_FILE}"
    )


def read_answers(run: ChecklistRun) -> tuple[list[str], Tensor, Tensor, Tensor, int]:
    """The pairs of a file of answers.

    A row with a feature that is missing or no number on either side is left out and counted: it is no answer "no".

    Returns:
        Names of the features; differences [N, F]; preference [N]; which rows are held out, bool [N], by their prompt,
        or by their number without one; and how many rows were left out.

    Raises:
        ValueError: If the file holds no such rows, or they do not have the same features.
    """
    path = Path(run.reward.answers)
    if not path.is_file():
        raise ValueError(f"reward.answers {str(path)!r} does not exist; expected a JSONL, JSON or parquet of pairs")
    names: list[str] | None = None
    rows: list[list[float]] = []
    labels: list[float] = []
    held: list[bool] = []
    unusable = 0
    for number, row in enumerate(read_index(path)):
        sides = [row.get("first"), row.get("second")]
        if names is None:
            names = _names(sides[0])
        if names is None or any(_names(side) != names for side in sides):
            raise ValueError(
                f"row {number} of {path} has other features than {names or 'expected'}; expected `first` and `second` "
                "with the same ones: numbers by name, or lists of one length"
            )
        first, second = (_values(side, names) for side in sides)
        preference = row.get("preference", 1.0)
        if first is None or second is None or preference is None:
            unusable += 1
            continue
        if isinstance(preference, bool) or not isinstance(preference, int | float) or not 0 <= preference <= 1:
            raise ValueError(f"preference of row {number} of {path} is {preference!r}; expected a number in [0, 1]")
        rows.append([a - b for a, b in zip(first, second, strict=True)])
        labels.append(float(preference))
        held.append(_share(run.seed, str(row.get("prompt", number))) < run.reward.held_out_fraction)
    if not rows:
        raise ValueError(f"{path} has no row with answers on both sides ({unusable} without)")
    assert names is not None
    double = torch.float64
    return names, torch.tensor(rows, dtype=double), torch.tensor(labels, dtype=double), torch.tensor(held), unusable


def _names(side: Any) -> list[str] | None:
    """Names of the features of one side, sorted if they have names; None if it is neither kind."""
    if isinstance(side, Mapping):
        return sorted(map(str, side))
    return (
        [f"feature {i}" for i in range(len(side))] if isinstance(side, Sequence) and not isinstance(side, str) else None
    )


def _values(side: Any, names: Sequence[str]) -> list[float] | None:
    """The features in their order; None if one is no finite number."""
    values = [side[name] for name in names] if isinstance(side, Mapping) else list(side)
    good = all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    return [float(value) for value in values] if good else None


def _share(seed: int, key: str) -> float:
    """A number in [0, 1) that depends on the seed and a prompt only."""
    digest = hashlib.blake2b(f"{seed}\x1f{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _SHARES / _SHARES
