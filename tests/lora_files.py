"""Reading LoRA files, random adapters, and what an adapter adds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from diffalign.lora_formats import (
    Adapter,
    read_adapters,
)


def delta(adapter: Adapter) -> Tensor:
    """What an adapter adds to its weight, [out, in, ...]."""
    product = adapter.up.flatten(1).double() @ adapter.down.flatten(1).double()
    return (adapter.scale * product).reshape(len(adapter.up), *adapter.down.shape[1:])


def content(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        return load_file(path), file.metadata() or {}


def adapters_of(path: Path) -> dict[str, Adapter]:
    return read_adapters(*content(path))


def random_adapters(layers: dict[str, tuple[int, ...]], rank: int = 2, alpha: float = 3.0) -> dict[str, Adapter]:
    """Adapters for weights of the given shapes."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, (out, into, *kernel) in layers.items():
        down = torch.randn(rank, into, *kernel, generator=generator)
        up = torch.randn(out, rank, *(1 for _ in kernel), generator=generator)
        made[name] = Adapter(down, up, alpha)
    return made
