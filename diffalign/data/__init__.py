"""Preference pairs: readers of the published formats, the encoded cache, and the source of training batches.

`load_pairs` reads a data set into raw `Pair`s, `encode_pairs` turns them into latents and text embeddings on disk,
`PairSource` draws training batches from those. Names are loaded when they are asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffalign.data.caches import check_finished, find_encoded
    from diffalign.data.config import DataConfig
    from diffalign.data.encoded import EncodedPairs
    from diffalign.data.encoding import encode_pairs
    from diffalign.data.images import CorruptImageError, ImageSource
    from diffalign.data.loading import check_source, load_pairs
    from diffalign.data.media import check_media
    from diffalign.data.opening import RunPairs
    from diffalign.data.pairs import Pair, PairList, PairSet, ReadReport
    from diffalign.data.source import PairSource

__all__ = [
    "CorruptImageError",
    "DataConfig",
    "EncodedPairs",
    "ImageSource",
    "Pair",
    "PairList",
    "PairSet",
    "PairSource",
    "ReadReport",
    "RunPairs",
    "check_finished",
    "check_media",
    "check_source",
    "encode_pairs",
    "find_encoded",
    "load_pairs",
]

_HOMES = {
    "media": ("check_media",),
    "caches": ("check_finished", "find_encoded"),
    "config": ("DataConfig",),
    "encoded": ("EncodedPairs",),
    "encoding": ("encode_pairs",),
    "images": ("CorruptImageError", "ImageSource"),
    "loading": ("check_source", "load_pairs"),
    "opening": ("RunPairs",),
    "pairs": ("Pair", "PairList", "PairSet", "ReadReport"),
    "source": ("PairSource",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
