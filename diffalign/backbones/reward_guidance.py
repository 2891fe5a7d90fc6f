"""Flow-NRG: the gradient of a reward on noisy latents added to a flow's velocity while its pipeline samples.

Liu et al. 2025, "Improving Video Generation with Human Feedback" (arXiv:2501.13918). With x_t = (1 - t) x0 + t noise
and v = noise - x0 the score is -(x_t + (1 - t) v) / t, so that adding w grad r to it means

    v~(x_t, t, c) = v(x_t, t, c) - w t / (1 - t) grad_{x_t} sum_j w_j r_j(x_t, t, c)

Samples are integrated from t = 1 down to 0, hence the minus sign moves them up the reward. v is the guided velocity,
as the pipeline hands it to its scheduler: whatever it makes of prompts, negative prompts and guidance stays its own.

t / (1 - t) has no bound at t = 1, where the exact reward's gradient vanishes and a trained one's does not. So it is cut
off at `max_factor`, and the correction's norm at `max_share` of the velocity's; both are ours, and None switches off.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffalign.schedules import expand
from diffalign.transitions import at_least_float32
from diffalign.weight_hashes import hash_weights

if TYPE_CHECKING:
    from diffalign.backbones.base import PipelinePolicy
    from diffalign.backbones.loading import ModelSource
    from diffalign.generation import SamplingConfig
    from diffalign.noisy_rewards import NoisyReward

__all__ = ["RewardGuidance", "check_guidance", "guided_velocity", "load_guidance"]


def guided_velocity(
    velocity: Tensor,
    gradient: Tensor,
    t: Tensor,
    scale: float,
    *,
    max_factor: float | None = 5.0,
    max_share: float | None = 0.2,
) -> Tensor:
    """v~ of the module's description, shape and dtype of `velocity`.

    Args:
        velocity: v, [B, C, ...].
        gradient: Of the weighted rewards, by x_t, [B, C, ...].
        t: Share of noise, [B], in [0, 1]; below 1 where `max_factor` is None.
        scale: w.
        max_factor: Bound of t / (1 - t).
        max_share: Bound of the correction's norm over that of the velocity, for each sample over all its elements.
    """
    exact = at_least_float32(velocity)
    factor = t.double() / (1 - t.double())  # infinite at 1
    if max_factor is not None:
        factor = factor.clamp(max=max_factor)
    correction = scale * expand(factor, exact) * gradient.to(exact)
    if max_share is not None:
        allowed, found = max_share * exact.flatten(1).norm(dim=1), correction.flatten(1).norm(dim=1)
        correction = correction * expand((allowed / found.clamp(min=1e-30)).clamp(max=1.0), correction)
    return (exact - correction).to(velocity.dtype)


@dataclass(frozen=True)
class RewardGuidance:
    """A reward model that guides a policy's sampling.

    Attributes:
        reward: Frozen.
        weights: w_j, one for each of its dimensions.
        scale: w; 0 is the sampler without guidance.
        max_factor: See `guided_velocity`.
        max_share: Likewise.
        name: Where the reward model came from, for records.
    """

    reward: NoisyReward
    weights: tuple[float, ...]
    scale: float = 1.0
    max_factor: float | None = 5.0
    max_share: float | None = 0.2
    name: str = ""

    def settings(self) -> dict[str, Any]:
        """What pictures depend on, as JSON values."""
        return {
            "reward": self.name,
            "digest": _digest(self.reward),
            "weights": dict(zip(self.reward.card.dimensions, self.weights, strict=True)),
            "scale": self.scale,
            "max_factor": self.max_factor,
            "max_share": self.max_share,
        }

    def digest(self) -> str:
        """Short name of these settings."""
        return hashlib.blake2b(json.dumps(self.settings(), sort_keys=True).encode(), digest_size=4).hexdigest()

    def gradient(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Any) -> Tensor:
        """Of sum_j w_j r_j by the latents, [B, C, ...]; every sample's own, as no sample's reward sees another."""
        with torch.enable_grad():
            latents = noisy_latents.detach().float().requires_grad_(True)
            rewards = self.reward(latents, timesteps, conditioning)
            total = (rewards * rewards.new_tensor(self.weights)).sum()
            return torch.autograd.grad(total, latents)[0]

    @contextmanager
    def during(self, policy: PipelinePolicy, prompts: Sequence[str]) -> Iterator[None]:
        """The policy's pipeline samples these prompts with guidance inside the block.

        The scheduler's `step` is where every pipeline hands over its guided velocity, with the latents it belongs to.
        """
        if self.scale == 0:
            yield
            return
        scheduler = policy.pipeline.scheduler
        step, conditioning = scheduler.step, policy.recall_prompts(prompts)

        def guided_step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            assert sample.shape == (len(prompts), *policy.latent_shape), "the pipeline's latents are not the policy's"
            timesteps = torch.as_tensor(timestep).float().cpu().expand(len(prompts))
            gradient = self.gradient(sample, timesteps, conditioning)
            corrected = guided_velocity(
                model_output,
                gradient,
                policy.schedule.scales(timesteps)[1],
                self.scale,
                max_factor=self.max_factor,
                max_share=self.max_share,
            )
            return step(corrected, timestep, sample, *args, **kwargs)

        replaced = vars(scheduler).get("step")  # if somebody else stands there
        scheduler.step = guided_step
        try:
            yield
        finally:
            del scheduler.step
            if replaced is not None:
                scheduler.step = replaced


def check_guidance(source: ModelSource, sampling: SamplingConfig) -> None:
    """Refuses reward guidance that this model cannot have; loads no weights.

    Raises:
        ValueError: If the folder holds no reward model on noisy latents, one of another kind of model, or one without
            a dimension that has a weight.
    """
    if sampling.reward_guidance is None:
        if sampling.reward_weights:
            raise ValueError("reward_weights without reward_guidance; name the reward model's folder")
        return
    from diffalign.noisy_rewards import read_card

    card = read_card(sampling.reward_guidance)
    card.check(source)
    card.weights(sampling.reward_weights)


def load_guidance(policy: PipelinePolicy, sampling: SamplingConfig) -> RewardGuidance | None:
    """The guidance that a section `sampling` asks for, for the policy's `reward_guidance`; None if it asks for none.

    Raises:
        ValueError: See `check_guidance`, and if the reward model reads other latents or embeddings than the policy's.
    """
    check_guidance(policy.source, sampling)
    if sampling.reward_guidance is None:
        return None
    from diffalign.noisy_rewards import NoisyReward

    reward = NoisyReward.from_pretrained(sampling.reward_guidance, policy)
    return RewardGuidance(
        reward,
        tuple(reward.card.weights(sampling.reward_weights)),
        scale=sampling.reward_scale,
        max_factor=sampling.reward_max_factor,
        max_share=sampling.reward_max_share,
        name=sampling.reward_guidance,
    )


def _digest(reward: NoisyReward) -> str:
    digest = hashlib.blake2b(digest_size=8)
    hash_weights(digest, sorted(reward.state_dict().items()))
    return digest.hexdigest()
