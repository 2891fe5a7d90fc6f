"""Flow-RWR: reward-weighted regression on the velocities of a rectified flow.

Liu et al. 2025, "Improving Video Generation with Human Feedback" (arXiv:2501.13918):

    loss = E[ exp(r(x0, c)) |v - v_policy(x_t, t, c)|^2 ],    v = noise - x0

without a weight in time and without a reference. The exponential has no scale of its own, so its numerics are ours, in
this order: r is the sum over dimensions of z-scores, with means and deviations of the whole training set; the weights
are N softmax(r / temperature), N being the number of samples that compete; they are cut off at `max_weight` and not
normalised again. Samples compete within the group of one prompt if every prompt has several, as those of
`diffalign pairs` have (and as in the comparison of Flow-GRPO's authors), and otherwise with all others of an optimizer
step, over all processes and micro steps.

Equal rewards give weights of 1: plain fine-tuning on all samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from diffalign.batches import PairBatch
from diffalign.predictions import Prediction
from diffalign.timesteps import TimestepLaw
from diffalign.trainers.base import Data, TrainerConfig
from diffalign.trainers.sft import SFT, SFTConfig

if TYPE_CHECKING:
    from diffalign.data import PairSource

__all__ = ["FlowRWR", "FlowRWRConfig", "WeightedSource", "reward_weights", "z_scores"]


class FlowRWRConfig(SFTConfig):
    """Settings of Flow-RWR.

    Attributes:
        temperature: Divides the summed z-scores before the softmax.
        max_weight: Largest weight of a sample in the loss.
        normalisation: Who competes: the samples of one `prompt`, those of an optimizer step (`batch`), or `auto` for
            the former where every prompt has several samples.
        caption_dropout: None, so that the weights act on conditional velocities only.
        timestep_sampling: Stable Diffusion 3's density, as for Flow-DPO.
        log_reference: Off: the method has no reference.
    """

    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    max_weight: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    normalisation: Literal["auto", "prompt", "batch"] = "auto"
    caption_dropout: float = Field(default=0.0, ge=0, le=1)
    timestep_sampling: TimestepLaw = "logit_normal"
    log_reference: bool = False


class FlowRWR(SFT):
    """`SFT` for flows, on all samples, with weights from their rewards; the source of batches computes them."""

    Config: ClassVar[type[TrainerConfig]] = FlowRWRConfig
    predictions: ClassVar[frozenset[Prediction]] = frozenset({Prediction.VELOCITY})
    learns_from: ClassVar[Data] = "scored"
    config: FlowRWRConfig

    def describe(self) -> str:
        """One line for the start of a run."""
        config = self.config
        return (
            f"Flow-RWR: squared error of velocities, weights softmax of z-scores at temperature {config.temperature:g} "
            f"(normalised by {config.normalisation}), at most {config.max_weight:g}; timesteps "
            f"{config.timestep_sampling}, caption dropout {config.caption_dropout:g}"
        )

    def source(self, source: PairSource, seed: int) -> WeightedSource:
        """The data's samples with weights.

        Raises:
            ValueError: If the data have no rewards, or prompts with one sample only where prompts are to compete.
        """
        return WeightedSource(source, self.config)


class WeightedSource:
    """Batches of scored samples whose weights in the loss come from their rewards.

    A weight depends on the training set or on the visits of an optimizer step alone, both of which every process knows:
    weights are exact for any number of processes and micro steps, without a word between them.

    Args:
        source: Of the samples, with rewards.
        config: How rewards become weights.

    Attributes:
        by_prompt: Whether samples compete within their prompt.
    """

    def __init__(self, source: PairSource, config: FlowRWRConfig) -> None:
        encoded = source.encoded
        rewards = encoded.rewards(range(len(encoded)))
        if not rewards.shape[1]:
            raise ValueError("the data have no rewards; name their columns with data.reward_columns")
        self._source, self._config = source, config
        self._scores = z_scores(rewards).sum(dim=1)
        prompts = encoded.prompts
        groups: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            groups.setdefault(prompt, []).append(row)
        alone = next((prompt for prompt, rows in groups.items() if len(rows) == 1), None)
        if config.normalisation == "prompt" and alone is not None:
            raise ValueError(
                f"trainer.normalisation is 'prompt', and the prompt {alone!r} has one sample only; take 'batch'"
            )
        self.by_prompt = config.normalisation == "prompt" or (config.normalisation == "auto" and alone is None)
        self._fixed: dict[str, float] = {}
        if self.by_prompt:
            for rows in groups.values():
                self._fixed |= zip(map(encoded.pair_id, rows), self._weights(rows), strict=True)
        self._of_step = lru_cache(maxsize=2)(self._weigh_step)
        self._last: dict[str, float] = {}

    def batch(self, step: int, micro_step: int) -> PairBatch:
        """As `PairSource.batch`, with the samples' weights times those of their rewards."""
        batch = self._source.batch(step, micro_step)
        table = self._fixed if self.by_prompt else self._of_step(step)
        weights = torch.tensor([table[draw.pair_id] for draw in batch.draws])
        return replace(batch, weight=batch.weight * weights)

    def update(self, step: int) -> None:
        """Passed on."""
        self._source.update(step)

    def metrics(self) -> dict[str, float]:
        """Of the training set's weights by prompt, or the last step's: the largest, and the share that was cut off."""
        weights = list(self._fixed.values() if self.by_prompt else self._last.values())
        cut = sum(weight >= self._config.max_weight for weight in weights)
        return {"weight_max": max(weights, default=0.0), "weight_cut": cut / max(len(weights), 1)}

    def _weigh_step(self, step: int) -> dict[str, float]:
        """Weights of an optimizer step's samples, of all processes, by name; one that is visited twice counts twice."""
        visits = self._source.visits(step)
        weights = self._weights([row for row, _ in visits])
        self._last = {draw.pair_id: weight for (_, draw), weight in zip(visits, weights, strict=True)}
        return self._last

    def _weights(self, rows: Sequence[int]) -> list[float]:
        scores = self._scores[list(rows)]
        return reward_weights(scores, self._config.temperature, self._config.max_weight).tolist()


def z_scores(rewards: Tensor) -> Tensor:
    """Rewards [N, D] in deviations from the mean of their dimension, [N, D]; 0 where all N are equal.

    A dimension in which all are equal to rounding counts as one in which they are.
    """
    centred = rewards - rewards.mean(dim=0)
    deviation = centred.square().mean(dim=0).sqrt()
    spread = deviation > 1e-12 * rewards.abs().amax(dim=0)
    return torch.where(spread, centred / deviation.where(spread, torch.ones_like(deviation)), 0.0)


def reward_weights(rewards: Tensor, temperature: float = 1.0, max_weight: float = 10.0) -> Tensor:
    """Weights N softmax(r / temperature) of the N samples that compete, [N], mean 1 before the cut at `max_weight`."""
    return (len(rewards) * torch.softmax(rewards / temperature, dim=0)).clamp(max=max_weight)
