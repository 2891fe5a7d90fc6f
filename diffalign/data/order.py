"""In which order a run visits its pairs: an endless sequence, a pure function of (seed, position)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch

from diffalign.randomness import generator

Numbers = np.ndarray[Any, np.dtype[np.int64]]


class Order(Protocol):
    """Which pair is visited where."""

    def at(self, position: int) -> tuple[int, int]:
        """The row at a position of the sequence, and how often the pair has been visited before."""
        ...


class ShuffledEpochs:
    """Epoch after epoch, each a permutation of all pairs.

    Args:
        count: How many pairs.
        seed: Of the run.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count = count
        self._permutation = lru_cache(3)(lambda epoch: _permutation(count, seed, "permutation", epoch))

    def at(self, position: int) -> tuple[int, int]:
        """See `Order`."""
        epoch, place = divmod(position, self._count)
        return int(self._permutation(epoch)[place]), epoch


class ShuffledBuckets:
    """Micro-batches of one bucket each, in an order that mixes the buckets.

    Each bucket's pairs are visited in an endless sequence of their own, epoch after epoch, each a permutation, which is
    cut into batches without regard to where an epoch ends: what is left over of one epoch begins the next one. So
    no pair is left out and none comes twice in an epoch of its bucket. The batches that end in a bucket's epoch e are
    shuffled with those of the other buckets' epochs e.

    Args:
        buckets: Number of every pair's bucket, [count].
        seed: Of the run.
        batch_size: Pairs of a micro-batch.
    """

    def __init__(self, buckets: Numbers, seed: int, batch_size: int) -> None:
        numbers = np.unique(buckets)
        self._members = [np.flatnonzero(buckets == number) for number in numbers]
        self._counts = np.array([len(rows) for rows in self._members])
        self._seed, self._batch_size, self._numbers = seed, batch_size, numbers.tolist()
        self._schedule = lru_cache(3)(self._draw_schedule)
        self._permutation = lru_cache(4 * len(numbers))(self._draw_permutation)

    def at(self, position: int) -> tuple[int, int]:
        """See `Order`."""
        batch, place = divmod(position, self._batch_size)
        # Up to its end, an epoch has at most as many batches as fit into it: this one, or one of the next ones.
        epoch = batch * self._batch_size // int(self._counts.sum())
        while int(self._batches(epoch + 1).sum()) <= batch:
            epoch += 1
        bucket, number = self._schedule(epoch)[batch - int(self._batches(epoch).sum())]
        visits, index = divmod(int(number) * self._batch_size + place, int(self._counts[bucket]))
        return int(self._members[bucket][self._permutation(int(bucket), visits)[index]]), visits

    def _batches(self, epochs: int) -> Numbers:
        """How many whole batches each bucket has in its first epochs."""
        whole: Numbers = epochs * self._counts // self._batch_size
        return whole

    def _draw_schedule(self, epoch: int) -> Numbers:
        """The batches that end in an epoch, in order: bucket and number in its sequence, [batches, 2]."""
        starts, stops = self._batches(epoch), self._batches(epoch + 1)
        listed = [(bucket, n) for bucket in range(len(starts)) for n in range(starts[bucket], stops[bucket])]
        order = _permutation(len(listed), self._seed, "buckets", epoch)
        return np.array(listed, dtype=np.int64).reshape(-1, 2)[order]

    def _draw_permutation(self, bucket: int, epoch: int) -> Numbers:
        # Named by the bucket's own number: a split that empties another one changes nothing here.
        return _permutation(int(self._counts[bucket]), self._seed, "permutation", epoch, self._numbers[bucket])


def _permutation(count: int, *key: int | str) -> Numbers:
    """A permutation drawn from `key`. An array: lists of millions of numbers take seconds and gigabytes."""
    order: Numbers = torch.randperm(count, generator=generator(*key)).numpy()
    return order
