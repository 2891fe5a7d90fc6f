"""Stable Diffusion XL: base (Euler sampler), Turbo (ancestral Euler), and the refiner, which starts from images."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.backbones.families.base import Family, save, tiny_clip, tiny_vae

SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
"""What the published schedulers have in common."""


def tiny_unet(width: int, pooled: int, time_ids: int) -> Any:
    """Two levels on 4x4 latents; embeddings of `width`, and `time_ids` numbers beside a pooled one."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        cross_attention_dim=width,
        attention_head_dim=(2, 4),
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=pooled + 8 * time_ids,
    )


def save_tiny(folder: Path, turbo: bool = False, **options: Any) -> Path:
    """Base or Turbo: hidden width 16 + 16, pooled width 16, six time ids."""
    from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline

    torch.manual_seed(0)
    tokenizer, text_encoder = tiny_clip()
    tokenizer_2, text_encoder_2 = tiny_clip(projection=True)
    trailing = EulerAncestralDiscreteScheduler(**SCHEDULER, timestep_spacing="trailing")
    leading = EulerDiscreteScheduler(**SCHEDULER, timestep_spacing="leading")
    pipeline = StableDiffusionXLPipeline(
        vae=tiny_vae(sample_size=8, scaling_factor=0.13025, **options),
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=tiny_unet(32, 16, 6),
        scheduler=trailing if turbo else leading,
    )
    return save(pipeline, folder)


def save_tiny_refiner(folder: Path) -> Path:
    """The second text encoder only, five time ids, no zeros for the empty prompt."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLImg2ImgPipeline

    torch.manual_seed(0)
    tokenizer_2, text_encoder_2 = tiny_clip(projection=True)
    pipeline = StableDiffusionXLImg2ImgPipeline(
        vae=tiny_vae(sample_size=8, scaling_factor=0.13025),
        text_encoder=None,
        text_encoder_2=text_encoder_2,
        tokenizer=None,
        tokenizer_2=tokenizer_2,
        unet=tiny_unet(16, 16, 5),
        scheduler=EulerDiscreteScheduler(**SCHEDULER, timestep_spacing="leading"),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    )
    return save(pipeline, folder)


def variance_preserving(scheduler: Any, sample: Tensor, timestep: Any) -> Tensor:
    """Euler samplers keep x0 + sigma * noise; the UNet and the project read it divided by sqrt(1 + sigma^2)."""
    scaled: Tensor = scheduler.scale_model_input(sample, timestep)
    return scaled


SIZE = (8, 16)  # not square: height and width must not be swapped in the time ids
START = torch.rand((1, 3, *SIZE), generator=torch.Generator().manual_seed(4))

FAMILIES = [
    Family(
        name=name,
        save=partial(save_tiny, turbo=turbo),
        pipeline_class="StableDiffusionXLPipeline",
        latent_shape=(4, 4, 8),
        size=SIZE,
        model_input=variance_preserving,
    )
    for name, turbo in (("sdxl", False), ("sdxl-turbo", True))
] + [
    Family(
        name="sdxl-refiner",
        save=save_tiny_refiner,
        pipeline_class="StableDiffusionXLImg2ImgPipeline",
        latent_shape=(4, 4, 8),
        size=SIZE,
        load={"text_encoder": None, "tokenizer": None},
        model_input=variance_preserving,
        refines={"image": START, "strength": 1.0},
    )
]
