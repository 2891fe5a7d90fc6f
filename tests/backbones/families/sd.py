"""Stable Diffusion 1.x (epsilon) and 2.x (v)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.backbones.families.base import Family, save, tiny_clip, tiny_vae


def tiny_unet() -> Any:
    """A two-level image UNet on 4x4 latents."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def save_tiny(folder: Path, prediction_type: str) -> Path:
    """On 4x4 latents of 8x8 pictures."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    torch.manual_seed(0)
    tokenizer, text_encoder = tiny_clip()
    unet = tiny_unet()
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    pipeline = StableDiffusionPipeline(
        vae=tiny_vae(sample_size=8),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return save(pipeline, folder)


FAMILIES = [
    Family(
        name=name,
        save=partial(save_tiny, prediction_type=kind),
        pipeline_class="StableDiffusionPipeline",
        latent_shape=(4, 4, 4),
        size=(8, 8),
    )
    for name, kind in (("sd-epsilon", "epsilon"), ("sd-v", "v_prediction"))
]
