"""Errors of a reference that does not move: computed once for every draw, kept on disk, shared by runs.

What the frozen reference adds to a step is one number for each half of a pair. It depends on the visit's draw
(timestep, noise, posterior sample, dropped caption, mirroring) and on nothing that is trained. With `draws_per_pair`
K, a pair draws anew at its first K visits and repeats those draws afterwards; then there are K times 2 numbers a pair,
and a step needs no forward pass of the reference at all.

The first pass over all draws costs what it saves: it pays from epoch K + 1 on, and at once in every further run on the
same reference, data, seed and law of timesteps, whatever its beta, learning rate, rank or batch size. The files lie
beside the encoded pairs, under a fingerprint of all that the numbers depend on.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffalign.batches import PairBatch
from diffalign.data.disk import locked
from diffalign.devices import rounding
from diffalign.helper_threads import helper_threads
from diffalign.policy import Policy
from diffalign.processes import Processes, launched
from diffalign.resumable import claim_folder, write_atomically
from diffalign.sharding import refuse_sharded

if TYPE_CHECKING:
    from diffalign.data import PairSource

__all__ = ["ReferenceErrors", "ReferencedPairs", "ReferencedSource"]

PAIRS_PER_FILE = 256
"""At most so many are lost when a process is killed."""

Measure = Callable[[PairBatch], Tensor]
"""Errors of the reference on a batch of B pairs, chosen first, [2B]."""


@dataclass(frozen=True)
class ReferencedPairs(PairBatch):
    """Pairs with what the reference makes of their draws.

    Attributes:
        chosen_error: The reference's mean squared error on the chosen halves, [B], float32.
        rejected_error: On the rejected halves, likewise.
    """

    chosen_error: Tensor
    rejected_error: Tensor

    def exchanged(self) -> Self:
        """See `PairBatch.exchanged`."""
        return replace(super().exchanged(), chosen_error=self.rejected_error, rejected_error=self.chosen_error)


class ReferenceErrors:
    """The reference's errors on the first draws of every pair.

    Args:
        source: Of the pairs, with `draws_per_pair`.
        policy: Whose reference answers.
        law: What else the draws and their noisy latents depend on, as JSON values.
        root: Folder of all such errors; those of this origin lie in a folder of their own in it.
    """

    def __init__(self, source: PairSource, policy: Policy, law: Mapping[str, Any], root: Path) -> None:
        assert source.draws_per_pair is not None  # as the trainer's settings say
        self.source, self.policy = source, policy
        self.count, self.draws = len(source.encoded), source.draws_per_pair
        self._settings: dict[str, Any] = {
            "reference": policy.reference_fingerprint(),
            "data": source.encoded.fingerprint,
            "pairs": source.encoded.ids_digest(),
            "draws_per_pair": self.draws,
            "seed": source.seed,
            "caption_dropout": source.caption_dropout,
            **law,
        }
        self._root = root
        self._filled: dict[str, Any] | None = None
        self._table: np.ndarray[Any, np.dtype[np.float32]] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What the errors depend on, as JSON values; how products are rounded the loop decides, before `fill`."""
        return self._filled or self._settings | rounding(self.policy.autocast)

    @property
    def folder(self) -> Path:
        """Where they are, or would be filled now."""
        key = hashlib.blake2b(json.dumps(self.settings, sort_keys=True).encode(), digest_size=8).hexdigest()
        return self._root / key

    @torch.no_grad()
    def fill(self, step: int, measure: Measure, batch_size: int, processes: Processes | None = None) -> None:
        """Computes what is not there yet; every process calls it, and goes on when all is there.

        Args:
            step: Optimizer steps done.
            measure: By the reference.
            batch_size: Pairs at once, which changes the last digits.
            processes: Who shares the work; None takes those that the launcher started.

        Raises:
            ValueError: If an error is infinite or not a number, or the weights are spread over processes.
        """
        refuse_sharded(self.policy.denoiser, "trainer.reference: each process computes the cached errors", "live")
        processes = processes if processes is not None else launched()
        spent = self.policy.forwards
        self._filled = self.settings
        with ExitStack() as held:
            if processes.is_first:  # another run may share these errors
                held.enter_context(locked(self.folder))
            share = processes.share(processes.on_first(self._missing))
            total = sum(len(self._rows(number)) for number in share)
            hidden = not processes.is_first or not total
            reader = held.enter_context(helper_threads(1, "draws"))
            with tqdm(total=total, desc=processes.label("reference"), unit="draw", disable=hidden) as bar:
                for number in share:
                    self._write(number, measure, batch_size, reader, bar)
            processes.wait()
            processes.on_first(self._put_together)
        self._table = np.load(self._path, mmap_mode="r")
        # Counted before the first step, done now, earlier, or by another run; later checkpoints know of them.
        self.policy.forwards = spent + (2 * self.count * self.draws // processes.count if step == 0 else 0)

    def of(self, visits: list[tuple[int, int]]) -> Tensor:
        """The errors at B visits, given as rows of the data and epochs: [2, B], chosen first, float32."""
        assert self._table is not None, "fill comes first"
        return torch.from_numpy(np.stack([self._table[epoch, row] for row, epoch in visits], axis=1))

    # --- files -------------------------------------------------------------------------------------------------------

    @property
    def _path(self) -> Path:
        return self.folder / "errors.npy"

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.npy"

    def _rows(self, number: int) -> range:
        """A part's rows of the table [draws * pairs], of one draw or of two neighbouring ones."""
        start = number * PAIRS_PER_FILE
        return range(start, min(start + PAIRS_PER_FILE, self.draws * self.count))

    def _numbers(self) -> range:
        return range(-(-self.draws * self.count // PAIRS_PER_FILE))

    def _missing(self) -> list[int]:
        claim_folder(self.folder, self.settings, made_here=(self._path.name,))
        return [] if self._path.is_file() else [n for n in self._numbers() if not self._part(n).is_file()]

    def _write(
        self, number: int, measure: Measure, batch_size: int, reader: ThreadPoolExecutor, bar: tqdm[Any]
    ) -> None:
        """One part, each batch read while the one before it is measured."""
        rows = self._rows(number)
        chunks = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        found: list[Tensor] = []
        following = reader.submit(self._read, chunks[0])
        for place, chunk in enumerate(chunks, start=1):
            batch = following.result()
            if place < len(chunks):
                following = reader.submit(self._read, chunks[place])
            found.append(measure(batch).float().reshape(2, -1).T)
            bar.update(len(chunk))
        errors = torch.cat(found).cpu()
        bad = (~errors.isfinite().all(1)).nonzero().flatten().tolist()
        if bad:
            pair = self.source.encoded.pair_id(rows[bad[0]] % self.count)
            raise ValueError(
                f"the reference's error on pair {pair!r} is infinite or not a number; try "
                "training.mixed_precision=no, or leave the pair out"
            )
        write_atomically(self._part(number), _to_npy(errors.numpy()))

    def _read(self, rows: range) -> PairBatch:
        """The pairs of some rows of the table, with their draws."""
        visits = [divmod(row, self.count) for row in rows]
        return self.source.at([(row, draw) for draw, row in visits])

    def _put_together(self) -> None:
        if not self._path.is_file():
            parts = [np.load(self._part(number)) for number in self._numbers()]
            write_atomically(self._path, _to_npy(np.concatenate(parts).reshape(self.draws, self.count, 2)))
        for part in self.folder.glob("part-*.npy"):
            part.unlink()


class ReferencedSource:
    """Batches for `fit`: the data's pairs with the reference's errors on their draws.

    Args:
        pairs: Which pair is visited when.
        errors: Of these pairs.
    """

    def __init__(self, pairs: PairSource, errors: ReferenceErrors) -> None:
        self.pairs, self.errors = pairs, errors

    def batch(self, step: int, micro_step: int) -> ReferencedPairs:
        """This process's pairs of one micro step; on the CPU."""
        batch = self.pairs.batch(step, micro_step)
        visits = [(row, draw.epoch) for row, draw in self.pairs.own_visits(step, micro_step)]
        chosen, rejected = self.errors.of(visits)
        return ReferencedPairs(**vars(batch), chosen_error=chosen, rejected_error=rejected)

    def update(self, step: int) -> None:
        """Nothing of its own: the reference does not follow the policy."""
        self.pairs.update(step)


def _to_npy(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
