"""The perfect network for Gaussian data, and walks through noise with it: exact numbers for inversions."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from diffalign.batches import Conditioning, PairBatch
from diffalign.predictions import Prediction
from diffalign.randomness import Draw
from diffalign.schedules import DiscreteSchedule, expand
from diffalign.trainers.inpo import InPO
from tests.trainers.golden import TablePolicy, double

SD = DiscreteSchedule.scaled_linear()
LN2 = float(torch.tensor(math.log(2)))


class GaussianPolicy(TablePolicy):
    """The perfect network for data N(0, variance I); its reference knows other data. It writes down what it is told."""

    def __init__(self, prediction: Prediction = Prediction.EPSILON, variance: float = 0.25) -> None:
        super().__init__(double([0.0]), double([0.0]), prediction)
        self.schedule, self.variance = SD, variance
        self.told: list[list[int]] = []

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        assert len(noisy_latents) == len(timesteps) == len(conditioning)
        self.told.append(timesteps.tolist())
        alphas, sigmas = SD.scales(timesteps.clamp(min=0))
        noise = expand(sigmas / (self.variance * alphas**2 + sigmas**2), noisy_latents) * noisy_latents
        latents = (noisy_latents - expand(sigmas, noise) * noise) / expand(alphas, noise)
        return self.prediction.target(latents, noise, alphas, sigmas)

    def frozen(self) -> GaussianPolicy:
        return GaussianPolicy(self.prediction, variance=2.0)


def deviation(timestep: int) -> float:
    abar = float(SD.alphas_cumprod[timestep])
    return math.sqrt(0.25 * abar + 1 - abar)


def some_draws(count: int, epoch: int = 0) -> tuple[Draw, ...]:
    return tuple(Draw(0, epoch, f"pair-{i}") for i in range(count))


def inverted(trainer: InPO, *timesteps: int) -> list[float]:
    """Where clean latents of 1 arrive at each of the timesteps."""
    both = torch.tensor(timesteps).repeat(2)
    ones, nothing = torch.ones(len(both), 1, dtype=torch.float64), Conditioning({"hidden": torch.zeros(len(both), 1)})
    arrived = trainer.invert(ones, both, nothing, some_draws(len(timesteps)))[:, 0]
    assert torch.equal(arrived[: len(timesteps)], arrived[len(timesteps) :])
    return arrived[: len(timesteps)].tolist()


def walk(trainer: InPO, latents: Tensor, grid: list[int], draws: tuple[Draw, ...] = ()) -> Tensor:
    """All latents along one grid, the network told where each move goes."""
    levels = torch.tensor(grid)[:, None].expand(-1, len(latents))
    return trainer.walk(latents, levels, levels[1:], Conditioning({"hidden": torch.zeros(len(latents), 1)}), draws)


def walk_back(trainer: InPO, latents: Tensor, grid: list[int], conditioning: Conditioning) -> Tensor:
    """Plain DDIM sampling down the grid."""
    for level, cleaner in pairwise(reversed(grid)):
        now, then = (torch.full((len(latents),), value) for value in (level, cleaner))
        with torch.no_grad():
            noise = trainer.noise_seen(latents, now, conditioning)
        latents = trainer.solver.step(noise, latents, now, then).mean
    return latents


def random_pairs(count: int, size: int = 8, epoch: int = 0) -> PairBatch:
    draws = some_draws(count, epoch)
    chosen, rejected = (torch.stack([d.normal(half, (size,)) for d in some_draws(count)]).double() for half in "wl")
    return PairBatch(Conditioning({"hidden": torch.zeros(count, 1)}), chosen, rejected, torch.ones(count), draws)
