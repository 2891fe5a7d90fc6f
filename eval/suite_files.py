"""The folders that HPSv2's tools read and write: one picture for each prompt, named by its number.

HPDv2: `<root>/<style>/00000.jpg`, five digits, counted from 0 in each style. DrawBench and other flat lists:
`<root>/00000.jpg`. The original reads nothing but .jpg and passes over pictures that are missing, which moves all later
ones into other chunks; here .png is read as well, and a missing picture is missing and moves nothing.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from diffalign.eval.base import Case, Row
from diffalign.eval.case_rows import rows_of
from diffalign.reward_models.media import to_rgb

if TYPE_CHECKING:
    from diffalign.eval.reward_suite import RewardSuite

__all__ = ["find_pictures", "score_folder", "write_folder"]

logger = logging.getLogger("diffalign")

QUALITY = 75
"""JPEG quality of Pillow, with which the original's users save: scores depend on it a little."""
_ENDINGS = (".jpg", ".jpeg", ".png")
_SHOWN = 5


def find_pictures(benchmark: RewardSuite, root: str | Path) -> dict[str, Path]:
    """The pictures of a folder by the ids of their cases; .jpg is taken before .png. Missing ones are left out.

    Raises:
        ValueError: If the benchmark has several pictures of a prompt, for which the layout has no place.
    """
    found = {}
    for case, place in _places(benchmark):
        files = (Path(root) / f"{place}{ending}" for ending in _ENDINGS)
        file = next((file for file in files if file.is_file()), None)
        if file is not None:
            found[case.id] = file
    return found


def score_folder(benchmark: RewardSuite, root: str | Path, batch_size: int = 16) -> list[Row]:
    """The rows of a folder's pictures, for `benchmark.aggregate`; files are named relative to the folder.

    Rows have the seeds that the benchmark would have drawn with, since a folder does not say which were used: compare
    them with another model's only if both used the same.

    Args:
        benchmark: Scores.
        root: The folder.
        batch_size: Pictures scored at a time.

    Raises:
        ValueError: If there is no picture at all.
    """
    cases = benchmark.cases()
    found = find_pictures(benchmark, root)
    if not found:
        place = f"{_places(benchmark)[0][1]}.jpg"
        raise ValueError(f"{root} holds none of {len(cases)} pictures; expected files like {place}")
    absent = [case.id for case in cases if case.id not in found]
    if absent:
        logger.warning("%s: %d of %d pictures are missing, such as %s", root, len(absent), len(cases), absent[:_SHOWN])
    present = [case for case in cases if case.id in found]
    rows: list[Row] = []
    for start in range(0, len(present), batch_size):
        batch = present[start : start + batch_size]
        scored = benchmark.score([found[case.id] for case in batch], batch)
        files = [found[case.id].relative_to(root).as_posix() for case in batch]
        rows += [replace(row, image=file) for row, file in zip(scored, files, strict=True)]
    return rows


def write_folder(
    benchmark: RewardSuite,
    root: str | Path,
    rows: Sequence[Row],
    pictures: str | Path,
    *,
    ending: Literal[".jpg", ".png"] = ".jpg",
    quality: int = QUALITY,
) -> int:
    """Writes pictures into the layout, for the original's tools.

    Args:
        benchmark: Whose cases the rows are.
        root: The folder to write; files of the same names are overwritten.
        rows: `image` is a file relative to `pictures`.
        pictures: Folder of the file with the rows.
        ending: ".jpg", which the original reads, or ".png". A file that has it already is copied as it is.
        quality: Of the JPEG files that are made.

    Returns:
        How many pictures were written.

    Raises:
        ValueError: If a row is no case of the benchmark or names no picture, or there are several of a prompt.
        InvalidMediaError: If a picture cannot be read.
    """
    if ending not in (".jpg", ".png"):
        raise ValueError(f"the layout has .jpg or .png files, got {ending!r}")
    found = rows_of(benchmark.cases(), rows)
    written = 0
    for case, place in _places(benchmark):
        row = found.get((case.prompt, case.seed))
        if row is None:
            continue
        if row.image is None:
            raise ValueError(f"row {row.id!r} names no picture")
        source, target = Path(pictures) / row.image, Path(root) / f"{place}{ending}"
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix.lower() == ending or (ending == ".jpg" and source.suffix.lower() == ".jpeg"):
            shutil.copyfile(source, target)
        else:
            to_rgb(source).save(target, quality=quality)  # which PNG, without losses, has no use for
        written += 1
    return written


def _places(benchmark: RewardSuite) -> list[tuple[Case, str]]:
    """Every case with its file's path in the layout, without the ending."""
    if benchmark.samples != 1:
        raise ValueError(f"the layout has one picture of a prompt, the benchmark has samples={benchmark.samples}")
    return list(zip(benchmark.cases(), (benchmark.place(number) for number in benchmark.numbers), strict=True))
