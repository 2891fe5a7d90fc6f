"""Where every pair and every prompt of a finished cache lies: columns in one file, which is mapped from disk.

The headers of the cache's files say all of this too. Reading them takes a time and a memory that grow with the data;
mapping this file does not, and of it only the rows that are asked for are read.
"""

from __future__ import annotations

import json
import logging
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from diffalign.data.disk import locked, write_whole

_log = logging.getLogger("diffalign")

MANIFEST = "manifest.json"
INDEX = "index.safetensors"
INDEX_VERSION = 1
"""Raise it whenever the columns change: indices of other versions are made again."""

Column = np.ndarray[Any, np.dtype[Any]]


def shard_path(folder: Path, number: int) -> Path:
    """The file of one shard of pairs."""
    return folder / f"shard-{number:06d}.safetensors"


def text_path(folder: Path, number: int) -> Path:
    """The file of one part of the prompts."""
    return folder / f"text-{number:06d}.safetensors"


def read_header(path: Path) -> dict[str, Any] | None:
    """What a file of the cache says about itself, None if there is no such file or it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, Any] = json.loads(file.metadata()["shard"])
            return header
    except (FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def damaged(path: Path) -> ValueError:
    """The error for a file of a finished cache that cannot be read."""
    manifest = path.with_name(MANIFEST)
    return ValueError(f"{path} is missing or damaged; remove {manifest} to have it encoded again")


def bucket_suffix(bucket: int | None) -> str:
    """What the names of a bucket's tensors end in, in a shard of pairs; None stands for pairs of one size."""
    return "" if bucket is None else f"/{bucket}"


def same_prompt(prompt: str) -> str:
    """What prompts have in common that differ in upper case and spacing alone."""
    return " ".join(prompt.split()).casefold()


class Texts:
    """Texts behind one another in UTF-8, each followed by a line break.

    Args:
        content: All of them, uint8.
        ends: Where each one's line break ends, int64.
    """

    def __init__(self, content: Column, ends: Column) -> None:
        self._content, self._ends = content, ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> str:
        return self.span(number, number + 1)[:-1].tobytes().decode("utf-8", "surrogatepass")

    def span(self, start: int, stop: int) -> Column:
        """The bytes of the texts from `start` up to `stop`, their line breaks included; nothing is copied."""
        return self._content[self._ends[start - 1] if start else 0 : self._ends[stop - 1] if stop else 0]


@dataclass(frozen=True)
class CacheIndex:
    """The columns.

    Attributes:
        ids: Name of every pair.
        weights: Of the pairs in the loss, [pairs], float32.
        rewards: Of the pairs, [pairs, D], float64.
        prompt_of: Number of each pair's prompt, [pairs], int32.
        shard_ends: How many pairs the shards up to each one hold, [shards], int64.
        prompts: Every prompt once, the empty one first.
        group_of: For each prompt the first one that is the same but for upper case and spacing, [prompts], int32.
        sizes: Of the files in bytes, shards of pairs and then the prompts', int64.
        text_names: The tensors of a prompt.
        bucket_of: Bucket of every pair, [pairs], int32; None where all pairs have one size.
        rows_in_bucket: How many pairs of the same shard and bucket come before each pair, likewise.
    """

    ids: Texts
    weights: Column
    rewards: Column
    prompt_of: Column
    shard_ends: Column
    prompts: Texts
    group_of: Column
    sizes: Column
    text_names: tuple[str, ...]
    bucket_of: Column | None
    rows_in_bucket: Column | None

    @staticmethod
    def of(columns: Mapping[str, Column], about: Mapping[str, Any]) -> CacheIndex:
        """The index of columns as they are in the file."""
        return CacheIndex(
            ids=Texts(columns["ids"], columns["ids.ends"]),
            weights=columns["weights"],
            rewards=columns["rewards"],
            prompt_of=columns["prompt_of"],
            shard_ends=columns["shard_ends"],
            prompts=Texts(columns["prompts"], columns["prompts.ends"]),
            group_of=columns["group_of"],
            sizes=columns["sizes"],
            text_names=tuple(about["text_names"]),
            bucket_of=columns.get("bucket_of"),
            rows_in_bucket=columns.get("rows_in_bucket"),
        )

    def places(self, rows: Column) -> Iterator[tuple[int, int]]:
        """The shard of each pair, and its row in that shard's tensors, or in those of its bucket."""
        shards = np.searchsorted(self.shard_ends, rows, side="right")
        if self.rows_in_bucket is not None:
            inside = self.rows_in_bucket[rows]
        else:
            inside = rows - np.where(shards > 0, self.shard_ends[shards - 1], 0)
        return zip(shards.tolist(), inside.tolist(), strict=True)

    def bucket(self, rows: Column) -> int | None:
        """The bucket of pairs that are to be one batch; None where all pairs have one size.

        Raises:
            ValueError: If they are of several.
        """
        if self.bucket_of is None:
            return None
        found = np.unique(self.bucket_of[rows]).tolist()
        if len(found) > 1:
            raise ValueError(
                f"{len(rows)} pairs of {len(found)} sizes cannot be one batch; with data.aspect_ratio_buckets batches "
                "are of one bucket, as PairSource cuts them"
            )
        return int(found[0]) if found else 0

    def check_files(self, folder: Path) -> None:
        """Raises ValueError if a file is not there or not as long as it was; looks at all of them and opens none."""
        for path, size in zip(_files(folder, len(self.shard_ends), len(self.sizes)), self.sizes.tolist(), strict=True):
            try:
                found = path.stat().st_size
            except FileNotFoundError:
                found = -1
            if found != size:
                raise damaged(path)


