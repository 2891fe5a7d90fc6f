"""The LAION aesthetic predictor: how good a picture looks, whatever it shows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from diffalign.reward_models.base import RewardInfo, WeightsError, WeightSpec
from diffalign.reward_models.checkpoints import find_file, load_complete, read_tensors
from diffalign.reward_models.clip_towers import CropPreprocessing, ImageScorer, unit
from diffalign.reward_models.weights import folder_with, load_clip

__all__ = ["LaionAesthetic"]

Variant = Literal["sac+logos+ava1", "ava+logos", "ava+logos-relu"]

_HOME = "https://github.com/christophschuhmann/improved-aesthetic-predictor"
_CLIP = WeightSpec("openai/clip-vit-large-patch14", "model.safetensors")
_HEADS: dict[str, WeightSpec] = {
    "sac+logos+ava1": WeightSpec("", "sac+logos+ava1-l14-linearMSE.pth", "torch", url=_HOME),
    "ava+logos": WeightSpec("", "ava+logos-l14-linearMSE.pth", "torch", url=_HOME),
    "ava+logos-relu": WeightSpec("", "ava+logos-l14-reluMSE.pth", "torch", url=_HOME),
}
_WIDTHS = (1024, 128, 64, 16, 1)


class LaionAesthetic(ImageScorer):
    """A chain of linear layers on the unit image embedding of OpenAI's CLIP ViT-L/14, about 4 to 7.5 of 1 to 10.

    Source: Schuhmann et al. 2022, "LAION-5B: An open large-scale dataset for training next generation image-text
    models" (arXiv:2210.08402), and the released heads; "sac+logos+ava1" is the one that people mean by version 2.
    The prompt is not read. The head lies in its repository, not on the Hub: download the file and pass its path.

    The chain has no activations, so it is one affine function, and is computed as such (fused in float64); only
    "ava+logos-relu" has a ReLU after every layer but the last. `compare` has the temperature 1, which was not fitted.

    Pictures: short side to 224 (PIL bicubic), centre crop with torchvision's rounding.
    """

    info = RewardInfo(
        name="laion_aesthetic",
        license="Apache-2.0 (head), MIT (CLIP)",
        weights=(_CLIP, _HEADS["sac+logos+ava1"]),
        needs_prompt=False,
        nominal_range=(4.0, 7.5),
        min_vram_gb=1.5,
    )
    vision_model: Any
    visual_projection: nn.Module

    def __init__(
        self,
        path_or_id: str | Path | None = None,
        *,
        variant: Variant = "sac+logos+ava1",
        clip: str | Path | None = None,
        device: str | torch.device = "auto",
        dtype: torch.dtype | Literal["auto"] = "auto",
        local_files_only: bool | None = None,
    ):
        """Loads the weights; see `RewardModel.from_pretrained`.

        Args:
            path_or_id: The head's .pth file, or a folder with it.
            variant: Which of the released heads.
            clip: Folder or Hub id of CLIP ViT-L/14 in the layout of transformers; None takes the folder of the head
                if a CLIP lies there, else the published one.
            device: As in `from_pretrained`.
            dtype: As in `from_pretrained`; the head is computed in float32.
            local_files_only: As in `from_pretrained`.

        Raises:
            ValueError: If the variant is unknown.
            WeightsError: If head or CLIP are missing, damaged, or do not belong together.
        """
        self.info = self.describe(variant)
        path = find_file(self.info, path_or_id, _HEADS[variant], local_files_only)
        state = read_tensors(self.info, path)
        model = load_clip(self.info, clip or folder_with(path_or_id, ("config.json",)), local_files_only)
        activation = model.config.vision_config.hidden_act
        if activation != "quick_gelu":  # a ViT-L/14 of another training has the same shapes
            raise WeightsError(
                f"{self.info.name} needs OpenAI's CLIP ViT-L/14, which has quick_gelu; this CLIP has {activation!r}; "
                f"pass a folder with the files of Hub id {_CLIP.repo!r}, or the id, as clip"
            )
        chain = _layers(model.config.projection_dim, relu="relu" in variant)
        load_complete(self.info, chain, {_within(name): value for name, value in state.items()}, path)
        super().__init__(device, dtype, vision_model=model.vision_model, visual_projection=model.visual_projection)
        head = chain if "relu" in variant else fused(chain)
        wide = torch.promote_types(self.dtype, torch.float32)
        self.head = head.to(self.device, wide).requires_grad_(False).eval()
        self.crop = CropPreprocessing(int(model.config.vision_config.image_size), origin="round")

    @classmethod
    def describe(cls, variant: Variant = "sac+logos+ava1") -> RewardInfo:
        """See `RewardModel`."""
        if variant not in _HEADS:
            raise ValueError(f"unknown aesthetic head {variant!r} (available: {', '.join(_HEADS)})")
        if variant == "sac+logos+ava1":
            return LaionAesthetic.info
        name = f"laion_aesthetic-{variant}"
        return replace(LaionAesthetic.info, name=name, weights=(_CLIP, _HEADS[variant]))

    def preprocess_image(self, image: Image.Image) -> Tensor:
        """See `ImageScorer`."""
        return self.crop.image(image)

    def preprocess_tensor(self, pixels: Tensor) -> Tensor:
        """See `ImageScorer`."""
        return self.crop.tensor(pixels)

    def score_pixels(self, pixels: Tensor, texts: Sequence[Any], dims: Collection[str]) -> dict[str, Tensor]:
        """See `ImageScorer`."""
        pooled = self.vision_model(pixel_values=pixels.to(self.device, self.dtype)).pooler_output
        return {"overall": self.head(unit(self.visual_projection(pooled))).squeeze(-1)}


def fused(chain: nn.Sequential) -> nn.Linear:
    """The one linear layer that equals a chain of them."""
    linears = [layer.double() for layer in chain if isinstance(layer, nn.Linear)]
    weight, bias = linears[0].weight.detach(), linears[0].bias.detach()
    for layer in linears[1:]:
        weight, bias = layer.weight @ weight, layer.weight @ bias + layer.bias
    one = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    one.load_state_dict({"weight": weight, "bias": bias})
    return one


def _layers(width: int, relu: bool) -> nn.Sequential:
    """The head as it was trained: the published names count dropouts, and ReLUs where there are any."""
    drops = (True, True, True, False, False)
    layers: list[nn.Module] = []
    for out, drop in zip(_WIDTHS, drops, strict=True):
        layers.append(nn.Linear(width, out))
        if relu and out != _WIDTHS[-1]:
            layers.append(nn.ReLU())
        if drop:
            layers.append(nn.Dropout())  # its rate is of training only
        width = out
    return nn.Sequential(*layers)


def _within(name: str) -> str:
    return name.removeprefix("layers.")
