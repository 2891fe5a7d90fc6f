"""What others published for T2I-CompBench."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["PUBLISHED"]

_V1 = ("color", "shape", "texture", "spatial", "non_spatial", "complex")
_V2 = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")


def _published(model: str, paper: str, categories: tuple[str, ...], values: str) -> dict[str, Any]:
    named = dict(zip((f"t2i_{name}" for name in categories), map(float, values.split()), strict=True))
    return {"model": model, "categories": named, "source": f"paper of {paper}, from memory and not confirmed here"}


PUBLISHED: tuple[Mapping[str, Any], ...] = (
    _published("SD 1.4", "T2I-CompBench", _V1, ".3765 .3576 .4156 .1246 .3079 .3080"),
    _published("SD 2", "T2I-CompBench", _V1, ".5065 .4221 .4922 .1342 .3127 .3386"),
    _published("SDXL", "T2I-CompBench", _V1, ".6369 .5408 .5637 .2032 .3110 .4091"),
    _published("PixArt-alpha", "T2I-CompBench", _V1, ".6886 .5582 .7044 .2082 .3179 .4117"),
    _published("SDXL", "T2I-CompBench++", _V2, ".5879 .4687 .5299 .2133 .3566 .4988 .3119 .3237"),
    _published("DALL-E 3", "T2I-CompBench++", _V2, ".7785 .6205 .7036 .2865 .3744 .5926 .3003 .3773"),
    _published("SD 3", "T2I-CompBench++", _V2, ".8132 .5885 .7334 .3200 .4084 .6174 .3140 .3771"),
    _published("FLUX.1", "T2I-CompBench++", _V2, ".7407 .5718 .6922 .2863 .3866 .6185 .3127 .3703"),
)
"""Scores of 0..1 by the names of our scores, with UniDet for spatial, numeracy and complex. The two papers disagree on
SDXL, which they sampled differently."""
