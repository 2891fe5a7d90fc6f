"""The files of the original T2I-CompBench, read and written: a folder of one category, and its results.

Pictures lie in `samples/` as `<prompt>_<six digits>.png`; the digits count the pictures of the category, and the prompt
is what stands before the first underscore. Results are a list of numbers with these counts.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from diffalign.eval.base import Case, Row, write_text
from diffalign.eval.t2i_compbench import SAMPLES, T2ICompBench

__all__ = ["read_results", "read_samples", "score_samples", "write_results", "write_samples"]

logger = logging.getLogger("diffalign")

RESULTS: Mapping[str, str] = {
    **dict.fromkeys(("color", "shape", "texture"), "annotation_blip/vqa_result.json"),
    "non_spatial": "annotation_clip/vqa_result.json",
    "spatial": "labels/annotation_obj_detection_2d/vqa_result.json",
    "numeracy": "annotation_num/vqa_result.json",
    "complex": "annotation_3_in_1/vqa_result.json",
}
"""Where the original leaves a category's scores. Its place for 3d_spatial is not confirmed here."""
ORIGINAL = "original tool"


def read_samples(benchmark: T2ICompBench, root: str | Path, category: str) -> list[tuple[Case, Path]]:
    """The pictures of a folder of one category, in the order of their numbers.

    Sample k of a prompt is the k-th of its files. Pictures of prompts that the benchmark does not have, and further
    ones than its samples, are passed over with a warning.

    Raises:
        ValueError: If there is none.
    """
    cases = _cases(benchmark, category)
    numbered = _numbered(root)
    seen: dict[str, int] = {}
    found: list[tuple[Case, Path]] = []
    for _, file in numbered:
        prompt = file.name.split("_")[0]
        sample = seen.get(prompt, 0)
        seen[prompt] = sample + 1
        if sample < len(cases.get(prompt, ())):
            found.append((cases[prompt][sample], file))
    if len(found) < len(numbered):
        logger.warning("%s: %d pictures are no case of this benchmark", root, len(numbered) - len(found))
    if not found:
        raise ValueError(f"{root} holds no pictures of {category}; expected samples/<prompt>_000000.png and so on")
    return found


def score_samples(benchmark: T2ICompBench, root: str | Path, category: str, batch_size: int = 16) -> list[Row]:
    """The rows of a folder's pictures, for `benchmark.aggregate`; files are named relative to the folder.

    Args:
        benchmark: Judges.
        root: The folder.
        category: Which category it holds.
        batch_size: Pictures judged at a time.

    Raises:
        ValueError: As `read_samples`, and `T2ICompBench.score`.
    """
    found = read_samples(benchmark, root, category)
    rows: list[Row] = []
    for start in range(0, len(found), batch_size):
        batch = found[start : start + batch_size]
        judged = benchmark.score([file for _, file in batch], [case for case, _ in batch])
        rows += [replace(row, image=f"samples/{file.name}") for row, (_, file) in zip(judged, batch, strict=True)]
    return rows


def write_samples(
    root: str | Path, rows: Iterable[Row], pictures: str | Path, benchmark: T2ICompBench, category: str
) -> int:
    """Writes the pictures of one category under the original's names, for its own tools.

    Args:
        root: The folder to write; files of the same names are overwritten.
        rows: The pictures: `image` is a PNG file, relative to `pictures`; rows of other categories are passed over.
        pictures: Folder of the file with the rows.
        benchmark: Knows the cases.
        category: Which category.

    Returns:
        How many pictures were written.

    Raises:
        ValueError: If a row names no PNG file, or there is none of the category.
    """
    numbers = _numbers(benchmark, category)
    own = [row for row in rows if row.key in numbers]
    if not own:
        raise ValueError(f"no row is a case of {category}")
    (Path(root) / "samples").mkdir(parents=True, exist_ok=True)
    for row in own:
        if row.image is None or Path(row.image).suffix.lower() != ".png":
            raise ValueError(f"row {row.id!r} names no PNG file, which the original needs; found {row.image!r}")
        name = f"{row.prompt}_{numbers[row.key]:06d}.png"
        shutil.copyfile(Path(pictures) / row.image, Path(root) / "samples" / name)
    return len(own)


