"""The files of the original UniGenBench, read and written: pictures `<index>_<k>.png` and the table of its results."""

from __future__ import annotations

import ast
import csv
import json
import logging
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path

from diffalign.eval.base import Case, Row, write_text
from diffalign.eval.unigenbench import UniGenBench

__all__ = ["read_folder", "read_results", "score_folder", "write_folder", "write_results"]

logger = logging.getLogger("diffalign")

_COLUMNS = ("index", "prompt", "testpoint", "output", "result_json", "img_path")


def read_folder(benchmark: UniGenBench, root: str | Path) -> list[tuple[Case, Path]]:
    """The pictures of a folder that are cases of the benchmark, in its order; others are named in a warning.

    Raises:
        ValueError: If there is none.
    """
    files = sorted(Path(root).glob("*.png")) if Path(root).is_dir() else []
    cases = {case.id: case for case in benchmark.cases()}
    found = {file.stem: file for file in files if file.stem in cases}
    others = [file.name for file in files if file.stem not in cases]
    if others:
        logger.warning("%s: %d pictures are no case of this benchmark, such as %s", root, len(others), others[0])
    if not found:
        raise ValueError(f"{root} holds no pictures of this benchmark; expected <index>_<k>.png, such as 0_0.png")
    return [(case, found[name]) for name, case in cases.items() if name in found]


def score_folder(benchmark: UniGenBench, root: str | Path, batch_size: int = 64) -> list[Row]:
    """The rows of a folder's pictures, for `benchmark.aggregate`; files are named relative to the folder.

    Args:
        benchmark: Judges.
        root: The folder.
        batch_size: Pictures judged at a time, so that a server has many questions at once.

    Raises:
        ValueError: As `read_folder`.
    """
    found = read_folder(benchmark, root)
    rows: list[Row] = []
    for start in range(0, len(found), batch_size):
        batch = found[start : start + batch_size]
        judged = benchmark.score([file for _, file in batch], [case for case, _ in batch])
        rows += [replace(row, image=file.name) for row, (_, file) in zip(judged, batch, strict=True)]
    return rows


def write_folder(root: str | Path, rows: Iterable[Row], pictures: str | Path, benchmark: UniGenBench) -> int:
    """Writes pictures under the original's names, for its own tools.

    Args:
        root: The folder to write; files of the same names are overwritten.
        rows: The pictures: `image` is a PNG file, relative to `pictures`.
        pictures: Folder of the file with the rows.
        benchmark: Knows the cases.

    Returns:
        How many pictures were written.

    Raises:
        ValueError: If a row has no picture, or is no case of the benchmark.
    """
    names = {(case.prompt, case.seed): case.id for case in benchmark.cases()}
    count = 0
    Path(root).mkdir(parents=True, exist_ok=True)
    for row in rows:
        if row.key not in names or row.image is None or Path(row.image).suffix.lower() != ".png":
            raise ValueError(f"row {row.id!r} is no case of this benchmark, or names no PNG file: {row.image!r}")
        shutil.copyfile(Path(pictures) / row.image, Path(root) / f"{names[row.key]}.png")
        count += 1
    return count


def read_results(path: str | Path, benchmark: UniGenBench, judge: str) -> list[Row]:
    """The rows of a table of results that the original wrote.

    Args:
        path: The file.
        benchmark: Knows the cases.
        judge: Who judged, which the file does not say, such as "gemini-2.5-pro".

    Raises:
        ValueError: If a row is malformed or no case of the benchmark; the message names it.
    """
    cases = {case.id: case for case in benchmark.cases()}
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        lines = list(csv.DictReader(file))
    if not lines or any(column not in lines[0] for column in _COLUMNS):
        raise ValueError(f"{path}: expected a table with the columns {', '.join(_COLUMNS)}")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            name = Path(str(line["img_path"]).replace("\\", "/")).stem
            points, result = ast.literal_eval(line["testpoint"]), json.loads(line["result_json"])
            verdicts = result["score"]
            if re.fullmatch(r"\d+_\d+", name) is None or name not in cases:
                raise ValueError(f"picture {name!r} is no case of this benchmark")
            if len(verdicts) != len(points):
                raise ValueError(f"{len(verdicts)} verdicts on {len(points)} test points")
        except (KeyError, TypeError, ValueError, SyntaxError) as error:
            raise ValueError(f"{path}, row {number}: not a row of UniGenBench's results ({error})") from error
        case = cases[name]
        right = [value == 1 for value in verdicts]  # the original takes anything else for wrong
        rows.append(
            Row(
                case.id,
                case.prompt,
                case.seed,
                case.task,
                image=f"{name}.png",
                scores={benchmark.name: sum(right) / len(right)},
                reason="as the original's table says",
                evidence={"judge": judge, "points": list(points), "verdicts": right},
            )
        )
    return rows


def write_results(path: str | Path, rows: Sequence[Row], root: str = "") -> None:
    """Writes verdicts as the original does, for its summary; rows without verdicts are left out, as there.

    Args:
        path: The file.
        rows: Of this benchmark.
        root: Folder that the picture's names begin with.
    """
    text = StringIO(newline="")
    table = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    table.writeheader()
    for row in rows:
        verdicts = row.evidence.get("verdicts")
        if verdicts is None:
            continue
        points = list(row.evidence["points"])
        result = {"prompt": row.prompt, "testpoint": points, "analysis": [], "score": [int(v) for v in verdicts]}
        table.writerow(
            {
                "index": row.id.split("_")[0],
                "prompt": row.prompt,
                "testpoint": str(points),
                "output": row.reason or "",
                "result_json": json.dumps(result, ensure_ascii=False, indent=4),
                "img_path": "/".join(part for part in (root, f"{row.id}.png") if part),
            }
        )
    write_text(path, text.getvalue())
