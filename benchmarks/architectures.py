"""Denoisers at their published widths with random weights, and small ones of the same families.

The configurations are those of the published pipelines; only the weights are random, which changes no time and no
memory. Everything is made where it will be, in the precision it will have: SDXL takes seconds on a GPU and never
passes through float32 on a CPU. Training reads latents and embeddings from a cache, so a policy has no encoders;
`add_encoders` gives it those that a plain step calls again and again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

import diffalign as da
from diffalign.attention import set_attention
from diffalign.backbones.loading import ModelSource, policy_class
from diffalign.predictions import Prediction
from diffalign.shapes.networks import build_tokenizer

CLIP_TOKENS = 77
LORA_RANK = 16


@dataclass(frozen=True)
class Architecture:
    """A denoiser and what it is fed.

    Attributes:
        name: Model and side in pixels.
        family: Class of its pipeline, a key of `diffalign.backbones.loading.FAMILIES`.
        kind: Class of its denoiser in diffusers.
        config: Arguments of that class.
        latents: Shape of one latent, [C, h, w] or [C, t, h, w].
        conditioning: Shape of one prompt's embeddings, by name.
        pairs: Mode -> pairs of a step that one GPU of 140 GB should hold.
        forward_tflop: Of one sample through the denoiser, as the performance goals count it; None takes what
            `benchmarks.accounting.count_tflop` finds.
        encoders: Part of the pipeline -> its configuration, for the plain step; empty where there is none.
        checkpointed: Whether activations are recomputed, without which a pair does not fit.
    """

    name: str
    family: str
    kind: str
    config: Mapping[str, Any]
    latents: tuple[int, ...]
    conditioning: Mapping[str, tuple[int, ...]]
    pairs: Mapping[str, int]
    forward_tflop: float | None = None
    encoders: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    checkpointed: bool = False

    @property
    def is_unet(self) -> bool:
        """Whether its denoiser has convolutions that a memory format can help."""
        return self.kind.startswith("UNet")

    @property
    def repeats_blocks(self) -> bool:
        """Whether diffusers says which blocks of its denoiser can be compiled alone; of SD3's it does not."""
        return bool(getattr(diffusers, self.kind)._repeated_blocks)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels: all these autoencoders shrink eight times."""
        return self.latents[-2] * 8, self.latents[-1] * 8

    @property
    def frames(self) -> int | None:
        """Of a video whose autoencoder joins four frames after the first; None for images."""
        return 4 * (self.latents[1] - 1) + 1 if len(self.latents) == 4 else None

    def embeddings(self) -> dict[str, Tensor]:
        """Random embeddings of one prompt, one row each, float32."""
        draw = da.generator("benchmark", "text")
        return {name: torch.randn((1, *shape), generator=draw) for name, shape in self.conditioning.items()}


# --- published configurations ----------------------------------------------------------------------------------------

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
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
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

SD15 = Architecture(
    "sd15-512",
    "StableDiffusionPipeline",
    "UNet2DConditionModel",
    SD15_UNET,
    (4, 64, 64),
    {"hidden": (CLIP_TOKENS, 768)},
    {"lora": 16, "full": 16},
    forward_tflop=0.803,
    encoders={"vae": {**VAE, "scaling_factor": 0.18215}, "text_encoder": CLIP_L},
)
SDXL = Architecture(
    "sdxl-1024",
    "StableDiffusionXLPipeline",
    "UNet2DConditionModel",
    SDXL_UNET,
    (4, 128, 128),
    {"hidden": (CLIP_TOKENS, 2048), "pooled": (1280,)},
    {"lora": 4, "full": 2},
    forward_tflop=6.76,
    encoders={"vae": {**VAE, "scaling_factor": 0.13025}, "text_encoder": CLIP_L, "text_encoder_2": CLIP_BIGG},
)
SD35 = Architecture(
    "sd35m-1024",
    "StableDiffusion3Pipeline",
    "SD3Transformer2DModel",
    SD35_MEDIUM,
    (16, 128, 128),
    {"hidden": (CLIP_TOKENS + 256, 4096), "pooled": (2048,)},
    {"lora": 4, "full": 2},
    forward_tflop=11.25,
)
SD35_512 = replace(SD35, name="sd35m-512", latents=(16, 64, 64), pairs={"lora": 16, "full": 8}, forward_tflop=2.44)
WAN = Architecture(
    "wan21-1.3b-480p",
    "WanPipeline",
    "WanTransformer3DModel",
    WAN21_1_3B,
    (16, 9, 60, 104),
    {"hidden": (512, 4096)},
    {"lora": 2, "full": 2},
    checkpointed=True,
)
PUBLISHED = {one.name: one for one in (SD15, SDXL, SD35_512, SD35, WAN)}
"""Name -> architecture, in the order in which they are measured."""

# --- small ones ------------------------------------------------------------------------------------------------------

_CLIP_TINY: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 16,
}
_VAE_TINY = {**VAE, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
_ONE = {"lora": 1, "full": 1}
_UNET_TINY = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
_SD15_TINY = {
    **SD15_UNET,
    **_UNET_TINY,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
}
_SDXL_TINY = {
    **SDXL_UNET,
    **_UNET_TINY,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 1],
    "attention_head_dim": [2, 2],
    "cross_attention_dim": 32,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 16,
}
_SD35_TINY = {
    **SD35_MEDIUM,
    "sample_size": 8,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "joint_attention_dim": 16,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 16,
    "dual_attention_layers": (0,),
    "pos_embed_max_size": 16,
}
_WAN_TINY = {
    **WAN21_1_3B,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}
TINY = {
    SD15.name: replace(
        SD15,
        config=_SD15_TINY,
        latents=(4, 8, 8),
        conditioning={"hidden": (CLIP_TOKENS, 16)},
        pairs=_ONE,
        forward_tflop=None,
        encoders={"vae": {**_VAE_TINY, "scaling_factor": 0.18215}, "text_encoder": _CLIP_TINY},
    ),
    SDXL.name: replace(
        SDXL,
        config=_SDXL_TINY,
        latents=(4, 8, 8),
        conditioning={"hidden": (CLIP_TOKENS, 32), "pooled": (16,)},
        pairs=_ONE,
        forward_tflop=None,
        encoders={
            "vae": {**_VAE_TINY, "scaling_factor": 0.13025},
            "text_encoder": _CLIP_TINY,
            "text_encoder_2": _CLIP_TINY,
        },
    ),
    SD35_512.name: replace(
        SD35_512,
        config=_SD35_TINY,
        latents=(16, 8, 8),
        conditioning={"hidden": (CLIP_TOKENS + 256, 16), "pooled": (16,)},
        pairs=_ONE,
        forward_tflop=None,
    ),
    WAN.name: replace(WAN, config=_WAN_TINY, latents=(16, 3, 8, 8), conditioning={"hidden": (512, 16)}, pairs=_ONE),
}
"""The same families small enough for a CPU."""

# --- building --------------------------------------------------------------------------------------------------------


def build(
    architecture: Architecture,
    *,
    lora: bool,
    dtype: torch.dtype,
    device: torch.device | str,
    train: bool = True,
    attention: str = "native",
) -> Any:
    """A policy with random weights, without encoders.

    Args:
        architecture: Which.
        lora: Adapters on weights in `dtype`, or all weights in float32 beside a frozen copy rounded to `dtype`.
        dtype: Of the weights that are not trained.
        device: Where it is made; "meta" for shapes alone.
        train: Whether it will be trained; without adapters and training there is no frozen copy.
        attention: See `diffalign.attention.set_attention`.
    """
    denoiser = make(architecture, dtype if lora else torch.float32, device)
    prediction = Prediction.EPSILON if architecture.is_unet else Prediction.VELOCITY
    source = ModelSource(architecture.name, architecture.name, architecture.family, prediction)
    policy = policy_class(source)(
        _pipeline(architecture, denoiser),
        source,
        lora=da.LoRA(rank=LORA_RANK) if lora else None,
        train=train,
        reference_dtype=None if lora else dtype,
        size=architecture.size,
        num_frames=architecture.frames,
    )
    if attention != "native":
        for module in (policy.denoiser, policy._frozen):
            if module is not None:
                set_attention(module, attention)
    return policy


def make(architecture: Architecture, dtype: torch.dtype, device: torch.device | str) -> Any:
    """The denoiser alone, random weights in `dtype` on `device`."""
    torch.manual_seed(0)
    with _made_in(dtype), torch.device(device):
        denoiser = getattr(diffusers, architecture.kind)(**architecture.config)
    kept = set(denoiser._keep_in_fp32_modules or ())  # as `from_pretrained` leaves them
    for name, parameter in denoiser.named_parameters():
        if not kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.float()
    return denoiser


def add_encoders(policy: Any, architecture: Architecture, dtype: torch.dtype) -> None:
    """Puts autoencoder and text encoders of the published widths into the policy's pipeline, frozen."""
    with _made_in(dtype), policy.device:
        for part, config in architecture.encoders.items():
            if part == "vae":
                module: nn.Module = diffusers.AutoencoderKL(**config)
            else:
                kind = "CLIPTextModelWithProjection" if part.endswith("_2") else "CLIPTextModel"
                tokens = policy.pipeline.tokenizer
                special = {"eos_token_id": tokens.eos_token_id, "bos_token_id": tokens.bos_token_id}
                config = transformers.CLIPTextConfig(**config, **special, pad_token_id=tokens.eos_token_id)
                module = getattr(transformers, kind)(config)
            setattr(policy.pipeline, part, module.eval().requires_grad_(False))


@contextmanager
def _made_in(dtype: torch.dtype) -> Iterator[None]:
    """Weights that are made in the block have this dtype at once."""
    standard = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(standard)


def _pipeline(architecture: Architecture, denoiser: Any) -> Any:
    """The family's pipeline around the denoiser, all other models left out."""
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    if architecture.family == "StableDiffusion3Pipeline":
        encoders = dict.fromkeys(f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3"))
        return diffusers.StableDiffusion3Pipeline(transformer=denoiser, scheduler=flow, vae=None, **encoders)
    if architecture.family == "WanPipeline":
        return diffusers.WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=flow, transformer=denoiser)
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = CLIP_TOKENS
    scheduler = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
    )
    shared = {"vae": None, "text_encoder": None, "tokenizer": tokenizer, "unet": denoiser, "scheduler": scheduler}
    if architecture.family == "StableDiffusionXLPipeline":
        return diffusers.StableDiffusionXLPipeline(
            text_encoder_2=None, tokenizer_2=tokenizer, add_watermarker=False, **shared
        )
    return diffusers.StableDiffusionPipeline(
        safety_checker=None, feature_extractor=None, requires_safety_checker=False, **shared
    )
