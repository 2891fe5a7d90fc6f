"""Stable Diffusion 3 and 3.5, with and without T5."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from tests.backbones.families.base import Family, save, tiny_clip, tiny_t5, tiny_vae


def save_tiny(folder: Path, t5: bool) -> Path:
    """A two-layer transformer on 8x8 latents of 4 channels; joint width 32, pooled width 32."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    tokenizer, text_encoder = tiny_clip(projection=True)
    tokenizer_2, text_encoder_2 = tiny_clip(projection=True)
    tokenizer_3, text_encoder_3 = tiny_t5(32) if t5 else (None, None)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(levels=2, sample_size=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )
    return save(pipeline, folder)


FAMILIES = [
    Family(
        name=name,
        save=partial(save_tiny, t5=t5),
        pipeline_class="StableDiffusion3Pipeline",
        latent_shape=(4, 8, 8),
        size=(16, 16),
        load={} if t5 else {"text_encoder_3": None, "tokenizer_3": None},
        call={"max_sequence_length": 256},
    )
    for name, t5 in (("sd3", True), ("sd3-without-t5", False))
]
