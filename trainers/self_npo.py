"""Self-NPO: a negative model without preferences, by truncated diffusion fine-tuning.

Wang et al. 2025, "Self-NPO: Data-Free Diffusion Model Enhancement via Truncated Diffusion Fine-Tuning"
(arXiv:2505.11777), as its released code does it. A teacher walks a few sampler steps from a noised image, badly guided:

    out = cond + w * (cond - uncond)            w = -1 is the unconditional output alone
    t'  = the level reached after K DDIM moves from a level drawn uniformly among 25
    x*  = the teacher's clean image at (x_t', t')

and the student learns to see x* from a noisier state of the same walk, s > t', with n = sigma / alpha:

    x_s  = alpha_s (x_t' / alpha_t' + sqrt(n_s^2 - n_t'^2) xi)
    loss = mean(sqrt((x0(x_s) - x*)^2 + h^2) - h)

Noise is added to x_t', not to x*, so x_s lies where noised samples of the teacher lie. What is learnt is a weaker model
that errs as the original one does. It takes the place of the unconditional branch; see `docs/negative_models.md`.

Paper and released code differ, and the code is followed: the walk starts from a noised image and not from pure noise
(`start`), so images with captions are needed; the teacher is a moving average of the student (`teacher`); its guidance
is in no formula (`w`); the loss is pseudo-Huber (`loss_type`). Other than the code, the clean image is always looked at
again at t', even where all walks of a batch have ended at timestep 0.

For chains only. Every formula holds for flows too, but no grid, guidance or rate was ever published for one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from diffalign.batches import Conditioning, PairBatch
from diffalign.devices import send, send_like
from diffalign.policy import Policy
from diffalign.predictions import Prediction
from diffalign.schedules import DiscreteSchedule, Schedule, expand
from diffalign.sharding import cut_like, whole
from diffalign.trainers.base import Data, LossOutput, Trainer, TrainerConfig

if TYPE_CHECKING:
    from diffalign.data import PairSource
    from diffalign.loop import BatchSource

__all__ = ["SelfNPO", "SelfNPOConfig"]

LEVELS = 25
"""Levels of the teacher's sampler: every 40th timestep of 1000, 39, 79, ..., 999."""


class SelfNPOConfig(TrainerConfig):
    """Settings of Self-NPO. Defaults are the released ones for SD 1.5.

    Attributes:
        caption_dropout: None, as released.
        timestep_sampling: The law of s is the method's own.
        teacher: "ema", a moving average of the student; "frozen", the model that training started from.
        teacher_decay: Of that average per optimizer step; after 1000 steps 0.37 of the start is left.
        start: "real", a noised image at the drawn level; "noise", pure noise at the highest one, from which the teacher
            walks to where it would have got from there: up to 24 moves more, and no image is used.
        w: The teacher's guidance, g - 1 in the convention of `guidance_scale`. Released: -1 for SD 1.5, -5 for SDXL.
        teacher_steps: K, moves of the walk; 5 as released.
        loss_type: "huber", or "l2" as in the paper's formula.
        huber_scale: h, where "huber" turns from a square to an absolute value.
    """

    caption_dropout: float = Field(default=0.0, ge=0, le=1)
    timestep_sampling: Literal["uniform"] = "uniform"
    teacher: Literal["ema", "frozen"] = "ema"
    teacher_decay: float = Field(default=0.999, ge=0, lt=1)
    start: Literal["real", "noise"] = "real"
    w: float = Field(default=-1.0, allow_inf_nan=False)
    teacher_steps: int = Field(default=5, ge=1, le=LEVELS)
    loss_type: Literal["huber", "l2"] = "huber"
    huber_scale: float = Field(default=1e-3, gt=0)


