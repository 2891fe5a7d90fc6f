"""Stable Diffusion 1.x and 2.x: a UNet on VAE latents with one CLIP text encoder; epsilon or v prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.utils import convert_state_dict_to_diffusers
from torch import Tensor

from diffalign.backbones.base import PipelinePolicy
from diffalign.batches import Conditioning
from diffalign.schedules import DiscreteSchedule

__all__ = ["StableDiffusionPolicy"]


class UNetPolicy(PipelinePolicy):
    """What the UNets of Stable Diffusion share: a discrete chain, integer timesteps, latents of the UNet's size."""

    part = "unet"
    guidance_scale = 7.5
    num_inference_steps = 25

    def _configure(self, size: tuple[int, int] | None, num_frames: int | None) -> None:
        self.schedule = schedule_from_config(self.pipeline.scheduler.config)
        factor = int(self.pipeline.vae_scale_factor)
        sample_size = self.denoiser.config.sample_size
        own = (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)
        self.size = size or (own[0] * factor, own[1] * factor)
        channels = int(self.denoiser.config.in_channels)
        self.latent_shape = (channels, self.size[0] // factor, self.size[1] // factor)
        self.max_tokens = int((self.pipeline.tokenizer or self.pipeline.tokenizer_2).model_max_length)

    def _lora_layers(self) -> dict[str, Tensor]:
        layers = super()._lora_layers()
        older: dict[str, Tensor] = convert_state_dict_to_diffusers(layers)
        # The older suffixes exist for attentions alone, and diffusers fails on a file in which both occur.
        return layers if any("lora_A" in key for key in older) else older


class StableDiffusionPolicy(UNetPolicy):
    """A `StableDiffusionPipeline` as a policy; the conditioning is {"hidden": [B, tokens, width]}."""

    load_options: Mapping[str, Any] = {"requires_safety_checker": False}  # type: ignore[misc]
    any_size = True

    def _embed(self, prompts: list[str]) -> Mapping[str, Tensor]:
        hidden, _ = self.pipeline.encode_prompt(prompts, self.device, 1, False)
        return {"hidden": hidden}

    def _forward(self, module: Any, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        output: Tensor = module(noisy_latents, timesteps, conditioning.tensors["hidden"], return_dict=False)[0]
        return output


def schedule_from_config(config: Any) -> DiscreteSchedule:
    """The noise table of a diffusers scheduler's configuration, recomputed in float64 where it has a formula."""
    steps, kind = int(config["num_train_timesteps"]), config["beta_schedule"]
    if config.get("trained_betas") is not None:
        schedule = DiscreteSchedule.from_betas(config["trained_betas"])
    elif kind == "scaled_linear":
        schedule = DiscreteSchedule.scaled_linear(steps, config["beta_start"], config["beta_end"])
    elif kind == "linear":
        betas = torch.linspace(config["beta_start"], config["beta_end"], steps, dtype=torch.float64)
        schedule = DiscreteSchedule.from_betas(betas)
    else:
        return DiscreteSchedule.from_betas(DDPMScheduler.from_config(dict(config)).betas)
    return schedule.zero_terminal_snr() if config.get("rescale_betas_zero_snr") else schedule
