"""Denoisers at their published widths with random weights, inside the tiny pipelines of their families.

A tiny autoencoder and text encoder stand beside a full denoiser: training never calls them once pairs are encoded.
Latents and embeddings have the published shapes. `reduced` says where layers were left out to fit 80 GB.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.published_widths import FLUX_DEV, SD15_UNET, SD35_MEDIUM
from diffalign.backbones import LoRA, inspect_model, load_policy
from diffalign.backbones.loading import policy_class
from tests.backbones.families import FAMILIES
from tests.backbones.test_flux2 import KLEIN_4B
from tests.backbones.test_ltx import PUBLISHED_2B as LTX_2B
from tests.backbones.test_sdxl import BASE_UNET, REFINER_UNET
from tests.backbones.test_wan import PUBLISHED as WAN

BY_NAME = {family.name: family for family in FAMILIES}
SANA_1600M: dict[str, Any] = {
    "in_channels": 32,
    "out_channels": 32,
    "num_layers": 20,
    "num_attention_heads": 70,
    "attention_head_dim": 32,
    "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240,
    "caption_channels": 2304,
    "sample_size": 32,
    "patch_size": 1,
}
MOTION_UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "num_attention_heads": 8,
    "motion_max_seq_length": 32,
    "use_motion_mid_block": True,
}
MODELSCOPE_UNET: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 1024,
    "attention_head_dim": 64,
}


@dataclass(frozen=True)
class Case:
    """A denoiser to train for a few steps.

    Attributes:
        name: Of the model.
        family: Name of its tiny pipeline in `tests.backbones.families`.
        config: Arguments of the denoiser's class; the class's own defaults are the published ones of some models.
        grid: Latent rows and columns, for videos frames before them.
        widths: Last dimension of the embeddings, by name.
        modes: "lora" and perhaps "full".
        batch_size: Pairs.
        tokens: Of the text, where the denoiser knows one length only; None takes the tiny pipeline's.
        reduced: What was left out; empty if nothing.
    """

    name: str
    family: str
    config: Mapping[str, Any]
    grid: tuple[int, ...]
    widths: Mapping[str, int]
    modes: tuple[str, ...] = ("lora",)
    batch_size: int = 1
    tokens: int | None = None
    reduced: str = ""

    def __str__(self) -> str:
        return self.name


BOTH = ("lora", "full")
CASES = [
    Case("sd15-512px", "sd-epsilon", SD15_UNET, (64, 64), {"hidden": 768}, BOTH, 4),
    Case("sd15-1024px", "sd-epsilon", SD15_UNET, (128, 128), {"hidden": 768}, BOTH),
    Case("sdxl-512px", "sdxl", BASE_UNET, (64, 64), {"hidden": 2048, "pooled": 1280}, BOTH, 2),
    Case("sdxl-1024px", "sdxl", BASE_UNET, (128, 128), {"hidden": 2048, "pooled": 1280}, BOTH),
    Case("sdxl-refiner-1024px", "sdxl-refiner", REFINER_UNET, (128, 128), {"hidden": 1280, "pooled": 1280}),
    Case("sd35-medium-1024px", "sd3", SD35_MEDIUM, (128, 128), {"hidden": 4096, "pooled": 2048}),
    Case("flux-dev-1024px", "flux-dev", FLUX_DEV, (128, 128), {"hidden": 4096, "pooled": 768}),
    Case("flux2-klein-4b-1024px", "flux2-klein", KLEIN_4B, (64, 64), {"hidden": KLEIN_4B["joint_attention_dim"]}),
    Case(
        "qwen-image-1024px", "qwen-image", {"num_layers": 30}, (128, 128), {"hidden": 3584}, reduced="30 of 60 layers"
    ),
    Case("z-image-1024px", "z-image", {}, (128, 128), {"hidden": 2560}),
    Case("sana-1600m-1024px", "sana", SANA_1600M, (32, 32), {"hidden": 2304}),
    Case("animatediff-512px", "animatediff", MOTION_UNET, (16, 64, 64), {"hidden": 768}),
    Case("modelscope-256px", "text-to-video", MODELSCOPE_UNET, (16, 32, 32), {"hidden": 1024}),
    Case(
        "cogvideox-2b-480p",
        "cogvideox-2b",
        {},
        (13, 60, 90),
        {"hidden": 4096},
        tokens=226,
    ),
    Case("wan21-1.3b-480p", "wan", WAN["Wan2.1-T2V-1.3B"][0], (9, 60, 104), {"hidden": 4096}),
    Case("ltx-2b-512x768", "ltx", LTX_2B, (13, 16, 24), {"hidden": 4096}),
    Case(
        "hunyuan-video-540p",
        "hunyuan-video",
        {"num_layers": 10, "num_single_layers": 20},
        (5, 68, 120),
        {"hidden": 4096, "pooled": 768},
        reduced="10 of 20 double and 20 of 40 single blocks",
    ),
    Case("mochi-480p", "mochi", {"num_layers": 24}, (4, 60, 106), {"hidden": 4096}, reduced="24 of 48 layers"),
]


def build(
    case: Case, folder: Path, mode: str, *, tiny: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Any, dict[str, Tensor]]:
    """The policy, and the embeddings of one prompt.

    Args:
        case: What to build.
        folder: Where its family's tiny pipeline is saved.
        mode: "lora", "full", or "none" where nothing is trained.
        tiny: Keep the tiny denoiser and its sizes, to try the code without an accelerator.
        dtype: Of the frozen weights; those of "full" are float32, with a frozen copy in `dtype`.
        device: Where to build it.
    """
    family, source = BY_NAME[case.family], inspect_model(str(folder))
    video = {"num_frames": family.num_frames} if family.num_frames > 1 else {}
    small: Any = load_policy(source, size=family.size, **video)  # type: ignore[arg-type]
    embedded = dict(small.encode_prompts(["a red circle"]).tensors)
    size, frames, denoiser = family.size, family.num_frames, small.denoiser
    if not tiny:
        factor = family.size[0] // family.latent_shape[-2]
        size = (case.grid[-2] * factor, case.grid[-1] * factor)
        if len(case.grid) == 3:
            own = family.latent_shape[1]
            frames = case.grid[0]
            if own != family.num_frames:  # the autoencoder joins frames
                frames = (case.grid[0] - 1) * ((family.num_frames - 1) // (own - 1)) + 1
        standard = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32 if mode == "full" else dtype)
        try:
            with device:
                denoiser = type(small.denoiser)(**case.config)
        finally:
            torch.set_default_dtype(standard)
        generator = torch.Generator().manual_seed(0)
        embedded = {name: _widened(name, tensor, case, generator) for name, tensor in embedded.items()}
    pipeline = small.pipeline
    setattr(pipeline, small.part, denoiser)
    policy = policy_class(source)(
        pipeline if device.type == "meta" else pipeline.to(device),
        source,
        lora=LoRA(rank=8) if mode == "lora" else None,
        train=mode != "none",
        reference_dtype=dtype if mode == "full" else None,
        size=size,
        num_frames=frames if frames > 1 else None,
    )
    if not tiny and len(case.modes) == 1 and denoiser._supports_gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    policy.free_encoders()
    return policy, embedded


def _widened(name: str, tensor: Tensor, case: Case, generator: torch.Generator) -> Tensor:
    """A random embedding of the published shape in the place of the tiny one; masks stay."""
    if name not in case.widths:
        return tensor
    tokens = (case.tokens,) if case.tokens and tensor.ndim == 3 else tensor.shape[1:-1]
    return torch.randn((1, *tokens, case.widths[name]), generator=generator)
