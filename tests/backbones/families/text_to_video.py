"""ModelScope's text-to-video UNet, deprecated upstream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.backbones.families.base import Family, save, tiny_clip, tiny_vae


def save_tiny(folder: Path) -> Path:
    """A two-level UNet on 4x4 latents."""
    from diffusers import DDIMScheduler, TextToVideoSDPipeline, UNet3DConditionModel

    torch.manual_seed(0)
    tokenizer, text_encoder = tiny_clip()
    unet = UNet3DConditionModel(
        sample_size=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        # torch multiplies the transposed frames of `proj_in` by other kernels if the weight takes a gradient; below
        # 12 channels the two differ in the last bit
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    with torch.no_grad():  # as built, the last temporal convolutions are zero and frames would not see each other
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline = TextToVideoSDPipeline(
        vae=tiny_vae(sample_size=8), text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler
    )
    return save(pipeline, folder)


def unfold(policy: Any, tensor: Tensor) -> Tensor:
    """What the scheduler's step sees has frames folded into the batch, [B * T, C, h, w]; ours is [B, C, T, h, w]."""
    if tensor.ndim == 5:
        return tensor
    return tensor.unflatten(0, (-1, policy.num_frames)).transpose(1, 2)


def old_callback(function: Any) -> dict[str, Any]:
    """The pipeline has only the callback of old, which is handed the latents and returns nothing."""

    def call(step: int, timestep: Any, latents: Tensor) -> None:
        function(None, step, timestep, {"latents": latents})

    return {"callback": call}


FAMILIES = [
    Family(
        name="text-to-video",
        save=save_tiny,
        pipeline_class="TextToVideoSDPipeline",
        latent_shape=(4, 3, 4, 4),
        size=(8, 8),
        num_frames=3,
        latents=unfold,
        callback=old_callback,
        has_lora_loader=False,
    )
]
