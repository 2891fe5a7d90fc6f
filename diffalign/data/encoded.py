"""Reads the encoded cache: latents and text embeddings of preference pairs, mapped from disk row by row."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffalign.batches import Conditioning, Moments
from diffalign.data.index import (
    MANIFEST,
    CacheIndex,
    Column,
    bucket_suffix,
    damaged,
    open_index,
    same_prompt,
    shard_path,
    text_path,
)
from diffalign.data.pairs import ReadReport

TEXT = "text."
"""Before the name of a conditioning tensor in a file."""
OPEN_FILES = 128
"""Of each kind: a large cache has more files than a process may map, and headers that stay in memory."""


class _Store:
    """The files of a finished cache, opened when they are needed; shared by all views."""

    def __init__(self, folder: Path, manifest: dict[str, Any], index: CacheIndex) -> None:
        self.folder, self.manifest, self.index = folder, manifest, index
        self._shard = lru_cache(OPEN_FILES)(lambda number: _opened(shard_path(folder, number)))
        self._text = lru_cache(OPEN_FILES)(lambda number: _opened(text_path(folder, number)))

    def latents(self, name: str, rows: Column) -> Tensor:
        """A tensor of B pairs of one bucket, [B, views, C, ...], float32; only these rows are read."""
        name += bucket_suffix(self.index.bucket(rows))
        return _rows(name, ((self._shard(shard), row) for shard, row in self.index.places(rows)))

    def text(self, name: str, prompts: Sequence[int]) -> Tensor:
        """A tensor of B prompts, [B, ...]; floating point comes as float32."""
        size = self.manifest["shard_size"]
        return _rows(name, ((self._text(prompt // size), prompt % size) for prompt in prompts))


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (FileNotFoundError, SafetensorError) as error:
        raise damaged(path) from error


def _rows(name: str, places: Iterable[tuple[Any, int]]) -> Tensor:
    rows = torch.cat([file.get_slice(name)[row : row + 1] for file, row in places])
    return rows.float() if rows.is_floating_point() else rows


class EncodedPairs:
    """Preference pairs as latents and text embeddings on disk, in the order of their data set.

    Pairs are addressed by row, 0 to `len(self) - 1`. A view made by `split` has its own rows on the same files.

    Attributes:
        fingerprint: The cache's key: model, preprocessing and data.
        flipped: Whether every image is also there mirrored.
        sampled: Whether the cache holds one frozen sample (`cache: sample`); its std is zero.
        winners_only: Whether it holds the chosen images alone, which then stand for the rejected ones too.
        report: What was dropped while reading and encoding.
        folder: Where the cache is.
    """

    def __init__(self, store: _Store, rows: range | Column) -> None:
        self._store = store
        self._rows = rows
        self.fingerprint: str = store.manifest["fingerprint"]
        self.flipped: bool = store.manifest["views"] == 2
        self.sampled: bool = store.manifest["cache"] == "sample"
        self.winners_only: bool = store.manifest.get("members") == ["chosen"]
        self.folder: Path = store.folder
        self.report = ReadReport.from_json(store.manifest["report"])

    @staticmethod
    def open(folder: Path, *, check_files: bool = True) -> EncodedPairs:
        """The finished cache in a folder, whose files are opened when a batch needs them.

        Args:
            folder: One cache.
            check_files: Look at the size of every file first. Without that, opening takes the same time for any number
                of pairs, and a damaged file is found when it is read.

        Raises:
            ValueError: If it is not finished, or a file is missing or damaged.
        """
        if not (folder / MANIFEST).is_file():
            raise ValueError(f"{folder} holds no finished cache ({MANIFEST} is missing); run the encoding again")
        manifest = json.loads((folder / MANIFEST).read_text())
        index = open_index(folder, manifest)
        if check_files:
            index.check_files(folder)
        return EncodedPairs(_Store(folder, manifest, index), range(len(index.ids)))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def ids(self) -> list[str]:
        """Name of every pair."""
        return [self._store.index.ids[row] for row in self._all().tolist()]

    def ids_digest(self) -> str:
        """A hash of the pairs' names in their order, equal for equal lists of names."""
        rows, digest = self._all(), hashlib.blake2b(digest_size=16)
        bounds = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
        for start, stop in itertools.pairwise(bounds):  # of consecutive pairs, whose names are in one piece
            if start < stop:
                names = self._store.index.ids.span(int(rows[start]), int(rows[stop - 1]) + 1)
                digest.update(names.data if stop < len(rows) else names[:-1].data)
        return digest.hexdigest()

    @property
    def buckets(self) -> Column | None:
        """Number of every pair's bucket, [len(self)], int32; None without `aspect_ratio_buckets`."""
        every = self._store.index.bucket_of
        return None if every is None else every[self._all()]

    @property
    def prompts(self) -> list[str]:
        """Prompt of every pair."""
        numbers = self._store.index.prompt_of[self._all()].tolist()
        texts = {number: self._store.index.prompts[number] for number in set(numbers)}
        return [texts[number] for number in numbers]

    def pair_id(self, row: int) -> str:
        """Name of one pair."""
        return self._store.index.ids[int(self._rows[row])]

    def weights(self, rows: Sequence[int]) -> Tensor:
        """Weights of B pairs in the loss, [B], float32."""
        return torch.from_numpy(self._store.index.weights[self._at(rows)])

    def rewards(self, rows: Sequence[int]) -> Tensor:
        """What `data.reward_columns` say of B pairs, [B, D], float64; D is 0 if nothing was said."""
        return torch.from_numpy(self._store.index.rewards[self._at(rows)])

    def moments(self, rows: Sequence[int], mirrored: Sequence[bool] | None = None) -> tuple[Moments, Moments]:
        """Moments of the scaled latents of B pairs, chosen and rejected, each [B, C, ...], float32; see `winners_only`.

        Args:
            rows: Which pairs.
            mirrored: Which of them to take mirrored; needs a cache with both (`random_flip: true`).

        Raises:
            ValueError: If a mirrored pair is asked for and not there, pairs are of several buckets, or a file is
                missing or damaged.
        """
        if mirrored is not None and any(mirrored) and not self.flipped:
            raise ValueError("the cache holds no mirrored images; encode with random_flip: true")
        own = self._at(rows)
        view = torch.tensor([int(m) for m in mirrored] if mirrored is not None else [0] * len(own))
        each = torch.arange(len(own))

        def read(side: str) -> Moments:
            mean = self._store.latents(f"{side}.mean", own)[each, view]
            if self.sampled:
                return Moments(mean, torch.zeros_like(mean))
            return Moments(mean, self._store.latents(f"{side}.std", own)[each, view])

        chosen = read("chosen")
        return chosen, chosen if self.winners_only else read("rejected")

    def conditioning(self, rows: Sequence[int], dropped: Sequence[bool] | None = None) -> Conditioning:
        """Embeddings of the prompts of B pairs, B rows; where `dropped`, those of the empty prompt."""
        prompts = self._store.index.prompt_of[self._at(rows)].tolist()
        if dropped is not None:
            prompts = [0 if drop else prompt for prompt, drop in zip(prompts, dropped, strict=True)]
        return self._text(prompts)

    def empty_conditioning(self) -> Conditioning:
        """Embeddings of the empty prompt, one row."""
        return self._text([0])

    def _text(self, prompts: Sequence[int]) -> Conditioning:
        names = self._store.index.text_names
        return Conditioning({name.removeprefix(TEXT): self._store.text(name, prompts) for name in names})

    def _all(self) -> Column:
        """This view's rows as rows of the cache, int64."""
        return np.arange(len(self._rows)) if isinstance(self._rows, range) else self._rows

    def _at(self, rows: Sequence[int]) -> Column:
        """Some of them."""
        wanted = np.asarray(rows, dtype=np.int64)
        if wanted.size and not -len(self) <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"there are {len(self)} pairs, got row {wanted.min()} to {wanted.max()}")
        return wanted % max(len(self), 1) if isinstance(self._rows, range) else self._rows[wanted]

    def split(self, holdout_count: int, seed: int) -> tuple[EncodedPairs, EncodedPairs]:
        """A training and a validation view that share no prompt.

        Prompts are held out whole, in the order of a hash of (seed, prompt), until at least `holdout_count` pairs
        are; upper case and spacing do not make another prompt. Adding data does not move the other prompts' hashes.

        Raises:
            ValueError: If `holdout_count` is negative or leaves nothing to train on.
        """
        if holdout_count < 0:
            raise ValueError(f"holdout_count must be >= 0, got {holdout_count}")
        index, rows = self._store.index, self._all()
        groups = index.group_of[index.prompt_of[rows]]
        counts = np.bincount(groups, minlength=len(index.prompts))
        names = np.flatnonzero(counts).tolist()

        def place(group: int) -> bytes:
            return hashlib.blake2b(f"{seed}\x1f{same_prompt(index.prompts[group])}".encode()).digest()

        held, chosen = 0, []
        for group in heapq.nsmallest(holdout_count, names, key=place):  # each of them has a pair or more
            if held >= holdout_count:
                break
            chosen.append(group)
            held += int(counts[group])
        if held == len(rows):
            raise ValueError(
                f"holding out {holdout_count} of {len(self)} pairs ({len(names)} prompts) leaves none to train on; "
                "hold out fewer or add pairs"
            )
        apart = np.isin(groups, chosen)
        return EncodedPairs(self._store, rows[~apart]), EncodedPairs(self._store, rows[apart])
