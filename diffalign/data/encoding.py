"""Encodes preference pairs once: latents and text embeddings in an on-disk cache that survives being killed.

The cache is a folder named by a hash of model, preprocessing and data. First the latents: shards of consecutive pairs,
each written to a temporary file and renamed, none of which needs another, so that several processes can deal them among
themselves. Then the text: each prompt once, in files of as many prompts. Then the index, which says what lies where.
Shards and the batches in them are fixed by the order of the data alone, so a cache that was interrupted anywhere, or
made by any number of processes, equals one that was not, bit for bit.
"""

from __future__ import annotations

import contextlib
import itertools
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
from diffalign.data.caches import Encodes, cache_key, fingerprint, note_cache
from diffalign.data.config import DataConfig
from diffalign.data.disk import locked, write_whole
from diffalign.data.encoded import TEXT, EncodedPairs
from diffalign.data.images import to_unit_range
from diffalign.data.index import MANIFEST, bucket_suffix, open_index, read_header, shard_path, text_path, write_index
from diffalign.data.loading import no_usable_pair
from diffalign.data.media import Preparation, check_media
from diffalign.data.pairs import Pair, PairSet, ReadReport, State, refuse_duplicates
from diffalign.helper_threads import helper_threads
from diffalign.processes import ALONE, Processes, own_files
from diffalign.randomness import Draw

_log = logging.getLogger("diffalign")

REPORT = "report.json"
_BOOKMARK = "bookmark.json"
_EARLY_VERDICT = 1000
"""From so many pairs on, their corrupt fraction is taken for that of the whole data set."""
_PROMPT_BATCH = 32

Item = TypeVar("Item")
Result = TypeVar("Result")


class Encoder(Encodes, Protocol):
    """The part of a `Policy` that turns images or clips and prompts into tensors."""

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


def encode_pairs(
    pairs: PairSet,
    policy: Encoder,
    config: DataConfig,
    root: Path,
    *,
    shard_size: int | None = None,
    processes: Processes = ALONE,
) -> EncodedPairs:
    """The encoded pairs, from the cache if they are there, otherwise encoded into it.

    Safe to call from several processes that do not know each other: one encodes, the others wait for it.

    Args:
        pairs: What to encode.
        policy: Its autoencoder and text encoder are used, unless the cache is complete.
        config: Preprocessing and what to keep.
        root: Folder of all caches; this one becomes a subfolder.
        shard_size: Pairs per file; at most so much work is lost when the process is killed. None takes 256 pairs of
            images or 16 of clips.
        processes: Who shares the work, each calling this with the same arguments; the cache is the same for any number
            of them, and a rerun may have another number. Each of them reads the whole of a stream.

    Raises:
        ValueError: If no pair is usable, more than `max_corrupt_fraction` of them cannot be read, the data hold images
            where the model takes clips or the other way round, or the autoencoder gives values that are not finite.
        OSError: If the cache cannot be written; finished shards stay and are used by the next call.
    """
    preparation = Preparation(config, policy, winners_only=pairs.winners_only)
    how = cache_key(policy, config, preparation, shard_size)
    key = {**how, "data": pairs.fingerprint}
    name = fingerprint(key)
    folder = root / name
    with contextlib.ExitStack() as held:
        if processes.is_first:
            held.enter_context(locked(folder))
        if not processes.on_first(lambda: _is_finished(folder)):
            check_media(pairs, policy)
            _Encoding(pairs, policy, config, preparation, folder, name, how["shard_size"], processes).run(key)
        if processes.is_first:
            note_cache(folder, how, config)
    if processes.is_first:
        _warn_of_long_prompts(json.loads((folder / MANIFEST).read_text()), policy.max_tokens)
    return EncodedPairs.open(folder)


