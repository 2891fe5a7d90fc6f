"""The folders and results files of the original GenEval, read and written.

A folder has one subfolder for each prompt, named by digits: its metadata row in `metadata.jsonl`, its pictures in
`samples/`, named by digits as well, as PNG. `results.jsonl` has one row for each picture. What is written here the
original tools read, so that a score can be checked with them, and the other way round.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.eval.base import Case, Row, read_jsonl, write_text
from diffalign.reward_models.geneval_prompts import Wanted

if TYPE_CHECKING:
    from diffalign.eval.geneval import GenEval

__all__ = ["Sample", "read_folder", "read_results", "score_folder", "write_folder", "write_results"]

logger = logging.getLogger("diffalign")

JOINT = " | "
"""Between the reasons of several clauses, which the original puts on lines of their own."""
FITTING = "shows what was asked"
"""The reason of a right picture, which the original leaves empty."""
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Sample:
    """One picture of a folder.

    Attributes:
        path: Its file.
        number: Of the prompt, from the subfolder's name.
        sample: Of the picture among those of its prompt, from 0 in the order of their names.
        wanted: What it must show.
    """

    path: Path
    number: int
    sample: int
    wanted: Wanted


def read_folder(root: str | Path) -> list[Sample]:
    """The pictures of a folder, in the order of their numbers.

    Subfolders and files that the original passes over are passed over, too; pictures among them are named in a
    warning.

    Raises:
        ValueError: If there is no picture, a subfolder lacks its metadata or samples, or the metadata is malformed.
    """
    root = Path(root)
    inside = list(root.iterdir()) if root.is_dir() else []
    folders = sorted((f for f in inside if f.is_dir() and f.name.isdigit()), key=lambda f: int(f.name))
    samples: list[Sample] = []
    for folder in folders:
        wanted = _read_wanted(folder / "metadata.jsonl")
        if not (folder / "samples").is_dir():
            raise ValueError(f"{folder} has no folder 'samples'; expected its pictures there as 0000.png and so on")
        files = sorted(f for f in (folder / "samples").iterdir() if f.is_file())
        named = [f for f in files if re.fullmatch(r"\d+\.png", f.name)]
        others = [f.name for f in files if f not in named and f.suffix.lower() in _PICTURES]
        if others:
            logger.warning("%s: not read, as in the original: %s; name them 0000.png and so on", folder, others)
        pictures = enumerate(sorted(named, key=lambda f: int(f.stem)))
        samples += [Sample(file, int(folder.name), sample, wanted) for sample, file in pictures]
    if not samples:
        raise ValueError(f"{root} holds no pictures; expected 00000/samples/0000.png with 00000/metadata.jsonl")
    return samples


def score_folder(benchmark: GenEval, root: str | Path, batch_size: int = 16) -> list[Row]:
    """The rows of a folder's pictures, for `benchmark.aggregate`.

    Sample k of a prompt gets the benchmark's k-th seed, since a folder does not say which seed drew it. Files are
    named relative to the folder. A picture that cannot be read gets a row without a verdict.

    Args:
        benchmark: Judges; its prompts must be the folder's for `aggregate`.
        root: The folder.
        batch_size: Pictures judged at a time.

    Raises:
        ValueError: As `read_folder`.
    """
    samples = read_folder(root)
    rows: list[Row] = []
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        cases = [_case(sample, benchmark.seed) for sample in batch]
        judged = benchmark.score([sample.path for sample in batch], cases)
        files = [sample.path.relative_to(root).as_posix() for sample in batch]
        rows += [replace(row, image=file) for row, file in zip(judged, files, strict=True)]
    return rows


def write_folder(root: str | Path, rows: Iterable[Row], pictures: str | Path, wanted: Sequence[Wanted]) -> int:
    """Writes pictures into the original's folder layout, for its own tools.

    Args:
        root: The folder to write; files of the same names are overwritten.
        rows: The pictures: `image` is a PNG file, relative to `pictures`; those of a prompt are numbered by seed.
        pictures: Folder of the file with the rows.
        wanted: All prompts in the benchmark's order, which gives their numbers; `GenEval.wanted`.

    Returns:
        How many pictures were written.

    Raises:
        ValueError: If a row has no picture, or is of another prompt, or the file is no PNG.
    """
    numbers = {row.prompt: number for number, row in enumerate(wanted)}
    by_prompt: dict[str, list[Row]] = {}
    for row in rows:
        if row.prompt not in numbers:
            raise ValueError(f"prompt {row.prompt!r} of row {row.id!r} is not among the {len(wanted)} prompts")
        if row.image is None or Path(row.image).suffix.lower() != ".png":
            raise ValueError(f"row {row.id!r} names no PNG file, which the original needs; found {row.image!r}")
        by_prompt.setdefault(row.prompt, []).append(row)
    for prompt, group in by_prompt.items():
        number = numbers[prompt]
        folder = Path(root) / f"{number:05d}"
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        write_text(folder / "metadata.jsonl", json.dumps(wanted[number].to_dict()))
        for sample, row in enumerate(sorted(group, key=lambda row: row.seed)):
            shutil.copyfile(Path(pictures) / str(row.image), folder / "samples" / f"{sample:05d}.png")
    return sum(map(len, by_prompt.values()))


def read_results(path: str | Path, seed: int = 0) -> list[Row]:
    """The rows of a results file that the original wrote, in its order.

    Args:
        path: The file.
        seed: Of the first sample; sample k of a prompt gets `seed + k`, in the order of the files' names.

    Raises:
        ValueError: If a row is malformed; the message names file and row.
    """
    rows: list[tuple[tuple[int, int], Row]] = []
    for line, values in enumerate(read_jsonl(path), start=1):
        try:
            file = Path(str(values["filename"]).replace("\\", "/"))
            number, place = int(file.parent.parent.name), int(file.stem)
            wanted = Wanted.from_dict(json.loads(values["metadata"]))
            boxes = json.loads(values["details"])
            if not isinstance(values["correct"], bool):
                raise ValueError(f"'correct' must be true or false, found {values['correct']!r}")
            row = Row(
                id=f"{number:05d}-{place:02d}",
                prompt=wanted.prompt,
                seed=0,
                task=wanted.tag,
                image="/".join(file.parts[-3:]),
                correct=values["correct"],
                reason=JOINT.join(values["reason"].split("\n")) or FITTING,
                evidence={"official": values["correct"], "objects": boxes, "detector": "original tool"},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path}, row {line}: not a row of GenEval's results ({error}); expected filename "
                "(.../00000/samples/0000.png), correct, reason, metadata and details"
            ) from error
        rows.append(((number, place), row))
    return _numbered(rows, seed)


def write_results(path: str | Path, rows: Sequence[Row], wanted: Mapping[str, Wanted], root: str = "") -> None:
    """Writes verdicts as the original does, for its summary.

    Args:
        path: The file.
        rows: With a verdict; `image` or the id says which file it was.
        wanted: What each prompt asks for.
        root: Folder that the file names begin with.

    Raises:
        ValueError: If a row has no verdict, or its prompt is unknown.
    """
    lines = []
    for row in rows:
        if row.correct is None or row.prompt not in wanted:
            raise ValueError(f"row {row.id!r} has no verdict, or its prompt is not among those given")
        right = row.correct
        lines.append(
            {
                "filename": "/".join(part for part in (root, row.image or f"{row.id}.png") if part),
                "tag": wanted[row.prompt].tag,
                "prompt": row.prompt,
                "correct": right,
                "reason": "" if right else "\n".join(str(row.reason or "").split(JOINT)),
                "metadata": json.dumps(wanted[row.prompt].to_dict()),
                "details": json.dumps(row.evidence.get("objects", {})),
            }
        )
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def _read_wanted(path: Path) -> Wanted:
    if not path.is_file():
        raise ValueError(f"there is no {path}; expected the prompt's metadata row, one JSON object")
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(row, dict):
            raise ValueError("it is no JSON object")
        return Wanted.from_dict(row)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _case(sample: Sample, seed: int) -> Case:
    wanted = sample.wanted
    return Case(
        id=f"{sample.number:05d}-{sample.sample:02d}",
        prompt=wanted.prompt,
        seed=seed + sample.sample,
        task=wanted.tag,
        meta=wanted.to_dict(),
    )


def _numbered(rows: Sequence[tuple[tuple[int, int], Row]], seed: int) -> list[Row]:
    """The rows with seeds by the place of their file among those of their prompt."""
    places: dict[int, list[int]] = {}
    for (number, place), _ in rows:
        places.setdefault(number, []).append(place)
    order = {number: {place: k for k, place in enumerate(sorted(set(found)))} for number, found in places.items()}
    return [replace(row, seed=seed + order[number][place]) for (number, place), row in rows]
