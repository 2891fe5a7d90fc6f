"""DDIM-InPO: Diffusion-DPO at the noise that a pair's images come from, found by inverting the sampler.

Lu et al. 2025, "InPO: Inversion Preference Optimization with Reparametrized DDIM for Efficient Diffusion Model
Alignment" (arXiv:2503.18454). With x_t reached from the clean latents x0 by DDIM inversion, the noise that joins them,

    eps* = (x_t - sqrt(abar_t) x0) / sqrt(1 - abar_t),

is the target of both networks, another one for each image of a pair; the loss is Diffusion-DPO's. One move of the
inversion from level s to level d reads the noise eps from the network, at the latents of level s, and takes

    x_d = sqrt(abar_d) x0(s) + sqrt(1 - abar_d) eps,      x0(s) = (x_s - sqrt(1 - abar_s) eps) / sqrt(abar_s).

Where the released code deviates from these equations, the default follows them; `inversion: release` brings the first
three points back, for comparison:

- It stops at the grid's next level, up to 99 timesteps away from t, and calls the result x_t. Here the last move ends
  at t.
- It tells the network the level that a move comes from. Here it is the level that the move goes to: on Gaussian data,
  whose flow is known, ten moves then miss 0.6 % of the amplitude instead of 19 %.
- It draws t from 0, where the division above magnifies every error by 34. Here t starts at 2.
- It adds noise after every move, `eta` 0.1. Here that is an option, and 0 the default.
- The first pair's t serves the whole batch, and the noise table is rounded to half precision. Here neither happens.

The released code inverts with the policy, and so does the default; accounts of the paper name the reference, which is
`inversion_net: reference`. The inversion is told the caption of the loss, dropped or not.
With `cache_inversion` the reference inverts every pair once to all levels of the grid, nine passes, and a visit takes
one for the last move to t instead of 5.5 for all; see `diffalign.inversions`. It is off by default: the released run
visits hardly a pair twice, and a pair then has one posterior sample, and one caption to invert with, for all visits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from diffalign.batches import Conditioning, NoisyStates, PairBatch
from diffalign.devices import send, send_like
from diffalign.inversions import Inversions, InvertedPairs, InvertedSource, check_kind
from diffalign.policy import Policy, Predictor
from diffalign.predictions import Prediction
from diffalign.randomness import Draw
from diffalign.schedules import DiscreteSchedule, expand
from diffalign.timesteps import REFINER_SHARE, TimestepLaw, draw_timesteps
from diffalign.trainers.base import LossOutput, PairTrainer, PairTrainerConfig
from diffalign.transitions import DDIM, at_least_float32

if TYPE_CHECKING:
    from diffalign.data import PairSource
    from diffalign.loop import BatchSource

__all__ = ["InPO", "InPOConfig"]

FIRST_TIMESTEP = 2
"""The least noise that is trained on."""
HALVES = ("chosen", "rejected")


class InPOConfig(PairTrainerConfig):
    """Settings of DDIM-InPO.

    Attributes:
        beta: 2000 for SD1.5 and 5000 for SDXL, as released.
        timestep_sampling: "uniform" or "refiner".
        inversion: "exact" ends at t; "release", with eta 0.1, does what the released code does, for comparison.
        inversion_net: Whose forward passes invert: "policy", as released, or the frozen "reference".
        inversion_steps: Moves from clean latents to pure noise; 10 as released. A pair takes those below its t, 5.5 on
            average; with "release" 6.4.
        eta: Noise that every move adds, as a share of DDPM's on the same grid; 0.1 as released.
        cache_inversion: Invert every pair once and keep that on disk; needs the reference, "exact" and eta 0.
        inversion_batch_size: Pairs that are inverted at once for it.
    """

    fixed_reference: ClassVar[bool] = False

    inversion: Literal["exact", "release"] = "exact"
    inversion_net: Literal["policy", "reference"] = "policy"
    inversion_steps: int = Field(default=10, ge=1)
    eta: float = Field(default=0.0, ge=0, le=1)
    cache_inversion: bool = False
    inversion_batch_size: int = Field(default=4, ge=1)

    @field_validator("timestep_sampling")
    @classmethod
    def _check_law(cls, law: TimestepLaw) -> TimestepLaw:
        if law in ("turbo", "turbo_informative"):
            raise ValueError("a model distilled to a few steps has no path of small steps to invert; use diffusion_dpo")
        if law == "logit_normal":
            raise ValueError("this law is for flows, which DDIM does not invert; use uniform, or train with flow_dpo")
        return law

    @model_validator(mode="after")
    def _check_cache(self) -> InPOConfig:
        if self.cache_inversion and (self.inversion_net, self.inversion, self.eta) != ("reference", "exact", 0):
            raise ValueError(
                "cache_inversion needs inversion_net=reference, inversion=exact and eta=0, got "
                f"{self.inversion_net}, {self.inversion} and {self.eta:g}; set them, or cache_inversion=false"
            )
        return self


class InPO(PairTrainer):
    """`PairTrainer` whose noisy latents come from inversion instead of from fresh noise.

    Args:
        policy: A model of noise or v on a discrete chain.
        config: Settings, or None to build them from `options`.
        options: Fields of `Config`.

    Raises:
        ValueError: If the model is a flow or predicts clean latents, or has too few levels for `inversion_steps`.
    """

    Config: ClassVar[type[PairTrainerConfig]] = InPOConfig
    predictions: ClassVar[frozenset[Prediction]] = frozenset({Prediction.EPSILON, Prediction.V})
    config: InPOConfig

    @classmethod
    def forwards(cls, config: Any) -> dict[str, float]:
        """See `Trainer.forwards`; with the cache, after every pair was inverted once."""
        return {"policy": 2, "reference": 2, "inversion": 2 if config.cache_inversion else config.inversion_steps + 1}

    def __init__(self, policy: Policy, config: InPOConfig | None = None, **options: Any) -> None:
        super().__init__(policy, config, **options)
        if not isinstance(self.schedule, DiscreteSchedule):
            raise ValueError(
                f"InPO inverts DDIM on a discrete chain, and this model has a {type(self.schedule).__name__}; "
                "train flows with flow_dpo"
            )
        self.levels, steps = len(self.schedule), self.config.inversion_steps
        if 2 * steps > self.levels:
            raise ValueError(
                f"inversion_steps must be at most {self.levels // 2}, half of the model's noise levels, got {steps}"
            )
        self.solver = DDIM(self.schedule, Prediction.EPSILON, eta=0.0)
        self.inverter: Predictor = self.policy if self.config.inversion_net == "policy" else self.reference
        self.inversions: Inversions | None = None  # of `source`

    def describe(self) -> str:
        """One line for the start of a run; see `PairTrainer.describe`."""
        config = self.config
        return (
            f"{super().describe()}; {config.inversion} inversion by the {config.inversion_net} "
            f"in at most {config.inversion_steps} passes, eta {config.eta:g}"
            f"{', all but the last one kept on disk' if config.cache_inversion else ''}"
        )

    def noisy_states(self, batch: PairBatch) -> NoisyStates:
        """Both halves inverted to the pair's one timestep, each with its own eps*; float32 and without gradient."""
        latents = at_least_float32(torch.cat([batch.chosen, batch.rejected]))
        conditioning, timesteps = batch.conditioning.repeat(2), self.draw_timesteps(batch.draws).repeat(2)
        if isinstance(batch, InvertedPairs):
            starts, levels = batch.last_move(self.grid(), timesteps)
            noisy_latents = self.walk(starts, levels, levels[1:], batch.captions.repeat(2), batch.draws)
        else:
            noisy_latents = self.invert(latents, timesteps, conditioning, batch.draws)
        alphas, sigmas = self.schedule.scales(timesteps)
        noise = (noisy_latents - expand(alphas, latents) * latents) / expand(sigmas, latents)
        return NoisyStates(
            conditioning=conditioning,
            latents=latents,
            noise=noise,
            timesteps=send(timesteps, latents.device),
            noisy_latents=noisy_latents,
            target=self.policy.prediction.target(latents, noise, alphas, sigmas),
            alphas=alphas,
        )

    def draw_timesteps(self, draws: Sequence[Draw]) -> Tensor:
        """One timestep per pair, [B]: uniform from `FIRST_TIMESTEP` to the law's last; in release mode from 0."""
        if self.config.inversion == "release":
            return draw_timesteps(self.schedule, draws, self.config.timestep_sampling)
        uniform = torch.tensor([draw.uniform("timestep") for draw in draws], dtype=torch.float64)
        return FIRST_TIMESTEP + (uniform * (self._trained_levels() - FIRST_TIMESTEP)).long()

    def _trained_levels(self) -> int:
        """How many levels the law of the timesteps knows, from clean latents on."""
        return self.levels // REFINER_SHARE if self.config.timestep_sampling == "refiner" else self.levels

    # --- the cached inversion --------------------------------------------------------------------------------------

    def source(self, source: PairSource, seed: int) -> BatchSource:
        """The data's pairs, with `cache_inversion` as they were inverted."""
        if not self.config.cache_inversion:
            return source
        self.inversions = Inversions(source.encoded, self.grid(), seed, self.policy)
        return InvertedSource(source, self.inversions, self.draw_timesteps)

    def begin(self, step: int, folder: Path) -> None:
        """With `cache_inversion`, inverts the pairs that no earlier process has inverted; see `Inversions.fill`."""
        super().begin(step, folder)
        if self.inversions is not None:
            self.inversions.fill(step, folder / "inversions", self.invert_to_grid, self.config.inversion_batch_size)

    def loss(self, batch: PairBatch) -> LossOutput:
        """See `PairTrainer.loss`; raises a TypeError for pairs that `source` did not give."""
        check_kind(batch, self.config.cache_inversion)
        return super().loss(batch)

    def validate(self, batch: PairBatch) -> dict[str, Tensor]:
        """Metrics of fixed pairs, which are inverted anew each time."""
        return super().loss(batch).metrics

    def grid(self) -> Tensor:
        """The levels that exact paths pass on their way to the greatest timestep, [L]; 0 for clean latents."""
        levels = self.path(torch.tensor([self._trained_levels() - 1]))[0][:, 0]
        return levels[:-1][levels.diff() > 0]

    def invert_to_grid(self, latents: Tensor, captions: Conditioning) -> Tensor:
        """Where latents [N, C, ...] are at every level of the grid, [N, L, C, ...]."""
        device = next(self.policy.denoiser.parameters()).device
        states, captions = [send(latents, device)], captions.to(device)
        for move in pairwise(self.grid()):
            levels = torch.stack(move)[:, None].expand(-1, len(latents))
            states.append(self.walk(states[-1], levels, levels[1:], captions, ()))
        return torch.stack(states, dim=1)

    # --- inversion -----------------------------------------------------------------------------------------------

    def path(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """The levels that samples pass on their way to `timesteps` [N], and what the network is told in each move.

        Level 0 of the table stands for clean latents. A path that has reached its end stays there. With ten moves on a
        thousand levels, "exact" goes 0, 101, 201, ..., t and "release" 0, 1, 101, 201, ..., 901, or to the first of
        these that is at least t; the release tells the network where a move comes from, -99 in the first.

        Returns:
            Levels [M + 1, N] and timesteps [M, N], for at most M moves.
        """
        stride = self.levels // self.config.inversion_steps
        grid = torch.arange(self.config.inversion_steps) * stride + 1  # 1, 101, ..., 901
        first, timesteps = torch.zeros(1, dtype=torch.long), timesteps.cpu()
        if self.config.inversion == "exact":
            ends = torch.cat([first, grid[1:], torch.tensor([self.levels - 1])])
            levels = torch.minimum(ends[:, None], timesteps)
            return levels, levels[1:]
        stops = grid[torch.searchsorted(grid, timesteps).clamp(max=len(grid) - 1)]  # the first level that is at least t
        levels = torch.minimum(torch.cat([first, grid])[:, None], stops)
        return levels, (grid - stride)[:, None].expand(-1, len(timesteps))

    def invert(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, draws: Sequence[Draw]) -> Tensor:
        """Noisy latents [2B, C, ...] that the sampler takes to `latents`, at `timesteps` [2B]."""
        return self.walk(latents, *self.path(timesteps), conditioning, draws)

    @torch.no_grad()
    def walk(
        self, latents: Tensor, levels: Tensor, told: Tensor, conditioning: Conditioning, draws: Sequence[Draw]
    ) -> Tensor:
        """Latents moved along `levels`, without guidance and without gradient.

        Args:
            latents: Clean latents, [2B, C, ...].
            levels: Rising rows of the noise table, [M + 1, 2B]; a sample moves where its level changes.
            told: Timesteps that the network is told, [M, 2B]; its answer to one below the table is read at level 0.
            conditioning: 2B rows.
            draws: Where the pairs' random numbers come from, B entries.

        Returns:
            [2B, C, ...], in the dtype of `latents`.
        """
        noisy, together = latents.clone(), self._calls_together()
        for move, (source, destination) in enumerate(pairwise(levels)):
            moving = destination > source
            rows = torch.arange(len(moving)) if together else moving.nonzero()[:, 0]
            if not len(rows):
                continue
            places = send(rows, noisy.device)
            before = noisy[places]
            noise = self.noise_seen(before, told[move, rows], conditioning[rows])
            moved = self.solver.step(noise, before, source[rows], destination[rows]).mean
            if self.config.eta > 0:
                fresh = [draw.normal(f"inversion/{half}/{move}", noisy.shape[1:]) for half in HALVES for draw in draws]
                added = expand(self.added_std(source[rows], destination[rows]), moved)
                moved = moved + added * send_like(torch.stack(fresh)[rows], moved)
            noisy[places] = torch.where(expand(moving[rows], moved) > 0, moved, before)
        return noisy

    def noise_seen(self, noisy_latents: Tensor, told: Tensor, conditioning: Conditioning) -> Tensor:
        """The noise [N, C, ...] that the inverting network sees in latents, told that they are at `told` [N].

        A network of v is read at that level too, so that it gives what the same network of noise would.
        """
        output = self.inverter.predict(noisy_latents, send(told, noisy_latents.device), conditioning)
        scales = self.schedule.scales(told.clamp(min=0))
        return self.policy.prediction.to_sample_and_noise(output.to(noisy_latents), noisy_latents, *scales)[1]

    def added_std(self, source: Tensor, destination: Tensor) -> Tensor:
        """Deviation [N] of the noise after moves, in the release's form: what DDIM with `eta` adds on the way back.

        Song et al. 2021 (arXiv:2010.02502), Eq. 16. Nothing is taken from the deterministic part in return.
        """
        alphas, sigmas = self.schedule.scales(source)
        noisier_alphas, noisier_sigmas = self.schedule.scales(destination)
        return self.config.eta * sigmas / noisier_sigmas * (1 - (noisier_alphas / alphas).square()).sqrt()

    def _calls_together(self) -> bool:
        """Whether all processes must call the network equally often, so that each takes every move with every sample.

        Sharded weights, and the buffers of a module under DDP, travel between the processes in every call.
        """
        if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
            return False
        wrapped = self.policy.wrapped
        return not isinstance(wrapped, DistributedDataParallel) or any(True for _ in wrapped.buffers())
