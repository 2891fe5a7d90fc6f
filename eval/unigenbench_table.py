"""What others published for UniGenBench."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffalign.eval.unigenbench_prompts import PRIMARIES

__all__ = ["PUBLISHED"]

_SOURCE = "README of the released code, English short prompts, judged by Gemini 2.5 Pro"


def _published(model: str, overall: float, primaries: str = "") -> dict[str, Any]:
    values = [float(value) for value in primaries.split()]
    named = dict(zip(PRIMARIES.values(), values, strict=bool(values)))
    return {"model": model, "overall": overall, "primaries": named, "source": _SOURCE}


PUBLISHED: tuple[Mapping[str, Any], ...] = (
    _published("SDXL", 40.22, "87.45 72.28 44.66 35.10 46.37 10.34 48.48 26.68 30.80 0.00"),
    _published("Kolors", 46.07),
    _published("Hunyuan-DiT", 51.38),
    _published("BAGEL", 59.91),
    _published("FLUX.1-dev", 60.97, "85.00 87.50 67.20 62.26 66.88 29.77 62.30 45.75 70.90 32.18"),
    _published("Janus-Pro", 61.36),
    _published("SD 3.5 Large", 62.89),
    _published("OmniGen2", 63.09),
    _published("DALL-E 3", 68.85),
    _published("FLUX.1-Krea-dev", 69.88),
    _published("Lumina-DiMOO", 71.12),
    _published("HiDream-I1-Full", 71.36),
    _published("Z-Image-Turbo", 71.40),
    _published("Hunyuan-Image-2.1", 74.64),
    _published("Z-Image", 78.10),
    _published("Qwen-Image", 78.36),
    _published("FLUX.2-dev", 84.76),
    _published("Imagen-4-Ultra", 91.65),
    _published("GPT-4o", 92.48),
    _published("Nano Banana Pro", 92.72),
    _published("GPT-4o-1.5", 95.77),
)
"""Scores of 0..100; those of another judge or another list of prompts are not comparable."""
