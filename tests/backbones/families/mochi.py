"""Mochi 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.backbones.families.base import Family, save, tiny_t5

MAX_TOKENS = 32


def save_tiny(folder: Path, force_zeros: bool = True) -> Path:
    """A two-layer transformer on latents of 12 channels, 8 times smaller in space and 6 times in time."""
    from diffusers import (
        AutoencoderKLMochi,
        FlowMatchEulerDiscreteScheduler,
        MochiPipeline,
        MochiTransformer3DModel,
    )

    torch.manual_seed(0)
    tokenizer, text_encoder = tiny_t5(32)
    transformer = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=8,
        text_embed_dim=32,
        time_embed_dim=16,
        max_sequence_length=MAX_TOKENS,
    )
    # Zero as built: positions, and with them the order of height and width, would not be seen.
    torch.nn.init.normal_(transformer.pos_frequencies)
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
        scaling_factor=1.3,
    )
    pipeline = MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        force_zeros_for_empty_prompt=force_zeros,
    )
    return save(pipeline, folder)


def noise_level(scheduler: Any, timestep: torch.Tensor) -> float:
    """Mochi's sigmas are the share of data."""
    return 1 - float(scheduler.sigmas[int((scheduler.timesteps - timestep).abs().argmin())])


FAMILIES = [
    Family(
        name="mochi",
        save=save_tiny,
        pipeline_class="MochiPipeline",
        latent_shape=(12, 2, 2, 4),
        size=(16, 32),
        num_frames=7,
        call={"max_sequence_length": MAX_TOKENS},
        timesteps=lambda timestep: 1000 - timestep,
        velocity=lambda scheduler, output, sample, timestep: -output,
        noise_level=noise_level,
    )
]
