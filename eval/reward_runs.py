"""Runs reward models over what people compared, and goes on where it was when it is killed.

A folder holds `scores.jsonl` (every medium once, see `reward_models.scoring`), `pairs-MODEL.jsonl` for judges that look
at two media at once, `judged.jsonl` with the comparisons and all scores, and `report.json`, which `reward_accuracy`
makes of `judged.jsonl` alone.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffalign.eval.base import Report, write_json
from diffalign.eval.judged_media import OVERALL, Judged, JudgedFile, MediaOf
from diffalign.eval.reward_accuracy import accuracy_report, calibrate
from diffalign.processes import ALONE, Processes
from diffalign.resumable import RowLog, claim_folder
from diffalign.reward_models.base import RewardModel
from diffalign.reward_models.score_files import read_lines
from diffalign.reward_models.scoring import score_index
from diffalign.reward_models.unified_reward import JudgedPairs

__all__ = ["BENCHMARKS", "evaluate_rewards", "find_file"]

BENCHMARKS = {
    "hpdv2": ("hpdv2_test", ("test.json",)),
    "imagerewarddb": ("imagerewarddb", ("test.json", "test_rankings_466.json")),
    "pickapic_v2": ("pickapic", ("test_unique.parquet", "test_unique.jsonl")),
    "videogen_rewardbench": ("videogen", ("videogen-rewardbench.csv",)),
}
"""Name -> format, and the names of its file in a folder."""
_NAMES = {"hpdv3": "hpdv3"} | {form: name for name, (form, _) in BENCHMARKS.items()}


def find_file(benchmark: str, data: str | Path | None = None) -> tuple[str, JudgedFile]:
    """The name under which results are told, and the comparisons.

    Args:
        benchmark: One of `BENCHMARKS`, or a file of any format of `judged_media`.
        data: File or folder of a named benchmark.

    Raises:
        ValueError: If there is no such file, or its format is another one.
    """
    if benchmark not in BENCHMARKS:
        if data is not None:
            raise ValueError(f"--data goes with a benchmark by name ({', '.join(BENCHMARKS)}), got {benchmark!r}")
        if not Path(benchmark).expanduser().exists():
            raise ValueError(f"unknown benchmark {benchmark!r}; expected {', '.join(BENCHMARKS)} or an existing file")
        file = JudgedFile(benchmark)
        return _NAMES.get(file.format, "pairs"), file
    form, names = BENCHMARKS[benchmark]
    if data is None:
        raise ValueError(
            f"benchmark {benchmark} needs its comparisons and media: pass --data, a folder with {names[0]}"
        )
    place = Path(data).expanduser()
    if place.is_dir():
        place = next((place / name for name in names if (place / name).is_file()), place)
    file = JudgedFile(place)
    if file.format != form:
        raise ValueError(f"{place} is of format {file.format!r}, benchmark {benchmark} of format {form!r}")
    return benchmark, file


def evaluate_rewards(
    models: Sequence[RewardModel],
    file: JudgedFile,
    output: str | Path,
    *,
    benchmark: str = "pairs",
    media_folder: str | Path | None = None,
    calibration: JudgedFile | None = None,
    calibration_media: str | Path | None = None,
    batch_size: int = 32,
    workers: int = 1,
    processes: Processes = ALONE,
) -> Report:
    """Scores what a file compares and reports how often models and people agree.

    Killed and started again it goes on; a model that is added costs only its own scores.

    Args:
        models: Reward models with different names.
        file: The comparisons.
        output: Folder for everything that is written.
        benchmark: Name of the report.
        media_folder: See `MediaOf`.
        calibration: Other comparisons, such as Pick-a-Pic's `validation_unique`, to choose on where ties begin.
        calibration_media: Their media.
        batch_size: Media, or pairs, scored at once.
        workers: Threads that read files.
        processes: Who shares the work.

    Raises:
        ValueError: If names repeat, a model scores groups only, or the folder holds results of other comparisons.
    """
    names = [model.info.name for model in models]
    if not models or len(set(names)) != len(names):
        raise ValueError(f"expected one or more reward models with different names, got {names}")
    grouped = [model.info.name for model in models if model.info.groupwise]
    if grouped:
        raise ValueError(f"{grouped[0]} scores whole groups; evaluate the models it is made of")
    output = Path(output)
    options: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "processes": processes}
    taus = {model.info.name: model.info.tau for model in models}
    prints = {model.info.name: model.fingerprint() for model in models}
    limits = None
    if calibration is not None:
        rows = _judge(models, calibration, output / "calibration", calibration_media, **options)
        limits = processes.on_first(lambda: calibrate(read_lines(rows), taus))
    judged = _judge(models, file, output, media_folder, **options)

    def conclude() -> Report:
        report = accuracy_report(
            read_lines(judged), benchmark=benchmark, taus=taus, fingerprints=prints, calibrations=limits
        )
        write_json(output / "report.json", report.to_dict())
        return report

    return processes.on_first(conclude)


def _judge(
    models: Sequence[RewardModel],
    file: JudgedFile,
    output: Path,
    media_folder: str | Path | None,
    *,
    batch_size: int,
    workers: int,
    processes: Processes,
) -> Path:
    """Writes `judged.jsonl`; its path."""
    media = MediaOf(file, media_folder)
    settings = {"format": file.format, "comparisons": media.comparisons, "digest": media.digest}
    processes.on_first(lambda: claim_folder(output, settings, ("scores.jsonl", "judged.jsonl")))
    singles = [model for model in models if not model.info.pairwise_native]
    scores = output / "scores.jsonl"
    if singles:
        score_index(media, singles, scores, batch_size, processes=processes, workers=workers)
    judges = {
        model.info.name: _compare(model, file, media, output, batch_size, processes)
        for model in models
        if model.info.pairwise_native
    }

    def join() -> Path:
        known = {row["id"]: row for row in read_lines(scores)} if singles else {}
        signs = {model.info.name: 1.0 if model.info.higher_is_better else -1.0 for model in singles}
        lines = (_line(item, known, signs, judges) for item in file.read(media=False))
        return _write_lines(output / "judged.jsonl", lines)

    return processes.on_first(join)


def _line(
    item: Judged,
    known: Mapping[str, Mapping[str, Any]],
    signs: Mapping[str, float],
    judges: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> dict[str, Any]:
    """One line of `judged.jsonl`."""
    labels = list(item.labels) or [OVERALL]
    found = {name: {label: _values(item, label, name, sign, known) for label in labels} for name, sign in signs.items()}
    scores = {name: {label: v for label, v in by_label.items() if v is not None} for name, by_label in found.items()}
    row = {
        "id": item.id,
        "prompt": item.prompt,
        "group": item.group,
        "labels": dict(item.labels),
        "ranks": item.ranks,
        "scores": scores,
    }
    results = {name: rows[item.id] for name, rows in judges.items() if rows[item.id]["p"] is not None}
    if judges:
        row["p"] = {name: {OVERALL: result["p"]} for name, result in results.items()}
        row["position_bias"] = {n: r["position_bias"] for n, r in results.items() if r["position_bias"] is not None}
    return row


def _values(
    item: Judged, label: str, name: str, sign: float, known: Mapping[str, Mapping[str, Any]]
) -> list[float | None] | None:
    """A model's scores of an item's media under a label; None if it has no such dimension."""
    rows = [known[key] for key in item.names]
    if label == OVERALL:
        values = [row["scores"][name] for row in rows]
    else:
        dims = [{key.casefold(): v for key, v in row.get("dims", {}).get(name, {}).items()} for row in rows]
        if not any(label.casefold() in by_name for by_name in dims):
            return None
        values = [by_name.get(label.casefold()) for by_name in dims]
    return [None if value is None else sign * value for value in values]


def _compare(
    model: RewardModel, file: JudgedFile, media: MediaOf, output: Path, batch_size: int, processes: Processes
) -> dict[str, Mapping[str, Any]]:
    """What a judge of pairs says of each comparison: "p" of the first, and "position_bias"; None where it failed."""
    name = model.info.name
    if any(item.ranks is not None for item in file.read(media=False)):
        raise ValueError(f"{name} judges pairs, and {file.path} holds rankings; make a file of pairs of them")
    ids = [item.id for item in file.read(media=False)]
    print_ = model.fingerprint()

    def is_current(row: Mapping[str, Any]) -> bool:
        return row.get("fingerprint") == print_ and row.get("p") is not None

    log = RowLog(
        output / f"pairs-{re.sub(r'[^A-Za-z0-9._-]', '-', name)}.jsonl", ids, batch_size, is_current, processes
    )
    wanted = {number: None for chunk in log.todo for number in chunk}
    with log.progress(f"judging by {name}", "pair") as bar:
        batch: list[Judged] = []
        for number, item in enumerate(file.read() if wanted else ()):
            batch += [item] if number in wanted else []
            if batch and (len(batch) == batch_size or number + 1 == len(ids)):
                log.append(_compared(model, batch, media.folder, print_))
                bar.update(len(batch))
                batch = []
    return {row["id"]: row for row in log.finish()}


def _compared(model: RewardModel, batch: Sequence[Judged], folder: Path, print_: str) -> list[dict[str, Any]]:
    sides = [[m if isinstance(m, bytes) else folder / str(m) for m in item.media] for item in batch]
    first, second = ([_opened(side[k]) for side in sides] for k in (0, 1))
    found = model.compare(first, second, [item.prompt for item in batch], batch_size=len(batch), on_invalid="nan")
    biases = found.position_bias if isinstance(found, JudgedPairs) else torch.full_like(found.p_a, torch.nan)
    rows = []
    for item, p, tie, bias in zip(batch, found.p_a.tolist(), found.tie.tolist(), biases.tolist(), strict=True):
        p = None if p != p else 0.5 if tie else p
        rows.append(
            {"id": item.id, "fingerprint": print_, "p": p, "position_bias": None if p is None or bias != bias else bias}
        )
    return rows


def _opened(medium: bytes | Path) -> Any:
    return medium if isinstance(medium, Path) else Image.open(io.BytesIO(medium))


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Writes JSON lines one by one, and the file in one step."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(_as_line(row) for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return path


def _as_line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
