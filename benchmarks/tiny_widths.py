"""The families of `benchmarks/published_widths.py`, small enough for a CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.architectures import CLIP_TOKENS, Part
from benchmarks.published_widths import (
    FLUX_512,
    FLUX_DEV,
    FLUX_LATENTS,
    SD3_LATENTS,
    SD15,
    SD15_LATENTS,
    SD15_UNET,
    SD35_512,
    SD35_MEDIUM,
    SDXL,
    SDXL_LATENTS,
    SDXL_UNET,
    VAE,
    VAE_16,
    WAN,
    WAN21_1_3B,
)

_CLIP: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 16,
}
_T5: dict[str, Any] = {
    "vocab_size": 512,
    "d_model": 48,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
}
_SMALL = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
_WAN_VAE = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
_BOTH = {"lora": 1, "full": 1}
_UNET = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
_SD15_UNET = {
    **SD15_UNET,
    **_UNET,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
}
_SDXL_UNET = {
    **SDXL_UNET,
    **_UNET,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 1],
    "attention_head_dim": [2, 2],
    "cross_attention_dim": 32,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 16,
}
_SD35 = {
    **SD35_MEDIUM,
    "sample_size": 8,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "joint_attention_dim": 48,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 32,
    "dual_attention_layers": (0,),
    "pos_embed_max_size": 16,
}
_WAN = {
    **WAN21_1_3B,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 48,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}
_FLUX = {
    **FLUX_DEV,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "axes_dims_rope": (2, 2, 4),
    "joint_attention_dim": 48,
    "pooled_projection_dim": 16,
}
TINY = {
    SD15.name: replace(
        SD15,
        denoiser=Part(SD15.denoiser.kind, _SD15_UNET),
        autoencoder=Part("AutoencoderKL", {**VAE, **_SMALL, **SD15_LATENTS}),
        text_encoders={"text_encoder": Part("CLIPTextModel", _CLIP)},
        latents=(4, 8, 8),
        conditioning={"hidden": (CLIP_TOKENS, 16)},
        pairs=_BOTH,
        forward_tflop=None,
    ),
    SDXL.name: replace(
        SDXL,
        denoiser=Part(SDXL.denoiser.kind, _SDXL_UNET),
        autoencoder=Part("AutoencoderKL", {**VAE, **_SMALL, **SDXL_LATENTS}),
        text_encoders={
            "text_encoder": Part("CLIPTextModel", _CLIP),
            "text_encoder_2": Part("CLIPTextModelWithProjection", _CLIP),
        },
        latents=(4, 8, 8),
        conditioning={"hidden": (CLIP_TOKENS, 32), "pooled": (16,)},
        pairs=_BOTH,
        forward_tflop=None,
    ),
    SD35_512.name: replace(
        SD35_512,
        denoiser=Part(SD35_512.denoiser.kind, _SD35),
        autoencoder=Part("AutoencoderKL", {**VAE_16, **_SMALL, **SD3_LATENTS}),
        text_encoders={
            "text_encoder": Part("CLIPTextModelWithProjection", _CLIP),
            "text_encoder_2": Part("CLIPTextModelWithProjection", _CLIP),
            "text_encoder_3": Part("T5EncoderModel", _T5),
        },
        latents=(16, 8, 8),
        conditioning={"hidden": (CLIP_TOKENS + 256, 48), "pooled": (32,)},
        pairs=_BOTH,
        forward_tflop=None,
    ),
    WAN.name: replace(
        WAN,
        denoiser=Part(WAN.denoiser.kind, _WAN),
        autoencoder=Part("AutoencoderKLWan", _WAN_VAE),
        text_encoders={"text_encoder": Part("UMT5EncoderModel", _T5)},
        latents=(16, 3, 8, 8),
        conditioning={"hidden": (512, 48)},
        pairs=_BOTH,
    ),
    FLUX_512.name: replace(
        FLUX_512,
        denoiser=Part(FLUX_512.denoiser.kind, _FLUX),
        autoencoder=Part("AutoencoderKL", {**VAE_16, **_SMALL, **FLUX_LATENTS}),
        text_encoders={
            "text_encoder": Part("CLIPTextModel", _CLIP),
            "text_encoder_2": Part("T5EncoderModel", _T5),
        },
        latents=(16, 8, 8),
        conditioning={"hidden": (512, 48), "pooled": (16,)},
        pairs={"lora": 1},
        forward_tflop=None,
    ),
}
"""Under the names of the published ones."""
