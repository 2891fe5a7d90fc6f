"""CogVideoX: 2B (sine positions), 5B (rotary positions) and 1.5 (two latent frames to a token)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.backbones.families.base import Family, save, tiny_t5

SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "timestep_spacing": "trailing",
}
"""What all are published with, beside `snr_shift_scale`: 3 for 2B, 1 for 5B and 1.5."""


def save_tiny(
    folder: Path, shift: float, scheduler: str = "CogVideoXDDIMScheduler", invert: bool = False, **options: Any
) -> Path:
    """A two-layer transformer on latents [4, t, 4, 6], with a four-level autoencoder."""
    import diffusers
    from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline, CogVideoXTransformer3DModel

    torch.manual_seed(0)
    tokenizer, text_encoder = tiny_t5(32)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=2,
        sample_width=6,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=32,
        **options,
    )
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        scaling_factor=1.15258426 if shift == 3 else 0.7,
        invert_scale_latents=invert,
    )
    pipeline = CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=getattr(diffusers, scheduler)(snr_shift_scale=shift, **SCHEDULER),
    )
    return save(pipeline, folder)


FAMILIES = [
    Family(
        name=name,
        save=partial(save_tiny, shift=shift, **options),
        pipeline_class="CogVideoXPipeline",
        latent_shape=(4, frames, 4, 6),
        size=(32, 48),
        num_frames=9,
        call={"max_sequence_length": 32},
        latents=lambda policy, tensor: tensor.transpose(1, 2),
    )
    for name, shift, frames, options in (
        ("cogvideox-2b", 3.0, 3, {}),
        ("cogvideox-5b", 1.0, 3, {"use_rotary_positional_embeddings": True}),
        (
            "cogvideox-1.5",
            1.0,
            4,
            {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False, "invert": True},
        ),
    )
]
