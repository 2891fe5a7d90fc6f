"""Noise schedules: what a timestep means. Notation: x_t = alpha * x0 + sigma * noise.

Only a schedule may interpret timesteps. Tables are kept in float64 and cast when they meet a tensor: the noise
scale of the first Stable Diffusion step, 1 - abar_0 = 8.5e-4, loses half of its digits in half precision.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.devices import send_like


def expand(values: Tensor, like: Tensor) -> Tensor:
    """Per-sample values [B] shaped to broadcast against `like` [B, ...], in its dtype and on its device."""
    return send_like(values, like).reshape(-1, *[1] * (like.ndim - 1))


class Schedule(ABC):
    """Turns timesteps [B], in the network's own units, into signal and noise scales [B]."""

    @abstractmethod
    def scales(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(alphas, sigmas) at `timesteps`, both [B], float64."""

    @abstractmethod
    def timesteps_at(self, uniform: Tensor) -> Tensor:
        """The timesteps that numbers in [0, 1), [B], stand for under a uniform law; 0 is the least noise."""

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents alpha * latents + sigma * noise, [B, C, ...], in the dtype of `latents`."""
        alphas, sigmas = self.scales(timesteps)
        return expand(alphas, latents) * latents + expand(sigmas, latents) * noise


class DiscreteSchedule(Schedule):
    """A variance-preserving chain of T steps (Ho et al. 2020, arXiv:2006.11239): alpha = sqrt(abar_t).

    Attributes:
        alphas_cumprod: abar_t = prod(1 - beta_s), [T], float64.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        if alphas_cumprod.ndim != 1 or not bool((alphas_cumprod.diff() < 0).all()):
            raise ValueError("alphas_cumprod must be a falling table of one dimension")
        self.alphas_cumprod = alphas_cumprod.double().cpu()

    @classmethod
    def scaled_linear(cls, steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> DiscreteSchedule:
        """Stable Diffusion's table: beta linear in its square root (Rombach et al. 2022, arXiv:2112.10752)."""
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
        return cls((1 - betas).cumprod(0))

    @classmethod
    def from_betas(cls, betas: Tensor | Sequence[float]) -> DiscreteSchedule:
        """The chain with the given noise rates beta_t, [T]."""
        return cls((1 - torch.as_tensor(betas, dtype=torch.float64)).cumprod(0))

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def scales(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(sqrt(abar_t), sqrt(1 - abar_t)) for integer timesteps in 0..T-1.

        Raises:
            IndexError: If a timestep lies outside the table.
        """
        index = timesteps.detach().cpu().long()
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= len(self)):
            raise IndexError(f"timesteps must lie in 0..{len(self) - 1}, got {int(index.min())}..{int(index.max())}")
        abar = self.alphas_cumprod[index]
        return abar.sqrt(), (1 - abar).sqrt()

    def timesteps_at(self, uniform: Tensor) -> Tensor:
        """floor(T * u): uniform over 0..T-1."""
        return (uniform.double() * len(self)).long().clamp(max=len(self) - 1)

    def zero_terminal_snr(self) -> DiscreteSchedule:
        """The same chain rescaled so that its last step is pure noise.

        Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed" (arXiv:2305.08891),
        Algorithm 1: sqrt(abar) is shifted so that its last entry is 0 and scaled so that its first is unchanged.
        """
        root = self.alphas_cumprod.sqrt()
        return DiscreteSchedule(((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2)


class FlowSchedule(Schedule):
    """Rectified flow (Liu et al. 2023, arXiv:2209.03003): alpha = 1 - t, sigma = t, with t = timestep / T.

    Args:
        steps: T.
        shift: How far the model's sampler moves its steps towards noise (Esser et al. 2024, arXiv:2403.03206, Eq. 23);
            1 is no shift. It changes which timesteps are visited, never what a timestep means.
    """

    def __init__(self, steps: int = 1000, shift: float = 1.0) -> None:
        self.steps, self.shift = steps, shift

    def timestep_of_index(self, index: Tensor) -> Tensor:
        """Entries 0..T-1 of the sampler's falling table, [B]: T * s b / (1 + (s - 1) b) with b = (T - i) / T."""
        b = (self.steps - index.double()) / self.steps
        return self.steps * self.shift * b / (1 + (self.shift - 1) * b)

    def scales(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(1 - t, t) for real timesteps in [0, T]."""
        t = timesteps.detach().cpu().double() / self.steps
        return 1 - t, t

    def timesteps_at(self, uniform: Tensor) -> Tensor:
        """T * u, uniform over [0, T)."""
        return uniform.double() * self.steps
