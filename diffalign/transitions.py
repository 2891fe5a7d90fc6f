"""One step of a sampler as a Gaussian: mean, standard deviation, draw and log-probability.

Methods that learn from their own sampling trajectories (D3PO, and policy gradients) need the density of every step,
p(x_next | x_t), under policy and reference. A solver gives it for one step from the network's output:

    `DDIM`      Song et al. 2021, arXiv:2010.02502, Eq. 12 and 16: discrete chains, any prediction
    `Euler`     the probability flow of a rectified flow; no noise, so no density
    `FlowSDE`   Flow-GRPO (Liu et al. 2025, arXiv:2505.05470): sigma_t = a sqrt(t / (1 - t))
    `DanceSDE`  DanceGRPO (Xue et al. 2025, arXiv:2505.07818): sigma_t = eta, the same drift

The flow's stochastic steps have the marginals of the deterministic ones. All arithmetic is at least float32: in half
precision the mean loses the digits that the log-probability is made of.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.devices import send_like
from diffalign.predictions import Prediction
from diffalign.schedules import DiscreteSchedule, FlowSchedule, Schedule, expand


@dataclass(frozen=True)
class Transition:
    """The law of the next latents.

    Attributes:
        mean: [B, C, ...], with the gradient of the network's output.
        std: [B], float64, at least 0, on the CPU as schedules are.
    """

    mean: Tensor
    std: Tensor

    def draw(self, noise: Tensor) -> Tensor:
        """Next latents mean + std * noise, [B, C, ...]."""
        return self.mean + expand(self.std, self.mean) * send_like(noise, self.mean)

    def log_prob(self, next_latents: Tensor) -> Tensor:
        """Log-density of `next_latents`, its *mean* over elements, [B].

        The mean and not the sum, as in DDPO's and D3PO's released code, whose betas and clipping ranges expect it.

        Raises:
            ValueError: If a standard deviation is 0: a deterministic step has no density.
        """
        if not bool((self.std > 0).all()):
            raise ValueError(
                "a step without noise has no log-probability; sample with eta (or the noise level) above 0"
            )
        std = expand(self.std, self.mean)
        squares = (next_latents.detach().to(self.mean) - self.mean).square() / (2 * std.square())
        return -squares.flatten(1).mean(1) - send_like(self.std.log() + 0.5 * math.log(2 * math.pi), self.mean)


class Solver(ABC):
    """Turns the network's (guided) output at one timestep into the law of the next latents."""

    stochastic: ClassVar[bool] = True

    @abstractmethod
    def step(self, output: Tensor, noisy_latents: Tensor, timesteps: Tensor, next_timesteps: Tensor) -> Transition:
        """The step from `timesteps` to `next_timesteps`, both [B] in the schedule's units; noise falls."""


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it was."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class DDIM(Solver):
    """Denoising diffusion implicit models with noise `eta`: 0 is deterministic, 1 is DDPM on the same grid.

    With abar_t of the present and abar_s of the next level,

        std  = eta sqrt((1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s))
        mean = sqrt(abar_s) x0 + sqrt(1 - abar_s - std^2) noise

    Args:
        schedule: The chain.
        prediction: What the network predicts.
        eta: At least 0. A grid ends at level 0 of the table, not at abar = 1, so that the last std stays above 0.
    """

    def __init__(self, schedule: DiscreteSchedule, prediction: Prediction, eta: float = 1.0) -> None:
        if not eta >= 0:
            raise ValueError(f"eta must be at least 0, got {eta}")
        self.schedule, self.prediction, self.eta = schedule, prediction, eta

    def step(self, output: Tensor, noisy_latents: Tensor, timesteps: Tensor, next_timesteps: Tensor) -> Transition:
        """See `Solver.step`."""
        output, noisy_latents = at_least_float32(output), at_least_float32(noisy_latents)
        alphas, sigmas = self.schedule.scales(timesteps)
        next_alphas, next_sigmas = self.schedule.scales(next_timesteps)
        x0, noise = self.prediction.to_sample_and_noise(output, noisy_latents, alphas, sigmas)
        std = self.eta * (next_sigmas / sigmas) * (1 - (alphas / next_alphas).square()).clamp(min=0).sqrt()
        left = (next_sigmas.square() - std.square()).clamp(min=0).sqrt()
        return Transition(expand(next_alphas, x0) * x0 + expand(left, noise) * noise, std)


