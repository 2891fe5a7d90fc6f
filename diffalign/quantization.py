"""QLoRA (Dettmers et al. 2023, arXiv:2305.14314): the denoiser's frozen weights in 4 or 8 bits, adapters on top.

Only the denoiser is quantized: autoencoder and text encoders run once, into the cache, and leave memory again.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any, Literal

import torch

Quantization = Literal["nf4", "int8"]
PACKAGES: dict[str, str] = {"nf4": "bitsandbytes", "int8": "torchao"}
BYTES_PER_WEIGHT: dict[str, float] = {"nf4": 0.5 + 0.127 / 8, "int8": 1.0}
"""nf4 keeps 0.127 bits of block constants per weight, quantized a second time (section 3 of the paper)."""


def check_quantization(kind: str, device: str) -> None:
    """Refuses what cannot work here, before any weights are loaded.

    Raises:
        ValueError: If the kind is unknown, its package is not installed, or the device cannot do it.
    """
    if kind not in PACKAGES:
        raise ValueError(f"model.quantization: unknown kind {kind!r} (available: {', '.join(PACKAGES)})")
    package = PACKAGES[kind]
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"model.quantization: {kind} needs {package}, which is not installed; run "
            "`pip install 'diffalign[quantization]'`"
        )
    if kind == "nf4" and torch.device(device).type != "cuda":
        raise ValueError(
            f"model.quantization: nf4 needs a CUDA GPU, and this run is on {device!r}; use int8, or leave it out"
        )


def quantization_config(kind: Quantization, parts: Sequence[str], compute_dtype: torch.dtype) -> Any:
    """What the pipeline's `from_pretrained` takes as `quantization_config`.

    Args:
        kind: "nf4" (bitsandbytes, 4 bits, constants quantized too) or "int8" (torchao, weights only).
        parts: Attributes of the pipeline to quantize.
        compute_dtype: Of the matrix products.
    """
    from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig, TorchAoConfig

    settings: Any
    if kind == "nf4":
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    else:
        settings = TorchAoConfig(importlib.import_module("torchao.quantization").Int8WeightOnlyConfig())
    return PipelineQuantizationConfig(quant_mapping=dict.fromkeys(parts, settings))
