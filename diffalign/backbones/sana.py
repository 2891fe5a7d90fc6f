"""Sana: a flow transformer with linear attention, on the latents of a deep autoencoder, reading a language model.

Xie et al. 2024, "SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers"
(arXiv:2410.10629). The network reads t * `timestep_scale`, t in 0..1000, and predicts noise - x0. Its autoencoder has
no distribution: latents are one value, their deviation is zero.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import SanaPipeline
from torch import Tensor

from diffalign.backbones.base import PipelinePolicy
from diffalign.backbones.options import FlowOptions
from diffalign.batches import Conditioning

__all__ = ["SanaPolicy"]

_CALL = inspect.signature(SanaPipeline.__call__).parameters


class SanaOptions(FlowOptions):
    """What Sana can be told.

    Attributes:
        complex_human_instruction: Lines before every prompt; an empty list is none.
    """

    complex_human_instruction: tuple[str, ...] | None = None


class SanaPolicy(PipelinePolicy):
    """A `SanaPipeline` as a policy: Sana and Sana 1.5.

    The conditioning is {"hidden": [B, 300, width], "mask": [B, 300]}, the mask integer with 1 for a token.

    A prompt is encoded behind the pipeline's "complex human instruction" (section 3.1), of which only the prompt's own
    tokens are kept. The empty prompt is encoded without it: that is the pipeline's unconditional branch.
    """

    Options = SanaOptions
    instruction: tuple[str, ...] = tuple(_CALL["complex_human_instruction"].default)
    """Lines of the instruction before every prompt."""

    half_precision_text = True
    lora_targets = ("to_q", "to_k", "to_v")
    guidance_scale = 4.5
    num_inference_steps = 20

    def _configure(self, size: tuple[int, int] | None, num_frames: int | None) -> None:
        factor = int(self.pipeline.vae_scale_factor)
        side = int(self.denoiser.config.sample_size) * factor
        self.size = size or (side, side)
        self.latent_shape = (int(self.denoiser.config.in_channels), self.size[0] // factor, self.size[1] // factor)
        self.schedule = self._flow_schedule(self.latent_shape[1] * self.latent_shape[2])
        if self.options.complex_human_instruction is not None:
            self.instruction = self.options.complex_human_instruction
        self.max_tokens = int(_CALL["max_sequence_length"].default)

    def _embed(self, prompts: list[str]) -> Mapping[str, Tensor]:
        parts: list[tuple[list[int], Tensor, Tensor]] = []
        for empty in (False, True):
            rows = [i for i, prompt in enumerate(prompts) if (prompt == "") is empty]
            if rows:
                hidden, mask, _, _ = self.pipeline.encode_prompt(
                    [prompts[i] for i in rows],
                    do_classifier_free_guidance=False,
                    device=self.device,
                    max_sequence_length=self.max_tokens,
                    complex_human_instruction=None if empty else list(self.instruction),
                )
                parts.append((rows, hidden, mask))
        order = torch.tensor([i for rows, _, _ in parts for i in rows], device=self.device).argsort()
        return {
            "hidden": torch.cat([hidden for _, hidden, _ in parts])[order],
            "mask": torch.cat([mask for _, _, mask in parts])[order],
        }

    def _encoding_settings(self) -> Mapping[str, Any]:
        return {"instruction": list(self.instruction), "max_tokens": self.max_tokens}

    def _forward(self, module: Any, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        output: Tensor = module(
            noisy_latents,
            encoder_hidden_states=conditioning.tensors["hidden"],
            encoder_attention_mask=conditioning.tensors["mask"],
            timestep=timesteps * float(self.denoiser.config.timestep_scale),
            return_dict=False,
        )[0]
        return output[:, : noisy_latents.shape[1]]  # a second half of the channels would be a learned variance

    def _raw_moments(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        latents = vae.encode(pixels).latent
        return latents, torch.zeros_like(latents)

    def _sampling_arguments(self, guidance_scale: float) -> dict[str, Any]:
        return {
            **super()._sampling_arguments(guidance_scale),
            "use_resolution_binning": False,  # it would draw at another size and resize
            "max_sequence_length": self.max_tokens,
            "complex_human_instruction": list(self.instruction),
        }

    def _prompt_arguments(self, prompts: Sequence[str], arguments: Mapping[str, Any]) -> dict[str, Any]:
        return super()._prompt_arguments(prompts, arguments) | {"negative_prompt": None}  # its own default is a text
