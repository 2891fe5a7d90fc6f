"""HPSv2 and HPSv2.1: which of two pictures of one prompt people prefer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torchvision.transforms.functional import InterpolationMode
from torchvision.transforms.functional import resize as torchvision_resize

from diffalign.reward_models.base import RewardInfo, WeightSpec
from diffalign.reward_models.checkpoints import find_file, load_complete, read_tensors
from diffalign.reward_models.clip_towers import CLIP_MEAN, CLIP_STD, DualEncoder, OpenCLIPTowers, normalise, to_float
from diffalign.reward_models.weights import empty_open_clip

__all__ = ["HPSv2"]

Version = Literal["2.1", "2.0"]

_FILES: dict[str, WeightSpec] = {
    "2.1": WeightSpec("xswu/HPSv2", "HPS_v2.1_compressed.pt", "torch", md5="4067542e34ba2553a738c5ac6c1d75c0"),
    "2.0": WeightSpec("xswu/HPSv2", "HPS_v2_compressed.pt", "torch", md5="fd9180de357abf01fdb4eaad64631db4"),
}
_RANGES = {"2.1": (0.14, 0.34), "2.0": (0.23, 0.29)}


class HPSv2(DualEncoder):
    """The cosine of an open_clip ViT-H/14 fine-tuned on human rankings; tables in papers show 100 times it.

    Source: Wu et al. 2023, "Human Preference Score v2: A Solid Benchmark for Evaluating Human Preferences of
    Text-to-Image Synthesis" (arXiv:2306.09341). Compare pictures of the same prompt only, and never values of
    version 2.0 (about 0.23 to 0.29) with those of 2.1 (about 0.14 to 0.34). `compare` uses the training's
    temperature, 1/100 of a cosine.

    Pictures are not cropped, and not resized by PIL: float pixels, longest side to 224 (bicubic), black bars to a
    square, then normalisation. The released code makes bars only where it resized, so that oblong pictures of exactly
    224 pixels broke its batches; here they get bars like all others.
    """

    info = RewardInfo(
        name="hpsv2.1",
        license="Apache-2.0",
        weights=(_FILES["2.1"],),
        nominal_range=_RANGES["2.1"],
        tau=0.01,
        min_vram_gb=4.5,
    )

    def __init__(
        self,
        path_or_id: str | Path | None = None,
        *,
        version: Version = "2.1",
        antialias: bool = True,
        model_config: Mapping[str, Any] | None = None,
        device: str | torch.device = "auto",
        dtype: torch.dtype | Literal["auto"] = "auto",
        local_files_only: bool | None = None,
    ):
        """Loads the weights; see `RewardModel.from_pretrained`.

        Args:
            path_or_id: The published .pt file, a folder with it, or a Hub id.
            version: "2.1" or "2.0".
            antialias: Whether the resize filters before it shrinks, as the official package does with torchvision
                from 0.17 on. False gives the numbers of 2023, published tables included.
            model_config: open_clip configuration of the checkpoint; None is ViT-H-14.
            device: As in `from_pretrained`.
            dtype: As in `from_pretrained`.
            local_files_only: As in `from_pretrained`.

        Raises:
            ValueError: If the version is unknown, or the file's name is that of the other version.
            WeightsError: If the checkpoint is missing, damaged, holds more than tensors, or is of another model.
        """
        self.info = self.describe(version)
        path = find_file(self.info, path_or_id, local_files_only=local_files_only)
        for other, file in _FILES.items():
            if other != version and path.name == file.filename:
                raise ValueError(f"{path.name} is HPSv{other}, but version={version!r} was asked for")
        model = empty_open_clip(model_config if model_config is not None else open_clip.get_model_config("ViT-H-14"))
        load_complete(self.info, model, read_tensors(self.info, path, "state_dict"), path)
        super().__init__(OpenCLIPTowers(model), device, dtype)
        self.antialias = antialias

    @classmethod
    def describe(cls, version: Version = "2.1") -> RewardInfo:
        """See `RewardModel`."""
        if version not in _FILES:
            raise ValueError(f"unknown HPSv2 version {version!r} (available: {', '.join(map(repr, _FILES))})")
        return replace(HPSv2.info, name=f"hpsv{version}", weights=(_FILES[version],), nominal_range=_RANGES[version])

    def preprocess_image(self, image: Image.Image) -> Tensor:
        """See `DualEncoder`."""
        return self.preprocess_tensor(to_float(image)[None])[0]

    def preprocess_tensor(self, pixels: Tensor) -> Tensor:
        """See `DualEncoder`. Bicubic overshoot beyond [0, 1] is kept, as in training."""
        size = self.towers.image_size
        height, width = pixels.shape[-2:]
        factor = size / max(height, width)
        if factor != 1.0:
            # Python's round: halves go to the even number. A side never vanishes.
            height, width = max(1, round(height * factor)), max(1, round(width * factor))
            pixels = torchvision_resize(pixels, [height, width], InterpolationMode.BICUBIC, antialias=self.antialias)
        top, left = (size - height) // 2, (size - width) // 2
        padded = F.pad(pixels, (left, size - width - left, top, size - height - top), value=0.0)
        return normalise(padded, CLIP_MEAN, CLIP_STD)

    def score_cosine(self, cosine: Tensor) -> Tensor:
        """The cosine itself."""
        return cosine

    def settings(self) -> dict[str, str]:
        """See `RewardModel`."""
        return {**super().settings(), "antialias": str(self.antialias)}
