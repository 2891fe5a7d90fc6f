"""What VBench measures on one video, for the dimensions whose networks can be had from well-kept libraries.

Source: Huang et al. 2023, "VBench: Comprehensive Benchmark Suite for Video Generative Models" (arXiv:2311.17982), and
its released code, whose details count: frames are resized without antialiasing, except for the appearance style.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import ViTModel
from transformers.models.vit.modeling_vit import ViTEmbeddings

from diffalign.devices import resolve_device
from diffalign.reward_models.base import RewardInfo, WeightSpec
from diffalign.reward_models.checkpoints import load_complete, read_tensors
from diffalign.reward_models.clip_towers import CropPreprocessing, HFTowers, normalise, unit
from diffalign.reward_models.dynamic_degree import DynamicDegree
from diffalign.reward_models.fetched_files import find_or_fetch
from diffalign.reward_models.media import InvalidMediaError
from diffalign.reward_models.optical_flow import enlarged, is_static, static_magnitudes
from diffalign.reward_models.weights import load_clip, load_hf_towers, load_network

__all__ = ["COMPUTED", "NETWORKS", "NOT_HERE", "Measured", "Measures", "consistency", "flickering"]

NOT_HERE: dict[str, str] = {
    "motion_smoothness": "it needs the interpolation network AMT-S, which no library has (`flow_smoothness` is akin)",
    "imaging_quality": "it needs MUSIQ, which only a large collection of metrics has, under a licence of its own",
    "human_action": "it needs UMT-L, which no library has",
    "scene": "it needs Tag2Text, which no library has",
    "temporal_style": "it needs ViCLIP, which no library has",
    "overall_consistency": "it needs ViCLIP, which no library has",
    **dict.fromkeys(
        ("object_class", "multiple_objects", "color", "spatial_relationship"), "it needs GRiT, which needs detectron2"
    ),
}
"""Dimensions that are not computed, and why; import the original tool's results for them."""

NETWORKS: dict[str, tuple[WeightSpec, ...]] = {
    "dino": (WeightSpec("facebook/dino-vitb16", "model.safetensors"),),
    "clip_b32": (WeightSpec("openai/clip-vit-base-patch32", "model.safetensors"),),
    "clip_l14": (WeightSpec("openai/clip-vit-large-patch14", "model.safetensors"),),
    "aesthetic_head": (
        WeightSpec(
            "",
            "sa_0_4_vit_l_14_linear.pth",
            "torch",
            url="https://github.com/LAION-AI/aesthetic-predictor/blob/main/sa_0_4_vit_l_14_linear.pth?raw=true",
        ),
    ),
    "raft": DynamicDegree.info.weights,
}
"""The networks and where they are published; of the aesthetic head's file no checksum is known here."""

