"""Buckets of sizes: pictures keep their proportions, and those of about the same ones are batched together.

Sides are multiples of a step, areas at most that of the resolution and as near to it as the step allows, as NovelAI
described it in 2022 and Podell et al. 2023 (SDXL, arXiv:2307.01952, section 2.3) train.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

LONGEST = 2
"""Sides are at most so many times the square's side, and at least that part of it: proportions from 1:4 to 4:1."""


def bucket_sizes(size: tuple[int, int], step: int) -> tuple[tuple[int, int], ...]:
    """All buckets, as height and width in pixels, from the widest to the tallest.

    Of sizes whose sides are multiples of `step` and whose area is at most that of `size`, those that fit into no other.

    Args:
        size: Height and width whose area is kept.
        step: In pixels.

    Raises:
        ValueError: If the step is longer than the side of a square of that area.
    """
    area = size[0] * size[1]
    side = math.isqrt(area)
    if step > side:
        raise ValueError(f"data.bucket_step is {step}, longer than the sides of {size[0]}x{size[1]} pixels; lower it")
    shorter = range(math.ceil(side / LONGEST / step) * step, side + 1, step)
    # A step more on the shorter side takes at least a step off the longer one, so that none of these fits into another.
    pairs = [(short, min(area // short, LONGEST * side) // step * step) for short in shorter]
    return tuple(sorted({shape for short, long in pairs for shape in ((short, long), (long, short))}))


def nearest_bucket(sizes: Sequence[tuple[int, int]], height: int, width: int) -> int:
    """The bucket whose proportions are nearest to those of a picture, on a logarithmic scale; the wider of two."""
    wanted = math.log(height / width)
    return min(range(len(sizes)), key=lambda number: abs(math.log(sizes[number][0] / sizes[number][1]) - wanted))