class SelfNPO(Trainer):
    """Trains a negative model on images and their captions; see the module's description.

    The teacher is the policy's reference, whose weights follow the student's in float32.
    """

    Config: ClassVar[type[TrainerConfig]] = SelfNPOConfig
    predictions: ClassVar[frozenset[Prediction]] = frozenset({Prediction.EPSILON, Prediction.V})
    learns_from: ClassVar[Data] = "winners"
    trains_negative: ClassVar[bool] = True
    config: SelfNPOConfig

    def __init__(self, policy: Policy, config: SelfNPOConfig | None = None, **options: Any) -> None:
        super().__init__(policy, config, **options)
        assert isinstance(self.schedule, DiscreteSchedule)
        self.levels = grid(len(self.schedule))
        self._unconditional: Conditioning | None = None
        self._teacher: dict[str, Tensor] | None = None

    @classmethod
    def forwards(cls, config: Any) -> dict[str, float]:
        """See `Trainer.forwards`; without a prompt's part, w = -1, a move costs one pass."""
        return {"policy": 1, "teacher": (config.teacher_steps + 1) * (1 if config.w == -1 else 2)}

    def describe(self) -> str:
        """One line for the start of a run."""
        config = self.config
        moving = f"moving average {config.teacher_decay:g}" if config.teacher == "ema" else "frozen"
        return (
            f"Self-NPO: teacher {moving}, w {config.w:g}, {config.teacher_steps} moves on {len(self.levels)} levels "
            f"from {'noised images' if config.start == 'real' else 'pure noise'}, loss {config.loss_type}"
        )

    def source(self, source: PairSource, seed: int) -> BatchSource:
        """The data's own; the encoded empty prompt is taken from it, as text encoders are gone by now."""
        self._unconditional = self.policy.unconditional(source.encoded.empty_conditioning())
        return source

    # --- the loss ----------------------------------------------------------------------------------------------------

    def loss(self, batch: PairBatch) -> LossOutput:
        """The batch's loss: weighted mean over the images."""
        self._start_teacher()
        with torch.no_grad():
            latents, reached = self.walk(batch)
            target, _ = self.guided(latents, reached, batch.conditioning)
        span = len(self._chain) - 1 - reached
        share = torch.tensor([draw.uniform("student") for draw in batch.draws], dtype=torch.float64)
        timesteps = reached + 1 + (share * span).long()
        noise = torch.stack([draw.normal("student noise", latents.shape[1:]) for draw in batch.draws])
        noisy = renoise(self.schedule, latents, send_like(noise, latents), reached, timesteps)
        alphas, sigmas = self.schedule.scales(timesteps)
        output = self.policy.predict(noisy, send(timesteps, noisy.device), batch.conditioning)
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        seen, _ = self.policy.prediction.to_sample_and_noise(output, noisy, alphas, sigmas)
        losses = self._distance(seen - target).flatten(1).mean(1)
        loss: Tensor = (batch.weight.to(losses.dtype) * losses).mean()
        metrics = {
            "loss": losses.detach().mean(),
            "x0_mse": (seen - target).detach().square().mean(),
            "reached": send(reached.double().mean(), losses.device),
        }
        return LossOutput(loss, losses, metrics)

    def walk(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """The teacher's walk: states x_t' [B, C, ...], float32 or wider, and timesteps t' [B] on the CPU."""
        config, top = self.config, len(self.levels) - 1
        drawn = torch.tensor([int(draw.uniform("level") * len(self.levels)) for draw in batch.draws])
        last = (drawn - config.teacher_steps).clamp(min=-1)
        at = drawn if config.start == "real" else torch.full_like(drawn, top)
        latents = torch.stack([draw.normal("noise", batch.chosen.shape[1:]) for draw in batch.draws])
        latents = send_like(latents, batch.chosen)
        if config.start == "real":
            latents = self.schedule.add_noise(batch.chosen, latents, self._timesteps(at))
        latents = latents.to(torch.promote_types(latents.dtype, torch.float32))
        while bool((at > last).any()):
            moving = (at > last).nonzero().flatten()
            rows = send(moving, latents.device)
            here, there = self._timesteps(at[moving]), self._timesteps(at[moving] - 1)
            clean, noise = self.guided(latents[rows], here, batch.conditioning[moving])
            latents = latents.index_copy(0, rows, self.schedule.add_noise(clean, noise, there))
            at = at.index_add(0, moving, -torch.ones_like(moving))
        return latents, self._timesteps(at)

    def guided(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """The teacher's clean image and noise with guidance w, both [B, C, ...]; an unused branch is not computed."""
        w, told = self.config.w, send(timesteps, latents.device)
        output = torch.zeros_like(latents)
        if w != -1:
            output = output + (1 + w) * self.reference.predict(latents, told, conditioning)
        if w != 0:
            empty = self._empty(latents.device).repeat(len(latents))
            output = output - w * self.reference.predict(latents, told, empty)
        return self.policy.prediction.to_sample_and_noise(output, latents, *self.schedule.scales(timesteps))

    def _empty(self, device: torch.device) -> Conditioning:
        """What guidance contrasts a prompt with, one row, which stays on the device that it was sent to."""
        if self._unconditional is None:
            self._unconditional = self.policy.encode_unconditional(1)
        self._unconditional = self._unconditional.to(device)
        return self._unconditional

    def _distance(self, difference: Tensor) -> Tensor:
        if self.config.loss_type == "l2":
            return difference.square()
        h = self.config.huber_scale
        return (difference.square() + h * h).sqrt() - h

    @property
    def _chain(self) -> DiscreteSchedule:
        assert isinstance(self.schedule, DiscreteSchedule)
        return self.schedule

    def _timesteps(self, index: Tensor) -> Tensor:
        """Timesteps of places on the grid; below the lowest level, place -1, is timestep 0."""
        return torch.where(index < 0, 0, self.levels[index.clamp(min=0)])

    # --- the teacher -------------------------------------------------------------------------------------------------

    def update(self, step: int) -> None:
        """Moves the teacher after the student: teacher <- decay * teacher + (1 - decay) * student."""
        if self.config.teacher == "frozen":
            return
        self._start_teacher()
        assert self._teacher is not None
        with torch.no_grad():
            for name, parameter in self.policy.named_trainable():
                self._teacher[name].lerp_(parameter.detach(), 1 - self.config.teacher_decay)
        self.policy.put_reference(self._teacher)

    def _start_teacher(self) -> None:
        """The average starts as the student does, before its first step; kept in float32, where 0.001 is not lost."""
        if self._teacher is None and self.config.teacher == "ema":
            self._teacher = {name: parameter.detach().clone() for name, parameter in self.policy.named_trainable()}

    def state(self) -> dict[str, Any]:
        """The teacher's weights."""
        return {} if self._teacher is None else {"teacher": {n: whole(t).cpu() for n, t in self._teacher.items()}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on with the teacher of a checkpoint."""
        if "teacher" not in state:
            return
        named = dict(self.policy.named_trainable())
        self._teacher = {
            name: cut_like(tensor.to(named[name].device), named[name]).clone()
            for name, tensor in state["teacher"].items()
        }
        self.policy.put_reference(self._teacher)


def grid(steps: int) -> Tensor:
    """The teacher's levels, rising: 39, 79, ..., 999 for 1000 timesteps.

    Args:
        steps: Timesteps of the chain.
    """
    count = min(LEVELS, steps)
    stride = steps // count
    return stride * torch.arange(1, count + 1) - 1


def renoise(schedule: Schedule, latents: Tensor, noise: Tensor, now: Tensor, then: Tensor) -> Tensor:
    """States [B, C, ...] at timesteps `now` [B] with so much noise added that they are states at `then` [B]."""
    ratio, added = noise_between(schedule, now, then)
    return expand(ratio, latents) * latents + expand(added, latents) * noise


def noise_between(schedule: Schedule, now: Tensor, then: Tensor) -> tuple[Tensor, Tensor]:
    """What leads from states at timesteps `now` to noisier ones at `then`: factor and deviation of the noise, [B]."""
    (alpha, sigma), (alpha_then, sigma_then) = schedule.scales(now), schedule.scales(then)
    ratio = alpha_then / alpha
    return ratio, (sigma_then.square() - (sigma * ratio).square()).clamp(min=0).sqrt()
