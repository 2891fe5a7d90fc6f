"""One switch for the attention implementation, which counts what it reached."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

KERNELS = {
    "_native_flash": SDPBackend.FLASH_ATTENTION,
    "_native_cudnn": SDPBackend.CUDNN_ATTENTION,
    "_native_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "_native_math": SDPBackend.MATH,
}
"""diffusers' names for the kernels of PyTorch's `scaled_dot_product_attention`."""
_NEEDS = {
    "_native_flash": "bf16 or fp16 on a GPU (training.mixed_precision), and no mask",
    "_native_cudnn": "a CUDA device, and bf16 or fp16 (training.mixed_precision)",
    "_native_efficient": "a CUDA device",
}
_TITLES = {"_native_flash": "flash", "_native_cudnn": "cudnn", "_native_efficient": "mem"}
"""How the line begins after which PyTorch warns why it could not take a kernel, in lower case."""
_REFUSALS = (
    "No available kernel",  # PyTorch, on a GPU
    "No viable backend for scaled_dot_product_attention",  # PyTorch, on a CPU
    "cuDNN Frontend error",
)


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


def check_kernel(name: str, device: torch.device | str, dtype: torch.dtype) -> None:
    """Refuses a kernel of PyTorch's that a device does not have for such numbers; needs no model.

    Args:
        name: A key of `KERNELS`; all others pass.
        device: Where the network will be.
        dtype: Of queries, keys and values.

    Raises:
        ValueError: With the reason and what to do.
    """
    if name in KERNELS:
        heads = torch.zeros(1, 1, 8, 64, dtype=dtype, device=device)
        _run(name, functools.partial(functional.scaled_dot_product_attention, heads, heads, heads), heads)


def set_attention(denoiser: nn.Module, name: str) -> int:
    """Makes `denoiser` use an attention implementation; returns the number of attention modules it reached.

    Kernels of PyTorch's own function reach every module that calls it, in UNets and in transformers. The other
    implementations reach the newer transformers, by diffusers' own setter, which says nothing where it reaches none;
    for the others, xformers has a switch of its own. Zero modules reached is an error, never a silent fallback. Other
    models in the process stay as they are.

    Args:
        denoiser: A diffusers model.
        name: "native" for PyTorch's scaled_dot_product_attention, a key of `KERNELS` to hold it to one kernel,
            "xformers", or any other backend name that diffusers' `set_attention_backend` knows ("flash", "sage", ...).

    Raises:
        ValueError: If the package is missing, the name is unknown, or no module could be switched.
    """
    modules = [module for module in denoiser.modules() if hasattr(module, "processor")]
    if name == "native" and not modules:
        raise ValueError(f"found no attention module in {type(denoiser).__name__}")
    check_attention(name)
    _release(denoiser, modules)
    if name == "native":
        return len(modules)
    try:
        reached = _hold(modules, name) if name in KERNELS else _dispatched(denoiser, modules, name)
        if reached:
            return reached
        if name == "xformers":
            denoiser.enable_xformers_memory_efficient_attention()  # type: ignore[operator]
            switched = ("xformers" in type(module.processor).__name__.lower() for module in modules)
            return sum(switched) or _none(denoiser, name)
    except (ValueError, RuntimeError, ImportError) as error:
        raise ValueError(f"attention: {name!r} cannot be used here: {error}") from error
    return _none(denoiser, name)


def _release(denoiser: nn.Module, modules: Iterable[Any]) -> None:
    """Puts back what was chosen before."""
    for processor in (module.processor for module in modules):
        processor.__class__ = getattr(processor, "stock", type(processor))
    reset = getattr(denoiser, "reset_attention_backend", None)
    if reset is not None:
        reset()


def _dispatched(denoiser: nn.Module, modules: Iterable[Any], name: str) -> int:
    """Modules that diffusers' own setter reached; it would switch all models that are still on their default too."""
    switch_backend = getattr(denoiser, "set_attention_backend", None)
    if switch_backend is None:
        return 0
    from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend

    with attention_backend(AttentionBackendName.NATIVE):  # which puts the process's default back
        switch_backend(name)
    return sum(getattr(module.processor, "_attention_backend", None) is not None for module in modules)


def _hold(modules: Iterable[Any], name: str) -> int:
    """Holds modules to a kernel; returns how many call PyTorch's function, themselves or through diffusers."""
    reached = 0
    for processor in (module.processor for module in modules):
        stock: Any = type(processor)
        called = inspect.unwrap(stock.__call__).__code__.co_names
        if not {"scaled_dot_product_attention", "dispatch_attention_fn"}.isdisjoint(called):
            processor.__class__ = _held(stock, name)
            reached += 1
    return reached


_released = False


@contextmanager
def any_kernel() -> Iterator[None]:
    """PyTorch chooses the kernels in the block, whatever networks are held to: they may compute in float32 there."""
    global _released
    before, _released = _released, True
    try:
        yield
    finally:
        _released = before


@functools.cache
def _held(kind: type, name: str) -> type:
    """A kind of processor whose attention takes one kernel in every pass, those of recomputation included."""
    call: Callable[..., Any] = kind.__call__

    @functools.wraps(call)  # modules pass on those arguments that its signature names
    def held(self: Any, attention: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        if _released:
            return call(self, attention, hidden_states, *args, **kwargs)
        if torch.compiler.is_compiling():  # handling errors would break the graph
            with sdpa_kernel(KERNELS[name]):
                return call(self, attention, hidden_states, *args, **kwargs)
        return _run(name, functools.partial(call, self, attention, hidden_states, *args, **kwargs), hidden_states)

    return type(kind.__name__, (kind,), {"__call__": held, "stock": kind})


def _run(name: str, attend: Callable[[], Any], numbers: torch.Tensor) -> Any:
    """What `attend` gives with one kernel.

    Raises:
        ValueError: If the kernel cannot.
    """
    try:
        with sdpa_kernel(KERNELS[name]):
            return attend()
    except (RuntimeError, ValueError) as error:
        if not _is_refusal(error):
            raise
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with suppress(RuntimeError, ValueError), sdpa_kernel(KERNELS[name]):
                attend()  # PyTorch says why in warnings
        reason = _reason(name, [str(warning.message) for warning in caught])
        if not reason and "No " not in str(error):
            reason = str(error).splitlines()[0]
        kind = numbers.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else numbers.dtype
        raise ValueError(_message(name, f"{dtype} on {kind}", reason)) from error


def _is_refusal(error: Exception) -> bool:
    return any(words in str(error) for words in _REFUSALS)


def _reason(name: str, messages: Iterable[str]) -> str:
    """Of PyTorch's warnings about all kernels, what it says of one."""
    found, ours = [], False
    for message in messages:
        text = message.partition("(Triggered internally")[0].strip()
        if "kernel not used because" in text:
            ours = text.lower().startswith(_TITLES.get(name, name))
        elif ours:
            found.append(" ".join(text.split()).rstrip("."))
    return "; ".join(found)


def _message(name: str, what: str, reason: str) -> str:
    because = f": {reason}" if reason else ""
    needs = f"; it needs {_NEEDS[name]}" if name in _NEEDS else ""
    return f"attention: {name!r} has no kernel for {what}{because}{needs}; use 'native', which takes one that can"


def _none(denoiser: nn.Module, name: str) -> int:
    raise ValueError(
        f"attention: {name!r} reached none of the attention modules of {type(denoiser).__name__}; "
        f"use 'native', or hold PyTorch's own to a kernel: {', '.join(KERNELS)}"
    )
