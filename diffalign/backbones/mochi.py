"""Mochi 1: an asymmetric flow transformer over video latents, guided by one T5 encoder (Genmo 2024, no paper).

The network counts time from noise to data: it reads tau in 0..1000 with tau = 0 pure noise, and predicts x0 - noise.
The project's t is 1000 - tau and its velocity is noise - x0, so `_forward` turns both around. Latents are normalised
channel by channel. T5 reads 256 tokens; a mask says which are padding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.backbones.base import PipelinePolicy
from diffalign.backbones.options import FlowOptions
from diffalign.batches import Conditioning
from diffalign.schedules import FlowSchedule

__all__ = ["MochiPolicy"]

NUM_FRAMES = 19
"""The published pipeline's default; its weights were trained on up to 163."""


class MochiPolicy(PipelinePolicy):
    """A `MochiPipeline` as a policy.

    The conditioning is {"hidden": [B, 256, width], "mask": [B, 256] bool, true where there is a token}.
    """

    schedule: FlowSchedule
    Options = FlowOptions
    half_precision_text = True
    is_video = True
    frame_rate = 30.0
    # "to_q" alone would also reach the pooling of the prompt, time_embed.pooler.to_q.
    lora_targets = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
    guidance_scale = 4.5
    num_inference_steps = 64

    def _configure(self, size: tuple[int, int] | None, num_frames: int | None) -> None:
        pipeline, config, scheduler = self.pipeline, self.denoiser.config, self.pipeline.scheduler.config
        if not scheduler.get("invert_sigmas"):
            raise ValueError(
                f"{self.source.name}: Mochi's time runs from noise to data, so its scheduler must have invert_sigmas "
                f"true, got {scheduler.get('invert_sigmas')}; take scheduler_config.json from genmo/mochi-1-preview"
            )
        self.size = size or (int(pipeline.default_height), int(pipeline.default_width))
        self.num_frames = num_frames or NUM_FRAMES
        space, time = int(pipeline.vae_spatial_scale_factor), int(pipeline.vae_temporal_scale_factor)
        patch = space * int(config.patch_size)
        if any(side % patch for side in self.size) or self.num_frames % time != 1:
            raise ValueError(
                f"Mochi needs height and width divisible by {patch} and {time}k + 1 frames, got "
                f"{self.size[0]}x{self.size[1]} and {self.num_frames} frames"
            )
        frames = (self.num_frames - 1) // time + 1
        self.latent_shape = (int(config.in_channels), frames, self.size[0] // space, self.size[1] // space)
        self.schedule = self._flow_schedule(math.prod(self.latent_shape[1:]) // int(config.patch_size) ** 2)
        self.max_tokens = int(config.max_sequence_length)

    def _embed(self, prompts: list[str]) -> Mapping[str, Tensor]:
        groups = _empty_apart(prompts)
        encoded = [
            self.pipeline.encode_prompt(
                [prompts[i] for i in group],
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_tokens,
                device=self.device,
            )
            for group in groups
        ]
        return {
            "hidden": _in_order([hidden for hidden, *_ in encoded], groups),
            "mask": _in_order([mask for _, mask, *_ in encoded], groups),
        }

    def _forward(self, module: Any, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        to_data: Tensor = module(
            hidden_states=noisy_latents,
            encoder_hidden_states=conditioning.tensors["hidden"],
            encoder_attention_mask=conditioning.tensors["mask"],
            timestep=self.schedule.steps - timesteps,
            return_dict=False,
        )[0]
        return -to_data

    def _latent_statistics(self) -> tuple[float | Tensor, float | Tensor]:
        config = self._encoder("vae").config
        if config.latents_mean is None or config.latents_std is None:  # the pipeline then scales only
            return super()._latent_statistics()
        mean = torch.tensor(config.latents_mean).reshape(-1, 1, 1, 1)
        std = torch.tensor(config.latents_std).reshape(-1, 1, 1, 1)
        return mean, float(config.scaling_factor) / std

    def _sampling_arguments(self, guidance_scale: float) -> dict[str, Any]:
        return {**super()._sampling_arguments(guidance_scale), "max_sequence_length": self.max_tokens}

    def _encoding_settings(self) -> Mapping[str, Any]:
        zeros = bool(self.pipeline.config.force_zeros_for_empty_prompt)
        return {"max_tokens": self.max_tokens, "force_zeros_for_empty_prompt": zeros}

    def _draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        num_inference_steps: int,
        arguments: Mapping[str, Any],
        **weights: bool,
    ) -> Tensor:
        draw, groups = super()._draw, _empty_apart(prompts)
        if len(groups) < 2 or len(prompts) != len(seeds):
            return draw(prompts, seeds, num_inference_steps, arguments, **weights)
        videos = [
            draw([prompts[i] for i in g], [seeds[i] for i in g], num_inference_steps, arguments, **weights)
            for g in groups
        ]
        return _in_order(videos, groups)


def _empty_apart(prompts: Sequence[str]) -> list[list[int]]:
    """Indices of the prompts with text, then of the empty ones; each list goes through the pipeline alone.

    With `force_zeros_for_empty_prompt` the pipeline blanks every row of a batch whose last prompt is empty, where the
    authors' code blanks that row only. Apart, each kind gets what it gets in a batch of its own.
    """
    groups = [[i for i, prompt in enumerate(prompts) if bool(prompt) is text] for text in (True, False)]
    return [group for group in groups if group]


def _in_order(parts: Sequence[Tensor], groups: Sequence[Sequence[int]]) -> Tensor:
    """Rows of the groups back at their indices."""
    order = torch.tensor([i for group in groups for i in group])
    return torch.cat(list(parts))[order.argsort()]
