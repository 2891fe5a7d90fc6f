"""Scores media with several reward models, and goes on where it was when it is killed.

While it runs, each score is one line of a journal beside the output (`scores.jsonl.journal`, only ever appended to; of
several processes each has its own), and the rows done so far are in a second file (`scores.jsonl.part`). At the end the
output is written in one piece, in the order of the input, and both are removed. A score is reused if id, prompt,
content of the file and fingerprint of the model are the same, from a journal as well as from an earlier output, so that
adding a model or pictures costs only what is new.

Nothing is held for longer than it takes to score a batch but a few bytes per row for the statistics; what earlier runs
found waits in a database file of its own, which has no name and vanishes with the process.
"""

from __future__ import annotations

import io
import itertools
import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, TextIO

from PIL import Image
from tqdm import tqdm

from diffalign.helper_threads import helper_threads
from diffalign.processes import ALONE, Processes, own_files
from diffalign.reward_models.base import RewardInfo, RewardModel
from diffalign.reward_models.inputs import Row, ScoreInput, open_input
from diffalign.reward_models.media import Media
from diffalign.reward_models.score_files import ScoreRow, check_suffix, columns_of, read_lines, write_rows
from diffalign.reward_models.score_journal import Key, Known, Value, appending, open_known
from diffalign.reward_models.scoring_report import Columns, ColumnSummary, render_table

__all__ = ["ScoreSummary", "check_models", "score_index"]

NAMED_FAILURES = 100
"""Rows without a score that a summary names; all of them are in the output."""


@dataclass(frozen=True)
class ScoreSummary:
    """What `score_index` did.

    Attributes:
        rows: Rows of the input.
        computed: Scores computed now.
        reused: Scores taken from an earlier run.
        means: Mean score of each model over its valid rows; NaN if there are none.
        failures: What went wrong, by row id and then model name, for the first `NAMED_FAILURES` rows without a score.
        failed: How many rows lack a score.
        columns: Statistics of every column of numbers.
        seconds: What reading and scoring took, without loading the models.
    """

    rows: int
    computed: int
    reused: int
    means: dict[str, float]
    failures: dict[str, dict[str, str]] = field(default_factory=dict)
    failed: int = 0
    columns: tuple[ColumnSummary, ...] = ()
    seconds: float = 0.0

    def __str__(self) -> str:
        """A table and a few lines for people; at most ten failures are named."""
        first = f"{self.rows} rows: {self.computed} scores computed, {self.reused} reused"
        if self.computed and self.seconds:
            share = self.computed / (self.computed + self.reused)  # what was there already took no time
            first += f", {share * self.rows / self.seconds:.1f} images per second"
        lines = [first, render_table(self.columns)]
        if self.failed:
            lines.append(f"  {self.failed} row{'s' * (self.failed > 1)} without a score:")
            lines += [f"    {key}: {next(iter(errors.values()))}" for key, errors in list(self.failures.items())[:10]]
            lines += [f"    and {self.failed - 10} more"] if self.failed > 10 else []
        return "\n".join(lines)


def check_models(source: ScoreInput, infos: Iterable[RewardInfo]) -> None:
    """Whether reward models can score a source row by row.

    Raises:
        ValueError: If one scores whole groups or pairs only, or needs prompts and the source has none at all.
    """
    infos = list(infos)
    for info in infos:
        if info.groupwise or info.pairwise_native:
            what = "the media of one prompt against each other" if info.groupwise else "pairs"
            raise ValueError(
                f"{info.name} scores {what}, not media one by one, as rows are scored here; score what it is made of "
                "and combine the columns with diffalign.reward_models.preferences, or call it from Python"
            )
    names = [info.name for info in infos if info.needs_prompt]
    if names and not source.has_prompts:
        raise ValueError(
            f"{source.name} holds no prompts, and {', '.join(names)} cannot score without; put the prompt of a.png "
            "into a.txt beside it, or list the media in metadata.jsonl with the fields file_name and prompt"
        )


