"""What the contract test must know of a family: a tiny random pipeline, and how its own denoising loop speaks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PROMPTS = ("a red circle", "two blue squares and a star")


def _same(policy: Any, tensor: Tensor) -> Tensor:
    return tensor


def _unchanged(timestep: Tensor) -> Tensor:
    return timestep


def _sample(scheduler: Any, sample: Tensor, timestep: Any) -> Tensor:
    return sample


def _on_step_end(function: Any) -> Mapping[str, Any]:
    return {"callback_on_step_end": function}


def _load_lora(pipeline: Any, folder: Path) -> None:
    pipeline.load_lora_weights(folder)


def _discrete_or_flow(scheduler: Any, output: Tensor, sample: Tensor, timestep: Tensor) -> Tensor:
    """noise - x0 of what a scheduler's step was given, by the scheduler's own tables."""
    if type(scheduler).__name__.startswith("FlowMatch"):
        return output
    abar = scheduler.alphas_cumprod.double()[int(timestep)]
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    if scheduler.config.prediction_type == "v_prediction":
        return ((alpha + sigma) * output.double() + (sigma - alpha) * sample.double()).float()
    return (output.double() - (sample.double() - sigma * output.double()) / alpha).float()


def _noise_level(scheduler: Any, timestep: Tensor) -> float:
    """The share of noise, sigma, that the scheduler means by a timestep of its loop."""
    if type(scheduler).__name__.startswith("FlowMatch"):
        index = int((scheduler.timesteps - timestep).abs().argmin())
        return float(scheduler.sigmas[index])
    return float((1 - scheduler.alphas_cumprod.double()[int(timestep)]).sqrt())


def _guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    return unconditional + scale * (conditional - unconditional)


@dataclass(frozen=True)
class Family:
    """A family in the contract test.

    Attributes:
        name: Test id.
        save: Builds the tiny random pipeline and saves it in the published layout into the folder it is given.
        pipeline_class: The published `_class_name`.
        latent_shape: Of one latent at `size`, batch left out, in the project's order [C, h, w] or [C, t, h, w].
        size: Height and width in pixels.
        num_frames: Of a video.
        load: Further arguments of `from_pretrained` for the plain pipeline.
        options: What the policy is told; see `diffalign.backbones.options`.
        call: Further arguments of the pipeline's call, beside prompt, generator, steps, guidance, height and width.
        guidance_off: Value that switches guidance off.
        guidance_on: A value that switches it on; None where the family has no classifier-free guidance.
        guidance_argument: Name of the pipeline's argument.
        latents: The scheduler's tensors (sample or output) -> the project's latents [B, C, ...].
        timesteps: A timestep of the scheduler's loop -> the project's.
        velocity: (scheduler, output, sample, timestep) -> noise - x0 in the scheduler's layout.
        noise_level: (scheduler, timestep) -> sigma, the share of noise.
        guide: (conditional, unconditional, scale) -> guided prediction, in the project's layout.
        model_input: (scheduler, sample, timestep) -> the sample as the denoiser reads it, where the scheduler rescales.
        refines: Arguments of a pipeline that starts from an image: `image` [1, 3, H, W] and `strength`; such a policy
            draws with `refine` instead of `sample`.
        callback: A function (pipeline, step, timestep, {"latents": ...}) -> arguments that have it called every step.
        load_lora: (pipeline, folder): plain diffusers reads what `save_trained` wrote.
        has_lora_loader: Whether the diffusers pipeline reads LoRA files.
        tolerance: Of the comparison with the pipeline's own loop.
    """

    name: str
    save: Callable[[Path], Any]
    pipeline_class: str
    latent_shape: tuple[int, ...]
    size: tuple[int, int]
    num_frames: int = 1
    load: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    guidance_off: float = 1.0
    guidance_on: float | None = 4.0
    guidance_argument: str = "guidance_scale"
    latents: Callable[[Any, Tensor], Tensor] = _same
    timesteps: Callable[[Tensor], Tensor] = _unchanged
    velocity: Callable[[Any, Tensor, Tensor, Tensor], Tensor] = _discrete_or_flow
    noise_level: Callable[[Any, Tensor], float] = _noise_level
    guide: Callable[[Tensor, Tensor, float], Tensor] = _guide
    model_input: Callable[[Any, Tensor, Any], Tensor] = _sample
    refines: Mapping[str, Any] = field(default_factory=dict)
    callback: Callable[[Any], Mapping[str, Any]] = _on_step_end
    load_lora: Callable[[Any, Path], None] = _load_lora
    has_lora_loader: bool = True
    tolerance: float = 1e-5

    def __str__(self) -> str:
        return self.name


def tiny_clip(width: int = 16, layers: int = 2, projection: bool = False) -> tuple[Any, Any]:
    """A CLIP tokenizer of the embedded world's words, and a text encoder of `width` with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from diffalign.shapes.networks import build_tokenizer

    tokenizer = build_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    return tokenizer, kind(config).eval()


def tiny_t5(width: int = 32) -> tuple[Any, Any]:
    """A T5 tokenizer of single characters, and an encoder of `width` with random weights."""
    import string

    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_letters, *string.digits, *string.punctuation]
    tokenizer = T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=2 * width, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return tokenizer, T5EncoderModel(config).eval()


def tiny_vae(channels: int = 4, levels: int = 2, **options: Any) -> Any:
    """A Stable Diffusion autoencoder with random weights; it halves the side `levels - 1` times."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        **options,
    ).eval()


def save(pipeline: Any, folder: Path) -> Path:
    """Saves a pipeline of freshly built modules as its publishers do."""
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder
