"""Scores an index of pictures with several reward models, and goes on where it was when it is killed.

While it runs, each score is one line of a journal beside the output (`scores.jsonl.journal`, only ever appended to; of
several processes each has its own); at the end the output is written in one piece, in the order of the index, and the
journals are removed. A score is reused if id, prompt, content of the picture and fingerprint of the model are the same,
from a journal as well as from an earlier output, so that adding a model or pictures costs only what is new.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from tqdm import tqdm

from diffalign.processes import ALONE, Processes, own_files
from diffalign.resumable import write_atomically
from diffalign.reward_models.base import RewardModel

__all__ = ["ScoreSummary", "score_index"]


@dataclass(frozen=True)
class ScoreSummary:
    """What `score_index` did.

    Attributes:
        rows: Rows of the index.
        computed: Scores computed now.
        reused: Scores taken from an earlier run.
        means: Mean score of each model over its valid rows; NaN if there are none.
        failures: What went wrong, by row id and then model name, for rows without a score.
    """

    rows: int
    computed: int
    reused: int
    means: dict[str, float]
    failures: dict[str, dict[str, str]] = field(default_factory=dict)

    def __str__(self) -> str:
        """A few lines for people; at most ten failures are named."""
        lines = [f"{self.rows} rows: {self.computed} scores computed, {self.reused} reused"]
        lines += [f"  mean {name}: {mean:.4f}" for name, mean in self.means.items()]
        if self.failures:
            lines.append(f"  {len(self.failures)} rows without a score:")
            lines += [f"    {key}: {next(iter(errors.values()))}" for key, errors in list(self.failures.items())[:10]]
            lines += [f"    and {len(self.failures) - 10} more"] if len(self.failures) > 10 else []
        return "\n".join(lines)


class _Key(NamedTuple):
    id: str
    prompt: str
    sha256: str
    model: str
    fingerprint: str


@dataclass(frozen=True)
class _Row:
    id: str
    prompt: str
    image: str


def score_index(
    index: Path | str,
    models: Sequence[RewardModel],
    out: Path | str,
    batch_size: int = 32,
    *,
    progress: bool = True,
    processes: Processes = ALONE,
) -> ScoreSummary:
    """Scores every picture of an index with every model.

    Index: JSONL, rows {"id", "prompt", "image"}, the image's path relative to the index. Output: JSONL, rows {"id",
    "prompt", "image", "sha256", "scores": {model: value or null}, "errors": {model: reason}, "models": {model:
    fingerprint}}. A picture that cannot be read has null scores and a reason, never a zero, and is tried again by the
    next run. Killed at any moment and started again with the same arguments, it ends with the same output.

    Args:
        index: What to score.
        models: The reward models, with different names.
        out: Where the scores go; `out` with ".journal" appended holds the unfinished work.
        batch_size: Pictures per forward pass, >= 1.
        progress: Whether to show a bar with the time that is left.
        processes: Who shares the work, each calling this with the same arguments; the output is the same for any
            number of them, and a rerun may have another number.

    Raises:
        ValueError: If the index has a bad row (named by line), ids or model names are not unique, or there are none.
    """
    index, out = Path(index), Path(out)
    names = [model.info.name for model in models]
    if not models or len(set(names)) != len(names):
        raise ValueError(f"expected one or more models with different names, got {names}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    rows = _read_index(index)
    prints = {model.info.name: model.fingerprint() for model in models}
    out.parent.mkdir(parents=True, exist_ok=True)
    journal = out.with_name(out.name + ".journal")
    known = _finished(out)
    for path in (journal, *own_files(journal)):
        known |= _journalled(path)
    processes.wait()  # until all have read the journals that they now write to
    share = processes.share([rows[start : start + batch_size] for start in range(0, len(rows), batch_size)])
    work = _Work(models, prints, index.parent, known)
    with (
        tqdm(
            total=sum(len(chunk) for chunk in share) * len(models),
            desc=processes.label("score"),
            unit="image",
            disable=not (progress and processes.is_first),
        ) as bar,
        _appending(processes.own_file(journal)) as stream,
    ):
        for chunk in share:
            for lines in work.score(chunk):
                stream.write(lines)
                stream.flush()
                bar.update(len(chunk))
    parts = processes.gather((work.results, work.computed, work.reused))
    results = {row_id: result for part, _, _ in parts for row_id, result in part.items()}
    processes.on_first(lambda: _conclude(out, rows, results, prints, (journal, *own_files(journal))))
    errors = {row.id: results[row.id].errors for row in rows if results[row.id].errors}
    means = {name: _mean([results[row.id].scores[name] for row in rows]) for name in names}
    computed, reused = sum(part[1] for part in parts), sum(part[2] for part in parts)
    return ScoreSummary(len(rows), computed, reused, means, errors)


@dataclass
class _Result:
    """What is known of a row: content hash of its picture, and a score or an error by name of model."""

    sha256: str | None
    scores: dict[str, float | None] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


@dataclass
class _Work:
    """One process's part: the models, what is known already, and the results so far by row id."""

    models: Sequence[RewardModel]
    prints: dict[str, str]
    folder: Path
    known: dict[_Key, float]
    results: dict[str, _Result] = field(default_factory=dict)
    computed: int = 0
    reused: int = 0

    def score(self, chunk: Sequence[_Row]) -> Iterator[str]:
        """Scores a chunk with model after model; gives each one's new lines of the journal."""
        self.results |= {row.id: _Result(_hash(self.folder / row.image)) for row in chunk}
        for model in self.models:
            name = model.info.name
            keys = [_Key(r.id, r.prompt, self.results[r.id].sha256 or "", name, self.prints[name]) for r in chunk]
            hits = {key.id: self.known[key] for key in keys if key in self.known}
            fresh: dict[str, float | str] = {}
            if len(hits) < len(chunk):
                # The whole chunk again, also if half of it is known: the same batch gives the same digits.
                fresh = _score_chunk(model, chunk, self.folder)
            lines = []
            for key in keys:
                result, value = self.results[key.id], hits[key.id] if key.id in hits else fresh[key.id]
                result.scores[name] = None if isinstance(value, str) else value
                if isinstance(value, str):
                    result.errors[name] = value
                elif key.id in hits:
                    self.reused += 1
                else:
                    self.computed += 1
                    lines.append(json.dumps({**key._asdict(), "score": value}, ensure_ascii=False) + "\n")
            yield "".join(lines)


