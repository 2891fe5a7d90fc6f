"""The exact judge of the embedded world: reads a picture back and says whether it shows what a prompt asks.

The judge takes no part in any training. It works by analysis and synthesis: the ground colour comes from the
picture's border, connected regions that differ from it are objects, and each region is compared with every shape
of the world, drawn by the renderer with the area and centroid the region has. What cannot be read as one of the
shapes counts against the picture, and so does an object of no single colour where the prompt names one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from diffalign.shapes.scenes import COLORS, IMAGE_SIZE, SHAPES, Clause, Prompt, Thing, coverage, related

MIN_AREA = 24.0
"""Regions under this many covered pixels are specks, not objects."""
MIN_CONTRAST = 0.20
"""Distance (RGB, each channel in [0, 1]) from the ground at which a pixel belongs to an object."""
MIN_OVERLAP = 0.72
"""Soft intersection over union with the best shape under which a region is unreadable."""
MAX_COLOR_DISTANCE = 0.32
"""Distance (RGB, each channel in [0, 1]) from the nearest named colour beyond which a pixel has no named colour."""
MIN_COLOR_SHARE = 0.6
"""Share of an object's pixels that must agree on a colour for the object to have it."""
MIXED = "mixed"
"""Colour of an object whose pixels do not agree: right where a prompt names no colour, wrong where it does."""


@dataclass(frozen=True)
class Verdict:
    """What the judge says of one picture.

    Attributes:
        correct: Whether the picture shows exactly what the prompt asks.
        reason: One line; for a wrong picture, what is missing or too much.
        things: The objects that were read.
    """

    correct: bool
    reason: str
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Reading:
    """What the judge saw: readable objects, and the number of regions it could not read."""

    things: tuple[Thing, ...]
    unreadable: int


def judge(image: NDArray[np.uint8] | NDArray[np.floating], prompt: Prompt) -> Verdict:
    """Says whether `image` shows what `prompt` asks, and nothing else.

    Args:
        image: RGB picture, [64, 64, 3], uint8 or float in [0, 1].
        prompt: The prompt, with its clauses.
    """
    reading = read_image(image)
    reason = _mismatch(reading, prompt)
    return Verdict(reason is None, reason or "shows what was asked", reading.things)


def _mismatch(reading: Reading, prompt: Prompt) -> str | None:
    things = list(reading.things)
    left = list(things)
    for clause in sorted(prompt.clauses, key=lambda c: c.color is None):
        fitting = [t for t in left if _fits(t, clause)]
        if len(fitting) < clause.count:
            return f"expected {_name(clause)}, found {len(fitting)} (read: {_list(things)})"
        for thing in fitting[: clause.count]:
            left.remove(thing)
    if left:
        return f"too much: {_list(left)}"
    if reading.unreadable:
        return f"{reading.unreadable} region(s) that are no shape of this world"
    if prompt.relation is not None:
        first, second = (next(t for t in things if _fits(t, c)) for c in prompt.clauses)
        if not related(first, second, prompt.relation):
            return f"the {first.shape} is not {prompt.relation} the {second.shape}"
    return None


def _fits(thing: Thing, clause: Clause) -> bool:
    return thing.shape == clause.shape and clause.color in (None, thing.color)


def _name(clause: Clause) -> str:
    return f"{clause.count} {clause.color + ' ' if clause.color else ''}{clause.shape}"


def _list(things: list[Thing]) -> str:
    return ", ".join(f"{t.color} {t.shape}" for t in things) or "nothing"


def read_image(image: NDArray[np.uint8] | NDArray[np.floating]) -> Reading:
    """Reads the objects of a picture, RGB [64, 64, 3], uint8 or float in [0, 1].

    Raises:
        ValueError: If the picture has another size.
    """
    if image.shape != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(f"the judge reads [{IMAGE_SIZE}, {IMAGE_SIZE}, 3] pictures, got {list(image.shape)}")
    scale = 255.0 if image.dtype == np.uint8 else 1.0
    pixels = np.asarray(image, dtype=np.float32) / scale
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3)])
    border = np.concatenate([border, pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)])
    ground = np.median(border, axis=0)
    smooth = ndimage.gaussian_filter(pixels, (0.6, 0.6, 0))
    contrast = np.sqrt(((smooth - ground) ** 2).sum(-1))
    regions, count = ndimage.label(contrast > MIN_CONTRAST)
    things: list[Thing] = []
    unreadable = 0
    for index in range(1, count + 1):
        region = regions == index
        if region.sum() < MIN_AREA:
            continue
        thing = _read_region(pixels, contrast, region, regions)
        if thing is None:
            unreadable += 1
        else:
            things.append(thing)
    return Reading(tuple(things), unreadable)


