"""Stable Diffusion 1.x (epsilon) and 2.x (v)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from tests.backbones.families.base import Family, save, tiny_clip, tiny_vae


def save_tiny(folder: Path, prediction_type: str) -> Path:
    """A two-level UNet on 4x4 latents."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    tokenizer, text_encoder = tiny_clip()
    unet = UNet2DConditionModel(
        sample_size=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
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