def _score_chunk(model: RewardModel, chunk: Sequence[_Row], folder: Path) -> dict[str, float | str]:
    """The score of each row by id, or the reason why there is none."""
    media = [folder / row.image for row in chunk]
    output = model.score(media, [row.prompt for row in chunk], batch_size=len(chunk), on_invalid="nan")
    results: dict[str, float | str] = {}
    for row, value, error in zip(chunk, output.score.tolist(), output.errors, strict=True):
        # Without the number in the batch, which means nothing to the reader of the file.
        results[row.id] = value if error is None else error.partition(": ")[2]
    return results


def _hash(path: Path) -> str | None:
    """SHA-256 of a file, or None if it cannot be read; the scorer then says why."""
    try:
        return sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _read_index(path: Path) -> list[_Row]:
    rows: dict[str, _Row] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            row = _Row(str(content["id"]), content["prompt"], content["image"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}, line {number}: expected {{"id", "prompt", "image"}}, got {line:.80} ({error!r})'
            ) from error
        if not isinstance(row.prompt, str) or not isinstance(row.image, str):
            raise ValueError(f"{path}, line {number}: prompt and image must be strings, got {line:.80}")
        if row.id in rows:
            raise ValueError(f"{path}, line {number}: id {row.id!r} appears twice")
        rows[row.id] = row
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return list(rows.values())


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file; a line that is torn or damaged is left out, and so computed again."""
    if not path.exists():
        return
    with path.open("rb") as stream:
        for line in stream:
            try:
                content = json.loads(line)
            except ValueError:
                continue
            if line.endswith(b"\n") and isinstance(content, dict):
                yield content


def _journalled(path: Path) -> dict[_Key, float]:
    """The scores of a journal."""
    known = {}
    for content in _lines(path):
        value = content.pop("score", None)
        if content.keys() == set(_Key._fields) and isinstance(value, float):
            known[_Key(**content)] = value
    return known


@contextmanager
def _appending(journal: Path) -> Iterator[TextIO]:
    """The journal, open for more lines; if a kill tore its last one, that is cut off first."""
    if journal.exists():
        with journal.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
    with journal.open("a", encoding="utf-8") as stream:
        yield stream


def _finished(path: Path) -> dict[_Key, float]:
    """The scores of an earlier output."""
    known = {}
    for content in _lines(path):
        for model, value in content.get("scores", {}).items():
            print_of = content.get("models", {}).get(model)
            if isinstance(value, float) and print_of and content.get("sha256"):
                known[_Key(content["id"], content["prompt"], content["sha256"], model, print_of)] = value
    return known


def _conclude(
    out: Path, rows: Sequence[_Row], results: dict[str, _Result], prints: dict[str, str], journals: Sequence[Path]
) -> None:
    """Writes the output and removes the journals."""
    lines = []
    for row in rows:
        result = results[row.id]
        content = {
            "id": row.id,
            "prompt": row.prompt,
            "image": row.image,
            "sha256": result.sha256,
            "scores": result.scores,
            "errors": result.errors,
            "models": prints,
        }
        lines.append(json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")
    write_atomically(out, "".join(lines).encode())
    for journal in journals:
        journal.unlink(missing_ok=True)


def _mean(values: Sequence[float | None]) -> float:
    valid = [v for v in values if v is not None]
    return math.fsum(valid) / len(valid) if valid else math.nan
