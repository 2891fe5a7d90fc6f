"""Random numbers that depend on what they are for, never on when or where they are drawn.

Every draw of a training pair (timestep, noise, posterior sample, caption drop, crop, flip) comes from a generator
seeded with (run seed, epoch, pair id, purpose). Batch position, number of processes, resuming and caching can then
not change a single number. What the encoded cache holds, such as the place of a random crop, is drawn once for all
epochs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by all of `key`; equal keys give equal numbers on every machine."""
    digest = hashlib.blake2b("\x1f".join(f"{type(k).__name__}:{k}" for k in key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@dataclass(frozen=True)
class Draw:
    """The random numbers of one pair at one visit.

    Attributes:
        seed: Seed of the run.
        epoch: How often the pair has been visited before.
        pair_id: The pair's name in its data set; stable over runs.
    """

    seed: int
    epoch: int
    pair_id: str

    def generator(self, purpose: str) -> torch.Generator:
        """The generator of one purpose ("noise", "timestep", "posterior/chosen", ...)."""
        return generator(self.seed, self.epoch, self.pair_id, purpose)

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """A standard normal sample of `shape`, float32 on the CPU."""
        return torch.randn(tuple(shape), generator=self.generator(purpose))

    def uniform(self, purpose: str) -> float:
        """A number in [0, 1), double precision."""
        return float(torch.rand((), generator=self.generator(purpose), dtype=torch.float64))
