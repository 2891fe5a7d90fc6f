"""What people say about a round's images: `labels*.jsonl` in the round's folder, one file for each annotator.

A line holds one of

    {"ranking": ["r0-00003-01", ["r0-00003-00", "r0-00003-02"]]}    best first; images in one list are equal
    {"better": "r0-00003-01", "worse": "r0-00003-00"}
    {"tie": ["r0-00003-00", "r0-00003-02"]}
    {"image": "r0-00003-01", "score": 4}                            larger is better

and whatever else its writer wants to remember. Annotators are averaged: scores image by image, as in D3PO's released
code, and comparisons pair by pair, so that the majority decides and a draw is a tie.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.mining import TIE
from diffalign.rollout_config import RolloutConfig
from diffalign.rollout_store import RoundFolder

__all__ = ["LABELS", "label_files", "labels_digest", "preference", "preferences", "read_labels", "to_do"]

LABELS = "labels*.jsonl"

_Key = tuple[int, int]


def preference(first: Tensor, second: Tensor) -> int:
    """1 if the first image is better, -1 if the second is, 0 for a tie.

    With several scores an image is better if it dominates: better in at least one of them and worse in none, as in
    D3PO's released code. Scores that differ by 1e-6 or less are equal.

    Args:
        first: Scores of an image, a number or [D]; larger is better.
        second: Scores of the other one, likewise.
    """
    difference = first - second
    return int(bool((difference > TIE).any())) - int(bool((difference < -TIE).any()))


def preferences(scores: Tensor) -> Tensor:
    """`preference` of every two of K images, [K, K]; NaN where one of them has no score.

    Args:
        scores: [K] or [K, D]; larger is better, NaN for none.
    """
    table = torch.full((len(scores), len(scores)), math.nan)
    for i, j in combinations(range(len(scores)), 2):
        if bool(scores[[i, j]].isfinite().all()):
            table[i, j] = preference(scores[i], scores[j])
            table[j, i] = -table[i, j]
    return table


def label_files(folder: RoundFolder) -> list[Path]:
    """The annotators' files, by name."""
    return sorted(folder.path.glob(LABELS))


def labels_digest(folder: RoundFolder) -> str:
    """A hash of all that the annotators wrote."""
    return blake2b(b"\0".join(path.read_bytes() for path in label_files(folder)), digest_size=16).hexdigest()


def read_labels(folder: RoundFolder, config: RolloutConfig) -> dict[int, Tensor]:
    """Who is better among each prompt's images, as `preferences` says it, for the prompts that have a label.

    Args:
        folder: The round.
        config: How many prompts it has, and images of each.

    Raises:
        ValueError: For a line that is no label, names an unknown image, images of several prompts, or something that
            was labelled before; the message names file and line.
    """
    prompts, images = config.prompts_per_round, config.num_images_per_prompt
    known = {folder.image_id(group, image): (group, image) for group in range(prompts) for image in range(images)}
    scores: dict[tuple[int, ...], list[float]] = defaultdict(list)
    compared: dict[tuple[int, ...], list[float]] = defaultdict(list)
    kinds: dict[int, int] = {}  # by prompt: 2 for scores, 3 for comparisons
    for path in label_files(folder):
        own: dict[tuple[int, ...], int] = {}
        for number, row in _rows(path):
            where = f"line {number} of {path}"
            for key, value in _statements(row, known, where):
                if key in own:
                    raise ValueError(f"{where} labels again what line {own[key]} did; remove one of them")
                own[key] = number
                (scores if len(key) == 2 else compared)[key].append(value)
                if kinds.setdefault(key[0], len(key)) != len(key):
                    raise ValueError(
                        f"{where}: the images of one prompt have both scores and comparisons, which have no mean; use "
                        "one kind for a prompt"
                    )
    tables: dict[int, Tensor] = {}
    for group in sorted({key[0] for key in scores}):
        means = [scores.get((group, image), [math.nan]) for image in range(images)]
        tables[group] = preferences(torch.tensor([sum(m) / len(m) for m in means], dtype=torch.float64))
    for (group, i, j), values in sorted(compared.items()):
        table = tables.setdefault(group, torch.full((images, images), math.nan))
        mean = sum(values) / len(values)
        table[i, j] = (mean > TIE) - (mean < -TIE)
        table[j, i] = -table[i, j]
    return tables


def to_do(folder: RoundFolder, config: RolloutConfig) -> str | None:
    """What a person has to do before a round can be learned from; None if there is nothing.

    Raises:
        ValueError: As `read_labels`.
    """
    if not folder.index.is_file():
        return (
            f"round {folder.number} has no images yet: run `diffalign rollout` with this config, label what it draws, "
            "then run `diffalign train` again"
        )
    tables = read_labels(folder, config)
    if not any(bool(table.isfinite().any()) for table in tables.values()):
        return (
            f"label the {config.images_per_round} images in {folder.path} (open label.html there, or write "
            "labels.jsonl; see docs/human_feedback.md), then run `diffalign train` again"
        )
    return None


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"labels file {path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} of {path} is no JSON ({error}); repair or remove it") from error
        yield number, row if isinstance(row, Mapping) else {}


def _statements(
    row: Mapping[str, Any], known: Mapping[str, _Key], where: str
) -> Iterator[tuple[tuple[int, ...], float]]:
    """What a line says: (prompt, image) with a score, or (prompt, image, later image) with 1, -1 or 0."""
    if {"image", "score"} <= row.keys():
        score = row["score"]
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise ValueError(f"{where}: a score must be a finite number, got {score!r}")
        yield _place(row["image"], known, where), float(score)
        return
    if "ranking" in row and isinstance(row["ranking"], list):
        ranks = [entry if isinstance(entry, list) else [entry] for entry in row["ranking"]]
    elif {"better", "worse"} <= row.keys():
        ranks = [[row["better"]], [row["worse"]]]
    elif "tie" in row and isinstance(row["tie"], list):
        ranks = [row["tie"]]
    else:
        raise ValueError(
            f'{where} is no label; expected {{"ranking": [...]}}, {{"better": id, "worse": id}}, {{"tie": [...]}} or '
            '{"image": id, "score": number}'
        )
    places = [(rank, *_place(name, known, where)) for rank, names in enumerate(ranks) for name in names]
    if (
        len({group for _, group, _ in places}) != 1
        or len({image for _, _, image in places}) != len(places)
        or (len(places) < 2)
    ):
        raise ValueError(f"{where}: expected at least two different images of one prompt, got {_names(ranks)}")
    for (rank, group, image), (other_rank, _, other) in combinations(places, 2):
        sign = float((other_rank > rank) - (other_rank < rank))
        yield (group, image, other) if image < other else (group, other, image), sign if image < other else -sign


def _place(name: Any, known: Mapping[str, _Key], where: str) -> _Key:
    if not isinstance(name, str) or name not in known:
        ids = list(known)
        raise ValueError(f"{where}: unknown image {name!r}; this round's are {ids[0]} to {ids[-1]}")
    return known[name]


def _names(ranks: Sequence[Sequence[Any]]) -> str:
    return ", ".join(str(name) for names in ranks for name in names) or "none"
