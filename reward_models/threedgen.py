"""3DGen-Score: five qualities of a 3D asset, from rendered views of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from diffalign.devices import resolve_device
from diffalign.reward_models.base import RewardInfo, RewardModel, WeightSpec
from diffalign.reward_models.checkpoints import find_file, load_complete, read_tensors
from diffalign.reward_models.clip_towers import CropPreprocessing, HFTowers, unit
from diffalign.reward_models.media import InvalidMediaError, Media, Video, read_clip, to_rgb
from diffalign.reward_models.weights import (
    CLIP_H,
    TOKENIZER_FILES,
    clip_h_config,
    empty_clip,
    folder_with,
    load_tokenizer,
)

__all__ = ["ThreeDGenScore", "Views"]

Variant = Literal["demo", "training"]

DIMS = ("geometry_plausibility", "geometry_detail", "texture", "geometry_texture_coherence", "alignment")


@dataclass(frozen=True, eq=False)
class Views:
    """Renderings of one asset.

    Attributes:
        rgb: Four views in colour, or a turn around the asset of which the frames at 0, 1/4, 1/2 and 3/4 are taken: a
            sequence of pictures, a tensor [T, 3, H, W], an array [T, H, W, 3], a `Video` or the path of a video file,
            T a multiple of 4. A PIL image is the finished 2x2 grid.
        normal: The same views as normal maps.
        reference: The picture that the asset was made from; None if it was made from the prompt.
    """

    rgb: Media | Sequence[Media]
    normal: Media | Sequence[Media]
    reference: Media | None = None

    def __iter__(self) -> Iterator[Views]:
        """Itself, once: one asset is a batch of one."""
        yield self


class ThreeDGenScore(RewardModel):
    """CLIP ViT-H/14 with one more vision tower for normal maps and one for colours; no range is published.

    Source: Zhang et al. 2025, "3DGen-Bench: Comprehensive Benchmark Suite for 3D Generative Models" (arXiv:2503.21745),
    and the released code of its model MV-CLIP. With r the embedding of the prompt or of a reference picture, n of the
    normal maps and c of the colours: geometry plausibility exp(g1) <r, n>, geometry detail Linear(n), texture
    Linear(c), coherence of geometry and texture exp(g2) <n, c>, alignment exp(g3) <r, c>. For two assets of one prompt,
    softmax of the two scores is the predicted preference, which `compare` gives.

    There is no overall score: `primary` says which dimension trainers see. The released demo takes embeddings as they
    come, and exp(g); its training took unit embeddings, and g itself: `variant` chooses. Left out is the released
    second stage, which puts linear layers in place of the dot products.

    One medium is a `Views`, or a tensor [2, 4, 3, H, W] of colour and normal views. The four views make one grid, in
    rows, which is read as CLIP reads a picture (short side to 224, centre crop); that the grid goes row by row was not
    confirmed here. A prompt is not read for media that have a reference.
    """

    item_ndim = 5
    info = RewardInfo(
        name="threedgen",
        license="not stated by its authors",
        weights=(WeightSpec("3DGen/3dgen-score-mvclip-v1", "model.pkl", "torch"),),
        kind=frozenset({"multiview"}),
        dims=DIMS,
        tau=1.0,
        min_vram_gb=9.5,
    )
    towers: HFTowers

    def __init__(
        self,
        path_or_id: str | Path | None = None,
        *,
        primary: str = "alignment",
        variant: Variant = "demo",
        processor: str | Path | None = None,
        clip_config: Mapping[str, Any] | None = None,
        device: str | torch.device = "auto",
        dtype: torch.dtype | Literal["auto"] = "auto",
        local_files_only: bool | None = None,
    ):
        """Loads the weights; see `RewardModel.from_pretrained`.

        Args:
            path_or_id: The published model.pkl (read as plain tensors only), a folder with it, or a Hub id.
            primary: The dimension that is the score; it comes last in `info.dims`.
            variant: "demo" or "training".
            processor: Folder or Hub id of the tokenizer; None takes the one beside local weights if there is one,
                else that of CLIP-H.
            clip_config: Arguments of the checkpoint's CLIPConfig; None is ViT-H/14.
            device: As in `from_pretrained`.
            dtype: As in `from_pretrained`; the heads are computed in float32.
            local_files_only: As in `from_pretrained`.

        Raises:
            ValueError: If `primary` or `variant` is unknown.
            WeightsError: If the checkpoint is missing, damaged, holds more than tensors, or is of another model.
        """
        if primary not in DIMS:
            raise ValueError(f"unknown dimension {primary!r} (available: {', '.join(DIMS)})")
        if variant not in ("demo", "training"):
            raise ValueError(f"unknown 3DGen-Score variant {variant!r} (available: demo, training)")
        super().__init__()
        self.info = replace(ThreeDGenScore.info, dims=(*(name for name in DIMS if name != primary), primary))
        self.variant: Variant = variant
        self.dtype = torch.float32 if dtype == "auto" else dtype
        path = find_file(self.info, path_or_id, local_files_only=local_files_only)
        network = _Network(clip_config or clip_h_config())
        load_complete(self.info, network, read_tensors(self.info, path), path, rename=_rename)
        words = processor or folder_with(path_or_id, TOKENIZER_FILES) or CLIP_H
        text_config = network.clip.config.text_config
        self.towers = HFTowers(network.clip, load_tokenizer(self.info, words, text_config, local_files_only))
        self.normal_tower = _Tower(network.normal_vision_model, network.normal_visual_projection)
        self.rgb_tower = _Tower(network.rgb_vision_model, network.rgb_visual_projection)
        self.scales = network.scales(raw=variant == "training")
        device = resolve_device(device)
        self.to(device, self.dtype)
        wide = torch.promote_types(self.dtype, torch.float32)
        self.geometry_detail = network.geo_detail_logit_proj.to(device, wide)
        self.texture = network.texture_logit_proj.to(device, wide)
        self.requires_grad_(False).train(False)
        self.crop = CropPreprocessing(self.towers.image_size)

    def preprocess(self, item: Media | Views) -> _Prepared:
        """See `RewardModel`."""
        if isinstance(item, Tensor) and item.ndim == 5 and len(item) == 2:
            item = Views(item[0], item[1])
        if not isinstance(item, Views):
            shape = f"of shape {tuple(item.shape)}" if isinstance(item, Tensor) else ""
            raise InvalidMediaError(f"expected Views or a tensor [2, 4, 3, H, W], got {type(item).__name__} {shape}")
        reference = None if item.reference is None else self.crop.image(to_rgb(item.reference))
        return _Prepared(self._grid(item.rgb), self._grid(item.normal), reference)

    def _grid(self, views: Media | Sequence[Media]) -> Tensor:
        if isinstance(views, Image.Image):
            return self.crop.image(to_rgb(views))
        pictures = read_clip(Video(views) if isinstance(views, list | tuple) else views, _quarters)  # type: ignore[arg-type]
        width, height = pictures[0].size
        grid = Image.new("RGB", (2 * width, 2 * height))
        for i, picture in enumerate(pictures):
            grid.paste(picture, (i % 2 * width, i // 2 * height))
        return self.crop.image(grid)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], batch_size: int) -> Tensor:
        """See `RewardModel`: text embeddings [N, D], as they come."""
        chunks = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
        return torch.cat([self.towers.encode_texts(chunk) for chunk in chunks])

    def score_prepared(self, prepared: Sequence[_Prepared], texts: Sequence[Tensor]) -> dict[str, Tensor]:
        """See `RewardModel`."""
        references = list(texts)
        pictured = [i for i, item in enumerate(prepared) if item.reference is not None]
        if pictured:
            pixels = torch.stack([item.reference for item in prepared if item.reference is not None])
            for i, embedding in zip(pictured, self.towers.encode_images(self._ready(pixels)), strict=True):
                references[i] = embedding
        rgb = torch.stack([item.rgb for item in prepared])
        normal = torch.stack([item.normal for item in prepared])
        return self._scores(rgb, normal, torch.stack(references))

    def score_tensor(self, pixels: Tensor, prompts: str | Sequence[str]) -> Tensor:
        """Primary scores [B] on the model's device, with a graph to `pixels`; the model's weights get no gradient.

        Args:
            pixels: Colour and normal views [B, 2, 4, 3, H, W] in [0, 1], any floating type.
            prompts: One prompt, or B.

        Raises:
            InvalidMediaError: If `pixels` has another shape or is not floating.
        """
        if pixels.ndim != 6 or tuple(pixels.shape[1:4]) != (2, 4, 3) or not pixels.is_floating_point():
            raise InvalidMediaError(f"expected floats [B, 2, 4, 3, H, W], got {pixels.dtype} {tuple(pixels.shape)}")
        unique, rows = self._texts(prompts, len(pixels))
        texts = self.encode_text(unique, len(unique))[rows]
        wide = pixels.to(self.device, torch.promote_types(pixels.dtype, torch.float32))
        grids = torch.cat(
            [torch.cat([wide[:, :, 0], wide[:, :, 1]], -1), torch.cat([wide[:, :, 2], wide[:, :, 3]], -1)], -2
        )
        rgb, normal = (self.crop.tensor(grids[:, i]) for i in (0, 1))
        return self._scores(rgb, normal, texts)[self.info.dims[-1]]

    def _scores(self, rgb: Tensor, normal: Tensor, reference: Tensor) -> dict[str, Tensor]:
        """All scores [B] of grids [B, 3, S, S] and embeddings [B, D]."""
        towers = (self.rgb_tower(self._ready(rgb)), self.normal_tower(self._ready(normal)), reference)
        c, n, r = (e.to(torch.promote_types(e.dtype, torch.float32)) for e in towers)
        if self.variant == "training":
            c, n, r = unit(c), unit(n), unit(r)
        geometry, coherence, alignment = self.scales
        return {
            "geometry_plausibility": geometry * (r * n).sum(-1),
            "geometry_detail": self.geometry_detail(n).squeeze(-1),
            "texture": self.texture(c).squeeze(-1),
            "geometry_texture_coherence": coherence * (n * c).sum(-1),
            "alignment": alignment * (r * c).sum(-1),
        }

    def _ready(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.device, self.dtype)

    def settings(self) -> dict[str, str]:
        """See `RewardModel`."""
        scales = " ".join(f"{scale:.9e}" for scale in self.scales)
        return {"dtype": str(self.dtype), "variant": self.variant, "primary": self.info.dims[-1], "scales": scales}


class _Prepared(NamedTuple):
    """Normalised pixels [3, S, S] of the two grids and of the reference, if there is one."""

    rgb: Tensor
    normal: Tensor
    reference: Tensor | None


class _Tower(nn.Module):
    def __init__(self, vision_model: nn.Module, projection: nn.Module):
        super().__init__()
        self.vision_model, self.projection = vision_model, projection

    def forward(self, pixels: Tensor) -> Tensor:
        embeddings: Tensor = self.projection(self.vision_model(pixel_values=pixels).pooler_output)
        return embeddings


class _Network(nn.Module):
    """The checkpoint's parts under its names, without values; that the CLIPs are of transformers is read from them."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        self.clip, normal, rgb = (empty_clip(config) for _ in range(3))
        self.normal_vision_model, self.normal_visual_projection = normal.vision_model, normal.visual_projection
        self.rgb_vision_model, self.rgb_visual_projection = rgb.vision_model, rgb.visual_projection
        with torch.device("meta"):
            self.geo_logit_scale = nn.Parameter(torch.empty(()))
            self.geo_texture_logit_scale = nn.Parameter(torch.empty(()))
            self.align_logit_scale = nn.Parameter(torch.empty(()))
            self.geo_detail_logit_proj = nn.Linear(self.clip.projection_dim, 1)
            self.texture_logit_proj = nn.Linear(self.clip.projection_dim, 1)

    def scales(self, raw: bool) -> tuple[float, ...]:
        """The factors of plausibility, coherence and alignment, as Python floats: half precision would round them."""
        scales = (self.geo_logit_scale, self.geo_texture_logit_scale, self.align_logit_scale)
        values = [float(scale.detach()) for scale in scales]
        return tuple(value if raw else math.exp(value) for value in values)


def _quarters(count: int, fps: float | None) -> list[int]:
    if count % 4:
        raise InvalidMediaError(f"expected 4 views, or a turn with a multiple of 4 frames, got {count}")
    return [i * count // 4 for i in range(4)]


def _rename(name: str) -> str | None:
    """Old files hold position ids, which are no weights."""
    return None if name.endswith("embeddings.position_ids") else name
