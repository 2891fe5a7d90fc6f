"""Encodes preference pairs once: latents and text embeddings in an on-disk cache that survives being killed.

The cache is a folder named by a hash of model, preprocessing and data. It holds shards of `SHARD_SIZE` consecutive
pairs, each written to a temporary file and renamed, with everything the next ones build on in its own header.
Shards and the batches in them are fixed by the order of the data alone, so a cache that was interrupted anywhere
equals one that was not, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from diffalign.batches import Conditioning, Moments
from diffalign.data.config import DataConfig
from diffalign.data.disk import locked, write_whole
from diffalign.data.encoded import MANIFEST, TEXT, EncodedPairs, read_shard_header, shard_path
from diffalign.data.images import TRANSFORM_VERSION, CorruptImageError, ImageSource, pixels, to_unit_range
from diffalign.data.loading import no_usable_pair
from diffalign.data.pairs import Pair, PairReader, PairSet, ReadReport, refuse_duplicates
from diffalign.randomness import Draw

_log = logging.getLogger("diffalign")

CACHE_VERSION = 1
SHARD_SIZE = 256
REPORT = "report.json"
_BOOKMARK = "bookmark.json"
_EARLY_VERDICT = 1000
"""From so many pairs on, their corrupt fraction is taken for that of the whole data set."""
_PROMPT_BATCH = 32

Item = TypeVar("Item")
Result = TypeVar("Result")


class Encoder(Protocol):
    """The part of a `Policy` that turns images and prompts into tensors."""

    @property
    def resolution(self) -> int:
        """Default image side in pixels."""
        ...

    @property
    def max_tokens(self) -> int:
        """How many tokens the text encoder reads."""
        ...

    def encode(self, images: Tensor, /) -> Moments:
        """See `Policy.encode`; the images come from the CPU."""
        ...

    def encode_prompts(self, prompts: Sequence[str], /) -> Conditioning:
        """See `Policy.encode_prompts`."""
        ...

    def token_counts(self, prompts: Sequence[str], /) -> list[int]:
        """See `Policy.token_counts`."""
        ...

    def encoder_fingerprint(self) -> str:
        """See `Policy.encoder_fingerprint`."""
        ...


def encode_pairs(
    pairs: PairSet, policy: Encoder, config: DataConfig, root: Path, *, shard_size: int = SHARD_SIZE
) -> EncodedPairs:
    """The encoded pairs, from the cache if they are there, otherwise encoded into it.

    Safe to call from several processes at once: one encodes, the others wait for it.

    Args:
        pairs: What to encode.
        policy: Its autoencoder and text encoder are used, unless the cache is complete.
        config: Preprocessing and what to keep.
        root: Folder of all caches; this one becomes a subfolder.
        shard_size: Pairs per file; at most so much work is lost when the process is killed.

    Raises:
        ValueError: If no pair is usable, more than `max_corrupt_fraction` of them cannot be read, or the autoencoder
            gives values that are not finite.
        OSError: If the cache cannot be written; finished shards stay and are used by the next call.
    """
    key = cache_key(pairs, policy, config, shard_size)
    fingerprint = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16).hexdigest()
    folder = root / fingerprint
    with locked(folder):
        if not (folder / MANIFEST).is_file():
            _Encoding(pairs, policy, config, folder, fingerprint, shard_size).run(key)
    _warn_of_long_prompts(json.loads((folder / MANIFEST).read_text()), policy.max_tokens)
    return EncodedPairs.open(folder)


def cache_key(pairs: PairSet, policy: Encoder, config: DataConfig, shard_size: int = SHARD_SIZE) -> dict[str, Any]:
    """Everything that decides what is in the cache: model, preprocessing, layout and data."""
    return {
        "version": [CACHE_VERSION, TRANSFORM_VERSION],
        "encoder": policy.encoder_fingerprint(),
        "data": pairs.fingerprint,
        "resolution": config.resolution or policy.resolution,
        "crop": "center",
        "views": 2 if config.random_flip else 1,
        "cache": config.cache,
        "cache_dtype": config.cache_dtype,
        "shard_size": shard_size,
    }


@dataclass(frozen=True)
class _Decoded:
    """A pair's images, uint8 [3, H, W]: chosen then rejected, each plain and, if wanted, mirrored; or why not."""

    pair: Pair
    images: tuple[Tensor, ...] = ()
    reason: str = ""