def _read_region(
    pixels: NDArray[np.float32], contrast: NDArray[np.float32], region: NDArray[np.bool_], regions: NDArray[np.integer]
) -> Thing | None:
    inner = ndimage.binary_erosion(region, iterations=2)
    if inner.sum() < 6:
        inner = ndimage.binary_erosion(region)
    if inner.sum() < 6:
        inner = region
    # The share of each pixel that the object covers: its distance from the ground over the object's own nearby, so
    # that an object of several colours keeps its outline.
    near = ndimage.binary_dilation(region, iterations=3) & ((regions == 0) | region)
    contrast = contrast * near
    full = np.maximum(ndimage.maximum_filter(contrast, 5), 0.8 * np.percentile(contrast[inner], 30))
    alpha = np.clip(contrast / np.maximum(full, 1e-6), 0, 1).astype(np.float32)
    alpha[alpha < 0.2] = 0
    area = float(alpha.sum())
    if area < MIN_AREA:
        return None
    rows, columns = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
    y = float((alpha * (rows + 0.5)).sum() / area)
    x = float((alpha * (columns + 0.5)).sum() / area)
    fits = [_fit(shape, x, y, area) for shape in SHAPES]
    overlaps = _overlaps(np.stack([coverage(shape, *fit) for shape, fit in zip(SHAPES, fits, strict=True)]), alpha)
    best = int(overlaps.argmax())
    return Thing(SHAPES[best], _color(pixels[inner]), *fits[best]) if overlaps[best] >= MIN_OVERLAP else None


def _color(pixels: NDArray[np.float32]) -> str:
    """The named colour of an object's pixels [N, 3], or `MIXED`."""
    named = np.array(list(COLORS.values()), np.float32) / 255.0
    distances = np.linalg.norm(pixels[:, None] - named, axis=-1)
    votes = np.bincount(distances.argmin(1)[distances.min(1) <= MAX_COLOR_DISTANCE], minlength=len(COLORS))
    return list(COLORS)[int(votes.argmax())] if votes.max() >= MIN_COLOR_SHARE * len(pixels) else MIXED


@lru_cache(maxsize=len(SHAPES))
def _moments(shape: str) -> tuple[float, float, float]:
    """Area of a shape of size one, and its centroid's offset from its centre in sizes."""
    size = 48.0
    mask = coverage(shape, 32.0, 32.0, size)
    rows, columns = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
    area = float(mask.sum())
    x = float((mask * (columns + 0.5)).sum() / area)
    y = float((mask * (rows + 0.5)).sum() / area)
    return area / size**2, (x - 32.0) / size, (y - 32.0) / size


def _fit(shape: str, x: float, y: float, area: float) -> tuple[float, float, float]:
    """Centre and size at which a shape has this centroid and area."""
    unit, dx, dy = _moments(shape)
    size = float(np.sqrt(area / unit))
    return x - dx * size, y - dy * size, size


def _overlaps(drawn: NDArray[np.float32], alpha: NDArray[np.float32]) -> NDArray[np.floating]:
    """Best soft intersection over union of each drawn shape [N, 64, 64] with a region [64, 64], sharp or blurred."""
    best = np.zeros(len(drawn), np.float32)
    for sigma in (0.0, 0.8, 1.2):
        masks = ndimage.gaussian_filter(drawn, (0, sigma, sigma)) if sigma else drawn  # all at once: few, large calls
        common, joint = (f(masks, alpha).reshape(len(masks), -1).sum(1) for f in (np.minimum, np.maximum))
        best = np.maximum(best, common / joint)
    return best
