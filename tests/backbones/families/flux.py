"""FLUX.1 dev, which reads its guidance, and schnell, which does not."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.backbones.families.base import Family, save, tiny_clip, tiny_t5, tiny_vae


def save_tiny(folder: Path, dev: bool) -> Path:
    """One double and one single block on 8x12 latents of 4 channels; text width 32, pooled width 16."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    tokenizer, text_encoder = tiny_clip()
    tokenizer_2, text_encoder_2 = tiny_t5(32)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=dev,
        axes_dims_rope=(2, 2, 4),
    )
    shift = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15} if dev else {}
    pipeline = FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**shift),
        vae=tiny_vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
    )
    return save(pipeline, folder)


def unpack(policy: Any, packed: Tensor) -> Tensor:
    """By the pipeline's own method, which the policy does not use."""
    latents: Tensor = policy.pipeline._unpack_latents(packed, *policy.size, policy.pipeline.vae_scale_factor)
    return latents


FAMILIES = [
    Family(
        name=name,
        save=partial(save_tiny, dev=name == "flux-dev"),
        pipeline_class="FluxPipeline",
        latent_shape=(4, 8, 12),
        size=(16, 24),
        call=call,
        guidance_off=3.5,  # read by the network, not classifier-free: the policy's `embedded_guidance`
        guidance_on=None,
        latents=unpack,
    )
    for name, call in (("flux-dev", {}), ("flux-schnell", {"max_sequence_length": 256}))
]
