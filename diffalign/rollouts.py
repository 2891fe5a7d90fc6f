"""Rollouts: images that the policy draws itself, with every step of its sampler and that step's probability.

Methods that learn from their own trajectories need p(x_next | x_t, prompt) of every step, under the policy that drew
it and under others. `StochasticSampler` draws trajectories and gives the law of a step under any predictor, so that
drawing and training cannot disagree about grid, noise or guidance; `rollout_source` turns scored trajectories into
batches.

The sampler is DDIM with noise on Stable Diffusion's own grid for chains, and Flow-GRPO's stochastic equation on the
grid of a fresh scheduler for flows; see `diffalign.transitions`. All K images of a prompt start from one initial noise,
so that they differ by the steps that are learned from (D3PO, Yang et al. 2023, arXiv:2311.13231).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.batches import Conditioning, PairBatch
from diffalign.devices import send
from diffalign.generation import fill_up
from diffalign.policy import Policy, Predictor
from diffalign.randomness import Draw
from diffalign.schedules import DiscreteSchedule, FlowSchedule, Schedule
from diffalign.transitions import DDIM, Euler, Solver, Transition, at_least_float32, leading_timesteps, solver_for

__all__ = ["DeterministicSampler", "Rollouts", "StochasticSampler", "TransitionPairs", "guided", "sampling_grid"]


@dataclass(frozen=True)
class Rollouts:
    """Trajectories of N = P * K images: the K images of prompt 0, then those of prompt 1, and so on; on the CPU.

    Attributes:
        prompts: P prompts.
        draws: Where each prompt's random numbers come from, P entries.
        conditioning: The prompts' embeddings, P rows.
        unconditional: What guidance contrasts them with, one row.
        path: Latents at every level, the initial noise first, [N, S + 1, C, ...], float32.
        grid: The levels' timesteps, [S + 1].
        log_probs: Log-density of every step when it was drawn, mean over elements, [N, S], float32.
    """

    prompts: tuple[str, ...]
    draws: tuple[Draw, ...]
    conditioning: Conditioning
    unconditional: Conditioning
    path: Tensor
    grid: Tensor
    log_probs: Tensor

    @property
    def images_per_prompt(self) -> int:
        """K."""
        return len(self.path) // len(self.prompts)

    def of_prompt(self, number: int) -> Rollouts:
        """The K trajectories of one prompt, P = 1."""
        images = slice(number * self.images_per_prompt, (number + 1) * self.images_per_prompt)
        return replace(
            self,
            prompts=(self.prompts[number],),
            draws=(self.draws[number],),
            conditioning=self.conditioning[[number]],
            path=self.path[images],
            log_probs=self.log_probs[images],
        )

    @property
    def latents(self) -> Tensor:
        """Before each step, [N, S, C, ...]."""
        return self.path[:, :-1]

    @property
    def next_latents(self) -> Tensor:
        """After each step, [N, S, C, ...]."""
        return self.path[:, 1:]

    @property
    def timesteps(self) -> Tensor:
        """Of `latents`, [S]."""
        return self.grid[:-1]

    @property
    def next_timesteps(self) -> Tensor:
        """Of `next_latents`, [S]."""
        return self.grid[1:]

    @property
    def final(self) -> Tensor:
        """What is decoded, [N, C, ...]."""
        return self.path[:, -1]


@dataclass(frozen=True)
class TransitionPairs(PairBatch):
    """One step of the sampler for both images of B pairs of one prompt each.

    `chosen` and `rejected` are the latents *before* the step, [B, C, ...]. Both images take the same step.

    Attributes:
        next_chosen: Latents after the step, [B, C, ...].
        next_rejected: Likewise.
        timesteps: Before the step, [B], in the network's units, on the CPU.
        next_timesteps: After the step, [B], likewise.
        preference: 1 where `chosen` is the better image, -1 where `rejected` is, 0 for a tie; [B].
        unconditional: What guidance contrasts the prompts with, one row.
    """

    stays_on_cpu: ClassVar[frozenset[str]] = frozenset({"timesteps", "next_timesteps"})

    next_chosen: Tensor
    next_rejected: Tensor
    timesteps: Tensor
    next_timesteps: Tensor
    preference: Tensor
    unconditional: Conditioning


def sampling_grid(schedule: Schedule, steps: int) -> Tensor:
    """The falling timesteps of a model's own sampler, the last one 0, [steps + 1].

    Chains: `leading_timesteps`. Flows: the table of a freshly loaded Euler scheduler, which spreads timesteps evenly
    between the ends of its shifted table and shifts them again: 1, .9601, ..., .2780, .0089, 0 for 10 steps of shift 3.

    Raises:
        ValueError: If the schedule has fewer levels than that.
    """
    if isinstance(schedule, DiscreteSchedule):
        if not 1 <= steps < len(schedule):
            raise ValueError(f"expected 1 to {len(schedule) - 1} sampling steps for this schedule, got {steps}")
        return leading_timesteps(schedule, steps)
    if not isinstance(schedule, FlowSchedule) or steps < 1:
        raise ValueError(f"expected a chain or a flow and at least 1 step, got {type(schedule).__name__} and {steps}")
    lowest = float(schedule.timestep_of_index(torch.tensor(schedule.steps - 1)))
    even = torch.linspace(schedule.steps, lowest, steps, dtype=torch.float64)
    return torch.cat([schedule.timestep_of_index(schedule.steps - even), even.new_zeros(1)])


def guided(
    predictor: Predictor,
    latents: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    unconditional: Conditioning,
    scale: float,
) -> Tensor:
    """The network's output under classifier-free guidance, u + scale (c - u), [B, C, ...]; at 1 without u.

    Args:
        predictor: The policy or its reference.
        latents: [B, C, ...].
        timesteps: [B].
        conditioning: B rows.
        unconditional: One row.
        scale: In the convention of diffusers.
    """
    if scale == 1:
        return predictor.predict(latents, timesteps, conditioning)
    both = Conditioning.concatenate([unconditional.repeat(len(latents)), conditioning])
    twice = latents.repeat(2, *[1] * (latents.ndim - 1))
    without, told = at_least_float32(predictor.predict(twice, timesteps.repeat(2), both)).chunk(2)
    return without + scale * (told - without)


class DeterministicSampler:
    """Draws latents without noise between the steps: DDIM with eta 0 on a chain, Euler on a flow.

    Works on embeddings and gives latents, so that neither text encoder nor autoencoder is needed.

    Args:
        policy: Whose schedule, prediction and latents are drawn.
        num_inference_steps: S.
        guidance_scale: See `guided`.

    Raises:
        ValueError: If the schedule has no such sampler, or fewer levels than steps.
    """

    def __init__(self, policy: Policy, *, num_inference_steps: int, guidance_scale: float) -> None:
        self.policy, self.guidance_scale = policy, guidance_scale
        self.grid = sampling_grid(policy.schedule, num_inference_steps)
        self.solver: Solver
        if isinstance(policy.schedule, FlowSchedule):
            self.solver = Euler(policy.schedule)
        elif isinstance(policy.schedule, DiscreteSchedule):
            self.solver = DDIM(policy.schedule, policy.prediction, eta=0.0)

    @property
    def forwards_per_sample(self) -> int:
        """How often a sample goes through the denoiser; guidance doubles it."""
        return (len(self.grid) - 1) * (1 if self.guidance_scale == 1 else 2)

    @torch.no_grad()
    def draw(
        self, predictor: Predictor, draws: Sequence[Draw], conditioning: Conditioning, unconditional: Conditioning
    ) -> Tensor:
        """Latents [B, C, ...], float32, on the CPU.

        Args:
            predictor: The policy or its reference.
            draws: Where the initial noise comes from, B entries.
            conditioning: B rows.
            unconditional: One row.
        """
        device = next(self.policy.denoiser.parameters()).device
        conditioning, unconditional = conditioning.to(device), unconditional.to(device)
        noise = torch.stack([draw.normal("initial noise", self.policy.latent_shape) for draw in draws])
        latents = send(noise, device)
        for now, after in pairwise(self.grid):
            times = now.expand(len(draws)), after.expand(len(draws))
            output = guided(predictor, latents, times[0], conditioning, unconditional, self.guidance_scale)
            latents = self.solver.step(output, latents, *times).mean
        return latents.float().cpu()


class StochasticSampler:
    """Draws with noise at every step, and knows the law of every step.

    Args:
        policy: Draws.
        num_inference_steps: S; 20 in D3PO.
        guidance_scale: Weight w of classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) in the convention of
            diffusers, u + w (c - u); 1 switches it off, as for models that read a scale as an input.
        eta: Noise of a step, above 0; None is 1 for chains (DDIM's eta) and 0.7 for flows (Flow-GRPO's noise level).

    Raises:
        ValueError: If `eta` is not above 0, or the schedule has no such sampler.
    """

    def __init__(
        self, policy: Policy, *, num_inference_steps: int = 20, guidance_scale: float = 5.0, eta: float | None = None
    ) -> None:
        if eta is None:
            eta = 0.7 if isinstance(policy.schedule, FlowSchedule) else 1.0
        self.policy, self.guidance_scale, self.eta = policy, guidance_scale, eta
        self.solver = solver_for(policy.schedule, policy.prediction, eta)
        self.grid = sampling_grid(policy.schedule, num_inference_steps)

    def transition(
        self,
        predictor: Predictor,
        latents: Tensor,
        timesteps: Tensor,
        next_timesteps: Tensor,
        conditioning: Conditioning,
        unconditional: Conditioning,
    ) -> Transition:
        """The law of the next latents under a predictor, with guidance; both branches have its gradient.

        Args:
            predictor: The policy or its reference.
            latents: [B, C, ...].
            timesteps: Of the latents, [B].
            next_timesteps: Where the step leads, [B].
            conditioning: B rows.
            unconditional: One row.
        """
        output = guided(predictor, latents, timesteps, conditioning, unconditional, self.guidance_scale)
        return self.solver.step(output, latents, timesteps, next_timesteps)

    @torch.no_grad()
    def rollout(
        self, prompts: Sequence[str], draws: Sequence[Draw], images_per_prompt: int = 2, batch_size: int = 8
    ) -> Rollouts:
        """Trajectories of K images for every prompt.

        An image's numbers depend on its prompt's `Draw` and its place among the K alone, never on its batch.

        Args:
            prompts: P prompts.
            draws: One per prompt.
            images_per_prompt: K.
            batch_size: Trajectories per forward pass, before guidance doubles it; changes the last digits only.

        Raises:
            ValueError: If there is not one draw per prompt, or no prompt.
        """
        if not prompts or len(prompts) != len(draws):
            raise ValueError(f"expected one draw per prompt, got {len(prompts)} prompts and {len(draws)} draws")
        policy = self.policy
        policy.reload_encoders()
        parts = [policy.encode_prompts(prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size)]
        conditioning, unconditional = Conditioning.concatenate(parts), policy.encode_unconditional(1)
        images = [(number, k) for number in range(len(prompts)) for k in range(images_per_prompt)]
        drawn = []
        for start in range(0, len(images), batch_size):
            chunk = images[start : start + batch_size]
            filled = fill_up(chunk, batch_size) if policy.compiled and start else chunk  # as long as those before
            told = conditioning[[number for number, _ in filled]]
            path, log_probs = self._trajectories([(draws[number], k) for number, k in filled], told, unconditional)
            drawn.append((path[: len(chunk)], log_probs[: len(chunk)]))
        return Rollouts(
            prompts=tuple(prompts),
            draws=tuple(draws),
            conditioning=conditioning.to("cpu"),
            unconditional=unconditional.to("cpu"),
            path=torch.cat([path for path, _ in drawn]),
            grid=self.grid,
            log_probs=torch.cat([log_probs for _, log_probs in drawn]),
        )

    def _trajectories(
        self, images: Sequence[tuple[Draw, int]], conditioning: Conditioning, unconditional: Conditioning
    ) -> tuple[Tensor, Tensor]:
        """Paths [B, S + 1, C, ...] and log-densities [B, S] of images named by their prompt's draw and a number."""
        device = next(self.policy.denoiser.parameters()).device
        shape = self.policy.latent_shape
        conditioning, unconditional = conditioning.to(device), unconditional.to(device)
        latents = send(torch.stack([draw.normal("initial noise", shape) for draw, _ in images]), device)
        path, log_probs = [latents], []
        for step, (now, after) in enumerate(pairwise(self.grid)):
            times = now.expand(len(images)), after.expand(len(images))
            law = self.transition(self.policy, latents, *times, conditioning, unconditional)
            # drawn while the device still computes the law
            noise = torch.stack([draw.normal(f"image {k}, step {step}", shape) for draw, k in images])
            latents = law.draw(send(noise, device)).float()  # the next step starts from exactly what is stored
            path.append(latents)
            log_probs.append(law.log_prob(latents).float())
        return torch.stack(path, 1).cpu(), torch.stack(log_probs, 1).cpu()

    @torch.no_grad()
    def decode(self, rollouts: Rollouts, batch_size: int = 8) -> Tensor:
        """The images, [N, 3, H, W], or videos, [N, T, 3, H, W], in [0, 1], on the CPU."""
        final = rollouts.final
        chunks = [final[start : start + batch_size] for start in range(0, len(final), batch_size)]
        return torch.cat([self.policy.decode(chunk).float().cpu() for chunk in chunks])
