"""The networks behind FID and CMMD: pictures to features, with exactly the resizing that each metric means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from diffalign.devices import resolve_device
from diffalign.reward_models.base import RewardInfo, WeightsError, WeightSpec
from diffalign.reward_models.checkpoints import read_tensors
from diffalign.reward_models.clip_towers import CLIP_MEAN, CLIP_STD, normalise, unit
from diffalign.reward_models.fetched_files import find_or_fetch
from diffalign.reward_models.optical_flow import to_bytes
from diffalign.reward_models.weights import load_clip, one_line

__all__ = ["CLIP_336", "INCEPTION", "Features", "clip_features", "inception_features", "load_features"]

INCEPTION = RewardInfo(
    name="the Inception of FID",
    license="Apache-2.0",
    weights=(
        WeightSpec(
            "",
            "weights-inception-2015-12-05-6726825d.pth",
            "torch",
            url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
            "weights-inception-2015-12-05-6726825d.pth",
        ),
    ),
)
CLIP_336 = RewardInfo(
    name="the CLIP of CMMD",
    license="MIT",
    weights=(WeightSpec("openai/clip-vit-large-patch14-336", "model.safetensors"),),
)
Features = Callable[[Sequence[Image.Image]], Tensor]
"""RGB pictures of one size to features, float32 [B, D] on the CPU."""


def load_features(
    metric: str,
    path: str | Path | None = None,
    device: str | torch.device = "auto",
    local_files_only: bool | None = None,
) -> Features:
    """What a metric makes of pictures.

    Args:
        metric: "fid" or "cmmd".
        path: Its network's weights; None are the published ones.
        device: Where it runs; "auto" is the first accelerator, else the CPU.
        local_files_only: Never ask the network; None follows HF_HUB_OFFLINE.

    Raises:
        ValueError: If the package that a metric needs is not installed.
        WeightsError: If the weights cannot be loaded.
    """
    make = {"fid": inception_features, "cmmd": clip_features}[metric]
    return make(path, resolve_device(device), local_files_only)


def inception_features(path: str | Path | None, device: torch.device, local_files_only: bool | None = None) -> Features:
    """The 2048 pooled features of TensorFlow's Inception-v3 of 2015-12-05, through torch-fidelity.

    It resizes inside: the 8-bit picture to 299 x 299, bilinear as TensorFlow 1 did it, without antialiasing.
    """
    try:
        from torch_fidelity import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ValueError("FID needs torch-fidelity: pip install 'diffalign[fid]'") from error
    file = find_or_fetch(INCEPTION, path, INCEPTION.weights[0], local_files_only)
    read_tensors(INCEPTION, file)  # the library would execute what a pickle holds: only plain tensors get there
    try:
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(file))
    except (RuntimeError, KeyError, ValueError) as error:
        raise WeightsError(f"{str(file)!r} holds no weights of {INCEPTION.name}: {one_line(error)}") from error
    network.to(device)

    @torch.no_grad()
    def features(images: Sequence[Image.Image]) -> Tensor:
        (vectors,) = network(to_bytes(images).to(device))
        return torch.as_tensor(vectors).float().cpu()

    return features


def clip_features(path: str | Path | None, device: torch.device, local_files_only: bool | None = None) -> Features:
    """The unit image embedding of OpenAI's CLIP ViT-L/14 at 336 pixels.

    The whole picture becomes a square, bicubic without antialiasing, its aspect lost and its overshoot kept: CMMD's
    authors do so, while CLIP's own processor crops and antialiases.
    """
    model = load_clip(CLIP_336, path, local_files_only)
    size = int(model.config.vision_config.image_size)
    tower: nn.Module = model.vision_model.to(device).requires_grad_(False).eval()
    projection: nn.Module = model.visual_projection.to(device).requires_grad_(False)

    @torch.no_grad()
    def features(images: Sequence[Image.Image]) -> Tensor:
        pixels = to_bytes(images).to(device).float() / 255
        square = F.interpolate(pixels, (size, size), mode="bicubic", align_corners=False)
        pooled = tower(pixel_values=normalise(square, CLIP_MEAN, CLIP_STD)).pooler_output
        return unit(projection(pooled)).cpu()

    return features
