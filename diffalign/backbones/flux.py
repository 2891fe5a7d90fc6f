"""FLUX.1 dev and schnell: a flow transformer over packed latents, with CLIP's pooled vector and T5's tokens.

Black Forest Labs 2024; published as diffusers' `FluxPipeline`. The network reads t in 0..1 (its pipeline divides by
1000), tokens of 2x2 latent pixels with their positions beside them, and predicts noise - x0. Dev is distilled from
guidance (Meng et al. 2023, arXiv:2210.03142) and reads the scale as an input; schnell is distilled to a few steps and
reads none. The resolution-dependent ("dynamic") shift of the timesteps is the sampler's alone, see
`PipelinePolicy._flow_schedule`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from diffalign.backbones.base import JOINT_ATTENTION, PipelinePolicy
from diffalign.backbones.options import GuidedOptions, TokenOptions
from diffalign.batches import Conditioning

__all__ = ["FluxPolicy"]

PATCH = 2
"""Side of the patches that become tokens; the pipelines and the published weights know no other."""
TIME_UNITS = 1000
"""What the pipelines divide the scheduler's timesteps by; the network multiplies it back before it embeds them."""


class FluxOptions(GuidedOptions, TokenOptions):
    """What FLUX.1 and FLUX.2 can be told."""


class FluxPolicy(PipelinePolicy):
    """A `FluxPipeline` as a policy.

    The conditioning is {"hidden": [B, L, width], "pooled": [B, width]} with L = 512 tokens for dev and 256 for
    schnell, padding included: FLUX attends to it, no mask exists. Latents are the autoencoder's, [B, C, h, w]; packing
    them into tokens is a permutation, so noise added to them is the noise that the pipeline's scheduler adds.

    Attributes:
        embedded_guidance: The guidance scale that dev's network is told in `predict`, for policy and reference alike.
            The default, 3.5, is what dev is sampled with, so preferences are learnt where they will be used. Official
            and widely used fine-tuning scripts take values from 1.0 to 3.5: `model.options.embedded_guidance`.
            Sampling has its own `guidance_scale`. Schnell ignores both.
    """

    Options = FluxOptions
    encoder_parts = ("vae", "text_encoder", "text_encoder_2")
    half_precision_text = True
    lora_targets = JOINT_ATTENTION
    any_size = True
    guides = "never"
    embedded_guidance: float

    def _configure(self, size: tuple[int, int] | None, num_frames: int | None) -> None:
        config = self.denoiser.config
        self.size = image_size(self.pipeline, size)
        factor = int(self.pipeline.vae_scale_factor)
        channels = int(config.in_channels) // PATCH**2
        self.latent_shape = (channels, self.size[0] // factor, self.size[1] // factor)
        self.schedule = self._flow_schedule(self.latent_shape[1] * self.latent_shape[2] // PATCH**2)
        # Dev and schnell differ in this flag only; schnell was trained with the shorter prompts.
        dev = bool(config.guidance_embeds)
        self.max_tokens = self.options.max_sequence_length or (512 if dev else 256)
        self.guidance_scale = 3.5 if dev else 1.0
        self.num_inference_steps = 28 if dev else 4
        told = self.options.embedded_guidance
        self.embedded_guidance = self.guidance_scale if told is None else told

    def _encoding_settings(self) -> Mapping[str, Any]:
        return {"max_sequence_length": self.max_tokens}

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt for T5, special ones included, before any cut; CLIP reads its first 77 besides."""
        tokenizer = self.pipeline.tokenizer_2
        return [len(ids) for ids in tokenizer(list(prompts), truncation=False, verbose=False).input_ids]

    def _embed(self, prompts: list[str]) -> Mapping[str, Tensor]:
        hidden, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, device=self.device, max_sequence_length=self.max_tokens
        )
        return {"hidden": hidden, "pooled": pooled}

    def _forward(self, module: Any, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        hidden, device = conditioning.tensors["hidden"], noisy_latents.device
        patches = pixel_unshuffle(noisy_latents, PATCH)  # channel order (C, 2, 2), as the pipeline packs
        rows, columns = patches.shape[-2:]
        output: Tensor = module(
            hidden_states=tokens(patches),
            timestep=timesteps.float() / TIME_UNITS,
            guidance=embedded(self, timesteps),
            pooled_projections=conditioning.tensors["pooled"],
            encoder_hidden_states=hidden,
            txt_ids=torch.zeros(hidden.shape[1], 3, device=device),
            img_ids=positions(1, rows, columns, device=device).float(),
            return_dict=False,
        )[0]
        return pixel_shuffle(untokens(output, rows, columns), PATCH)

    def _sampling_arguments(self, guidance_scale: float) -> dict[str, Any]:
        return {**super()._sampling_arguments(guidance_scale), "max_sequence_length": self.max_tokens}


def image_size(pipeline: Any, size: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width in pixels: `size`, or the pipeline's own.

    Raises:
        ValueError: If a side does not fill whole patches; the pipeline would draw a smaller image without a word.
    """
    factor = int(pipeline.vae_scale_factor)
    side = int(pipeline.default_sample_size) * factor
    height, width = size or (side, side)
    if height % (PATCH * factor) or width % (PATCH * factor):
        raise ValueError(f"size must be multiples of {PATCH * factor} for FLUX, got {height}x{width} pixels")
    return height, width


def tokens(patches: Tensor) -> Tensor:
    """[B, C, rows, columns] -> [B, rows * columns, C]."""
    return patches.flatten(2).transpose(1, 2)


def untokens(packed: Tensor, rows: int, columns: int) -> Tensor:
    """[B, rows * columns, C] -> [B, C, rows, columns]."""
    return packed.transpose(1, 2).reshape(len(packed), -1, rows, columns)


def positions(*lengths: int, device: torch.device) -> Tensor:
    """Position ids of the cells of a grid, last axis fastest, [prod(lengths), len(lengths)], int64."""
    return torch.cartesian_prod(*(torch.arange(length, device=device) for length in lengths))


def embedded(policy: Any, timesteps: Tensor) -> Tensor | None:
    """The policy's `embedded_guidance` for every row, [B], or None where the network has no such input."""
    if not policy.denoiser.config.guidance_embeds:
        return None
    return torch.full(timesteps.shape, policy.embedded_guidance, device=timesteps.device, dtype=torch.float32)
