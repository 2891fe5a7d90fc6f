"""Where and with what numbers were made: every record of a benchmark says it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "triton")
ROOT = Path(__file__).resolve().parents[1]


def machine(device: torch.device | str = "cpu", commit: str | None = None) -> dict[str, Any]:
    """Machine, versions and commit, as JSON values.

    Args:
        device: Where the numbers were made.
        commit: Of the code, where a copy of the files without their history is measured; None asks git.
    """
    device = torch.device(device)
    found: dict[str, Any] = {"device": device_name(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"memory_gib": properties.total_memory / 2**30, "cuda": torch.version.cuda}
        found |= {"cudnn": torch.backends.cudnn.version()}  # type: ignore[no-untyped-call]
    return {
        **found,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "commit": commit or _commit(),
    }


def hide_accelerators() -> None:
    """This process and those that it starts compute on the CPU; called before anything else does."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}


def device_name(device: torch.device) -> str:
    """What people call the device, such as "NVIDIA H200"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _version(package: str) -> str | None:
    try:
        found: str = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    return found


def _commit() -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