def open_index(folder: Path, manifest: Mapping[str, Any], *, own_lock: bool = True) -> CacheIndex:
    """The index of a finished cache; made from the headers, and written, if the cache is older than that or it is lost.

    Args:
        folder: The cache.
        manifest: Its manifest.
        own_lock: Whether to hold the folder's lock while writing; False if the caller does.

    Raises:
        ValueError: If the index has to be made and a file is missing or damaged.
    """
    found = _read(folder, manifest["fingerprint"])
    if found is not None:
        return found
    columns, about = _gather(folder, manifest)
    try:
        if own_lock:
            with locked(folder):
                _write(folder, columns, about)
        else:
            _write(folder, columns, about)
    except OSError as error:
        _log.warning("%s cannot be written (%s); all headers are read at every start", folder / INDEX, error.strerror)
    return CacheIndex.of(columns, about)


def write_index(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes the index of a cache whose files are all there.

    Raises:
        ValueError: If one of them is missing or damaged.
        OSError: If it cannot be written.
    """
    _write(folder, *_gather(folder, manifest))


def _files(folder: Path, shards: int, files: int) -> Iterator[Path]:
    yield from (shard_path(folder, number) for number in range(shards))
    yield from (text_path(folder, number) for number in range(files - shards))


def _read(folder: Path, fingerprint: str) -> CacheIndex | None:
    try:
        with safe_open(folder / INDEX, framework="pt") as file:
            about = json.loads(file.metadata()["index"])
            if (about["version"], about["fingerprint"]) != (INDEX_VERSION, fingerprint):
                return None
            # Views of the mapped file: nothing is read before it is asked for.
            return CacheIndex.of({name: file.get_tensor(name).numpy() for name in file.keys()}, about)  # noqa: SIM118
    except (FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def _write(folder: Path, columns: Mapping[str, Column], about: Mapping[str, Any]) -> None:
    tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
    write_whole(folder / INDEX, safetensors.torch.save(tensors, metadata={"index": json.dumps(about)}))


class _TextColumn:
    """Texts while they are collected."""

    def __init__(self) -> None:
        self._content, self._ends = bytearray(), array("q")

    def __len__(self) -> int:
        return len(self._ends)

    def append(self, text: str) -> None:
        self._content += text.encode("utf-8", "surrogatepass") + b"\n"
        self._ends.append(len(self._content))

    def columns(self, name: str) -> dict[str, Column]:
        return {name: np.array(self._content), f"{name}.ends": np.array(self._ends, dtype=np.int64)}


def _gather(folder: Path, manifest: Mapping[str, Any]) -> tuple[dict[str, Column], dict[str, Any]]:
    """All columns and what the file says about itself, from the headers of the cache's files."""
    shards, parts = manifest["shards"], manifest["text_shards"]
    paths = list(_files(folder, shards, shards + parts))
    headers = (_header(path, manifest["fingerprint"]) for path in paths[shards:] + paths[:shards])  # the prompts first
    prompts, ids = _TextColumn(), _TextColumn()
    number_of: dict[str, int] = {}
    first_of: dict[str, int] = {}
    group_of, prompt_of, ends = array("i"), array("i"), array("q")
    weights, rewards, widths = array("d"), array("d"), set()
    bucket_of, rows_in_bucket = array("i"), array("i")
    for header in (next(headers) for _ in range(parts)):
        for prompt in header["prompts"]:
            group_of.append(first_of.setdefault(same_prompt(prompt), len(prompts)))
            number_of[prompt] = len(prompts)
            prompts.append(prompt)
    for header in headers:
        for name in header["ids"]:
            ids.append(name)
        weights.extend(header["weights"])
        prompt_of.extend(number_of[prompt] for prompt in header["prompts"])
        for row in header.get("rewards", [[]] * len(header["ids"])):
            rewards.extend(row)
            widths.add(len(row))
        ends.append(len(ids))
        before: Counter[int] = Counter()
        for bucket in header.get("buckets", ()):
            bucket_of.append(bucket)
            rows_in_bucket.append(before[bucket])
            before[bucket] += 1
    if len(widths) > 1:
        raise ValueError(f"pairs in {folder} have {min(widths)} to {max(widths)} rewards; expected as many in all")
    columns = {
        **ids.columns("ids"),
        **prompts.columns("prompts"),
        "weights": np.array(weights, dtype=np.float32),
        "rewards": np.array(rewards, dtype=np.float64).reshape(len(ids), max(widths, default=0)),
        "prompt_of": np.array(prompt_of, dtype=np.int32),
        "shard_ends": np.array(ends, dtype=np.int64),
        "group_of": np.array(group_of, dtype=np.int32),
        "sizes": np.array([path.stat().st_size for path in paths], dtype=np.int64),
    }
    if bucket_of:
        columns |= {"bucket_of": np.array(bucket_of), "rows_in_bucket": np.array(rows_in_bucket)}
    with safe_open(paths[-1], framework="pt") as file:
        names = sorted(file.keys())
    return columns, {"version": INDEX_VERSION, "fingerprint": manifest["fingerprint"], "text_names": names}


def _header(path: Path, fingerprint: str) -> dict[str, Any]:
    header = read_header(path)
    if header is None or header["fingerprint"] != fingerprint:
        raise damaged(path)
    return header
