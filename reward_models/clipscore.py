"""CLIPScore: how well a picture matches its prompt, in the variants that papers report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from diffalign.reward_models.base import RewardInfo, WeightSpec
from diffalign.reward_models.clip_towers import CropPreprocessing, DualEncoder
from diffalign.reward_models.weights import load_hf_towers

__all__ = ["CLIPScore"]

Variant = Literal["hessel", "torchmetrics", "logit"]

PREFIX = "A photo depicts "
WEIGHT = 2.5
"""w in the paper's Eq. 1."""


class CLIPScore(DualEncoder):
    """Agreement of picture and prompt under OpenAI's CLIP, which knows nothing of preferences.

    Source: Hessel et al. 2021, "CLIPScore: A Reference-free Evaluation Metric for Image Captioning"
    (arXiv:2104.08718), Eq. 1. Three numbers go by this name; the variant is part of `info.name`:

    | variant | score | model | text | usual range |
    |---|---|---|---|---|
    | hessel | 2.5 * max(cos, 0) | ViT-B/32 | with the prefix "A photo depicts " | 0.5 .. 0.9 |
    | torchmetrics | 100 * cos | ViT-L/14 | the prompt | 15 .. 40 |
    | logit | exp(logit_scale) * cos | ViT-L/14 | the prompt | 15 .. 40 |

    Deviations from torchmetrics: prompts over 77 tokens keep their end-of-text token (it slices it off, which moves
    the place where the text is read), and the maximum with zero, which it applies to the mean of a data set, is left
    to the caller. OpenAI's weights need the QuickGELU activation; the published configuration says so, and it is read.
    """

    info = RewardInfo(
        name="clipscore",
        license="MIT",
        weights=(WeightSpec("openai/clip-vit-base-patch32", "model.safetensors"),),
        nominal_range=(0.5, 0.9),
        tau=WEIGHT / 100,  # CLIP's own temperature, 1/100 of a cosine
        min_vram_gb=0.8,
    )

    def __init__(
        self,
        path_or_id: str | Path | None = None,
        *,
        variant: Variant = "hessel",
        device: str | torch.device = "auto",
        dtype: torch.dtype | Literal["auto"] = "auto",
        local_files_only: bool | None = None,
    ):
        """Loads the weights; see `RewardModel.from_pretrained`.

        Args:
            path_or_id: Folder with model and tokenizer in the layout of transformers, or a Hub id.
            variant: Which of the three scores.
            device: As in `from_pretrained`.
            dtype: As in `from_pretrained`.
            local_files_only: As in `from_pretrained`.

        Raises:
            ValueError: If the variant is unknown.
        """
        self.info = self.describe(variant)
        towers = load_hf_towers(self.info, path_or_id, None, local_files_only)
        super().__init__(towers, device, dtype)
        self.variant: Variant = variant
        self.crop = CropPreprocessing(towers.image_size, origin="round" if variant == "hessel" else "floor")

    @classmethod
    def describe(cls, variant: Variant = "hessel") -> RewardInfo:
        """See `RewardModel`."""
        if variant not in get_args(Variant):
            raise ValueError(f"unknown CLIPScore variant {variant!r} (available: {', '.join(get_args(Variant))})")
        if variant == "hessel":
            return CLIPScore.info
        return replace(
            CLIPScore.info,
            name=f"clipscore-{variant}",
            weights=(WeightSpec("openai/clip-vit-large-patch14", "model.safetensors"),),
            nominal_range=(15.0, 40.0),
            tau=1.0,
            min_vram_gb=2.0,
        )

    def preprocess_image(self, image: Image.Image) -> Tensor:
        """See `DualEncoder`."""
        return self.crop.image(image)

    def preprocess_tensor(self, pixels: Tensor) -> Tensor:
        """See `DualEncoder`."""
        return self.crop.tensor(pixels)

    def wrap_prompt(self, prompt: str) -> str:
        """The prompt, with the paper's prefix in the paper's variant."""
        return PREFIX + prompt if self.variant == "hessel" else prompt

    def score_cosine(self, cosine: Tensor) -> Tensor:
        """The variant's function of the cosine."""
        if self.variant == "hessel":
            return WEIGHT * cosine.clamp(min=0)
        return (100.0 if self.variant == "torchmetrics" else self.towers.scale) * cosine
