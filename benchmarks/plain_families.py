"""How public scripts encode and noise the data of a family; `benchmarks/plain_widths.py` asks at every step.

Written from the `encode_prompt` of diffusers' pipelines, which `tests/test_plain_widths.py` compares. Everything takes
the pipeline first and reads its own models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from benchmarks.architectures import CLIP_TOKENS

SD3_TOKENS, FLUX_TOKENS, WAN_TOKENS = 256, 512, 512
"""Of T5."""
Noised = tuple[Tensor, Tensor, Tensor]
"""Noisy latents [2B, ...], timesteps [2B] and what should be predicted [2B, ...]."""


@dataclass(frozen=True)
class Family:
    """What a plain step has to know.

    Attributes:
        text: B prompts -> their embeddings by name, B rows each.
        latents: Pictures [2B, 3, H, W], or videos [2B, 3, T, H, W], in [-1, 1] -> latents [2B, C, ...].
        noised: Latents, the chosen ones first -> the same with noise; both halves have the same noise and timesteps.
    """

    text: Callable[[Any, list[str]], Mapping[str, Tensor]]
    latents: Callable[[Any, Tensor], Tensor]
    noised: Callable[[Any, Tensor], Noised]


# --- text ------------------------------------------------------------------------------------------------------------


def _tokens(tokenizer: Any, prompts: list[str], length: int, encoder: Any) -> Any:
    """`input_ids` and `attention_mask`, [B, length], where the encoder is."""
    found = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return found.to(encoder.device)


def _clip(tokenizer: Any, encoder: Any, prompts: list[str]) -> Any:
    """All that a CLIP encoder says of the prompts."""
    return encoder(_tokens(tokenizer, prompts, CLIP_TOKENS, encoder).input_ids, output_hidden_states=True)


def _both_clips(pipeline: Any, prompts: list[str]) -> tuple[Any, Any, Tensor]:
    """Both encoders' outputs, and their last hidden states but one beside each other."""
    first = _clip(pipeline.tokenizer, pipeline.text_encoder, prompts)
    second = _clip(pipeline.tokenizer_2, pipeline.text_encoder_2, prompts)
    return first, second, torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)


def _t5(tokenizer: Any, encoder: Any, prompts: list[str], length: int) -> Tensor:
    """[B, length, width]; these pipelines give T5 no mask."""
    hidden: Tensor = encoder(_tokens(tokenizer, prompts, length, encoder).input_ids).last_hidden_state
    return hidden


def _sd_text(pipeline: Any, prompts: list[str]) -> Mapping[str, Tensor]:
    return {"hidden": _clip(pipeline.tokenizer, pipeline.text_encoder, prompts).last_hidden_state}


def _sdxl_text(pipeline: Any, prompts: list[str]) -> Mapping[str, Tensor]:
    _, second, hidden = _both_clips(pipeline, prompts)
    return {"hidden": hidden, "pooled": second.text_embeds}


def _sd3_text(pipeline: Any, prompts: list[str]) -> Mapping[str, Tensor]:
    """CLIP's tokens, zeros up to T5's width, before T5's."""
    first, second, clip = _both_clips(pipeline, prompts)
    t5 = _t5(pipeline.tokenizer_3, pipeline.text_encoder_3, prompts, SD3_TOKENS)
    hidden = torch.cat([F.pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5], dim=1)
    return {"hidden": hidden, "pooled": torch.cat([first.text_embeds, second.text_embeds], dim=-1)}


def _flux_text(pipeline: Any, prompts: list[str]) -> Mapping[str, Tensor]:
    pooled = _clip(pipeline.tokenizer, pipeline.text_encoder, prompts).pooler_output
    return {"hidden": _t5(pipeline.tokenizer_2, pipeline.text_encoder_2, prompts, FLUX_TOKENS), "pooled": pooled}


def _wan_text(pipeline: Any, prompts: list[str]) -> Mapping[str, Tensor]:
    """UMT5 with a mask, and zeros after the last token."""
    tokens = _tokens(pipeline.tokenizer, prompts, WAN_TOKENS, pipeline.text_encoder)
    hidden = pipeline.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return {"hidden": hidden * tokens.attention_mask[..., None]}


# --- pictures --------------------------------------------------------------------------------------------------------


def _scaled(pipeline: Any, pixels: Tensor) -> Tensor:
    """Shifted where the autoencoder's configuration says so, then scaled."""
    config = pipeline.vae.config
    latents: Tensor = pipeline.vae.encode(pixels).latent_dist.sample()
    shift, scale = float(config.shift_factor or 0.0), float(config.scaling_factor)
    return (latents - shift) * scale


def _normalised(pipeline: Any, pixels: Tensor) -> Tensor:
    """By mean and deviation of every channel."""
    config = pipeline.vae.config
    latents: Tensor = pipeline.vae.encode(pixels).latent_dist.sample()
    mean, std = (torch.tensor(config[name]).to(latents) for name in ("latents_mean", "latents_std"))
    return (latents - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)


# --- noise -----------------------------------------------------------------------------------------------------------


def _shared_noise(latents: Tensor) -> Tensor:
    return torch.cat([torch.randn_like(latents[: len(latents) // 2])] * 2)


def _diffused(pipeline: Any, latents: Tensor) -> Noised:
    """Uniform timesteps; the noise should be predicted."""
    scheduler, noise = pipeline.scheduler, _shared_noise(latents)
    steps = scheduler.config.num_train_timesteps
    timesteps = torch.randint(0, steps, (len(latents) // 2,), device=latents.device).repeat(2)
    return scheduler.add_noise(latents, noise, timesteps), timesteps, noise


def _flowing(pipeline: Any, latents: Tensor) -> Noised:
    """A rectified flow at the entries of the scheduler's table that a logit-normal law draws, as diffusers' scripts do.

    The velocity, noise - latents, should be predicted.
    """
    scheduler, noise = pipeline.scheduler, _shared_noise(latents)
    drawn = compute_density_for_timestep_sampling("logit_normal", len(latents) // 2, logit_mean=0.0, logit_std=1.0)
    entries = (drawn * scheduler.config.num_train_timesteps).long().repeat(2)
    sigmas = scheduler.sigmas[entries].to(latents).view(-1, *[1] * (latents.ndim - 1))
    timesteps = scheduler.timesteps[entries].to(latents.device)
    return (1 - sigmas) * latents + sigmas * noise, timesteps, noise - latents


FAMILIES = {
    "StableDiffusionPipeline": Family(_sd_text, _scaled, _diffused),
    "StableDiffusionXLPipeline": Family(_sdxl_text, _scaled, _diffused),
    "StableDiffusion3Pipeline": Family(_sd3_text, _scaled, _flowing),
    "WanPipeline": Family(_wan_text, _normalised, _flowing),
    "FluxPipeline": Family(_flux_text, _scaled, _flowing),
}
"""Class of a pipeline -> what a plain step has to know of it."""
