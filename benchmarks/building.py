"""Makes policies of any architecture with random weights, which change no time and no memory.

Everything is made where it will be, in the precision it will have: SDXL takes seconds on a GPU and never passes through
float32 on a CPU. Training reads latents and embeddings from a cache, so a policy has no encoders; `add_encoders` gives
it those that a plain step calls again and again. Tokenizers are small ones of the published classes: prompts are padded
to the published lengths, and which numbers stand for the words changes no time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
import transformers

import diffalign as da
from benchmarks.architectures import CLIP_TOKENS, Architecture
from diffalign.attention import set_attention
from diffalign.backbones.loading import ModelSource, policy_class
from diffalign.predictions import Prediction
from diffalign.shapes.networks import build_tokenizer
from diffalign.shapes.video_networks import build_video_tokenizer

LORA_RANK = 16
T5_TOKENS = 512
"""The most that the published tokenizers of T5 and UMT5 give."""
_SETTINGS: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    },
    "StableDiffusionXLPipeline": {"add_watermarker": False},
}
"""Family -> further arguments of its pipeline."""


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
        denoiser = getattr(diffusers, architecture.denoiser.kind)(**architecture.denoiser.config)
    kept = set(denoiser._keep_in_fp32_modules or ())  # as `from_pretrained` leaves them
    for name, parameter in denoiser.named_parameters():
        if not kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.float()
    return denoiser


def add_encoders(policy: Any, architecture: Architecture, dtype: torch.dtype) -> None:
    """Puts autoencoder and text encoders, random weights in `dtype`, into the policy's pipeline, frozen."""
    pipeline = policy.pipeline
    with _made_in(dtype), policy.device:
        pipeline.vae = getattr(diffusers, architecture.autoencoder.kind)(**architecture.autoencoder.config)
        for name, part in architecture.text_encoders.items():
            kind, tokenizer = getattr(transformers, part.kind), getattr(pipeline, _tokenizer_of(name))
            special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
            setattr(pipeline, name, kind(kind.config_class(**part.config, **special)))
    for name in ("vae", *architecture.text_encoders):
        getattr(pipeline, name).eval().requires_grad_(False)


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
    """The family's pipeline around the denoiser, with tokenizers and without all other models."""
    parts: dict[str, Any] = {"vae": None, "unet" if architecture.is_unet else "transformer": denoiser}
    parts["scheduler"] = getattr(diffusers, architecture.scheduler.kind)(**architecture.scheduler.config)
    for name, encoder in architecture.text_encoders.items():
        parts |= {name: None, _tokenizer_of(name): _tokenizer(encoder.kind)}
    return getattr(diffusers, architecture.family)(**parts, **_SETTINGS.get(architecture.family, {}))


def _tokenizer_of(text_encoder: str) -> str:
    """Names in a pipeline: "text_encoder_2" reads what "tokenizer_2" gives."""
    return text_encoder.replace("text_encoder", "tokenizer")


def _tokenizer(encoder: str) -> Any:
    """One for an encoder of this class; T5's spells every word, CLIP's knows those of the embedded world."""
    is_clip = encoder.startswith("CLIP")
    tokenizer = build_tokenizer() if is_clip else build_video_tokenizer(())
    tokenizer.model_max_length = CLIP_TOKENS if is_clip else T5_TOKENS
    return tokenizer