@dataclass
class _Encoding:
    """One encoding run of one process, and what it knows of the pairs it has seen."""

    pairs: PairSet
    policy: Encoder
    config: DataConfig
    preparation: Preparation
    folder: Path
    fingerprint: str
    shard_size: int
    processes: Processes
    seen: int = 0
    corrupt: list[dict[str, str]] = field(default_factory=list)

    def run(self, key: dict[str, Any]) -> None:
        finished, bookmark = self.processes.on_first(self._take_up)
        shards, read = self._encode_latents(finished, bookmark)
        self.processes.wait()
        prompts = self.processes.on_first(lambda: self._look_over(shards, read))
        self._encode_text(prompts)
        self.processes.wait()
        self.processes.on_first(lambda: self._finish(key, shards, prompts, read))

    def _take_up(self) -> tuple[set[int], State]:
        """The shards that an earlier run finished, and from where on to read.

        The bookmark spares a stream from being read again; if a shard before it was damaged, it is too new.
        """
        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink()
        finished = set()
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            header = read_header(path)
            if header is not None and header["fingerprint"] == self.fingerprint:
                finished.add(header["number"])
                self._count(header)
        if self.seen:
            _log.info("%s: %d pairs are encoded already", self.pairs.name, self.seen)
        bookmark: State = {"shards": 0, "state": None}
        if (self.folder / _BOOKMARK).is_file():
            bookmark = json.loads((self.folder / _BOOKMARK).read_text())
        if not finished.issuperset(range(bookmark["shards"])):
            bookmark = {"shards": 0, "state": None}
        return finished, bookmark

    def _count(self, header: dict[str, Any]) -> None:
        self.seen += header["seen"]
        self.corrupt += header["corrupt"]

    def _encode_latents(self, finished: set[int], bookmark: State) -> tuple[int, ReadReport]:
        """Writes this process's shards; gives the number of all shards, and what became of the rows that it read."""
        reader = self.pairs.reader(bookmark["state"])
        number = bookmark["shards"]
        turns = itertools.cycle(range(self.processes.count))
        states: dict[int, State] = {}
        with helper_threads(min(8, os.cpu_count() or 1), "decode") as pool, self._progress(finished) as bar:
            while True:
                mine = number not in finished and next(turns) == self.processes.rank
                chunk = list(islice(reader, self.shard_size)) if mine else []
                if not chunk and (mine or not reader.skip(self.shard_size)):
                    return number, reader.report
                states[number + 1] = {"shards": number + 1, "state": reader.state()}
                if mine:
                    self._encode_shard(number, chunk, pool, bar)
                    self._write_bookmark(states)
                    self._refuse_corrupt(reader.report, finished=False)
                number += 1

    def _write_bookmark(self, states: dict[int, State]) -> None:
        """Notes the last place, of those in `states`, before which all shards are there; older ones are forgotten."""
        if not self.processes.is_first:
            states.clear()
            return
        reached: State | None = None
        while states and shard_path(self.folder, min(states) - 1).exists():
            reached = states.pop(min(states))
        if reached is not None:
            write_whole(self.folder / _BOOKMARK, json.dumps(reached).encode())

    def _progress(self, finished: set[int]) -> tqdm[Any]:
        """A bar over all pairs; of several processes the first shows its own part."""
        total, initial, size = self.pairs.size, self.seen, self.shard_size
        if self.processes.count > 1:
            initial = 0
            if total is not None:
                left = [number for number in range(-(-total // size)) if number not in finished]
                total = sum(min(size, total - number * size) for number in self.processes.share(left))
        label, hidden = self.processes.label("encoding pairs"), not self.processes.is_first
        return tqdm(total=total, initial=initial, desc=label, unit="pair", disable=hidden)

    def _encode_shard(self, number: int, chunk: list[Pair], pool: ThreadPoolExecutor, bar: tqdm[Any]) -> None:
        kept: list[Pair] = []
        buckets: list[int] = []
        corrupt: list[dict[str, str]] = []

        def images() -> Iterator[tuple[int, Tensor]]:
            for decoded in _ahead(pool, self.preparation.decode, chunk, 2 * self.preparation.batch_size):
                bar.update()
                if decoded.reason:
                    corrupt.append({"id": decoded.pair.pair_id, "reason": decoded.reason})
                else:
                    kept.append(decoded.pair)
                    buckets.append(decoded.bucket)
                    yield from ((decoded.bucket, image) for image in decoded.images)

        encoded = self._encode_images(images())
        tensors: dict[str, Tensor] = {}
        for bucket, moments in sorted(encoded.items()):
            members = [pair for pair, own in zip(kept, buckets, strict=True) if own == bucket]
            suffix = bucket_suffix(bucket if self.preparation.buckets else None)
            tensors |= {f"{name}{suffix}": tensor for name, tensor in self._latents(moments, members).items()}
        header = {
            "fingerprint": self.fingerprint,
            "number": number,
            "ids": [pair.pair_id for pair in kept],
            "weights": [pair.weight for pair in kept],
            **({"rewards": [pair.rewards for pair in kept]} if any(pair.rewards for pair in kept) else {}),
            "prompts": [pair.prompt for pair in kept],
            **({"buckets": buckets} if self.preparation.buckets else {}),
            "corrupt": corrupt,
            "seen": len(chunk),
        }
        self._write(shard_path(self.folder, number), tensors, header)
        self._count(header)

    def _write(self, path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        write_whole(path, safetensors.torch.save(tensors, metadata={"shard": json.dumps(header)}))

    def _encode_images(self, images: Iterator[tuple[int, Tensor]]) -> dict[int, Moments]:
        """Moments of all images of a shard, by bucket, in the order in which they came."""
        means: dict[int, list[Tensor]] = {}
        stds: dict[int, list[Tensor]] = {}
        for bucket, batch in _alike(images, self.preparation.batch_size):
            with torch.no_grad():
                moments = self.policy.encode(to_unit_range(torch.stack(batch)))
            means.setdefault(bucket, []).append(moments.mean.float().cpu())
            stds.setdefault(bucket, []).append(moments.std.float().cpu())
        return {bucket: Moments(torch.cat(means[bucket]), torch.cat(stds[bucket])) for bucket in means}

    def _latents(self, moments: Moments, kept: list[Pair]) -> dict[str, Tensor]:
        """Tensors [pairs, views, C, ...] of the pairs of one bucket in a shard, by name."""
        views, members = 2 if self.config.random_flip else 1, self.preparation.members
        shape = (len(kept), len(members), views, *moments.mean.shape[1:])
        mean, std = moments.mean.reshape(shape), moments.std.reshape(shape)
        for pair, *values in zip(kept, mean, std, strict=True):
            if not all(bool(v.isfinite().all()) for v in values):
                raise ValueError(
                    f"the autoencoder gives values that are not finite for pair {pair.pair_id!r}; "
                    "load it in float32 or bfloat16"
                )
        tensors = {}
        for member, name in enumerate(members):
            if self.config.cache == "sample":
                noise = [Draw(0, 0, pair.pair_id).normal(f"posterior/{name}", mean.shape[3:]) for pair in kept]
                drawn = mean[:, member] + std[:, member] * torch.stack(noise).unsqueeze(1)
                tensors[f"{name}.mean"] = self._stored(drawn)
            else:
                tensors[f"{name}.mean"] = self._stored(mean[:, member])
                tensors[f"{name}.std"] = self._stored(std[:, member])
        return tensors

    def _look_over(self, shards: int, read: ReadReport) -> list[str]:
        """Judges the whole when all shards are there; gives all prompts, each once and the empty one first."""
        self.seen, self.corrupt = 0, []
        ids: list[str] = []
        prompts: dict[str, None] = {"": None}
        for number in range(shards):
            header = self._header(shard_path(self.folder, number))
            self._count(header)
            ids += header["ids"]
            prompts |= dict.fromkeys(header["prompts"])
        if self.seen == 0:
            raise no_usable_pair(self.pairs.name, read)
        self._refuse_corrupt(read, finished=True)
        if not ids:
            raise ValueError(f"no pair of {self.pairs.name} has readable images; see {self.folder / REPORT}")
        refuse_duplicates(ids, self.pairs.name)
        return list(prompts)

    def _header(self, path: Path) -> dict[str, Any]:
        header = read_header(path)
        if header is None:
            raise ValueError(
                f"{path} cannot be read, though it was just written; expected all processes to write to one disk: set "
                "data.encoded_dir to a folder that all machines share"
            )
        return header

    def _encode_text(self, prompts: list[str]) -> None:
        parts = list(enumerate(_groups(prompts, self.shard_size)))

        def missing() -> list[int]:
            headers = [read_header(text_path(self.folder, number)) for number, _ in parts]
            current = [h is not None and h["fingerprint"] == self.fingerprint and h["prompts"] for h in headers]
            return [number for number, part in parts if current[number] != part]

        todo = self.processes.share(self.processes.on_first(missing))
        label, hidden = self.processes.label("encoding prompts"), not self.processes.is_first
        with tqdm(total=sum(len(parts[n][1]) for n in todo), desc=label, unit="prompt", disable=hidden) as bar:
            for number in todo:
                part = parts[number][1]
                header = {
                    "fingerprint": self.fingerprint,
                    "prompts": part,
                    "long_prompts": sum(count > self.policy.max_tokens for count in self.policy.token_counts(part)),
                }
                self._write(text_path(self.folder, number), self._text(part), header)
                bar.update(len(part))

    def _text(self, prompts: list[str]) -> dict[str, Tensor]:
        """Embeddings of prompts, by name."""
        parts = []
        for batch in _groups(prompts, _PROMPT_BATCH):
            with torch.no_grad():
                parts.append(self.policy.encode_prompts(batch).to("cpu"))
        whole = Conditioning.concatenate(parts)
        return {f"{TEXT}{name}": self._stored(tensor) for name, tensor in whole.tensors.items()}

    def _stored(self, tensor: Tensor) -> Tensor:
        dtype = torch.bfloat16 if self.config.cache_dtype == "bfloat16" else torch.float32
        return (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()

    def _refuse_corrupt(self, read: ReadReport, *, finished: bool) -> None:
        """Names unreadable pairs in the report; raises ValueError if there are too many."""
        if not self.corrupt and not finished:
            return
        path = self.folder / REPORT
        report = {**self._report(read).to_json(), "unreadable": self.corrupt, "finished": finished}
        write_whole(self.processes.own_file(path) if not finished else path, json.dumps(report, indent=1).encode())
        total = self.seen if finished or self.pairs.size is None else self.pairs.size
        enough = finished or self.pairs.size is not None
        allowed = self.config.max_corrupt_fraction
        too_many = (enough and len(self.corrupt) > allowed * total) or (
            self.seen >= _EARLY_VERDICT and len(self.corrupt) > allowed * self.seen
        )
        if too_many:
            names = ", ".join(entry["id"] for entry in self.corrupt[:5])
            medium = "clip" if self.policy.is_video else "image"
            raise ValueError(
                f"{len(self.corrupt)} of {self.seen} pairs of {self.pairs.name} have an unreadable {medium} (first: "
                f"{names}), for example {self.corrupt[0]['reason']}; that is more than max_corrupt_fraction "
                f"{allowed:g} allows; all are named in {self.folder / REPORT}: repair the data, or raise "
                "data.max_corrupt_fraction"
            )

    def _report(self, read: ReadReport) -> ReadReport:
        return read.with_corrupt([entry["id"] for entry in self.corrupt])

    def _finish(self, key: dict[str, Any], shards: int, prompts: list[str], read: ReadReport) -> None:
        report = self._report(read)
        if report.corrupt:
            _log.warning("%s: %s; see %s", self.pairs.name, report.summary(), self.folder / REPORT)
        texts = [self._header(text_path(self.folder, n)) for n in range(-(-len(prompts) // self.shard_size))]
        manifest = {
            **key,
            "fingerprint": self.fingerprint,
            "shards": shards,
            "text_shards": len(texts),
            "pairs": self.seen - len(self.corrupt),
            "prompts": len(prompts),
            "long_prompts": sum(header["long_prompts"] for header in texts),
            "report": report.to_json(),
        }
        for path in own_files(self.folder / REPORT):
            path.unlink()
        write_index(self.folder, manifest)
        (self.folder / _BOOKMARK).unlink(missing_ok=True)
        write_whole(self.folder / MANIFEST, json.dumps(manifest, indent=1).encode())


def _is_finished(folder: Path) -> bool:
    """Whether a cache is; one that was made before there were indices gets its own, under the lock that is held."""
    if not (folder / MANIFEST).is_file():
        return False
    open_index(folder, json.loads((folder / MANIFEST).read_text()), own_lock=False)
    return True


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


def _alike(items: Iterable[tuple[int, Item]], size: int) -> Iterator[tuple[int, list[Item]]]:
    """The items of each kind in lists of `size`, as soon as they are full; what is left over comes last."""
    waiting: dict[int, list[Item]] = {}
    for kind, item in items:
        waiting.setdefault(kind, []).append(item)
        if len(waiting[kind]) == size:
            yield kind, waiting.pop(kind)
    yield from sorted(waiting.items(), key=lambda left: left[0])


def _warn_of_long_prompts(manifest: dict[str, Any], max_tokens: int) -> None:
    count = manifest["long_prompts"]
    if count:
        _log.warning(
            "%d of %d prompts are longer than the %d tokens the text encoder reads; the rest of them is ignored",
            count,
            manifest["prompts"] - 1,
            max_tokens,
        )
