"""PickScore: what users of an image generator preferred."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from diffalign.reward_models.base import RewardInfo, WeightSpec
from diffalign.reward_models.clip_towers import CropPreprocessing, DualEncoder
from diffalign.reward_models.weights import CLIP_H, TOKENIZER_FILES, folder_with, load_hf_towers

__all__ = ["PickScore"]


class PickScore(DualEncoder):
    """exp(logit_scale) times the cosine of a CLIP ViT-H/14 fine-tuned on Pick-a-Pic, about 17 to 24.

    Source: Kirstain et al. 2023, "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation"
    (arXiv:2305.01569), Eq. 1. Over candidates for one prompt, softmax of the scores is the predicted preference,
    which `compare` gives for two.

    Pictures: short side to 224 (PIL bicubic), centre crop, as the processor of the original does. Texts are cut at 77
    tokens.
    """

    info = RewardInfo(
        name="pickscore",
        license="MIT",
        weights=(WeightSpec("yuvalkirstain/PickScore_v1", "model.safetensors"),),
        nominal_range=(17.0, 24.0),
        tau=1.0,
        min_vram_gb=4.5,
    )

    def __init__(
        self,
        path_or_id: str | Path | None = None,
        *,
        processor: str | Path | None = None,
        device: str | torch.device = "auto",
        dtype: torch.dtype | Literal["auto"] = "auto",
        local_files_only: bool | None = None,
    ):
        """Loads the weights; see `RewardModel.from_pretrained`.

        Args:
            path_or_id: Folder of a CLIPModel in the layout of transformers, or a Hub id.
            processor: Folder or Hub id of the tokenizer; None takes the one in a local `path_or_id` if there is one,
                else that of CLIP-H: the published weights' own repository is not relied on for it.
            device: As in `from_pretrained`.
            dtype: As in `from_pretrained`; float16 is good to about three decimals of the score.
            local_files_only: As in `from_pretrained`.
        """
        if processor is None:
            processor = folder_with(path_or_id, TOKENIZER_FILES) or CLIP_H
        towers = load_hf_towers(self.info, path_or_id, processor, local_files_only)
        super().__init__(towers, device, dtype)
        self.crop = CropPreprocessing(towers.image_size)

    def preprocess_image(self, image: Image.Image) -> Tensor:
        """See `DualEncoder`."""
        return self.crop.image(image)

    def preprocess_tensor(self, pixels: Tensor) -> Tensor:
        """See `DualEncoder`."""
        return self.crop.tensor(pixels)
