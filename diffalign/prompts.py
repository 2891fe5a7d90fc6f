"""Prompts from files and from the embedded world, and the seeds of their pictures."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, cast

from diffalign.shapes import clips, scenes

SHAPES_SOURCE = "diffalign://shapes/"
CLIPS_SOURCE = "diffalign://shapes_video/"
OWN_FIELDS = ("id", "prompt", "seed", "image", "video")
"""Fields of an index that a prompt's file may not set."""


@dataclass(frozen=True)
class PromptRow:
    """A prompt and whatever else its source says about it (`task`, tags, ...), as JSON values."""

    prompt: str
    extras: Mapping[str, Any] = field(default_factory=dict)


def image_seed(run_seed: int, prompt: str, sample: int) -> int:
    """Seed of one image, 0 <= seed < 2**31: a function of its arguments only, the same on every machine."""
    key = json.dumps(["image", run_seed, prompt, sample]).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big") >> 1


def read_prompts(
    source: str,
    limit: int | None = None,
    seed: int = 0,
    task_weights: Mapping[str, float] | None = None,
) -> list[PromptRow]:
    """The prompts of a source, in its order.

    Args:
        source: A text file with one prompt a line (blank lines are skipped); a `.jsonl` file whose rows have a
            `prompt` field, and maybe others, which are kept; or `diffalign://shapes/train` and
            `diffalign://shapes/held_out`, the prompts of the embedded world with their `task`, or those of its clips,
            `diffalign://shapes_video/train` and so on. A file that is not
            there is looked for among the packaged `configs/prompts/`.
        limit: At most so many. Of a file the first ones; of the embedded world a seeded choice, balanced over the
            tasks (all of a task that has fewer). A larger limit keeps the choice of a smaller one.
        seed: Of that choice.
        task_weights: Embedded world only: a task's share of `limit` relative to the others'; 1 where not given, 0
            leaves the task out.

    Raises:
        ValueError: If the source is missing, unknown, unreadable or empty, or an argument is out of range.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"the number of prompts must be at least 1, got {limit}; leave it out to take all")
    if source.startswith("diffalign://"):
        return _embedded_prompts(source, limit, seed, task_weights or {})
    if task_weights:
        raise ValueError(f"task_weights need the embedded world ({SHAPES_SOURCE}train), found prompts: {source}")
    path = _find_file(source)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts file {path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise ValueError(f"prompts file {path} is empty; expected one prompt a line")
    if path.suffix.lower() == ".jsonl":
        return [_parse(path, number, line) for number, line in numbered[:limit]]
    return [PromptRow(line) for _, line in numbered[:limit]]


def _find_file(source: str) -> Path:
    path = Path(source).expanduser()
    packaged = Path(str(resources.files("diffalign.configs") / "prompts" / path.name))
    if not path.exists() and path.parent in (Path(), Path("configs/prompts")) and packaged.is_file():
        return packaged
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(
            f"prompts file {source!r} {found}; expected a text file, a .jsonl file, {SHAPES_SOURCE}train or "
            f"{SHAPES_SOURCE}held_out"
        )
    return path


def _parse(path: Path, number: int, line: str) -> PromptRow:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} of {path} is no JSON ({error}); repair or remove it") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise ValueError(f'line {number} of {path} has no prompt; expected an object like {{"prompt": "a red cube"}}')
    prompt = row.pop("prompt")
    return PromptRow(prompt, {f"source_{k}" if k in OWN_FIELDS else k: v for k, v in row.items()})


def _embedded_prompts(source: str, limit: int | None, seed: int, task_weights: Mapping[str, float]) -> list[PromptRow]:
    splits = ("train", "held_out", "all")
    known = [world + split for world in (SHAPES_SOURCE, CLIPS_SOURCE) for split in splits]
    if source not in known:
        near = difflib.get_close_matches(source, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown embedded prompts {source!r}{hint} (available: {', '.join(known)})")
    world, _, name = source.rpartition("/")
    split = cast(scenes.Split, name)
    moving = world + "/" == CLIPS_SOURCE
    tasks = tuple(clips.MOTIONS) if moving else scenes.TASKS
    everything: Sequence[Any] = clips.clip_prompts(split) if moving else scenes.prompts(split)
    for task, weight in task_weights.items():
        if task not in tasks:
            raise ValueError(f"task_weights: unknown task {task!r} (available: {', '.join(tasks)})")
        if not 0 <= weight < float("inf"):
            raise ValueError(f"task_weights: the weight of {task} must be a finite number >= 0, got {weight}")
    weights = {task: task_weights.get(task, 1.0) for task in tasks}
    by_task = {task: [p for p in everything if p.task == task] for task in tasks if weights[task] > 0}
    total = sum(len(found) for found in by_task.values())
    if total == 0:
        raise ValueError("task_weights leave no task: all weights are 0; expected one above 0")
    shares = task_shares({task: len(found) for task, found in by_task.items()}, limit or total, weights)
    chosen: set[str] = set()
    for task, found in by_task.items():
        ranked = sorted((p.text for p in found), key=lambda text: image_seed(seed, f"choice/{text}", 0))
        chosen.update(ranked[: shares[task]])
    return [PromptRow(p.text, {"task": p.task}) for p in everything if p.text in chosen]


def task_shares(sizes: Mapping[str, int], total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """How many of `total` each task gets: in proportion to the weights, never more than the task has.

    Seats are given one by one to the task with the smallest (seats + 1/2) / weight among those with prompts left
    (Sainte-Laguë's rule); equal weights give numbers that differ by at most one.

    Args:
        sizes: Prompts of each task.
        total: How many to give out; all of them if there are fewer.
        weights: Positive weight of each task.
    """
    shares = dict.fromkeys(sizes, 0)
    for _ in range(min(total, sum(sizes.values()))):
        left = [task for task in sizes if shares[task] < sizes[task]]
        shares[min(left, key=lambda task: (shares[task] + 0.5) / weights[task])] += 1
    return shares