def read_results(root: str | Path, benchmark: T2ICompBench, category: str) -> list[Row]:
    """The rows of the scores that the original left in a folder of one category.

    Where the folder has `samples/`, its files say what a number stands for; else all prompts with ten pictures each do.
    The original numbers by the digits in the names for what its detector judges, and by place for the rest.

    Raises:
        ValueError: If the file is missing or malformed, or has a number that stands for nothing.
    """
    path = Path(root) / _place(category)
    if not path.is_file():
        raise ValueError(f"there is no {path}; expected what the original's evaluation of {category} writes")
    cases = _by_number(root, benchmark, category)
    try:
        content = json.loads(path.read_bytes())
        answers = [(int(line["question_id"]), float(line["answer"])) for line in content]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a list of question_id and answer ({error!r:.100})") from error
    strangers = [number for number, _ in answers if number not in cases]
    if strangers:
        raise ValueError(f"{path}: {len(strangers)} numbers are no case of the benchmark, such as {strangers[0]}")
    return [_imported(cases[number], category, value) for number, value in answers]


def write_results(root: str | Path, rows: Sequence[Row], benchmark: T2ICompBench, category: str) -> Path:
    """Writes the scores of one category as the original does; rows without a score are left out.

    Returns:
        The file.
    """
    numbers = {(case.prompt, case.seed): number for number, case in _by_number(root, benchmark, category).items()}
    values = sorted((numbers[r.key], r.evidence["value"]) for r in rows if r.key in numbers and "value" in r.evidence)
    as_text = category in ("color", "shape", "texture")
    content = [{"question_id": number, "answer": f"{v:.4f}" if as_text else v} for number, v in values]
    path = Path(root) / _place(category)
    write_text(path, json.dumps(content))
    return path


def _place(category: str) -> str:
    if category not in RESULTS:
        raise ValueError(f"the original has no results of {category!r} that are read here ({', '.join(RESULTS)} are)")
    return RESULTS[category]


def _cases(benchmark: T2ICompBench, category: str) -> dict[str, list[Case]]:
    """The cases of a category by prompt, in the order of their samples."""
    found: dict[str, list[Case]] = {}
    for case in benchmark.cases():
        if case.task == category:
            found.setdefault(case.prompt, []).append(case)
    if not found:
        raise ValueError(f"the benchmark has no prompt of {category!r}")
    return found


def _numbered(root: str | Path) -> list[tuple[int, Path]]:
    """The files of `samples/` with the digits at the end of their names, in the order of these."""
    files = list((Path(root) / "samples").glob("*.png")) if (Path(root) / "samples").is_dir() else []
    return sorted((int(match[1]), file) for file in files if (match := re.search(r"_(\d+)$", file.stem)))


def _by_number(root: str | Path, benchmark: T2ICompBench, category: str) -> dict[int, Case]:
    """What the numbers in the original's results stand for."""
    files = _numbered(root)
    if not files:
        known = {(case.prompt, case.seed): case for case in benchmark.cases()}
        return {number: known[key] for key, number in _numbers(benchmark, category).items()}
    cases = {file: case for case, file in read_samples(benchmark, root, category)}
    by_name = category in ("spatial", "numeracy")
    return {number if by_name else place: cases[file] for place, (number, file) in enumerate(files) if file in cases}


def _numbers(benchmark: T2ICompBench, category: str) -> dict[tuple[str, int], int]:
    """The number of each case of a category among the original's, of which every prompt has ten."""
    return {
        (case.prompt, case.seed): SAMPLES * int(case.id.split("-")[-2]) + case.seed - benchmark.seed
        for cases in _cases(benchmark, category).values()
        for case in cases
    }


def _imported(case: Case, category: str, value: float) -> Row:
    evidence = {"judge": ORIGINAL, "value": value}
    scores = {f"t2i_{category}": value}
    return Row(
        case.id, case.prompt, case.seed, case.task, scores=scores, reason="as the original says", evidence=evidence
    )
