"""Published prompt lists in a development checkout, and pictures, for the tests of benchmarks with reward models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
"""Where the published lists are in a development checkout; they are no part of the project."""


def published(folder: str, *files: str) -> Path:
    """A folder with published lists, or a skipped test."""
    lacking = [name for name in files if not (DATA / folder / name).is_file()]
    if lacking:
        pytest.skip(f"{', '.join(lacking)} not in ../shared/data/{folder}")
    return DATA / folder


def hpdv2_data() -> Path:
    """The folder with HPDv2's four lists, or a skipped test."""
    return published("hpdv2_benchmark", "anime.json", "concept-art.json", "paintings.json", "photo.json")


def parti_data() -> Path:
    """The folder with PartiPrompts, or a skipped test."""
    return published("parti", "PartiPrompts.tsv")


def noise(size: int, seed: int = 0) -> Image.Image:
    """A picture whose JPEG is the larger, the larger `size` is."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))