@dataclass
class _Encoding:
    """One encoding run: the state that grows from shard to shard."""

    pairs: PairSet
    policy: Encoder
    config: DataConfig
    folder: Path
    fingerprint: str
    shard_size: int
    shards: int = 0
    seen: int = 0
    ids: list[str] = field(default_factory=list)
    prompts: dict[str, int] = field(default_factory=dict)
    corrupt: list[dict[str, str]] = field(default_factory=list)
    long_prompts: int = 0

    def run(self, key: dict[str, Any]) -> None:
        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink()
        reader = self._take_up_finished_shards()
        if self.seen:
            _log.info("%s: %d pairs are encoded already", self.pairs.name, self.seen)
        with (
            ThreadPoolExecutor(min(8, os.cpu_count() or 1), "decode") as pool,
            tqdm(total=self.pairs.size, initial=self.seen, desc="encoding pairs", unit="pair") as bar,
        ):
            while chunk := list(islice(reader, self.shard_size)):
                bookmark = {"shards": self.shards + 1, "seen": self.seen + len(chunk), "state": reader.state()}
                self._encode_shard(chunk, pool, bar)
                write_whole(self.folder / _BOOKMARK, json.dumps(bookmark).encode())
                self._refuse_corrupt(reader.report, finished=False)
        self._finish(key, reader.report)

    def _take_up_finished_shards(self) -> PairReader:
        """Counts what an earlier run left; returns a reader that stands behind it.

        The bookmark spares a stream from being read again. It may be older than the last shard, or, if a shard was
        damaged, too new; then the pairs in between are read and passed over.
        """
        bookmark: dict[str, Any] | None = None
        if (self.folder / _BOOKMARK).is_file():
            bookmark = json.loads((self.folder / _BOOKMARK).read_text())
        while (header := read_shard_header(shard_path(self.folder, self.shards))) is not None:
            if header["fingerprint"] != self.fingerprint:
                break
            self._count(header)
        if bookmark is None or bookmark["shards"] > self.shards:
            bookmark = {"seen": 0, "state": None}
        reader = self.pairs.reader(bookmark["state"])
        for _ in islice(reader, self.seen - bookmark["seen"]):
            pass
        return reader

    def _count(self, header: dict[str, Any]) -> None:
        self.shards += 1
        self.seen += header["seen"]
        self.ids += header["ids"]
        self.corrupt += header["corrupt"]
        self.long_prompts += header["long_prompts"]
        for prompt in header["new_prompts"]:
            self.prompts.setdefault(prompt, len(self.prompts))

    def _encode_shard(self, chunk: list[Pair], pool: ThreadPoolExecutor, bar: tqdm[Any]) -> None:
        kept: list[Pair] = []
        corrupt: list[dict[str, str]] = []

        def images() -> Iterator[Tensor]:
            for decoded in _ahead(pool, self._decode, chunk, 2 * self.config.encode_batch_size):
                bar.update()
                if decoded.reason:
                    corrupt.append({"id": decoded.pair.pair_id, "reason": decoded.reason})
                else:
                    kept.append(decoded.pair)
                    yield from decoded.images

        tensors = self._latents(images(), kept)
        first = [""] if self.shards == 0 else []  # the empty prompt is number 0
        prompts = [pair.prompt for pair in kept]
        new = [prompt for prompt in dict.fromkeys(first + prompts) if prompt not in self.prompts]
        number = {prompt: len(self.prompts) + i for i, prompt in enumerate(new)}
        tensors |= self._text(new)
        header = {
            "fingerprint": self.fingerprint,
            "ids": [pair.pair_id for pair in kept],
            "weights": [pair.weight for pair in kept],
            "prompt_of": [number[p] if p in number else self.prompts[p] for p in prompts],
            "new_prompts": new,
            "long_prompts": sum(n > self.policy.max_tokens for n in self.policy.token_counts(new)) if new else 0,
            "corrupt": corrupt,
            "seen": len(chunk),
        }
        content = safetensors.torch.save(tensors, metadata={"shard": json.dumps(header)})
        write_whole(shard_path(self.folder, self.shards), content)
        self._count(header)

    def _decode(self, pair: Pair) -> _Decoded:
        side = self.config.resolution or self.policy.resolution
        images: list[Tensor] = []
        sources: tuple[tuple[str, ImageSource], ...] = (("chosen", pair.chosen), ("rejected", pair.rejected))
        for member, source in sources:
            try:
                image = pixels(source.decode(), side)
            except CorruptImageError as error:
                return _Decoded(pair, reason=f"{member}: {error}")
            images += [image, image.flip(-1)] if self.config.random_flip else [image]
        return _Decoded(pair, tuple(images))

    def _latents(self, images: Iterator[Tensor], kept: list[Pair]) -> dict[str, Tensor]:
        """Tensors [pairs, views, C, ...] of a shard, by name; `kept` grows while `images` is read."""
        means, stds = [], []
        views = 2 if self.config.random_flip else 1
        for batch in _groups(images, self.config.encode_batch_size):
            with torch.no_grad():
                moments = self.policy.encode(to_unit_range(torch.stack(batch)))
            means.append(moments.mean.float().cpu())
            stds.append(moments.std.float().cpu())
        if not kept:
            return {}
        shape = (len(kept), 2, views, *means[0].shape[1:])
        mean, std = torch.cat(means).reshape(shape), torch.cat(stds).reshape(shape)
        for pair, *values in zip(kept, mean, std, strict=True):
            if not all(bool(v.isfinite().all()) for v in values):
                raise ValueError(
                    f"the autoencoder gives values that are not finite for pair {pair.pair_id!r}; "
                    "load it in float32 or bfloat16"
                )
        tensors = {}
        for member, name in enumerate(("chosen", "rejected")):
            if self.config.cache == "sample":
                noise = [Draw(0, 0, pair.pair_id).normal(f"posterior/{name}", mean.shape[3:]) for pair in kept]
                drawn = mean[:, member] + std[:, member] * torch.stack(noise).unsqueeze(1)
                tensors[f"{name}.mean"] = self._stored(drawn)
            else:
                tensors[f"{name}.mean"] = self._stored(mean[:, member])
                tensors[f"{name}.std"] = self._stored(std[:, member])
        return tensors

    def _text(self, prompts: list[str]) -> dict[str, Tensor]:
        """Embeddings of prompts that no earlier shard holds."""
        parts = []
        for batch in _groups(prompts, _PROMPT_BATCH):
            with torch.no_grad():
                parts.append(self.policy.encode_prompts(batch).to("cpu"))
        if not parts:
            return {}
        whole = Conditioning.concatenate(parts)
        return {f"{TEXT}{name}": self._stored(tensor) for name, tensor in whole.tensors.items()}

    def _stored(self, tensor: Tensor) -> Tensor:
        dtype = torch.bfloat16 if self.config.cache_dtype == "bfloat16" else torch.float32
        return (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()

    def _refuse_corrupt(self, read: ReadReport, *, finished: bool) -> None:
        """Names unreadable pairs in the report; raises ValueError if there are too many."""
        if not self.corrupt and not finished:
            return
        report = {**self._report(read).to_json(), "unreadable": self.corrupt, "finished": finished}
        write_whole(self.folder / REPORT, json.dumps(report, indent=1).encode())
        total = self.seen if finished or self.pairs.size is None else self.pairs.size
        enough = finished or self.pairs.size is not None
        allowed = self.config.max_corrupt_fraction
        too_many = (enough and len(self.corrupt) > allowed * total) or (
            self.seen >= _EARLY_VERDICT and len(self.corrupt) > allowed * self.seen
        )
        if too_many:
            names = ", ".join(entry["id"] for entry in self.corrupt[:5])
            raise ValueError(
                f"{len(self.corrupt)} of {self.seen} pairs of {self.pairs.name} have an unreadable image (first: "
                f"{names}), more than max_corrupt_fraction {allowed:g} allows; all are named in "
                f"{self.folder / REPORT}: repair the data, or raise data.max_corrupt_fraction"
            )

    def _report(self, read: ReadReport) -> ReadReport:
        return read.with_corrupt([entry["id"] for entry in self.corrupt])

    def _finish(self, key: dict[str, Any], read: ReadReport) -> None:
        if self.seen == 0:
            raise no_usable_pair(self.pairs.name, read)
        self._refuse_corrupt(read, finished=True)
        if not self.ids:
            raise ValueError(f"no pair of {self.pairs.name} has two readable images; see {self.folder / REPORT}")
        refuse_duplicates(self.ids, self.pairs.name)
        report = self._report(read)
        if report.corrupt:
            _log.warning("%s: %s; see %s", self.pairs.name, report.summary(), self.folder / REPORT)
        manifest = {
            **key,
            "fingerprint": self.fingerprint,
            "shards": self.shards,
            "pairs": len(self.ids),
            "prompts": len(self.prompts),
            "long_prompts": self.long_prompts,
            "report": report.to_json(),
        }
        (self.folder / _BOOKMARK).unlink(missing_ok=True)
        write_whole(self.folder / MANIFEST, json.dumps(manifest, indent=1).encode())


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], depth: int
) -> Iterator[Result]:
    """Results in order, computed by the pool at most `depth` items ahead."""
    pending: deque[Future[Result]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > depth:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _groups(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Consecutive items in lists of `size`, the last one perhaps shorter."""
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def _warn_of_long_prompts(manifest: dict[str, Any], max_tokens: int) -> None:
    count = manifest["long_prompts"]
    if count:
        _log.warning(
            "%d of %d prompts are longer than the %d tokens the text encoder reads; the rest of them is ignored",
            count,
            manifest["prompts"] - 1,
            max_tokens,
        )
