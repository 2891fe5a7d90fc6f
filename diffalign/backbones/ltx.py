"""LTX-Video: a flow transformer on strongly compressed video latents with T5 text.

HaCohen et al. 2025, "LTX-Video: Realtime Video Latent Diffusion" (arXiv:2501.00103). The network reads t in 0..1000 and
predicts noise - x0. Traps:

- the network takes a sequence of tokens, one for each latent pixel, and their grid beside it;
- positions are in seconds and pixels: they depend on the frame rate and on the autoencoder's strides;
- T5 sees the padding, the transformer does not: the mask is part of the conditioning;
- latents are normalised per channel, by means and deviations among the autoencoder's weights;
- from 0.9.1 on the autoencoder's decoder is told how noisy its latents are, and adds noise of its own while it decodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import PositiveFloat
from torch import Tensor

from diffalign.backbones.base import PipelinePolicy
from diffalign.backbones.options import FlowOptions
from diffalign.batches import Conditioning

__all__ = ["LTXPolicy"]

TEXT_TOKENS = 128
"""The published pipeline's own default."""
SIDE = 32
"""The published pipeline refuses other multiples, whatever its autoencoder's stride."""


class LTXOptions(FlowOptions):
    """What LTX-Video can be told.

    Attributes:
        frame_rate: Frames per second.
    """

    frame_rate: PositiveFloat | None = None


class LTXPolicy(PipelinePolicy):
    """An `LTXPipeline` as a policy; the conditioning is {"hidden": [B, 128, width], "mask": [B, 128] of bool}.

    Decoders that read a timestep are told 0 and get the latents as they are, which is the default of the pipeline's
    call: `decode` is then a function of the latents, and sampling ends in it. Noise that such a decoder draws inside
    its layers, without a generator, is drawn from a fixed seed, the same for every video.

    Attributes:
        frame_rate: Frames per second that the network is told, the pipeline's default.
    """

    Options = LTXOptions
    is_video = True
    reads_frame_rate = True
    half_precision_text = True
    guidance_scale = 3.0
    num_inference_steps = 50
    frame_rate = 25

    def _configure(self, size: tuple[int, int] | None, num_frames: int | None) -> None:
        pipeline, config = self.pipeline, self.denoiser.config
        self.size, self.num_frames = size or (512, 704), num_frames or 161
        factor, stride = int(pipeline.vae_spatial_compression_ratio), int(pipeline.vae_temporal_compression_ratio)
        if (int(config.patch_size), int(config.patch_size_t)) != (1, 1):
            raise ValueError(
                f"{self.source.name}: expected a transformer of patch size 1, as published and as its pipeline draws, "
                f"got {config.patch_size} in space and {config.patch_size_t} in time"
            )
        multiple = math.lcm(SIDE, factor)
        if self.size[0] % multiple or self.size[1] % multiple:
            raise ValueError(
                f"size: expected multiples of {multiple} for LTX, got {self.size[0]}x{self.size[1]} pixels"
            )
        if (self.num_frames - 1) % stride:
            raise ValueError(
                f"num_frames: expected a multiple of {stride} plus one for LTX, got {self.num_frames}; "
                f"use {self.num_frames // stride * stride + 1}"
            )
        grid = ((self.num_frames - 1) // stride + 1, self.size[0] // factor, self.size[1] // factor)
        self.latent_shape = (int(config.in_channels), *grid)
        self.schedule = self._flow_schedule(math.prod(grid))
        self.frame_rate = self.options.frame_rate or self.frame_rate
        self.max_tokens = TEXT_TOKENS

    def _embed(self, prompts: list[str]) -> Mapping[str, Tensor]:
        hidden, mask, _, _ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=self.max_tokens, device=self.device
        )
        return {"hidden": hidden, "mask": mask}

    def _encoding_settings(self) -> Mapping[str, Any]:
        return {"max_sequence_length": self.max_tokens}

    def _forward(self, module: Any, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        frames, height, width = noisy_latents.shape[2:]
        factor, stride = self.pipeline.vae_spatial_compression_ratio, self.pipeline.vae_temporal_compression_ratio
        output: Tensor = module(
            hidden_states=noisy_latents.flatten(2).transpose(1, 2),
            encoder_hidden_states=conditioning.tensors["hidden"],
            timestep=timesteps,
            encoder_attention_mask=conditioning.tensors["mask"],
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(stride / self.frame_rate, factor, factor),
            return_dict=False,
        )[0]
        return output.transpose(1, 2).reshape(noisy_latents.shape)

    def _latent_statistics(self) -> tuple[Tensor, Tensor]:
        vae = self._encoder("vae")
        mean, std = (tensor.float().view(1, -1, 1, 1, 1) for tensor in (vae.latents_mean, vae.latents_std))
        return mean, float(vae.config.scaling_factor) / std

    def _pixels(self, vae: Any, latents: Tensor) -> Tensor:
        timesteps = latents.new_zeros(len(latents)) if vae.config.timestep_conditioning else None
        with _fixed_noise(latents.device):
            pixels: Tensor = vae.decode(latents, timesteps, return_dict=False)[0]
        return pixels

    def _sampling_arguments(self, guidance_scale: float) -> dict[str, Any]:
        return super()._sampling_arguments(guidance_scale) | {
            "max_sequence_length": self.max_tokens,
            "frame_rate": self.frame_rate,
            "decode_timestep": 0.0,
            "decode_noise_scale": 0.0,
        }

    @contextmanager
    def _drawing_weights(self, reference: bool, negative_rows: int | None = None) -> Iterator[None]:
        with super()._drawing_weights(reference, negative_rows):
            vae = self.pipeline.vae
            decode = vae.decode

            def decode_with_fixed_noise(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
                with _fixed_noise(latents.device):
                    return decode(latents, *args, **kwargs)

            vae.decode = decode_with_fixed_noise
            yield


@contextmanager
def _fixed_noise(device: torch.device) -> Iterator[None]:
    """Starts the device's own generator, from which a decoder's layers draw, at 0 in the block; restores it after."""
    generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    state = generator.get_state()
    generator.manual_seed(0)
    try:
        yield
    finally:
        generator.set_state(state)
