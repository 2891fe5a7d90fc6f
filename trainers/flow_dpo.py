"""Flow-DPO: Diffusion-DPO on the velocities of a rectified flow.

Liu et al. 2025, "Improving Video Generation with Human Feedback" (arXiv:2501.13918). With
x_t = (1 - t) x0 + t noise and the target noise - x0,

    loss = -log sigmoid( -beta_t / 2 * [(E(policy) - E(reference)) of chosen - the same of rejected] )

`beta_schedule: constant` is the form that the paper recommends; `timestep`, beta_t = beta (1 - t)^2, is what the loss
on noise becomes when it is carried over exactly. It takes the pull to the reference away at high noise, where the
model then hacks its reward (in the paper's comparison, text alignment falls below the base's).

Deviations: none from the released image code in the loss. Pairs are read, or mined once, instead of being drawn anew
every step; groups of equal reward make no pair, where the code takes images 0 and 1.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from diffalign.batches import NoisyStates
from diffalign.predictions import Prediction
from diffalign.schedules import expand
from diffalign.timesteps import TimestepLaw
from diffalign.trainers.base import PairTrainer, PairTrainerConfig

__all__ = ["FlowDPO", "FlowDPOConfig"]


class FlowDPOConfig(PairTrainerConfig):
    """Settings of Flow-DPO.

    Attributes:
        beta: 100 in the authors' image configuration; users of larger models went to 500 and 2000. Keep the logged
            `z_mean` under 5.
        beta_schedule: `constant`, or `timestep` for beta (1 - t)^2.
        caption_dropout: None, as released.
        timestep_sampling: Stable Diffusion 3's density, as released.
    """

    beta: float = 500.0
    beta_schedule: Literal["constant", "timestep"] = "constant"
    caption_dropout: float = 0.0
    timestep_sampling: TimestepLaw = "logit_normal"


class FlowDPO(PairTrainer):
    """`PairTrainer` for flows, with a beta that may depend on time."""

    Config: ClassVar[type[PairTrainerConfig]] = FlowDPOConfig
    predictions: ClassVar[frozenset[Prediction]] = frozenset({Prediction.VELOCITY})
    config: FlowDPOConfig

    def margin(self, ratio: Tensor, states: NoisyStates) -> Tensor:
        """Chosen minus rejected, [B]; times beta_t / beta, so that every metric sees the same z as the loss."""
        margin = super().margin(ratio, states)
        if self.config.beta_schedule == "constant":
            return margin
        return margin * expand(states.alphas[: len(margin)].square(), margin)  # alpha is 1 - t
