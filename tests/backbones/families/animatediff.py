"""AnimateDiff: an image UNet and a motion adapter, saved as one pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.backbones.families.base import Family, save, tiny_clip, tiny_vae
from tests.backbones.families.sd import tiny_unet

SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "linear",
    "clip_sample": False,
    "timestep_spacing": "linspace",
    "steps_offset": 1,
}
"""What the motion adapters are published with."""


def tiny_adapter() -> Any:
    """Motion modules for `tiny_unet` and at most 8 frames."""
    from diffusers import MotionAdapter

    adapter = MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        motion_max_seq_length=8,
    )
    with torch.no_grad():  # published modules are trained; as built, their last layers are too near to zero to be seen
        for parameter in adapter.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return adapter.eval()


def save_tiny(folder: Path) -> Path:
    """The image UNet with its motion modules, as `AnimateDiffPipeline.save_pretrained` writes it."""
    from diffusers import AnimateDiffPipeline, DDIMScheduler

    torch.manual_seed(0)
    tokenizer, text_encoder = tiny_clip()
    pipeline = AnimateDiffPipeline(
        vae=tiny_vae(sample_size=8),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=tiny_unet(),
        motion_adapter=tiny_adapter(),
        scheduler=DDIMScheduler(**SCHEDULER),
    )
    return save(pipeline, folder)


FAMILIES = [
    Family(
        name="animatediff",
        save=save_tiny,
        pipeline_class="AnimateDiffPipeline",
        latent_shape=(4, 3, 4, 4),
        size=(8, 8),
        num_frames=3,
    )
]
