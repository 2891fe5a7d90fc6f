"""One switch for the attention implementation, which counts what it reached."""

from __future__ import annotations

import difflib
import importlib.util

from torch import nn


def check_attention(name: str) -> None:
    """Refuses a name that nobody knows, and xformers where it is not installed; needs no model.

    Raises:
        ValueError: With what to do.
    """
    if name == "xformers" and importlib.util.find_spec("xformers") is None:
        raise ValueError(
            "attention: xformers is not installed; run `pip install 'diffalign[xformers]'` or use 'native'"
        )
    from diffusers.models.attention_dispatch import AttentionBackendName

    known = sorted({"native", "xformers", *(str(backend.value) for backend in AttentionBackendName)})
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"attention: unknown backend {name!r}{hint} (available: {', '.join(known)})")


def set_attention(denoiser: nn.Module, name: str) -> int:
    """Makes `denoiser` use an attention implementation; returns the number of attention modules it reached.

    The diffusers backend setter reaches the newer transformers, and silently no module of the older UNets; for
    those, xformers has a switch of its own. Zero modules reached is an error, never a silent fallback.

    Args:
        denoiser: A diffusers model.
        name: "native" for PyTorch's scaled_dot_product_attention, "xformers", or any backend name that diffusers'
            `set_attention_backend` knows ("flash", "_native_cudnn", "sage", ...).

    Raises:
        ValueError: If the package is missing, the name is unknown, or no module could be switched.
    """
    processors = {id(m): m for m in denoiser.modules() if hasattr(m, "processor") and hasattr(m, "set_processor")}
    if name == "native":
        if not processors:
            raise ValueError(f"found no attention module in {type(denoiser).__name__}")
        return len(processors)
    check_attention(name)
    switch_backend = getattr(denoiser, "set_attention_backend", None)
    try:
        if switch_backend is not None:
            switch_backend(name)
            reached = sum(getattr(m.processor, "_attention_backend", None) is not None for m in processors.values())
            if reached:
                return reached
        if name == "xformers":
            denoiser.enable_xformers_memory_efficient_attention()  # type: ignore[operator]
            return sum("xformers" in type(m.processor).__name__.lower() for m in processors.values()) or _none(
                denoiser, name
            )
    except (ValueError, RuntimeError, ImportError) as error:
        raise ValueError(f"attention: {name!r} cannot be used here: {error}") from error
    return _none(denoiser, name)


def _none(denoiser: nn.Module, name: str) -> int:
    raise ValueError(
        f"attention: {name!r} reached none of the attention modules of {type(denoiser).__name__}; "
        "use 'native', or 'xformers' for the Stable Diffusion UNets"
    )
