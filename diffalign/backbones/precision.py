"""What is rounded, and what never is, where a denoiser works in half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""What accelerate's `mixed_precision` names."""
EXACT_INPUTS = ("time_ids", "image_rotary_emb", "img_ids", "txt_ids")
"""Inputs that networks turn into sines and cosines.

bfloat16 has no whole numbers between 1024 and 1032, so SDXL would be told of another image size, and rotations by
position would be off. SDXL's pipeline rounds its time ids itself where its text encoders are in half precision; here
these encoders stay in float32, and so do the ids.
"""


def under_autocast(module: Any, dtype: torch.dtype) -> None:
    """Makes every call of `module` run under autocast to `dtype`, whoever calls it."""
    forward = module.forward

    def cast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(next(module.parameters()).device.type, dtype=dtype):
            return forward(*args, **kwargs)

    module.forward = cast


def halve(module: Any, dtype: torch.dtype) -> None:
    """Half the memory, and bit for bit what autocast computes of the float32 weights.

    Autocast rounds the weights of linear and convolutional layers itself; norms, embeddings and tables it leaves alone,
    and rounding those too would tell the reference apart from a policy that has not been trained yet.
    """
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    for name, layer in module.named_modules():
        rounded = isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        if rounded and kept.isdisjoint(name.split(".")):
            layer.to(dtype)
    under_autocast(module, dtype)


def to_own_dtype(module: Any) -> Callable[..., tuple[Any, Any]]:
    """A forward pre-hook for `module`, a denoiser: a pipeline's latents and embeddings in the module's dtype.

    They come in the text encoder's. Scalars and vectors stay as they are, as timesteps lose their last digits in half
    precision, and so do `EXACT_INPUTS`.
    """
    dtype = module.dtype  # once: diffusers looks through the parameters for it

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1:
            return value.to(dtype)
        if isinstance(value, list | tuple):
            return type(value)(cast(item) for item in value)
        if isinstance(value, dict):
            return {key: item if key in EXACT_INPUTS else cast(item) for key, item in value.items()}
        return value

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return cast(args), cast(kwargs)

    return hook
