"""LTX-Video, with the first decoder and with the one that reads a timestep (0.9.1 and later)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.backbones.families.base import Family, save, tiny_t5

LATENTS = (4, 2, 4, 8)


def tiny_video_vae(**options: Any) -> Any:
    """An LTX autoencoder of 4 channels with random weights: a stride of 8 in space and in time."""
    from diffusers import AutoencoderKLLTXVideo

    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 3,
        layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, True),
        decoder_spatio_temporal_scaling=(True, True, True),
        upsample_residual=(False, False, False),
        upsample_factor=(1, 1, 1),
        patch_size=1,
        scaling_factor=0.7,
        **{"decoder_inject_noise": (False,) * 4, **options},
    )
    vae.latents_mean.copy_(torch.tensor([0.3, -0.6, 0.1, 0.9]))
    vae.latents_std.copy_(torch.tensor([2.8, 1.4, 0.6, 1.9]))
    return vae.eval()


def save_tiny(folder: Path, **options: Any) -> Path:
    """A two-layer transformer of width 24; `options` go to the autoencoder."""
    from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel

    torch.manual_seed(0)
    tokenizer, text_encoder = tiny_t5(32)
    transformer = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=2,
        caption_channels=32,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        base_shift=0.95,
        max_shift=2.05,
        shift_terminal=0.1,
    )
    pipeline = LTXPipeline(
        scheduler=scheduler,
        vae=tiny_video_vae(**options),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )
    return save(pipeline, folder)


def latents(policy: Any, packed: Tensor) -> Tensor:
    """[B, t * h * w, C] -> [B, C, t, h, w]."""
    return policy.pipeline._unpack_latents(packed, *LATENTS[1:])


FAMILIES = [
    Family(
        name=name,
        save=save_family,
        pipeline_class="LTXPipeline",
        latent_shape=LATENTS,
        size=(32, 64),
        num_frames=9,
        latents=latents,
    )
    for name, save_family in (("ltx", save_tiny), ("ltx-0.9.1", partial(save_tiny, timestep_conditioning=True)))
]