class _FlowSolver(Solver):
    """The drift that all flow solvers share; they differ in sigma_t.

        mean = x + [v + sigma^2 / (2 t) (x + (1 - t) v)] dt        with dt = t_next - t < 0
        std  = sigma sqrt(-dt)

    which is dx = [v - sigma^2 / 2 * score] dt + sigma dw with score = -(x + (1 - t) v) / t.
    """

    def __init__(self, schedule: FlowSchedule) -> None:
        self.schedule = schedule

    @abstractmethod
    def sigma(self, t: Tensor, next_t: Tensor) -> Tensor:
        """Noise of the stochastic equation at t in (0, 1], [B]."""

    def step(self, output: Tensor, noisy_latents: Tensor, timesteps: Tensor, next_timesteps: Tensor) -> Transition:
        velocity, x = at_least_float32(output), at_least_float32(noisy_latents)
        t, next_t = self.schedule.scales(timesteps)[1], self.schedule.scales(next_timesteps)[1]
        dt, sigma = next_t - t, self.sigma(t, next_t)
        pull = sigma.square() / (2 * t)
        mean = x * expand(1 + pull * dt, x) + velocity * expand((1 + pull * (1 - t)) * dt, x)
        return Transition(mean, sigma * (-dt).sqrt())


class Euler(_FlowSolver):
    """x + v dt: the sampler of every flow pipeline in diffusers."""

    stochastic = False

    def sigma(self, t: Tensor, next_t: Tensor) -> Tensor:
        """None."""
        return torch.zeros_like(t)


class FlowSDE(_FlowSolver):
    """sigma_t = noise_level * sqrt(t / (1 - t)).

    At t = 1 the root is infinite; there, as in the released code, 1 - t is taken at the next timestep.

    Args:
        schedule: The flow.
        noise_level: a; 0.7 in the released configurations.
    """

    def __init__(self, schedule: FlowSchedule, noise_level: float = 0.7) -> None:
        super().__init__(schedule)
        self.noise_level = noise_level

    def sigma(self, t: Tensor, next_t: Tensor) -> Tensor:
        """Of Flow-GRPO."""
        rest = torch.where(t < 1, 1 - t, 1 - next_t)
        return self.noise_level * (t / rest).sqrt()


class DanceSDE(_FlowSolver):
    """sigma_t = eta, the same at every step.

    Args:
        schedule: The flow.
        eta: 0.3 for images and 0.25 for HunyuanVideo in the released configurations.
    """

    def __init__(self, schedule: FlowSchedule, eta: float = 0.3) -> None:
        super().__init__(schedule)
        self.eta = eta

    def sigma(self, t: Tensor, next_t: Tensor) -> Tensor:
        """Of DanceGRPO."""
        return torch.full_like(t, self.eta)


def leading_timesteps(schedule: DiscreteSchedule, steps: int, offset: int = 1) -> Tensor:
    """Stable Diffusion's falling grid and a last entry 0, [steps + 1]: 951, 901, ..., 51, 1, 0 for 20 of 1000 steps."""
    stride = len(schedule) // steps
    return torch.cat([torch.arange(steps - 1, -1, -1) * stride + offset, torch.zeros(1, dtype=torch.long)])


def solver_for(schedule: Schedule, prediction: Prediction, eta: float) -> Solver:
    """The stochastic solver of a model: `DDIM` on a chain, `FlowSDE` on a flow, with noise `eta`.

    Raises:
        ValueError: If `eta` is not above 0, so that steps would have no density.
    """
    if not eta > 0:
        raise ValueError(f"eta must be above 0 for steps to have a probability, got {eta}; D3PO and DDPO take 1")
    if isinstance(schedule, FlowSchedule):
        return FlowSDE(schedule, eta)
    if isinstance(schedule, DiscreteSchedule):
        return DDIM(schedule, prediction, eta)
    raise ValueError(f"no solver with probabilities for a {type(schedule).__name__}; expected a chain or a flow")
