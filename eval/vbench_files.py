"""VBench's folders of videos and its results files, read and written.

A folder holds `<prompt>-<0..4>.mp4` (or .gif); `<name>_eval_results.json` holds, for every dimension, its score and a
list with the value of each video. What is written here the original tool reads, and the other way round.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from diffalign.eval.base import Case, Row, write_json
from diffalign.eval.vbench_prompts import DIMENSIONS, file_name

if TYPE_CHECKING:
    from diffalign.eval.vbench import VBench

__all__ = ["Imported", "read_folder", "read_results", "score_folder", "write_folder", "write_results"]

logger = logging.getLogger("diffalign")

SUFFIXES = (".mp4", ".gif")
_NAME = re.compile(r"(?P<prompt>.+)-(?P<sample>\d+)", re.DOTALL)


class Imported(NamedTuple):
    """What another tool found in one dimension.

    Attributes:
        score: Raw, on the scale of the dimension.
        videos: How many videos it rests on.
        prompts: The prompt of each video whose value is known; empty where they are not.
        values: Their values.
    """

    score: float
    videos: int
    prompts: tuple[str, ...] = ()
    values: tuple[float, ...] = ()


def read_folder(benchmark: VBench, root: str | Path) -> list[tuple[Path, Case]]:
    """The videos of a folder that are the benchmark's, each with its case, in the order of the cases.

    Videos that are missing are counted by `VBench.aggregate`; those that are of no prompt are named in a warning.

    Raises:
        ValueError: If no video of the benchmark is there, or one is there twice with different endings.
    """
    root = Path(root)
    files = [path for path in root.iterdir() if path.is_file()] if root.is_dir() else []
    videos: dict[str, Path] = {}
    for path in sorted(path for path in files if path.suffix.lower() in SUFFIXES):
        if path.stem in videos:
            raise ValueError(f"{path.name!r} is there twice, as {videos[path.stem].name!r} too; keep one of them")
        videos[path.stem] = path
    found = []
    for case in benchmark.cases():
        video = videos.pop(file_name(case.prompt, case.meta["sample"], ""), None)
        if video is not None:
            found.append((video, case))
    if not found:
        example = file_name(benchmark.asked[0].prompt, 0)
        raise ValueError(f"{root} holds none of the benchmark's videos; expected names such as {example!r}")
    if videos:
        logger.warning("%s: %d videos are of no prompt asked for, such as %r", root, len(videos), next(iter(videos)))
    return found


def score_folder(benchmark: VBench, root: str | Path) -> list[Row]:
    """The rows of a folder's videos, for `benchmark.aggregate`; files are named relative to the folder.

    Raises:
        ValueError: As `read_folder`.
        WeightsError: If a network cannot be loaded.
    """
    rows = []
    for path, case in read_folder(benchmark, root):
        row = benchmark.score([path], [case])[0]
        rows.append(replace(row, image=path.name))
    return rows


def write_folder(benchmark: VBench, root: str | Path, rows: Iterable[Row], videos: str | Path) -> int:
    """Copies videos into VBench's layout, for the original tool.

    Of temporal flickering the ones that stand still are written, as the original's filter leaves them.

    Args:
        benchmark: Whose rows they are.
        root: The folder to write; files of the same names are overwritten.
        rows: The videos: `image` is an mp4 or gif file, relative to `videos`.
        videos: Folder that the files' names begin at.

    Returns:
        How many were written.

    Raises:
        ValueError: If a row names no such file, is no case of the benchmark, or its prompt cannot be a file's name.
    """
    cases = {(case.prompt, case.seed): case for case in benchmark.cases()}
    filtered = {entry.prompt for entry in benchmark.asked if benchmark.samples_of(entry) > benchmark.samples}
    plan: list[tuple[Path, str]] = []
    kept: dict[str, int] = {}
    rows = list(rows)
    stranger = next((row for row in rows if row.key not in cases), None)
    if stranger is not None:
        raise ValueError(f"row {stranger.id!r} is no case of this benchmark; expected rows that its own cases led to")
    for row in sorted(rows, key=lambda row: cases[row.key].id):
        source = Path(videos) / str(row.image)
        if row.image is None or source.suffix.lower() not in SUFFIXES or not source.is_file():
            raise ValueError(f"row {row.id!r} names no video file; expected an mp4 or gif, found {row.image!r}")
        sample = cases[row.key].meta["sample"]
        if row.prompt in filtered:
            sample = kept.get(row.prompt, 0)
            if not row.evidence.get("static") or sample >= benchmark.samples:
                continue
            kept[row.prompt] = sample + 1
        plan.append((source, file_name(row.prompt, sample, source.suffix.lower())))
    Path(root).mkdir(parents=True, exist_ok=True)
    for source, name in plan:
        shutil.copyfile(source, Path(root) / name)
    return len(plan)


def read_results(path: str | Path, dimensions: Sequence[str] | None = None) -> dict[str, Imported]:
    """Scores that the original tool wrote, by dimension.

    A score is taken as it stands there, since some are means over frames. Where it is the mean of the videos' values,
    these give it an interval.

    Args:
        path: `<name>_eval_results.json`.
        dimensions: Which to take; None takes all.

    Raises:
        ValueError: If the file is not as described, or has not all of the dimensions.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {path} as VBench's results: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is none of VBench's results; expected an object with a list for every dimension")
    unknown = sorted(set(content) - set(DIMENSIONS))
    absent = [name for name in dimensions or () if name not in content]
    if unknown or absent:
        problem = f"unknown dimension {unknown[0]!r}" if unknown else f"no dimension {absent[0]!r}"
        raise ValueError(f"{path}: {problem} (known: {', '.join(DIMENSIONS)})")
    chosen = content if dimensions is None else {name: content[name] for name in dimensions}
    return {name: _imported(path, name, value) for name, value in chosen.items()}


