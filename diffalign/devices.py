"""Where models run, and the way there."""

from __future__ import annotations

import os

import torch
from torch import Tensor

__all__ = ["pick_device", "pinned", "resolve_device", "rounding", "send", "send_like"]


def pick_device() -> str:
    """The accelerator that is there, or the CPU; the processes of a machine take its GPUs in turn."""
    if torch.cuda.is_available():
        local = os.environ.get("LOCAL_RANK")
        return "cuda" if local is None else f"cuda:{int(local) % torch.cuda.device_count()}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def resolve_device(device: str | torch.device) -> torch.device:
    """A device, or for "auto" that of `pick_device`."""
    return torch.device(pick_device() if device == "auto" else device)


def rounding(autocast: torch.dtype | None) -> dict[str, str]:
    """What is rounded now beside the weights, as JSON values: entries for caches of what a network says.

    Args:
        autocast: Dtype of a policy's products; None for that of its weights.
    """
    found = {} if autocast is None else {"autocast": str(autocast).removeprefix("torch.")}
    return found | ({"float32": "tf32"} if torch.get_float32_matmul_precision() != "highest" else {})


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on another device, without waiting for what that device is doing.

    From ordinary memory the CPU waits until the copy has had its turn; memory that is pinned is copied when it comes.
    """
    if tensor.device.type == "cpu" and device.type == "cuda" and type(tensor) is Tensor:  # none without storage
        return pinned(tensor).to(device, non_blocking=True)
    return tensor.to(device)


def send_like(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor.to(like)`, in the other's dtype and on its device, without waiting; see `send`."""
    return send(tensor.to(like.dtype), like.device)


def pinned(tensor: Tensor) -> Tensor:
    """A tensor of the CPU in memory that a GPU copies from by itself; needs CUDA."""
    return tensor.contiguous().pin_memory()  # which keeps strides, and cannot fill an expanded tensor's
