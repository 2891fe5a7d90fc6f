"""Scores an index of pictures with several reward models, and goes on where it was when it is killed.

While it runs, each score is one line of a journal beside the output (`scores.jsonl.journal`, only ever appended to);
at the end the output is written in one piece, in the order of the index, and the journal is removed. A score is reused
if id, prompt, content of the picture and fingerprint of the model are the same, from the journal as well as from an
earlier output, so that adding a model or pictures costs only what is new.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

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
    known = {**_finished(out), **_journalled(journal)}
    hashes: dict[str, str | None] = {}
    errors: dict[str, dict[str, str]] = {}
    scores: dict[str, dict[str, float | None]] = {row.id: {} for row in rows}
    computed = reused = 0
    bar = tqdm(total=len(rows) * len(models), desc="score", unit="image", disable=not progress)
    with bar, journal.open("a", encoding="utf-8") as stream:
        for start in range(0, len(rows), batch_size):
            chunk = rows[start : start + batch_size]
            hashes |= {row.id: _hash(index.parent / row.image) for row in chunk}
            for model in models:
                keys = [_key(row, hashes[row.id], model.info.name, prints) for row in chunk]
                hits = {row.id: known[key] for row, key in zip(chunk, keys, strict=True) if key in known}
                fresh: dict[str, float | str] = {}
                if len(hits) < len(chunk):
                    # The whole chunk again, also if half of it is known: the same batch gives the same digits.
                    fresh = _score_chunk(model, chunk, index.parent)
                lines = []
                for row, key in zip(chunk, keys, strict=True):
                    value = hits[row.id] if row.id in hits else fresh[row.id]
                    scores[row.id][model.info.name] = None if isinstance(value, str) else value
                    if isinstance(value, str):
                        errors.setdefault(row.id, {})[model.info.name] = value
                    elif row.id in hits:
                        reused += 1
                    else:
                        computed += 1
                        lines.append(json.dumps({**key._asdict(), "score": value}, ensure_ascii=False) + "\n")
                stream.write("".join(lines))
                stream.flush()
                bar.update(len(chunk))
    _write(out, rows, hashes, scores, errors, prints)
    journal.unlink()
    means = {name: _mean([scores[row.id][name] for row in rows]) for name in names}
    return ScoreSummary(len(rows), computed, reused, means, errors)


def _score_chunk(model: RewardModel, chunk: Sequence[_Row], folder: Path) -> dict[str, float | str]:
    """The score of each row by id, or the reason why there is none."""
    media = [folder / row.image for row in chunk]
    output = model.score(media, [row.prompt for row in chunk], batch_size=len(chunk), on_invalid="nan")
    results: dict[str, float | str] = {}
    for row, value, error in zip(chunk, output.score.tolist(), output.errors, strict=True):
        # Without the number in the batch, which means nothing to the reader of the file.
        results[row.id] = value if error is None else error.partition(": ")[2]
    return results


def _key(row: _Row, content: str | None, model: str, prints: dict[str, str]) -> _Key:
    return _Key(row.id, row.prompt, content or "", model, prints[model])


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
    """The scores of a journal; its torn end, if it was killed while writing, is cut off for the next line."""
    known = {}
    for content in _lines(path):
        value = content.pop("score", None)
        if content.keys() == set(_Key._fields) and isinstance(value, float):
            known[_Key(**content)] = value
    if path.exists():
        with path.open("rb+") as stream:
            stream.truncate(stream.read().rfind(b"\n") + 1)
    return known


def _finished(path: Path) -> dict[_Key, float]:
    """The scores of an earlier output."""
    known = {}
    for content in _lines(path):
        for model, value in content.get("scores", {}).items():
            print_of = content.get("models", {}).get(model)
            if isinstance(value, float) and print_of and content.get("sha256"):
                known[_Key(content["id"], content["prompt"], content["sha256"], model, print_of)] = value
    return known


def _write(
    out: Path,
    rows: Sequence[_Row],
    hashes: dict[str, str | None],
    scores: dict[str, dict[str, float | None]],
    errors: dict[str, dict[str, str]],
    prints: dict[str, str],
) -> None:
    partial = out.with_name(out.name + ".partial")
    with partial.open("w", encoding="utf-8") as stream:
        for row in rows:
            content = {
                "id": row.id,
                "prompt": row.prompt,
                "image": row.image,
                "sha256": hashes[row.id],
                "scores": scores[row.id],
                "errors": errors.get(row.id, {}),
                "models": prints,
            }
            stream.write(json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, out)


def _mean(values: Sequence[float | None]) -> float:
    valid = [v for v in values if v is not None]
    return math.fsum(valid) / len(valid) if valid else math.nan
