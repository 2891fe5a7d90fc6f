"""Wan 2.1, the two experts of 2.2, and the 2.2 model with a timestep for each token."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.backbones.families.base import Family, save, tiny_t5

STATISTICS = {"latents_mean": [0.3, -0.6, 0.1, 0.9], "latents_std": [2.8, 1.4, 0.6, 1.9]}


def tiny_umt5(width: int = 16) -> tuple[Any, Any]:
    """A T5 tokenizer of single characters, and a multilingual T5 encoder of `width` with random weights."""
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer, _ = tiny_t5()
    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=2 * width, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return tokenizer, UMT5EncoderModel(config).eval()


def save_tiny(folder: Path, parts: tuple[str, ...] = ("transformer",), per_token: bool = False) -> Path:
    """Two-layer transformers on latents of 4 channels, eight times smaller in space and four times in time.

    Args:
        folder: Where to.
        parts: Which experts there are.
        per_token: As the 5B model: a timestep for each token, and 2x2 pixels folded before the autoencoder.
    """
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    torch.manual_seed(0)
    tokenizer, text_encoder = tiny_umt5()
    folded = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **STATISTICS, **(folded if per_token else {})
    )
    experts = {
        part: WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        )
        for part in parts
    }
    # a fresh text projection hardly reaches the output, and no comparison would then notice a wrong prompt
    for expert in experts.values():
        for parameter in expert.condition_embedder.text_embedder.parameters():
            parameter.data.mul_(8)
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        **experts,
        boundary_ratio=0.7 if len(parts) == 2 else None,
        expand_timesteps=per_token,
    )
    return save(pipeline, folder)


def velocity(scheduler: Any, output: Tensor, sample: Tensor, timestep: Tensor) -> Tensor:
    """The UniPC solver of flows is given noise - x0."""
    return output


def noise_level(scheduler: Any, timestep: Tensor) -> float:
    """The sigma that the network is told: a whole timestep, cut from the solver's finer one."""
    index = int((scheduler.timesteps - timestep).abs().argmin())
    steps = scheduler.config.num_train_timesteps
    assert 0 <= float(scheduler.sigmas[index]) * steps - int(timestep) < 1
    return int(timestep) / steps


def load_lora(pipeline: Any, folder: Path) -> None:
    """Both experts' files."""
    pipeline.load_lora_weights(folder)
    second = "pytorch_lora_weights_transformer_2.safetensors"
    pipeline.load_lora_weights(folder, weight_name=second, load_into_transformer_2=True)


_wan = partial(Family, pipeline_class="WanPipeline", velocity=velocity, noise_level=noise_level)

FAMILIES = [
    _wan(name="wan", save=save_tiny, latent_shape=(4, 2, 4, 6), size=(32, 48), num_frames=5),
    _wan(
        name="wan-experts",
        save=partial(save_tiny, parts=("transformer", "transformer_2")),
        latent_shape=(4, 2, 4, 6),
        size=(32, 48),
        num_frames=5,
        guidance_on=5.0,
        load_lora=load_lora,
    ),
    _wan(
        name="wan-per-token",
        save=partial(save_tiny, per_token=True),
        latent_shape=(4, 2, 4, 6),
        size=(64, 96),
        num_frames=5,
    ),
]
