"""Supervised fine-tuning on the chosen images: the control of every preference method.

The loss that the base model was trained with, on better pictures: mean squared error against the network's own target,
one timestep and one noise sample a visit. It knows nothing of what people rejected.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from diffalign.batches import PairBatch
from diffalign.losses import per_sample_error
from diffalign.trainers.base import Data, LossOutput, Trainer, TrainerConfig

__all__ = ["SFT", "SFTConfig"]


class SFTConfig(TrainerConfig):
    """Settings of supervised fine-tuning.

    Attributes:
        log_reference: Log the reference's error on the same states too, for one more forward pass a visit.
    """

    log_reference: bool = True


class SFT(Trainer):
    """Trains on the chosen halves of pairs; see the module's description."""

    Config: ClassVar[type[TrainerConfig]] = SFTConfig
    learns_from: ClassVar[Data] = "winners"
    config: SFTConfig

    @classmethod
    def forwards(cls, config: Any) -> dict[str, float]:
        """See `Trainer.forwards`."""
        return {"policy": 1, "reference": 1} if config.log_reference else {"policy": 1}

    def describe(self) -> str:
        """One line for the start of a run."""
        config = self.config
        return (
            f"SFT on chosen images: mean squared error of {self.policy.prediction.value}, timesteps "
            f"{config.timestep_sampling}, caption dropout {config.caption_dropout:g}"
        )

    def loss(self, batch: PairBatch) -> LossOutput:
        """The batch's loss: weighted mean over the chosen images."""
        states = self.noised(batch.chosen, batch.conditioning, batch.draws)
        metrics = {}
        if self.config.log_reference:
            error, reference_error = self.errors(states)
            metrics["ref_mse"] = reference_error.mean()
        else:
            output = self.policy.predict(states.noisy_latents, states.timesteps, states.conditioning)
            error = per_sample_error(output, states.target)
        loss: torch.Tensor = (batch.weight.to(error.dtype) * error).mean()
        metrics |= {"loss": loss.detach(), "model_mse": error.detach().mean()}
        return LossOutput(loss, error, metrics)
