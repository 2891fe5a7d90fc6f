"""The configurations of published pipelines, as their repositories have them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.architectures import CLIP_TOKENS, Architecture, Part

SD15_UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD35_MEDIUM: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
WAN21_1_3B: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
}
FLUX_DEV: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
VAE_16: dict[str, Any] = {**VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
SD15_LATENTS = {"scaling_factor": 0.18215}
SDXL_LATENTS = {"scaling_factor": 0.13025}
SD3_LATENTS = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
FLUX_LATENTS = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_BIGG: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
T5_XXL: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
UMT5_XXL: dict[str, Any] = {**T5_XXL, "vocab_size": 256384}
DDPM = Part(
    "DDPMScheduler",
    {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "clip_sample": False,
    },
)
FLOW = Part("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
FLUX_FLOW = Part(
    "FlowMatchEulerDiscreteScheduler",
    {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
)

SD15 = Architecture(
    "sd15-512",
    "StableDiffusionPipeline",
    denoiser=Part("UNet2DConditionModel", SD15_UNET),
    scheduler=DDPM,
    autoencoder=Part("AutoencoderKL", {**VAE, **SD15_LATENTS}),
    text_encoders={"text_encoder": Part("CLIPTextModel", CLIP_L)},
    latents=(4, 64, 64),
    conditioning={"hidden": (CLIP_TOKENS, 768)},
    pairs={"lora": 16, "full": 16},
    forward_tflop=0.803,
)
SDXL = Architecture(
    "sdxl-1024",
    "StableDiffusionXLPipeline",
    denoiser=Part("UNet2DConditionModel", SDXL_UNET),
    scheduler=DDPM,
    autoencoder=Part("AutoencoderKL", {**VAE, **SDXL_LATENTS}),
    text_encoders={
        "text_encoder": Part("CLIPTextModel", CLIP_L),
        "text_encoder_2": Part("CLIPTextModelWithProjection", CLIP_BIGG),
    },
    latents=(4, 128, 128),
    conditioning={"hidden": (CLIP_TOKENS, 2048), "pooled": (1280,)},
    pairs={"lora": 4, "full": 2},
    forward_tflop=6.76,
)
SD35 = Architecture(
    "sd35m-1024",
    "StableDiffusion3Pipeline",
    denoiser=Part("SD3Transformer2DModel", SD35_MEDIUM),
    scheduler=FLOW,
    autoencoder=Part("AutoencoderKL", {**VAE_16, **SD3_LATENTS}),
    text_encoders={
        "text_encoder": Part("CLIPTextModelWithProjection", CLIP_L),
        "text_encoder_2": Part("CLIPTextModelWithProjection", CLIP_BIGG),
        "text_encoder_3": Part("T5EncoderModel", T5_XXL),
    },
    latents=(16, 128, 128),
    conditioning={"hidden": (CLIP_TOKENS + 256, 4096), "pooled": (768 + 1280,)},
    pairs={"lora": 4, "full": 2},
    forward_tflop=11.25,
)
SD35_512 = replace(SD35, name="sd35m-512", latents=(16, 64, 64), pairs={"lora": 16, "full": 8}, forward_tflop=2.44)
WAN = Architecture(
    "wan21-1.3b-480p",
    "WanPipeline",
    denoiser=Part("WanTransformer3DModel", WAN21_1_3B),
    scheduler=FLOW,
    autoencoder=Part("AutoencoderKLWan", {}),  # the class's own defaults are the published ones
    text_encoders={"text_encoder": Part("UMT5EncoderModel", UMT5_XXL)},
    latents=(16, 9, 60, 104),
    conditioning={"hidden": (512, 4096)},
    pairs={"lora": 2, "full": 2},
    checkpointed=True,
)
FLUX = Architecture(
    "flux-dev-1024",
    "FluxPipeline",
    denoiser=Part("FluxTransformer2DModel", FLUX_DEV),
    scheduler=FLUX_FLOW,
    autoencoder=Part("AutoencoderKL", {**VAE_16, **FLUX_LATENTS}),
    text_encoders={
        "text_encoder": Part("CLIPTextModel", CLIP_L),
        "text_encoder_2": Part("T5EncoderModel", T5_XXL),
    },
    latents=(16, 128, 128),
    conditioning={"hidden": (512, 4096), "pooled": (768,)},
    pairs={"lora": 1},
    forward_tflop=74.4,
)
FLUX_512 = replace(FLUX, name="flux-dev-512", latents=(16, 64, 64), pairs={"lora": 4}, forward_tflop=21.5)
PUBLISHED = {one.name: one for one in (SD15, SDXL, SD35_512, SD35, WAN, FLUX_512, FLUX)}
"""Name -> architecture, in the order in which they are measured."""
