"""What this machine can do and what is missing for which feature: the body of `diffalign doctor`.

Packages are looked up, not imported, except torch, which alone knows the devices.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from importlib import metadata, resources
from pathlib import Path
from typing import Any

PACKAGES = (
    "diffalign",
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "open-clip-torch",
    "datasets",
    "safetensors",
    "numpy",
)
"""Always needed; by their names on the package index."""

FEATURES = (
    ("CLIP, PickScore and HPS scorers", "open-clip-torch", "pip install open-clip-torch"),
    ("video files", "av", "pip install 'diffalign[video]'"),
    ("diffalign serve-reward", "fastapi", "pip install 'diffalign[serve]'"),
    ("TensorBoard logs", "tensorboard", "pip install 'diffalign[tensorboard]'"),
    ("Weights & Biases logs", "wandb", "pip install 'diffalign[wandb]'"),
    ("optimizer adamw_8bit, quantization nf4", "bitsandbytes", "pip install 'diffalign[quantization]'"),
    ("quantization int8", "torchao", "pip install 'diffalign[quantization]'"),
)
"""Feature, distribution, and the command that installs it."""

_SWITCHED = "FLUX, FLUX.2, Qwen-Image, Z-Image, Wan, LTX and HunyuanVideo"
_HALF = "every model, in bf16 or fp16"
ATTENTION = (
    ("native", None, "", False, "every model: PyTorch's choice of its kernels"),
    ("_native_flash", None, "", False, f"{_HALF} on GPUs, where its attention has no mask"),
    ("_native_cudnn", None, "", True, _HALF),
    ("_native_efficient", None, "", True, "every model"),
    ("_native_math", None, "", False, "every model"),
    ("xformers", "xformers", "pip install 'diffalign[xformers]'", True, "every image model"),
    ("flash", "flash-attn", "pip install flash-attn --no-build-isolation", True, _SWITCHED),
    ("sage", "sageattention", "pip install 'sageattention>=2.1.1'", True, _SWITCHED),
)
"""Name in the config, distribution, install command, whether it needs a CUDA device, and which models it reaches."""

ASSETS = {
    "pipeline": ("model_index.json", "unet/*.safetensors", "vae/*.safetensors", "text_encoder/*.safetensors"),
    "scorer": ("config.json", "*.safetensors"),
}

_GIB = 1024**3


def collect(output_dir: str | Path = "runs") -> dict[str, Any]:
    """Everything `render` prints, as JSON values: system, packages, devices, attention, features, disk, assets.

    Args:
        output_dir: Where runs will be written; it need not exist.
    """
    devices = _devices()
    cuda = any(device["name"].startswith("cuda") for device in devices)
    return {
        "system": {
            "python": platform.python_version(),
            "executable": sys.executable,
            "platform": platform.platform(),
        },
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": devices,
        "attention": [_attention(*row, cuda=cuda) for row in ATTENTION],
        "features": [_feature(*row) for row in FEATURES],
        "disk": [
            _disk("output folder", Path(output_dir)),
            _disk("Hub cache", _hub_cache()),
        ],
        "assets": {name: _asset(name, patterns) for name, patterns in ASSETS.items()},
    }


def render(info: dict[str, Any]) -> str:
    """The result of `collect` as aligned plain text."""
    system = info["system"]
    sections: list[tuple[str, list[tuple[str, ...]]]] = [
        ("system", [(name, str(value)) for name, value in system.items()]),
        ("packages", [(name, version or f"MISSING: pip install {name}") for name, version in info["packages"].items()]),
        (
            "devices",
            [
                (d["name"], d["model"], _size(d["memory_gib"]), f"bf16 {'yes' if d['bf16'] else 'no'}", d["note"])
                for d in info["devices"]
            ],
        ),
        ("attention", [(a["name"], a["reaches"], _state(a)) for a in info["attention"]]),
        ("features", [(f["name"], _state(f)) for f in info["features"]]),
        ("disk", [(d["name"], f"{_size(d['free_gib'])} free", d["path"]) for d in info["disk"]]),
        ("embedded world", [(name, text) for name, text in info["assets"].items()]),
    ]
    return "\n\n".join(f"{title}\n{_table(rows)}" for title, rows in sections)


def _table(rows: list[tuple[str, ...]]) -> str:
    columns = max(len(row) for row in rows)
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(columns)]
    return "\n".join(
        ("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))).rstrip() for row in rows
    )


def _state(entry: dict[str, Any]) -> str:
    if not entry["missing"]:
        return f"available ({entry['version']})" if entry["version"] else "available"
    command = f": {entry['install']}" if entry["install"] and entry["version"] is None else ""
    return f"missing {' and '.join(entry['missing'])}{command}"


def _size(gib: float | None) -> str:
    return "unknown" if gib is None else f"{gib:.1f} GiB"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        if distribution == "diffalign":  # a checkout that was never installed has no metadata
            return "running from source, not installed"
        return None


def _feature(name: str, distribution: str, install: str) -> dict[str, Any]:
    version = _version(distribution)
    return {"name": name, "version": version, "missing": [] if version else [distribution], "install": install}


def _attention(
    name: str, distribution: str | None, install: str, needs_cuda: bool, reaches: str, *, cuda: bool
) -> dict[str, Any]:
    version = _version(distribution) if distribution else None
    missing = [distribution] if distribution and version is None else []
    if needs_cuda and not cuda:
        missing.append("a CUDA device")
    return {"name": name, "version": version, "missing": missing, "install": install, "reaches": reaches}


def _devices() -> list[dict[str, Any]]:
    if importlib.util.find_spec("torch") is None:
        return [_cpu(bf16=False, note="torch is missing, other devices are unknown")]
    import torch

    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": f"cuda:{index}",
                "model": properties.name,
                "memory_gib": properties.total_memory / _GIB,
                "bf16": properties.major >= 8 or torch.version.hip is not None,
                "note": f"compute capability {properties.major}.{properties.minor}",
            }
        )
    if torch.backends.mps.is_available():
        devices.append(
            {
                "name": "mps",
                "model": platform.processor(),
                "memory_gib": _memory(),
                "bf16": _runs_bf16("mps"),
                "note": "shared memory",
            }
        )
    return [*devices, _cpu(bf16=_runs_bf16("cpu"), note=f"{_cores()} cores, {torch.get_num_threads()} torch threads")]


def _runs_bf16(device: str) -> bool:
    import torch

    try:
        half = torch.full((2, 2), 0.5, dtype=torch.bfloat16, device=device)
        return bool((half @ half == 0.5).all())
    except (RuntimeError, TypeError):  # how torch says that a device has no such type or operation
        return False


def _cpu(bf16: bool, note: str) -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    return {"name": "cpu", "model": model, "memory_gib": _memory(), "bf16": bf16, "note": note}


def _cores() -> int:
    if platform.system() == "Linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> float | None:
    if platform.system() == "Windows":
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB


def _hub_cache() -> Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        return Path("~/.cache/huggingface/hub")
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _disk(name: str, folder: Path) -> dict[str, Any]:
    """Free space where `folder` is, or will be."""
    folder = folder.expanduser().absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return {"name": name, "path": str(folder), "free_gib": shutil.disk_usage(existing).free / _GIB}


def _asset(name: str, patterns: tuple[str, ...]) -> str:
    folder = Path(str(resources.files("diffalign.shapes").joinpath("assets", name)))
    missing = [pattern for pattern in patterns if not any(folder.glob(pattern))]
    if missing:
        return f"MISSING {missing[0]}: reinstall, or rebuild with `python -m diffalign.shapes.build`"
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return f"present, {size / 1e6:.1f} MB"
