"""The colours of objects in a picture, told by CLIP from what the detector cut out, as GenEval does it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor, nn

from diffalign.devices import resolve_device
from diffalign.reward_models.base import RewardInfo, WeightsError, WeightSpec
from diffalign.reward_models.clip_towers import CropPreprocessing, unit
from diffalign.reward_models.geneval_prompts import COLORS
from diffalign.reward_models.geneval_rules import Detection
from diffalign.reward_models.text_cache import TextCache
from diffalign.reward_models.weights import load_hf_towers

__all__ = ["COLOR_CLIP", "TEMPLATES", "ColorNamer", "cut_out"]

COLOR_CLIP = WeightSpec("openai/clip-vit-large-patch14", "model.safetensors")
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
GREY = (153, 153, 153)
"""What is painted around an object, #999."""
Background = Literal["grey", "original"]


class ColorNamer(nn.Module):
    """Names the colours of objects: the nearest of ten classes to a cut-out, under OpenAI's CLIP ViT-L/14.

    Source: Ghosh et al. 2023 (arXiv:2310.11513) and its released code. A colour's class is the mean of the unit
    embeddings of three sentences that name it and the object. The cut-out is resized and cropped at the centre as CLIP
    does it, so long objects lose their ends.
    """

    def __init__(
        self,
        path_or_id: str | Path | None = None,
        *,
        background: Background = "grey",
        device: str | torch.device = "auto",
        local_files_only: bool | None = None,
    ):
        """Loads the weights.

        Args:
            path_or_id: Folder of a CLIPModel with its tokenizer in the layout of transformers, or a Hub id.
            background: What becomes of the pixels outside the object: painted grey, or kept ("original").
            device: Where it runs; "auto" is the first accelerator, else the CPU.
            local_files_only: Never ask the Hub; None follows HF_HUB_OFFLINE.

        Raises:
            ValueError: If `background` is unknown.
            WeightsError: If the weights are missing, damaged or of another model.
        """
        super().__init__()
        if background not in ("grey", "original"):
            raise ValueError(f"background must be 'grey' or 'original', got {background!r}")
        self.background = background
        self.towers = load_hf_towers(_INFO, path_or_id, None, local_files_only)
        activation = self.towers.model.config.vision_config.hidden_act
        if activation != "quick_gelu":  # a ViT-L/14 of another training has the same shapes
            raise WeightsError(
                f"GenEval tells colours with OpenAI's CLIP, which has quick_gelu; this CLIP has {activation!r}; pass a "
                f"folder with the files of Hub id {COLOR_CLIP.repo!r}, or the id"
            )
        self.crop = CropPreprocessing(self.towers.image_size, origin="round")
        self.text_cache: TextCache[Tensor] = TextCache(100 * len(COLORS) * len(TEMPLATES))
        device = resolve_device(device)
        self.to(device).requires_grad_(False).eval()

    @torch.no_grad()
    def name(self, image: Image.Image, name: str, found: Sequence[Detection]) -> list[str]:
        """The colour of each object, one of `COLORS`.

        Args:
            image: The RGB picture in which they were found.
            name: Their class.
            found: The objects.

        Raises:
            InvalidMediaError: If an object is more than a thousand times longer than wide.
        """
        if not found:
            return []
        pixels = torch.stack([self.crop.image(cut_out(image, d, self.background)) for d in found])
        embeddings = unit(self.towers.encode_images(pixels.to(self.towers.model.logit_scale.device)))
        nearest = (embeddings @ self.classes(name).T).argmax(-1)
        return [COLORS[number] for number in nearest.tolist()]

    @torch.no_grad()
    def classes(self, name: str) -> Tensor:
        """The ten colours of objects of class `name`, unit embeddings [10, D]."""
        texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
        encoded = self.text_cache.get(
            texts, self.towers.text_weights(), lambda batch: unit(self.towers.encode_texts(batch))
        )
        return unit(encoded.reshape(len(COLORS), len(TEMPLATES), -1).mean(1))


def cut_out(image: Image.Image, detection: Detection, background: Background = "grey") -> Image.Image:
    """The box of an object, with grey outside its mask; a detection without a mask keeps its surroundings."""
    if detection.mask is not None and background == "grey":
        ground = Image.new("RGB", image.size, GREY)
        image = Image.composite(image, ground, Image.fromarray(detection.mask))
    x1, y1, x2, y2 = (round(side) for side in detection.box)
    return image.crop((x1, y1, x2, y2))


_INFO = RewardInfo(name="geneval's colours", license="MIT", weights=(COLOR_CLIP,))
