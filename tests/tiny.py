"""Random pairs, and policies on the tiny pipeline that are moved away from their reference or hold doubles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from diffalign.backbones import inspect_model
from diffalign.backbones.sd import StableDiffusionPolicy
from diffalign.batches import Conditioning, PairBatch
from diffalign.randomness import Draw, generator


def random_batch(
    count: int,
    *,
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] = (4, 4, 4),
    key: str = "batch",
    first: int = 0,
) -> PairBatch:
    """Pairs `first` to `first + count - 1` of an endless random set; pair i is the same in every batch."""
    draws = tuple(Draw(0, 0, f"{key}-{i}") for i in range(first, first + count))

    def stack(purpose: str, size: tuple[int, ...]) -> torch.Tensor:
        return torch.stack([draw.normal(purpose, size) for draw in draws]).to(dtype)

    return PairBatch(
        conditioning=Conditioning({"hidden": stack("prompt", (5, 16))}),
        chosen=stack("chosen", shape),
        rejected=stack("rejected", shape),
        weight=torch.ones(count),
        draws=draws,
    )


def move_away(policy: Any, scale: float = 0.05) -> None:
    """Changes the trained weights, so that the policy differs from its reference."""
    with torch.no_grad():
        for name, parameter in policy.named_trainable():
            noise = torch.randn(parameter.shape, generator=generator("move away", name), dtype=torch.float64)
            parameter.add_(scale * noise.to(parameter.dtype))


def double_policy(folder: Path, *, lora: Any = None, train: bool = True) -> Any:
    """A policy with everything in float64."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float64, safety_checker=None)
    return StableDiffusionPolicy(pipeline, inspect_model(str(folder)), lora=lora, train=train)
