"""Z-Image and Z-Image-Turbo: a single-stream flow transformer told by a language model's last but one layer.

Z-Image Team 2025, "Z-Image: An Efficient Image Generation Foundation Model with Single-Stream Diffusion Transformer"
(arXiv:2511.22699). The network's time is that of the signal, (1000 - t) / 1000, and its output points at the image,
x0 - noise: both are turned here. It takes lists, one latent and one text of its own length per sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffalign.backbones.base import PipelinePolicy
from diffalign.backbones.options import TokenOptions
from diffalign.batches import Conditioning

__all__ = ["ZImagePolicy"]

DEFAULT_SIDE = 1024
"""Pixels; of the pipeline's call, for no configuration file names a resolution."""
TURBO_GUIDANCE, TURBO_STEPS = 0.0, 8


class ZImagePolicy(PipelinePolicy):
    """A `ZImagePipeline` as a policy.

    The conditioning is {"hidden": [B, 512, width], "mask": [B, 512]}, the mask true at real tokens, which come first.

    The pipeline guides as conditional + scale * (conditional - unconditional): 0 switches guidance off, and a scale of
    s is what other families call s + 1. Turbo is distilled and drawn without guidance in 8 steps; nothing in its files
    tells it from the base model, so it is known by "turbo" in its name.
    """

    Options = TokenOptions
    half_precision_text = True
    guides = "conditional_first"
    guidance_scale = 5.0
    num_inference_steps = 50
    max_sequence_length = 512
    """Tokens that are kept, the chat template's included; the default of the pipeline's call."""

    def _configure(self, size: tuple[int, int] | None, num_frames: int | None) -> None:
        factor = int(self.pipeline.vae_scale_factor)
        self.size = size or (DEFAULT_SIDE, DEFAULT_SIDE)
        patch = int(self.denoiser.config.all_patch_size[0])
        multiple = factor * patch
        if any(length % multiple for length in self.size):
            raise ValueError(f"size must be multiples of {multiple} pixels here, got {self.size}; choose another")
        self.latent_shape = (int(self.denoiser.config.in_channels), self.size[0] // factor, self.size[1] // factor)
        self.schedule = self._flow_schedule(self.latent_shape[1] * self.latent_shape[2] // patch**2)
        self.max_sequence_length = self.options.max_sequence_length or self.max_sequence_length
        self.max_tokens = self.max_sequence_length
        if "turbo" in Path(self.source.name).name.lower():
            self.guidance_scale, self.num_inference_steps = TURBO_GUIDANCE, TURBO_STEPS

    def _embed(self, prompts: list[str]) -> Mapping[str, Tensor]:
        rows, _ = self.pipeline.encode_prompt(prompts, self.device, False, max_sequence_length=self.max_sequence_length)
        lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
        return {
            "hidden": torch.stack([pad(row, (0, 0, 0, self.max_sequence_length - len(row))) for row in rows]),
            "mask": torch.arange(self.max_sequence_length, device=lengths.device) < lengths[:, None],
        }

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt in the chat template that the pipeline puts around it, before any cut."""
        tokenizer = self.pipeline.tokenizer
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
            for prompt in prompts
        ]
        return [len(ids) for ids in tokenizer(texts, truncation=False, verbose=False).input_ids]

    def _encoding_settings(self) -> Mapping[str, Any]:
        return {
            "max_sequence_length": self.max_sequence_length,
            "chat_template": str(self.pipeline.tokenizer.chat_template),
        }

    def _forward(self, module: Any, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        hidden, lengths = conditioning.tensors["hidden"], conditioning.lengths
        clips = module(
            list(noisy_latents.unsqueeze(2).unbind()),
            (1000 - timesteps.float()) / 1000,  # as the pipeline does, whatever the scheduler's number of steps
            [row[:length] for row, length in zip(hidden, lengths, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(clips).squeeze(2)

    def _ready(self, embedded: Mapping[str, Tensor]) -> dict[str, Any]:
        lengths = embedded["mask"].sum(dim=1).tolist()
        rows = [row[:length] for row, length in zip(embedded["hidden"], lengths, strict=True)]
        return {"prompt_embeds": rows}

    def _sampling_arguments(self, guidance_scale: float) -> dict[str, Any]:
        return super()._sampling_arguments(guidance_scale) | {"max_sequence_length": self.max_sequence_length}
