"""CogVideoX 2B, 5B and 1.5: a video transformer with v prediction, on latents compressed in time as well.

Yang et al. 2024, "CogVideoX: Text-to-Video Diffusion Models with An Expert Transformer" (arXiv:2408.06072). Traps:

- the network wants frames before channels, [B, t, C, h, w];
- the chain is shifted towards noise and ends in pure noise, where alpha = 0; v prediction stays defined there;
- 1.5 joins `patch_size_t` latent frames to one token. Odd counts are filled up at the front, in training with copies
  of the first latent frame as the official fine-tuning does; the pipeline drops these frames before it decodes;
- `invert_scale_latents` of 1.5's autoencoder concerns the image of image-to-video only, which is not supported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffalign.backbones.base import PipelinePolicy
from diffalign.batches import Conditioning
from diffalign.schedules import DiscreteSchedule

__all__ = ["CogVideoXPolicy"]


class CogVideoXPolicy(PipelinePolicy):
    """A `CogVideoXPipeline` as a policy; the conditioning is {"hidden": [B, 226, width]}, padding included.

    The pipeline gives the transformer no text mask, so padding is read as text, here as well.
    """

    is_video = True
    frame_rate = 8.0
    half_precision_text = True
    guidance_scale = 6.0
    num_inference_steps = 50

    def _configure(self, size: tuple[int, int] | None, num_frames: int | None) -> None:
        config = self.denoiser.config
        # the scheduler's own table: after the usual betas come a shift of the signal-to-noise ratio and a rescaling
        self.schedule = DiscreteSchedule(self.pipeline.scheduler.alphas_cumprod)
        factor = int(self.pipeline.vae_scale_factor_spatial)
        self.size = size or (int(config.sample_height) * factor, int(config.sample_width) * factor)
        self.num_frames = num_frames or int(config.sample_frames)
        compression = int(self.pipeline.vae_scale_factor_temporal)
        # the autoencoder decodes pairs of latent frames; an even count comes back with more frames than it was made of,
        # unless it does not compress time
        if compression > 1 and (self.num_frames - 1) % (2 * compression):
            raise ValueError(
                f"num_frames: expected a multiple of {2 * compression} plus one, got {self.num_frames}; "
                f"use {(self.num_frames - 1) // (2 * compression) * 2 * compression + 1}"
            )
        frames = (self.num_frames - 1) // compression + 1
        if config.patch_size_t is not None:  # version 1.5, trained on twice as many frames per second
            self.frame_rate = 16.0
        self._filling = -frames % int(config.patch_size_t or 1)
        height, width = (side // factor for side in self.size)
        self.latent_shape = (int(config.in_channels), frames + self._filling, height, width)
        self.max_tokens = int(config.max_text_seq_length)

    def _embed(self, prompts: list[str]) -> Mapping[str, Tensor]:
        hidden, _ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=self.max_tokens, device=self.device
        )
        return {"hidden": hidden}

    def _forward(self, module: Any, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        frames, height, width = noisy_latents.shape[2:]
        rotary = None
        if self.denoiser.config.use_rotary_positional_embeddings:
            factor = self.pipeline.vae_scale_factor_spatial
            rotary = self.pipeline._prepare_rotary_positional_embeddings(
                height * factor, width * factor, frames, noisy_latents.device
            )
        output: Tensor = module(
            hidden_states=noisy_latents.transpose(1, 2),
            encoder_hidden_states=conditioning.tensors["hidden"],
            timestep=timesteps,
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]
        return output.transpose(1, 2)

    def _raw_moments(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = super()._raw_moments(vae, pixels)
        return self._fill(mean), self._fill(std)

    def _fill(self, latents: Tensor) -> Tensor:
        """Latents [B, C, t, h, w] with copies of the first frame in front, until tokens can be made of them."""
        return torch.cat((latents[:, :, :1].repeat(1, 1, self._filling, 1, 1), latents), dim=2)

    def _pixels(self, vae: Any, latents: Tensor) -> Tensor:
        return super()._pixels(vae, latents[:, :, self._filling :])

    def _sampling_arguments(self, guidance_scale: float) -> dict[str, Any]:
        return super()._sampling_arguments(guidance_scale) | {"max_sequence_length": self.max_tokens}

    def _encoding_settings(self) -> Mapping[str, Any]:
        return {"filling": self._filling, "max_tokens": self.max_tokens}
