"""What a run leaves: the lines of its metrics and its weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from diffalign.batches import PairBatch
from diffalign.data import PairSource

MANDATORY = {
    "loss",
    "model_mse",
    "ref_mse",
    "error_chosen",
    "error_rejected",
    "ref_error_chosen",
    "ref_error_rejected",
    "z_mean",
    "z_std",
    "implicit_accuracy",
    "gate",
    "grad_norm",
    "lr",
}


def rows(folder: Path | str, kind: str = "train") -> list[dict[str, float]]:
    """The lines of one kind in metrics.jsonl, without the prefix and the time they took."""
    found = []
    for line in (Path(folder) / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        named = {k.removeprefix(f"{kind}/"): v for k, v in row.items() if k.startswith(f"{kind}/")}
        if named:
            named.pop("seconds", None)
            named.pop("data_seconds", None)
            found.append({"step": row["step"], **named})
    return found


def column(folder: Path | str, name: str, kind: str = "train") -> list[float]:
    return [row[name] for row in rows(folder, kind)]


def trained_file(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "pytorch_lora_weights.safetensors")


def weights_file(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def optimizer_state(folder: Path) -> dict[int, dict[str, torch.Tensor]]:
    state: dict[int, dict[str, torch.Tensor]] = torch.load(folder / "state.pt", weights_only=True)["optimizer"]["state"]
    return state


class Changed:
    """A source with one change made to what another one gives."""

    def __init__(self, source: PairSource, change: Callable[[int, int, PairBatch], PairBatch]) -> None:
        self.source, self.change = source, change

    def batch(self, step: int, micro_step: int) -> PairBatch:
        return self.change(step, micro_step, self.source.batch(step, micro_step))

    def update(self, step: int) -> None:
        self.source.update(step)
