"""VP-Score: ImageReward's network trained on preferences that a language model stated."""

from __future__ import annotations

from diffalign.reward_models.base import RewardInfo, WeightSpec
from diffalign.reward_models.image_reward import ImageReward

__all__ = ["VPScore"]


class VPScore(ImageReward):
    """The reward of a BLIP-large trained pairwise on VisionPrefer, whose labels GPT-4V gave.

    Source: Wu et al. 2024, "Multimodal Large Language Model is a Human-Aligned Annotator for Text-to-Image
    Generation" (arXiv:2404.15100); the architecture and the loss are those of `ImageReward`. No published weights are
    known, so a path is required: weights of one's own training, with ImageReward's names of tensors, as `VPScore.pt`
    beside a `med_config.json`. Scores are raw unless `mean` and `std` are given; their usual range is not known here.
    """

    info = RewardInfo(
        name="vp_score",
        license="that of the weights given (none are published)",
        weights=(WeightSpec("", "VPScore.pt", "torch"),),
        tau=1.0,
        min_vram_gb=2.5,
    )
    default_mean = 0.0
    default_std = 1.0