def score_index(
    index: Path | str | ScoreInput,
    models: Sequence[RewardModel],
    out: Path | str,
    batch_size: int = 32,
    *,
    progress: bool = True,
    processes: Processes = ALONE,
    workers: int = 1,
) -> ScoreSummary:
    """Scores everything an index or folder names with every model.

    Input: see `inputs.open_input`. Output: JSONL or parquet by the ending of `out`, see `score_files`. A row that
    cannot be scored has no score and a reason, never a zero, and is tried again by the next run. Killed at any moment
    and started again with the same arguments, it ends with the same output.

    Args:
        index: What to score.
        models: The reward models, with different names.
        out: Where the scores go; `out` with ".journal" appended holds the unfinished work.
        batch_size: Media per forward pass, >= 1.
        progress: Whether to show a bar with the time that is left.
        processes: Who shares the work, each calling this with the same arguments; the output is the same for any
            number of them, and a rerun may have another number.
        workers: Threads that read files ahead while a model computes, >= 1.

    Raises:
        ValueError: If the input has a bad row (named by line) or no prompts where a model needs them, ids or model
            names are not unique, or the output ends otherwise.
    """
    out = Path(out)
    names = [model.info.name for model in models]
    if not models or len(set(names)) != len(names):
        raise ValueError(f"expected one or more models with different names, got {names}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    check_suffix(out)
    source = index if isinstance(index, ScoreInput) else open_input(index)
    source.check_output(out)
    check_models(source, [model.info for model in models])
    prints = {model.info.name: model.fingerprint() for model in models}
    out.parent.mkdir(parents=True, exist_ok=True)
    journal, part = (out.with_name(out.name + ending) for ending in (".journal", ".part"))
    with ExitStack() as open_files:
        known = open_files.enter_context(open_known(out, journal))
        processes.wait()  # until all have read the journals that they now write to
        bar = open_files.enter_context(
            tqdm(
                total=_share_of(source.count, batch_size, processes),
                desc=processes.label("score"),
                unit="image",
                disable=not (progress and processes.is_first),
            )
        )
        lines = open_files.enter_context(appending(processes.own_file(journal)))
        rows = open_files.enter_context(processes.own_file(part).open("w", encoding="utf-8"))
        work, started = _Work(models, prints, known, lines), time.perf_counter()
        for chunk in _read_ahead(source, batch_size, processes, workers):
            for row in work.score(chunk, bar):
                rows.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    parts = processes.gather((work.computed, work.reused, work.extras))
    seconds = time.perf_counter() - started  # until the slowest process was done
    dims = {model.info.name: model.info.dims if len(model.info.dims) > 1 else () for model in models}
    extras = {name for _, _, found in parts for name in found}

    def conclude() -> tuple[tuple[ColumnSummary, ...], dict[str, dict[str, str]], int]:
        columns, failed = Columns(), 0
        failures: dict[str, dict[str, str]] = {}
        for row in _merged(part, processes, source.count, batch_size):
            columns.add(columns_of(row))
            failed += bool(row["errors"])
            if row["errors"] and len(failures) < NAMED_FAILURES:
                failures[row["id"]] = row["errors"]
        write_rows(out, _merged(part, processes, source.count, batch_size), dims, extras)
        for path in (journal, part):
            for file in (path, *own_files(path)):
                file.unlink(missing_ok=True)
        return columns.summaries(), failures, failed

    columns, failures, failed = processes.on_first(conclude)
    means = {column.name: column.mean for column in columns if column.name in names}
    computed, reused = sum(count for count, _, _ in parts), sum(count for _, count, _ in parts)
    return ScoreSummary(source.count, computed, reused, means, failures, failed, columns, seconds)


@dataclass(frozen=True)
class _Item:
    """A row whose file has been looked at: content hash, or None if there is nothing to read."""

    row: Row
    sha256: str | None


@dataclass
class _Work:
    """One process's part: the models, what is known already, and where new scores are noted."""

    models: Sequence[RewardModel]
    prints: dict[str, str]
    known: Known
    journal: TextIO
    computed: int = 0
    reused: int = 0
    extras: set[str] = field(default_factory=set)

    def score(self, chunk: Sequence[_Item], bar: Any) -> Iterator[ScoreRow]:
        """Scores a chunk with model after model, noting each one's new scores; gives the chunk's rows."""
        results: list[dict[str, Value | str]] = [{} for _ in chunk]
        for model in self.models:
            for result, value in zip(results, self._by_model(model, chunk), strict=True):
                result[model.info.name] = value
        bar.update(len(chunk))
        for item, result in zip(chunk, results, strict=True):
            values = {name: value for name, value in result.items() if isinstance(value, dict)}
            errors = {name: value for name, value in result.items() if isinstance(value, str)}
            row: dict[str, Any] = {"id": item.row.id, "prompt": item.row.prompt, "image": item.row.image}
            row |= {"sha256": item.sha256, "valid": not errors}
            row |= {"scores": {name: values.get(name, {}).get("score") for name in result}, "errors": errors}
            row["models"] = self.prints
            for extra in ("dims", "uncertainty", "raw"):
                found = {name: value[extra] for name, value in values.items() if extra in value}
                row |= {extra: found} if found else {}
                self.extras |= {f"{name}/{extra}" for name in found}
            yield row

    def _by_model(self, model: RewardModel, chunk: Sequence[_Item]) -> list[Value | str]:
        """One model's value of each item, or the reason why it has none."""
        name = model.info.name
        keys = [Key(i.row.id, i.row.prompt or "", i.sha256 or "", name, self.prints[name]) for i in chunk]
        hits = [self.known.get(key) for key in keys]
        # The whole chunk again, also if half of it is known: the same batch gives the same digits.
        fresh = _score_chunk(model, chunk) if None in hits else []
        lines, values = [], []
        for i, (key, hit) in enumerate(zip(keys, hits, strict=True)):
            value = fresh[i] if hit is None else hit
            values.append(value)
            if hit is not None:
                self.reused += 1
            elif isinstance(value, dict):
                self.computed += 1
                lines.append(json.dumps({**key._asdict(), **value}, ensure_ascii=False) + "\n")
        self.journal.write("".join(lines))
        self.journal.flush()
        return values


def _score_chunk(model: RewardModel, chunk: Sequence[_Item]) -> list[Value | str]:
    """What the model says of each item, or the reason why there is none."""
    results: list[Value | str | None] = [_refusal(model, item.row) for item in chunk]
    with ExitStack() as open_files:
        media: list[Media] = []
        for i, item in enumerate(chunk):
            if results[i] is None:
                try:
                    media.append(_open(item.row, open_files))
                except (OSError, Image.DecompressionBombError) as error:
                    results[i] = f"{item.row.id}: cannot be read as a picture ({error})"
        good = [i for i, result in enumerate(results) if result is None]
        if good:
            prompts = [chunk[i].row.prompt or "" for i in good]
            output = model.score(media, prompts, batch_size=len(good), on_invalid="nan")
            for position, i in enumerate(good):
                reason = output.errors[position]
                # Without the number in the batch, which means nothing to the reader of the file.
                results[i] = _value(model, output, position) if reason is None else reason.partition(": ")[2]
    return [result for result in results if result is not None]


def _refusal(model: RewardModel, row: Row) -> str | None:
    """Why the model need not look at the row; None if it should."""
    kind = "video" if row.is_video else "image"
    if row.error is not None:
        return row.error
    if row.prompt is None and model.info.needs_prompt:
        return f"there is no prompt for it, and {model.info.name} cannot score without"
    if kind not in model.info.kind:
        scored = " and ".join(f"{name}s" for name in sorted(model.info.kind))
        return f"{row.image or row.id}: {model.info.name} scores {scored}, not {kind}s"
    return None


def _open(row: Row, open_files: ExitStack) -> Media:
    """What a model takes: the path, or what lies in memory as a picture, not yet decoded, or as a file."""
    if isinstance(row.media, bytes) and row.is_video:
        path = Path(open_files.enter_context(tempfile.TemporaryDirectory())) / Path(row.image).name
        path.write_bytes(row.media)
        return path
    if isinstance(row.media, bytes):
        return Image.open(io.BytesIO(row.media))
    assert row.media is not None, "a row without media has an error"
    return row.media


def _value(model: RewardModel, output: Any, i: int) -> Value:
    value: Value = {"score": float(output.score[i])}
    if len(model.info.dims) > 1:
        numbers = {name: float(values[i]) for name, values in output.dims.items()}
        value["dims"] = {name: number if abs(number) < float("inf") else None for name, number in numbers.items()}
    if output.uncertainty is not None and bool(output.uncertainty[i].isfinite()):
        value["uncertainty"] = float(output.uncertainty[i])
    if output.raw is not None:
        value["raw"] = output.raw[i]
    return value


def _read_ahead(source: ScoreInput, batch_size: int, processes: Processes, workers: int) -> Iterator[list[_Item]]:
    """This process's chunks of rows; the files of the next one are read and hashed while a model computes."""
    rows = iter(source)
    chunks = iter(lambda: list(itertools.islice(rows, batch_size)), [])
    own = (chunk for number, chunk in enumerate(chunks) if number % processes.count == processes.rank)
    with helper_threads(max(workers, 1), "media") as pool:
        waiting: tuple[list[Row], list[Future[str | None]]] | None = None
        for chunk in own:
            following = (chunk, [pool.submit(_hash, row.media) for row in chunk])
            if waiting is not None:
                yield _looked_at(*waiting)
            waiting = following
        if waiting is not None:
            yield _looked_at(*waiting)


def _looked_at(rows: Sequence[Row], hashes: Sequence[Future[str | None]]) -> list[_Item]:
    return [_Item(row, found.result()) for row, found in zip(rows, hashes, strict=True)]


def _hash(media: Path | bytes | None) -> str | None:
    """SHA-256 of a file, or None if it cannot be read; the scorer then says why."""
    if not isinstance(media, Path):
        return None if media is None else sha256(media).hexdigest()
    try:
        with media.open("rb") as file:
            return file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _share_of(count: int, batch_size: int, processes: Processes) -> int:
    """Rows in the chunks of this process."""
    starts = range(processes.rank * batch_size, count, processes.count * batch_size)
    return sum(min(batch_size, count - start) for start in starts)


def _merged(part: Path, processes: Processes, count: int, batch_size: int) -> Iterator[ScoreRow]:
    """The rows of all processes in the order of the input, which dealt its chunks to them in turn."""
    owners = [Processes(rank, processes.count) for rank in range(processes.count)]
    parts = [read_lines(owner.own_file(part)) for owner in owners]
    for number, start in enumerate(range(0, count, batch_size)):
        size = min(batch_size, count - start)
        rows = list(itertools.islice(parts[number % processes.count], size))
        if len(rows) != size:
            raise ValueError(
                f"rows from {start} on cannot be seen beside {part}; several machines need an output folder that all "
                "of them share"
            )
        yield from rows
