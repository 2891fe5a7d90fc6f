"""What others published for DPG-Bench."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["PUBLISHED"]

_SOURCE = "the model's own report, judged by mPLUG; from memory and not confirmed here"

PUBLISHED: tuple[Mapping[str, Any], ...] = tuple(
    {"model": model, "dpg": score, "source": _SOURCE}
    for model, score in (
        ("SD 1.5", 63.18),
        ("SD 2.1", 68.09),
        ("PixArt-alpha", 71.11),
        ("SDXL", 74.65),
        ("ELLA, SD 1.5", 74.91),
        ("Playground v2.5", 75.47),
        ("Hunyuan-DiT", 78.87),
        ("ELLA, SDXL", 80.23),
        ("PixArt-Sigma", 80.54),
        ("DALL-E 3", 83.50),
        ("FLUX.1-dev", 83.84),
        ("SD 3 Medium", 84.08),
        ("Janus-Pro 7B", 84.19),
        ("Sana 1.6B", 84.8),
        ("BAGEL", 85.07),
        ("GPT-Image-1", 85.15),
        ("HiDream-I1-Full", 85.89),
        ("Seedream 3", 88.27),
        ("Qwen-Image", 88.32),
    )
)
"""Scores of 0..100 with the original's judge; those of another judge are not comparable."""
