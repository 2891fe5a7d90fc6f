"""Media that people compared, as data sets of preferences store them, for benchmarks of reward models.

Formats are told apart by their columns; unlike training pairs, ties stay:

| format | columns of a row |
| --- | --- |
| `pickapic` | caption, jpg_0, jpg_1, label_0 (0, 0.5 or 1); perhaps has_label |
| `hpdv2_test` | prompt, image_path [n], rank [n], smaller is better |
| `imagerewarddb` | prompt, generations [n], ranking [n], smaller is better |
| `videogen` | prompt, path_A, path_B, and VQ, MQ, TA, Overall ("A", "B" or "same") |
| `hpdv2` | prompt, file_path [2], human_preference [2] |
| `hpdv3` | prompt, path1 (the preferred), path2 |
| `chosen_rejected` | prompt, chosen, rejected |
| `pairs` | prompt, media_a, media_b, and label ("a", "b" or "tie") or p_a (share that preferred a) |

Files are JSONL, JSON (a list), CSV or parquet, or a folder of parquet files. They are read from start to end as often
as they are needed, and only JSON is held.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffalign.reward_models.inputs import Row, ScoreInput

__all__ = ["OVERALL", "Judged", "JudgedFile", "MediaOf"]

OVERALL = "overall"
"""The label of pairs, and of rankings, that have one; it is told by a model's primary score."""
ASPECTS = ("VQ", "MQ", "TA")
_CHOICES = {"a": 1.0, "b": 0.0, "tie": 0.5, "same": 0.5}


@dataclass(frozen=True)
class Judged:
    """Media of one prompt, and what people said of them.

    Attributes:
        id: Unique in the file.
        prompt: What the media were made for.
        media: Names of files, or their bytes; None in each place where only labels were asked for and it holds bytes.
        names: A name for each medium, the same wherever it stands: equal prompts and files have equal names.
        labels: Label -> share that preferred the first of two media, 0.5 being a tie; empty for a ranking.
        ranks: Of all media, smaller is better; None for a pair.
        group: What results are also told by: the two models of a pair, or a category.
    """

    id: str
    prompt: str
    media: tuple[str | bytes | None, ...]
    names: tuple[str, ...]
    labels: Mapping[str, float]
    ranks: tuple[float, ...] | None = None
    group: str | None = None