def write_results(path: str | Path, benchmark: VBench, rows: Sequence[Row], root: str = "") -> None:
    """Writes the dimensions that were computed, as the original tool does.

    Args:
        path: The file.
        benchmark: Whose rows they are.
        rows: Of videos that were measured.
        root: Folder that the names of the videos begin with.
    """
    report = benchmark.aggregate(rows)
    cases = {(case.prompt, case.seed): case for case in benchmark.cases()}
    content: dict[str, Any] = {}
    for name in benchmark.dimensions:
        score = report.scores[name]
        if score.value is None:
            continue
        videos = [
            {"video_path": f"{root}/{_named(row, cases[row.key])}".removeprefix("/"), "video_results": value}
            for row, value in benchmark.counted(name, rows)
        ]
        content[name] = [score.value, videos]
    write_json(path, content)


def _named(row: Row, case: Case) -> str:
    return row.image or file_name(row.prompt, case.meta["sample"])


def _imported(path: str | Path, name: str, value: object) -> Imported:
    wrong = f"{path}: {name} is not as VBench writes it; expected [score, [{{video_path, video_results}}, ...]]"
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[1], list):
        raise ValueError(wrong)
    score, videos = value
    if isinstance(score, bool) or not isinstance(score, int | float) or not np.isfinite(score):
        raise ValueError(f"{wrong}; the score is {score!r}")
    prompts, values = [], []
    for video in videos:
        if not isinstance(video, Mapping):
            raise ValueError(f"{wrong}; found {video!r:.60}")
        found = _NAME.fullmatch(re.split(r"[/\\]", str(video.get("video_path", "")))[-1].rpartition(".")[0])
        result = video.get("video_results")
        if found is not None and isinstance(result, int | float) and np.isfinite(result):
            prompts.append(found["prompt"])
            values.append(float(result))
    whole = len(values) == len(videos) > 0 and abs(float(np.mean(values)) - score) <= 1e-4
    return Imported(float(score), len(videos), tuple(prompts) * whole, tuple(values) * whole)