COMPUTED: dict[str, tuple[str, ...]] = {
    "subject_consistency": ("dino",),
    "background_consistency": ("clip_b32",),
    "temporal_flickering": ("raft",),
    "dynamic_degree": ("raft",),
    "aesthetic_quality": ("clip_l14", "aesthetic_head"),
    "appearance_style": ("clip_b32",),
}
"""Dimensions that are computed, and the networks they need."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = 224
"""Short side of the frames that DINO and CLIP read."""


class Measured(NamedTuple):
    """The score of one video in one dimension, and how many terms (frames or pairs of them) it is the mean of."""

    value: float
    terms: int


class Measures:
    """Measures one video at a time; networks are loaded when a dimension first needs them.

    Everything runs in float32, where the original runs CLIP in half precision on a GPU.

    Args:
        paths: Folders or files with weights, by the names in `NETWORKS`; what is left out is taken from its home.
        fps: Frames per second of clips that do not say theirs, for the dynamic degree.
        batch_size: Frames per forward pass.
        device: Where the networks run; "auto" is the first accelerator, else the CPU.
        local_files_only: Never ask the network; None follows HF_HUB_OFFLINE.

    Raises:
        ValueError: If a path is given for a network that is none of these, or `fps` is not positive.
    """

    def __init__(
        self,
        paths: Mapping[str, str | Path] | None = None,
        *,
        fps: float = 8.0,
        batch_size: int = 32,
        device: str | torch.device = "auto",
        local_files_only: bool | None = None,
    ) -> None:
        self.paths = dict(paths or {})
        unknown = sorted(set(self.paths) - set(NETWORKS))
        if unknown:
            raise ValueError(f"unknown network {unknown[0]!r} (available: {', '.join(NETWORKS)})")
        if not fps > 0:
            raise ValueError(f"fps must be positive, got {fps}")
        self.fps, self.batch_size, self.local_files_only = fps, batch_size, local_files_only
        self.device = resolve_device(device)
        self._texts: dict[str, Tensor] = {}

    def __call__(self, dimension: str, frames: Tensor, fps: float | None, auxiliary: Mapping[str, Any]) -> Measured:
        """The score of one video in one dimension.

        Args:
            dimension: One of `COMPUTED`.
            frames: All of them, uint8 [T, 3, H, W].
            fps: Frames per second, if known.
            auxiliary: What the prompt's row says about the dimension.

        Raises:
            InvalidMediaError: If the video has too few frames.
            WeightsError: If a network cannot be loaded.
        """
        measures: dict[str, Callable[[], Measured]] = {
            "subject_consistency": lambda: consistency(self._features(frames, self.dino, self._for_dino)),
            "background_consistency": lambda: consistency(
                self._features(frames, self.clip_b32.encode_images, self._for_clip)
            ),
            "temporal_flickering": lambda: flickering(frames),
            "dynamic_degree": lambda: self._dynamic(frames, fps),
            "aesthetic_quality": lambda: self._aesthetic(frames),
            "appearance_style": lambda: self._style(frames, str(auxiliary["appearance_style"])),
        }
        return measures[dimension]()

    def static(self, frames: Tensor) -> bool:
        """Whether a video, uint8 [T, 3, H, W], passes the filter before temporal flickering.

        Raises:
            InvalidMediaError: If it has one frame only.
        """
        frames = enlarged(frames)
        neighbours, around = static_magnitudes(self.raft.flow, frames)
        return is_static(neighbours, around, len(frames), min(frames.shape[-2:]))

    # --- networks ---------------------------------------------------------------------------------------------------

    @cached_property
    def dino(self) -> nn.Module:
        """DINO ViT-B/16: pixels [B, 3, H, W] to features [B, D]."""
        network = load_network(
            _info("dino"),
            ViTModel,
            self.paths.get("dino"),
            self.local_files_only,
            model_type="vit",
            ignored=r"^pooler\.",
            add_pooling_layer=False,
        )
        # Published names are translated for the library's own class alone: its embeddings are changed afterwards.
        positions = _Positions(network.config)
        positions.load_state_dict(network.embeddings.state_dict())
        network.embeddings = positions
        return _FirstToken(network).to(self.device).requires_grad_(False).eval()

    @cached_property
    def clip_b32(self) -> HFTowers:
        """OpenAI's CLIP ViT-B/32."""
        towers = load_hf_towers(_info("clip_b32"), self.paths.get("clip_b32"), None, self.local_files_only)
        return towers.to(self.device).requires_grad_(False).eval()

    @cached_property
    def aesthetic(self) -> nn.Module:
        """OpenAI's CLIP ViT-L/14 with LAION's first linear head: pixels [B, 3, S, S] to scores [B, 1]."""
        info = _info("clip_l14")
        clip = load_clip(info, self.paths.get("clip_l14"), self.local_files_only)
        about = _info("aesthetic_head")
        file = find_or_fetch(about, self.paths.get("aesthetic_head"), about.weights[0], self.local_files_only)
        head = nn.Linear(int(clip.config.projection_dim), 1)
        load_complete(about, head, read_tensors(about, file), file)
        return _Aesthetic(clip, head).to(self.device).requires_grad_(False).eval()

    @cached_property
    def raft(self) -> DynamicDegree:
        """The dynamic degree, with the flow that the static filter reads, too."""
        return DynamicDegree(
            self.paths.get("raft"), fps=self.fps, device=self.device, local_files_only=self.local_files_only
        )

    # --- dimensions -------------------------------------------------------------------------------------------------

    def _dynamic(self, frames: Tensor, fps: float | None) -> Measured:
        chosen = frames[list(self.raft.choose(len(frames), fps))]
        return Measured(float(self.raft.margin(chosen) > 1), 1)

    @torch.no_grad()
    def _aesthetic(self, frames: Tensor) -> Measured:
        scores = self._features(frames, self.aesthetic, self._for_clip)
        return Measured(float(scores.mean()) / 10, len(frames))

    @torch.no_grad()
    def _style(self, frames: Tensor, style: str) -> Measured:
        """Mean of logit / 100 of the frames with the style's words; the one dimension read through PIL."""
        if style not in self._texts:
            self._texts[style] = unit(self.clip_b32.encode_texts([style]))[0]
        crop = CropPreprocessing(self.clip_b32.image_size, origin="round")

        def prepare(chunk: Tensor) -> Tensor:
            return torch.stack([crop.image(Image.fromarray(np.asarray(f.permute(1, 2, 0)))) for f in chunk])

        features = unit(self._features(frames, self.clip_b32.encode_images, prepare))
        return Measured(float((features @ self._texts[style]).mean()) * self.clip_b32.scale / 100, len(frames))

    @torch.no_grad()
    def _features(
        self, frames: Tensor, network: Callable[[Tensor], Tensor], prepare: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """What a network makes of frames uint8 [T, 3, H, W], a few at a time: [T, D]."""
        chunks = (frames[i : i + self.batch_size] for i in range(0, len(frames), self.batch_size))
        return torch.cat([network(prepare(chunk).to(self.device)) for chunk in chunks])

    def _for_dino(self, frames: Tensor) -> Tensor:
        """Short side to 224, bilinear without antialiasing, no crop; [T, 3, h, w]."""
        height, width, _, _ = CropPreprocessing(SIZE).geometry(*frames.shape[-2:])
        resized = F.interpolate(frames.float(), (height, width), mode="bilinear", align_corners=False)
        return normalise(resized / 255, IMAGENET_MEAN, IMAGENET_STD)

    def _for_clip(self, frames: Tensor) -> Tensor:
        """Short side to 224, bicubic without antialiasing, centre crop; [T, 3, 224, 224]."""
        crop = CropPreprocessing(SIZE, origin="round")
        height, width, top, left = crop.geometry(*frames.shape[-2:])
        resized = F.interpolate(frames.float(), (height, width), mode="bicubic", align_corners=False)
        return normalise(resized[..., top : top + SIZE, left : left + SIZE] / 255, crop.mean, crop.std)


def consistency(features: Tensor) -> Measured:
    """How much a video's frames resemble the one before and the first one.

    The mean over frames t >= 1 of (max(0, cos(f_t, f_{t-1})) + max(0, cos(f_t, f_0))) / 2.

    Args:
        features: Of the frames in their order, [T, D].

    Raises:
        InvalidMediaError: If there is one frame only.
    """
    if len(features) < 2:
        raise InvalidMediaError(f"consistency needs at least 2 frames, the clip has {len(features)}")
    units = unit(features)
    before = (units[1:] * units[:-1]).sum(-1).clamp(min=0)
    first = (units[1:] * units[:1]).sum(-1).clamp(min=0)
    return Measured(float((before + first).mean()) / 2, len(features) - 1)


def flickering(frames: Tensor) -> Measured:
    """(255 - mean absolute difference of neighbouring frames) / 255, of frames uint8 [T, 3, H, W].

    Raises:
        InvalidMediaError: If there is one frame only.
    """
    if len(frames) < 2:
        raise InvalidMediaError(f"flickering needs at least 2 frames, the clip has {len(frames)}")
    differences = [float((after.float() - before.float()).abs().mean()) for before, after in pairwise(frames)]
    return Measured((255 - sum(differences) / len(differences)) / 255, len(differences))


class _Positions(ViTEmbeddings):  # type: ignore[misc]  # transformers is not typed
    """The embeddings of a ViT whose table of positions is stretched as DINO's authors do it."""

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """The table [1, N + 1, D] for pictures of another size; a tenth of a cell is added to both sides.

        The library stretches the table to the number of cells alone, which puts every cell elsewhere.
        """
        table: Tensor = self.position_embeddings
        side = round((table.shape[1] - 1) ** 0.5)
        cells = height // self.patch_size, width // self.patch_size
        if cells == (side, side) and height == width:
            return table
        grid = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        scale = [(cell + 0.1) / side for cell in cells]
        stretched = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat([table[:, :1], stretched.flatten(2).transpose(1, 2)], dim=1)


class _FirstToken(nn.Module):
    """A ViT's feature of a picture: the class token behind the last norm."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.network(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state[:, 0]
        return features


class _Aesthetic(nn.Module):
    def __init__(self, clip: Any, head: nn.Linear):
        super().__init__()
        self.tower, self.projection, self.head = clip.vision_model, clip.visual_projection, head

    def forward(self, pixels: Tensor) -> Tensor:
        scores: Tensor = self.head(unit(self.projection(self.tower(pixel_values=pixels).pooler_output)))
        return scores


def _info(network: str) -> RewardInfo:
    """A network's description, for the messages about its weights."""
    return RewardInfo(name=f"vbench's {network}", license="", weights=NETWORKS[network])
