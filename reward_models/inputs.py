"""What `diffalign score` reads: a folder of media, a JSONL or a parquet file, as one stream of rows.

A source is read twice from its start to its end and never held: once to count and check it, once to score it. So a
million rows need the memory of a few (and 8 bytes each while ids are compared; a folder also the names in it).
"""

from __future__ import annotations

import csv
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["HISTOGRAMS", "Row", "ScoreInput", "open_input"]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif"})
VIDEO_SUFFIXES = frozenset({".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v"})
MEDIA_FIELDS = ("image", "video", "file_name", "path")
PROMPT_FIELDS = ("prompt", "text", "caption")
METADATA = ("index.jsonl", "metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Files that list a folder's media, the first one found: what `diffalign sample` writes, and what the imagefolder
of `datasets` reads."""
HISTOGRAMS = ".histograms.png"
"""What the name of the picture ends with that `diffalign score` draws beside its output."""
LONGEST_SIDECAR = 1_000_000
"""Bytes of a .txt beside a picture; a longer one is no prompt."""


@dataclass(frozen=True, slots=True)
class Row:
    """One medium to score.

    Attributes:
        id: Its name in the output, unique within a source.
        prompt: None where the source has none for it.
        image: What the output shows as its place: the path as the source has it, "" for bytes without a name.
        media: Where it is, or the bytes of its file; None where the source names nothing.
        error: Why it cannot be scored, if the source already shows that.
    """

    id: str
    prompt: str | None
    image: str
    media: Path | bytes | None
    error: str | None = None

    @property
    def is_video(self) -> bool:
        """Whether it is a video, by the ending of its name."""
        return Path(self.image).suffix.lower() in VIDEO_SUFFIXES


class ScoreInput(ABC):
    """Rows in a fixed order, as often as they are asked for.

    Attributes:
        name: Where they come from, for messages.
        count: How many there are.
        has_prompts: Whether any row has a prompt.
    """

    name: str
    count: int
    has_prompts: bool

    @abstractmethod
    def __iter__(self) -> Iterator[Row]:
        """The rows, read anew."""

    def check_output(self, out: Path) -> None:
        """Raises ValueError if an output of that name would take the place of the input, or join it."""
        place = Path(self.name)
        joins = (
            isinstance(self, _Parquet) and out.suffix.lower() == ".parquet" and out.resolve().parent == place.resolve()
        )
        if out.resolve() == place.resolve() or joins:
            raise ValueError(f"the output {str(out)!r} would be part of the input {self.name!r}; put it elsewhere")


def open_input(
    source: Path | str, *, image_column: str | None = None, prompt_column: str | None = None
) -> ScoreInput:  # fmt: skip
    """The rows of a folder or file, checked: readable, not empty, no id twice.

    - A folder with one of `METADATA`: the media that this file lists. A folder with parquet files alone: their rows.
    - Any other folder: every picture and video in it and below, sorted by name; the prompt of `a.png` is in `a.txt`.
      The id is the path within the folder.
    - `*.jsonl`: objects with `image` (or another of `MEDIA_FIELDS`; a path, relative to the file), `prompt` (or
      another of `PROMPT_FIELDS`) and `id` (else the path is the id).
    - `*.parquet`: likewise, one column each. The column of media holds paths, the bytes of files, or both as
      `datasets` stores an image: {"bytes", "path"}. Without a column `id`, the number of the row is the id.

    Args:
        source: The folder or file.
        image_column: Field or column of the media; None is the first of `MEDIA_FIELDS` that is there.
        prompt_column: Likewise of the prompts.

    Raises:
        ValueError: If there is nothing to read, or a row is not as described; the message names it.
    """
    path = Path(source).expanduser()
    columns = ((image_column,) if image_column else MEDIA_FIELDS, (prompt_column,) if prompt_column else PROMPT_FIELDS)
    if path.is_dir():
        listed = next((path / name for name in METADATA if (path / name).is_file()), None)
        shards = sorted(path.glob("*.parquet"))
        if listed is not None:
            path, shards = listed, [listed]
        elif not shards or any(names for _, names, _ in _walk(path)):
            return _Folder(path)
    else:
        shards = [path]
    if not path.exists():
        raise ValueError(
            f"index {str(source)!r} does not exist; expected a folder of media, a JSONL file with the fields id, "
            "prompt, image, or a parquet file"
        )
    if shards[0].suffix.lower() == ".parquet":
        return _Parquet(path, shards, *columns)
    if path.suffix.lower() == ".csv":
        return _Table(path, _csv_records, *columns)
    return _Table(path, _json_records, *columns)


class _Folder(ScoreInput):
    """Media with their prompts in text files beside them."""

    def __init__(self, folder: Path):
        self.name = str(folder)
        self.folder = folder
        self.count = 0
        self.has_prompts = False
        for _, names, texts in _walk(self.folder):
            self.count += len(names)
            self.has_prompts = self.has_prompts or any(Path(name).with_suffix(".txt").name in texts for name in names)
        if not self.count:
            kinds = ", ".join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))
            raise ValueError(f"folder {self.name!r} holds no media to score; expected files like {kinds}")

    def __iter__(self) -> Iterator[Row]:
        for folder, names, texts in _walk(self.folder):
            for name in names:
                path = folder / name
                place = path.relative_to(self.folder).as_posix()
                sidecar = path.with_suffix(".txt")
                prompt, error = _read_sidecar(sidecar) if sidecar.name in texts else (None, None)
                yield Row(place, prompt, place, path, error)


def _walk(top: Path) -> Iterator[tuple[Path, list[str], set[str]]]:
    """Every folder with its media, sorted, and its text files; hidden ones and our own pictures left out."""
    for folder, below, names in os.walk(top):
        below[:] = sorted(name for name in below if not name.startswith("."))
        shown = sorted(name for name in names if not name.startswith(".") and not name.endswith(HISTOGRAMS))
        media = [name for name in shown if Path(name).suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES]
        yield Path(folder), media, {name for name in shown if name.endswith(".txt")}


def _read_sidecar(path: Path) -> tuple[str | None, str | None]:
    """The prompt, or why there is none."""
    try:
        content = path.read_bytes() if path.stat().st_size <= LONGEST_SIDECAR else None
        if content is None:
            return None, f"{path.name} is larger than a prompt, {path.stat().st_size} bytes"
        text = content.decode("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        return None, f"{path.name} cannot be read as UTF-8 text ({error})"
    return (text, None) if text else (None, f"{path.name} is empty")


class _Table(ScoreInput):
    """A text file with one record per medium."""

    def __init__(
        self,
        path: Path,
        records: Callable[[Path], Iterator[tuple[int, Mapping[str, Any]]]],
        media_fields: Sequence[str],
        prompt_fields: Sequence[str],
    ):
        self.name = str(path)
        self.path, self.records = path, records
        self.media_fields, self.prompt_fields = media_fields, prompt_fields
        self.count = 0
        self.has_prompts = False
        for row in self:
            self.count += 1
            self.has_prompts = self.has_prompts or row.prompt is not None
        if not self.count:
            raise ValueError(f"{path} holds no rows")
        twice = _first_repeated(lambda: (row.id for row in self))
        if twice is not None:
            lines = (number for number, _ in self.records(self.path))
            number = next(line for position, line in enumerate(lines) if position == twice[0])
            raise ValueError(f"{path}, line {number}: id {twice[1]!r} appears twice")

    def __iter__(self) -> Iterator[Row]:
        for number, record in self.records(self.path):
            try:
                media = record[_present(record, self.media_fields)]
                prompt = record.get(_present(record, self.prompt_fields), None)
            except KeyError as error:
                raise ValueError(
                    f'{self.path}, line {number}: expected {{"id", "prompt", "image"}}, got {record!s:.80} ({error!r})'
                ) from error
            missing = not any(name in record for name in self.prompt_fields)
            if not isinstance(media, str) or not (missing or isinstance(prompt, str)):
                raise ValueError(
                    f"{self.path}, line {number}: prompt and image must be strings, got {dict(record)!s:.80}"
                )
            name = record.get("id")
            yield Row(media if name is None else str(name), prompt, media, self.path.parent / media)


def _present(record: Mapping[str, Any], names: Sequence[str]) -> str:
    """The first of the names that the record has, else the first."""
    return next((name for name in names if name in record), names[0])


def _json_records(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Number and content of every line that is not blank."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                content = json.loads(line.decode("utf-8-sig"))
                if not isinstance(content, dict):
                    raise TypeError(f"a {type(content).__name__}")
            except (ValueError, TypeError) as error:
                shown = line.decode("utf-8", "replace").strip()
                raise ValueError(
                    f'{path}, line {number}: expected {{"id", "prompt", "image"}}, got {shown:.80} ({error})'
                ) from error
            yield number, content


def _csv_records(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Number of its last line and content of every row; an empty cell is no value."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        rows = csv.DictReader(stream)
        try:
            for row in rows:
                yield rows.line_num, {name: value for name, value in row.items() if name and value}
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, line {rows.line_num + 1}: cannot be read as UTF-8 CSV ({error})") from error


class _Parquet(ScoreInput):
    """Parquet files of equal columns, one after another."""

    def __init__(self, place: Path, paths: Sequence[Path], media_fields: Sequence[str], prompt_fields: Sequence[str]):
        self.name = str(place)
        self.paths = list(paths)
        names = self._names(paths[0])
        self.media = next((name for name in media_fields if name in names), None)
        self.prompt = next((name for name in prompt_fields if name in names), None)
        self.id = "id" if "id" in names else None
        if self.media is None or (self.prompt is None and len(prompt_fields) == 1):
            wanted, fields = ("media", media_fields) if self.media is None else ("prompts", prompt_fields)
            raise ValueError(
                f"{paths[0]} has no column of {wanted}: expected {' or '.join(fields)}, found {', '.join(names)}; "
                "name it with --image-column and --prompt-column"
            )
        for path in paths[1:]:
            if missing := {self.media, self.prompt, self.id} - {None, *self._names(path)}:
                raise ValueError(f"{path} lacks the columns {', '.join(map(str, missing))} that {paths[0].name} has")
        self.count = sum(_parquet(path).metadata.num_rows for path in paths)
        if not self.count:
            raise ValueError(f"{self.name} holds no rows")
        self.has_prompts = self.prompt is not None and any(
            value is not None for values in self._columns([self.prompt], 10_000) for value in values[0]
        )
        twice = _first_repeated(self._ids) if self.id else None
        if twice is not None:
            raise ValueError(f"{self.name}, row {twice[0]}: id {twice[1]!r} appears twice")

    def __iter__(self) -> Iterator[Row]:
        assert self.media is not None
        wanted = [name for name in (self.media, self.prompt, self.id) if name is not None]
        number = 0
        for values in self._columns(wanted, 64):  # of media with their bytes: few at a time
            columns = dict(zip(wanted, values, strict=True))
            blank = [None] * len(columns[self.media])
            ids = columns[self.id] if self.id else blank
            for media, prompt, name in zip(
                columns[self.media], columns[self.prompt] if self.prompt else blank, ids, strict=True
            ):
                content = media if isinstance(media, dict) else {"bytes" if isinstance(media, bytes) else "path": media}
                place = str(content.get("path") or "")
                data = content.get("bytes") or (self.paths[0].parent / place if place else None)
                words = prompt if isinstance(prompt, str) else None
                error = None if data is not None else f"row {number} has nothing in column {self.media!r}"
                yield Row(str(number) if self.id is None else str(name), words, place, data, error)
                number += 1

    def _ids(self) -> Iterator[str]:
        assert self.id is not None
        for values in self._columns([self.id], 10_000):
            yield from map(str, values[0])

    def _columns(self, names: Sequence[str], size: int) -> Iterator[list[list[Any]]]:
        """The values of some columns, `size` rows at a time."""
        for path in self.paths:
            try:
                for batch in _parquet(path).iter_batches(batch_size=size, columns=list(names)):
                    yield [batch.column(name).to_pylist() for name in names]
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{path} is damaged: {str(error).splitlines()[0]}") from error

    def _names(self, path: Path) -> list[str]:
        return list(_parquet(path).schema_arrow.names)


def _parquet(path: Path) -> Any:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]}") from error


def _first_repeated(ids: Callable[[], Iterable[str]]) -> tuple[int, str] | None:
    """Position and text of the first id that occurred before, with 8 bytes of memory per id."""
    hashes = np.sort(np.fromiter((hash(text) for text in ids()), np.int64))
    suspects = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    seen: set[str] = set()
    for position, text in enumerate(ids() if suspects else ()):
        if hash(text) in suspects:
            if text in seen:
                return position, text
            seen.add(text)
    return None
