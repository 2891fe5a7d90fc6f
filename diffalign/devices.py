"""Where models run."""

from __future__ import annotations

import os

import torch

__all__ = ["pick_device", "resolve_device"]


def pick_device() -> str:
    """The accelerator that is there, or the CPU; the processes of a machine take its GPUs in turn."""
    if torch.cuda.is_available():
        local = os.environ.get("LOCAL_RANK")
        return "cuda" if local is None else f"cuda:{int(local) % torch.cuda.device_count()}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def resolve_device(device: str | torch.device) -> torch.device:
    """A device, or for "auto" that of `pick_device`."""
    return torch.device(pick_device() if device == "auto" else device)