class JudgedFile:
    """A file of comparisons.

    Args:
        path: The file, or a folder of parquet files.

    Attributes:
        format: One of those above.
        left_out: Rows without a label so far, in the last pass.

    Raises:
        ValueError: If there is no such file, or its columns are none of the above.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        shards = sorted(self.path.glob("*.parquet")) if self.path.is_dir() else [self.path]
        if not shards or not shards[0].is_file():
            raise ValueError(f"there is no {str(path)!r}; expected a JSONL, JSON, CSV or parquet file with comparisons")
        self._shards = shards
        self.left_out = 0
        first = next(_records(shards[0], media=True), {})
        found = next((name for name, (needed, _) in _FORMATS.items() if set(needed) <= first.keys()), None)
        if found is None:
            expected = "; ".join(f"{', '.join(needed)} ({name})" for name, (needed, _) in _FORMATS.items())
            raise ValueError(f"{self.path} has the columns {', '.join(first) or 'none'}; expected one of: {expected}")
        self.format = found

    def read(self, *, media: bool = True) -> Iterator[Judged]:
        """The comparisons in their order; rows without a label are left out and counted.

        Args:
            media: False leaves bytes of media on the disk.

        Raises:
            ValueError: If a row is malformed; the message names its number.
        """
        needed, read = _FORMATS[self.format]
        self.left_out = 0
        number = -1
        for shard in self._shards:
            for row in _records(shard, media):
                number += 1
                try:
                    found = read(row)
                except (KeyError, TypeError, ValueError) as error:
                    raise ValueError(
                        f"{self.path}, row {number}: not a row of format {self.format!r} ({error!s:.160}); expected "
                        f"{', '.join(needed)}"
                    ) from error
                if found is None:
                    self.left_out += 1
                    continue
                yield _judged(found, row, number)


class MediaOf(ScoreInput):
    """Every medium of a file of comparisons once, for `score_index`.

    Args:
        file: The comparisons.
        folder: What names of files are relative to; None is the file's own folder, or `test` in it if the format is
            HPDv2's and there is one.

    Raises:
        ValueError: If the file holds no comparison.
    """

    has_prompts = True

    def __init__(self, file: JudgedFile, folder: str | Path | None = None) -> None:
        self.name = str(file.path)
        self._file = file
        beside = file.path if file.path.is_dir() else file.path.parent
        if folder is None and file.format == "hpdv2_test" and (beside / "test").is_dir():
            beside /= "test"
        self.folder = beside if folder is None else Path(folder).expanduser()
        if not self.folder.is_dir():
            raise ValueError(f"there is no folder {str(self.folder)!r}; expected the one with the media")
        digest = hashlib.blake2b(digest_size=16)
        seen: set[str] = set()
        self.comparisons = 0
        for item in file.read(media=False):
            self.comparisons += 1
            seen.update(item.names)
            digest.update(repr((item.id, item.names, sorted(item.labels.items()), item.ranks)).encode())
        self.count = len(seen)
        self.digest = digest.hexdigest()
        if not self.count:
            raise ValueError(f"{self.name} holds no comparison with a label")

    def __iter__(self) -> Iterator[Row]:
        seen: set[str] = set()
        for item in self._file.read():
            for medium, name in zip(item.media, item.names, strict=True):
                if name in seen:
                    continue
                seen.add(name)
                place = medium if isinstance(medium, str) else ""
                data = medium if isinstance(medium, bytes) else self.folder / place if place else None
                error = None if data is not None else f"comparison {item.id} has nothing in the place of this medium"
                yield Row(name, item.prompt, place, data, error)


@dataclass(frozen=True)
class _Found:
    prompt: str
    media: tuple[Any, ...]
    labels: Mapping[str, float]
    ranks: tuple[float, ...] | None = None
    models: tuple[Any, Any] | None = None


def _judged(found: _Found, row: Mapping[str, Any], number: int) -> Judged:
    key = row.get("id")
    key = str(number) if key is None or key == "" else f"{key}#{number}"
    media = tuple(m["bytes"] or m["path"] if isinstance(m, Mapping) else m for m in found.media)
    names = tuple(
        hashlib.blake2b(json.dumps([found.prompt, m]).encode(), digest_size=16).hexdigest()
        if isinstance(m, str) else f"{number}/{k}"
        for k, m in enumerate(media)
    )  # fmt: skip
    group = row.get("category")
    if group is None and found.models is not None and all(found.models):
        group = " : ".join(sorted(map(str, found.models)))
    return Judged(key, found.prompt, media, names, found.labels, found.ranks, None if group is None else str(group))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"the prompt is {value!r:.60}")
    return value


def _pickapic(row: Mapping[str, Any]) -> _Found | None:
    label = row["label_0"]
    if row.get("has_label") is False or label is None or (isinstance(label, float) and math.isnan(label)):
        return None
    if label not in (0, 0.5, 1):
        raise ValueError(f"label_0 is {label!r}, expected 0, 0.5 or 1")
    media = (row.get("jpg_0"), row.get("jpg_1"))
    return _Found(
        _text(row["caption"]), media, {OVERALL: float(label)}, models=(row.get("model_0"), row.get("model_1"))
    )


def _ranking(files: str, ranks: str) -> Callable[[Mapping[str, Any]], _Found | None]:
    def read(row: Mapping[str, Any]) -> _Found | None:
        media, places = tuple(row[files]), tuple(float(rank) for rank in row[ranks])
        if len(media) != len(places) or not all(map(math.isfinite, places)):
            raise ValueError(f"{len(media)} {files} and the {ranks} {places}")
        return _Found(_text(row["prompt"]), media, {}, places) if len(media) > 1 else None

    return read


def _videogen(row: Mapping[str, Any]) -> _Found | None:
    labels = {}
    for column in (*ASPECTS, "Overall"):
        if row.get(column):
            labels[OVERALL if column == "Overall" else column] = _CHOICES[row[column].strip().casefold()]
    media, models = (row["path_A"], row["path_B"]), (row.get("A_model"), row.get("B_model"))
    return _Found(_text(row["prompt"]), media, labels, models=models) if labels else None


def _hpdv2(row: Mapping[str, Any]) -> _Found | None:
    (first, second), (one, other) = row["file_path"], row["human_preference"]
    if min(one, other) < 0 or one + other <= 0:
        raise ValueError(f"human_preference is {[one, other]}")
    return _Found(_text(row["prompt"]), (first, second), {OVERALL: one / (one + other)})


def _preferred(first: str, second: str) -> Callable[[Mapping[str, Any]], _Found | None]:
    def read(row: Mapping[str, Any]) -> _Found | None:
        models = (row.get("model1"), row.get("model2"))
        return _Found(_text(row["prompt"]), (row.get(first), row.get(second)), {OVERALL: 1.0}, models=models)

    return read


def _pairs(row: Mapping[str, Any]) -> _Found | None:
    share, label = row.get("p_a"), row.get("label")
    if share is None or share == "":
        if label is None or label == "":
            return None
        share = _CHOICES.get(str(label).casefold(), math.nan)
    if not 0 <= float(share) <= 1:
        raise ValueError(f"label {label!r} and p_a {row.get('p_a')!r}; expected a, b or tie, or a share in [0, 1]")
    models = (row.get("model_a"), row.get("model_b"))
    return _Found(
        _text(row["prompt"]), (row.get("media_a"), row.get("media_b")), {OVERALL: float(share)}, models=models
    )


_FORMATS: dict[str, tuple[Sequence[str], Callable[[Mapping[str, Any]], _Found | None]]] = {
    "pickapic": (("caption", "jpg_0", "jpg_1", "label_0"), _pickapic),
    "hpdv2_test": (("prompt", "image_path", "rank"), _ranking("image_path", "rank")),
    "imagerewarddb": (("prompt", "generations", "ranking"), _ranking("generations", "ranking")),
    "videogen": (("prompt", "path_A", "path_B"), _videogen),
    "hpdv2": (("prompt", "file_path", "human_preference"), _hpdv2),
    "hpdv3": (("prompt", "path1", "path2"), _preferred("path1", "path2")),
    "chosen_rejected": (("prompt", "chosen", "rejected"), _preferred("chosen", "rejected")),
    "pairs": (("prompt", "media_a", "media_b"), _pairs),
}


def _records(path: Path, media: bool) -> Iterator[dict[str, Any]]:
    """The rows of a file; of parquet without the columns of bytes, unless `media` is asked for."""
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            file = pq.ParquetFile(path)
            bytes_too = [f.name for f in file.schema_arrow if media or not _holds_bytes(f.type)]
            for batch in file.iter_batches(batch_size=64, columns=bytes_too):
                yield from batch.to_pylist()
        elif kind == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as stream:
                yield from csv.DictReader(stream)
        elif kind == ".json":
            listed = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(listed, list) or not all(isinstance(row, dict) for row in listed):
                raise ValueError("it holds no list of objects")
            yield from listed
        elif kind == ".jsonl":
            with path.open(encoding="utf-8") as stream:
                for number, line in enumerate(stream, start=1):
                    yield from [_object(line, number)] if line.strip() else []
        else:
            raise ValueError("expected .jsonl, .json, .csv or .parquet")
    except (pa.ArrowException, OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def _holds_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _object(line: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} is no JSON ({error}), perhaps torn: repair or remove it") from error
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is no JSON object")
    return row
