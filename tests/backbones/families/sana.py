"""Sana with its published sampler (DPM-Solver) and with the flow matching Euler sampler."""

from __future__ import annotations

import string
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.backbones.sana import SanaPolicy
from tests.backbones.families.base import Family, save


def tiny_gemma(width: int = 16) -> tuple[Any, Any]:
    """A Gemma tokenizer and a decoder of `width` with random weights.

    Tokens are characters, and the lines of the pipeline's instruction: as characters they would be 1200 tokens.
    """
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    pieces = [*special, "▁", "\n", *string.ascii_letters, *string.digits, *string.punctuation]
    tokenizer = GemmaTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], padding_side="right", add_bos_token=True
    )
    tokenizer.add_tokens(list(SanaPolicy.instruction))
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return tokenizer, Gemma2Model(config).eval()


def tiny_autoencoder(scaling_factor: float = 0.41407) -> Any:
    """A deep-compression autoencoder of three levels: 4 channels at a quarter of the side."""
    from diffusers import AutoencoderDC

    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (5,), (5,)),
        decoder_qkv_multiscales=((), (5,), (5,)),
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
        scaling_factor=scaling_factor,
    ).eval()


def save_tiny(folder: Path, euler: bool, timestep_scale: float = 1.0, out_channels: int = 4) -> Path:
    """Two layers on 8x8 latents of 4 channels."""
    from diffusers import (
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
        SanaPipeline,
        SanaTransformer2DModel,
    )

    torch.manual_seed(0)
    tokenizer, text_encoder = tiny_gemma()
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=out_channels,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
        timestep_scale=timestep_scale,
    )
    solver = DPMSolverMultistepScheduler(flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction")
    pipeline = SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=tiny_autoencoder(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0) if euler else solver,
    )
    return save(pipeline, folder)


def velocity(scheduler: Any, output: Tensor, sample: Tensor, timestep: Tensor) -> Tensor:
    """Both samplers are given the velocity itself."""
    return output


def solver_noise_level(scheduler: Any, timestep: Tensor) -> float:
    """DPM-Solver tells the network its noise in whole timesteps: the table's sigma, cut to 1/1000."""
    index = int((scheduler.timesteps - timestep).abs().argmin())
    told = float(timestep) / 1000
    assert told <= float(scheduler.sigmas[index]) + 1e-6
    assert float(scheduler.sigmas[index]) == pytest.approx(told, abs=1e-3)
    return told


FAMILIES = [
    Family(
        name="sana",
        save=partial(save_tiny, euler=False),
        pipeline_class="SanaPipeline",
        latent_shape=(4, 8, 16),
        size=(32, 64),
        call={"use_resolution_binning": False},
        velocity=velocity,
        noise_level=solver_noise_level,
    ),
    Family(
        name="sana-scaled-time",
        save=partial(save_tiny, euler=True, timestep_scale=0.5, out_channels=8),
        pipeline_class="SanaPipeline",
        latent_shape=(4, 8, 16),
        size=(32, 64),
        call={"use_resolution_binning": False},
    ),
]
