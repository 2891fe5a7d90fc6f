"""Stable Diffusion 3 and 3.5: a flow transformer with two CLIP encoders and, if it is there, T5.

Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis" (arXiv:2403.03206). The
network reads t in 0..1000 and predicts noise - x0. Latents are shifted before they are scaled. T5 may be missing, as
the published pipelines allow: its tokens are then zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffalign.backbones.base import JOINT_ATTENTION, PipelinePolicy
from diffalign.backbones.options import FlowOptions
from diffalign.batches import Conditioning

__all__ = ["StableDiffusion3Policy"]

T5_TOKENS = 256
"""Tokens of T5, or zeros in their place, that the pipelines ask for; fewer where the third tokenizer reads fewer."""


class StableDiffusion3Policy(PipelinePolicy):
    """A `StableDiffusion3Pipeline` as a policy.

    The conditioning is {"hidden": [B, 77 + 256, width], "pooled": [B, width]}.
    """

    Options = FlowOptions
    encoder_parts = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    half_precision_text = True
    lora_targets = JOINT_ATTENTION
    any_size = True
    guidance_scale = 7.0
    num_inference_steps = 28

    def _configure(self, size: tuple[int, int] | None, num_frames: int | None) -> None:
        factor = int(self.pipeline.vae_scale_factor)
        side = int(self.denoiser.config.sample_size) * factor
        self.size = size or (side, side)
        self.latent_shape = (int(self.denoiser.config.in_channels), self.size[0] // factor, self.size[1] // factor)
        patch = int(self.denoiser.config.patch_size)
        self.schedule = self._flow_schedule(self.latent_shape[1] * self.latent_shape[2] // patch**2)
        self.max_tokens = int(self.pipeline.tokenizer_max_length)
        third = self.pipeline.tokenizer_3
        self._t5_tokens = T5_TOKENS if third is None else min(T5_TOKENS, int(third.model_max_length))

    def _embed(self, prompts: list[str]) -> Mapping[str, Tensor]:
        hidden, _, pooled, _ = self.pipeline.encode_prompt(
            prompts,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self._t5_tokens,
        )
        return {"hidden": hidden, "pooled": pooled}

    def _sampling_arguments(self, guidance_scale: float) -> dict[str, Any]:
        return {**super()._sampling_arguments(guidance_scale), "max_sequence_length": self._t5_tokens}

    def _forward(self, module: Any, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        output: Tensor = module(
            hidden_states=noisy_latents,
            timestep=timesteps,
            encoder_hidden_states=conditioning.tensors["hidden"],
            pooled_projections=conditioning.tensors["pooled"],
            return_dict=False,
        )[0]
        return output
