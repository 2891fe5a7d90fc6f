"""T2I-CompBench's rules: from probabilities, boxes and cosines to the scores of pictures.

Source: Huang et al. 2023, "T2I-CompBench: A Comprehensive Benchmark for Open-world Compositional Text-to-image
Generation" (arXiv:2307.06350), and its extension "T2I-CompBench++"; where the papers give no number, the released
evaluation does. Pure functions, without pictures and weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

__all__ = ["attribute_score", "count_score", "merge_objects", "position_score", "spatial_score", "three_in_one"]

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 in pixels of the picture, x to the right and y down."""
Found = tuple[str, float, Box]
"""Class name, score and box of an object; lists of them have the surest first."""

OVERLAP = 0.1
"""Intersection over union from which a position counts less."""
NEAR = 150.0
"""Pixels within which things are next to each other, whatever the picture's size."""
SAME = 0.9
"""Overlap beyond which two boxes of a class are one thing."""
PERSONS = ("girl", "boy", "man", "woman")
RENAMED: Mapping[str, str] = {
    **dict.fromkeys(PERSONS, "person"),
    "ship": "boat",
    "telivision": "tv",  # as the released code spells it
    "goldfish": "fish",
    "painting": "picture",
}
"""Names of counted things under which detectors know them."""


def attribute_score(probabilities: Sequence[float]) -> float:
    """The product of P(yes) over the questions about a picture, each rounded to four decimals, and so is the product.

    Multiplied in single precision as the released code does; 1 for no question.
    """
    product = np.float32(1)
    for value in probabilities:
        product *= np.float32(round(value, 4))
    return round(float(product), 4)


def position_score(relation: str | None, first: Box, second: Box) -> float:
    """How well `first` lies in a relation to `second`, in [0, 1].

    A thing that is "on the left of" another must have its centre to the left, by more than they differ in height; then
    the score is 1, or 0.1 / IoU where the boxes overlap by an IoU of 0.1 or more. Things "near" each other score 1 if
    their centres are less than 150 pixels apart along one of the axes, else 150 / the larger distance.

    "on top of" is among the relations that the released code looks for, but has no rule there and scores 0.
    """
    dx = (second[0] + second[2] - first[0] - first[2]) / 2
    dy = (second[1] + second[3] - first[1] - first[3]) / 2
    if relation in ("next to", "on side of", "near"):
        return 1.0 if min(abs(dx), abs(dy)) < NEAR else NEAR / max(abs(dx), abs(dy))
    holds = {
        "on the right of": -dx > abs(dy),
        "on the left of": dx > abs(dy),
        "on the bottom of": -dy > abs(dx),
        "on the top of": dy > abs(dx),
    }
    if relation is None or not holds.get(relation, False):
        return 0.0
    iou = _iou(first, second)
    return 1.0 if iou < OVERLAP else OVERLAP / iou


def spatial_score(relation: str | None, objects: tuple[str, str] | None, found: Sequence[Found]) -> float:
    """A quarter of the score of each of two objects and half that of their position; 0 if that is below 0.5.

    One object alone gives at most a quarter, and so 0.

    Args:
        relation: One of the localities, or None.
        objects: Names of the two, as prompts say them.
        found: What was detected, the surest first; of each class the first counts.
    """
    if objects is None:
        return 0.0
    names = ["person" if name in PERSONS else name for name in objects]
    seen = [next((f for f in found if f[0] == name), None) for name in names]
    score = sum(0.25 * f[1] for f in seen if f is not None)
    first, second = seen
    if first is not None and second is not None:
        score += position_score(relation, first[2], second[2]) / 2
    return score if score >= 0.5 else 0.0


def merge_objects(found: Sequence[Found]) -> list[Found]:
    """The detections without those that show a thing of the same class again.

    Again is an IoU above 0.9 with one that was kept, or that either box covers more than 0.9 of the other.
    """
    kept: list[Found] = []
    for one in found:
        if not any(one[0] == other[0] and _same(one[2], other[2]) for other in kept):
            kept.append(one)
    return kept


def count_score(wanted: Sequence[tuple[str, int]], found: Sequence[str]) -> float:
    """For each counted thing half a point if it is there, and half if its number is right, over the number of things.

    A class whose name contains a thing's stands for it where no class has exactly its name.

    Args:
        wanted: Things and numbers; not empty.
        found: Class names of the merged detections.

    Raises:
        ValueError: If nothing is wanted.
    """
    if not wanted:
        raise ValueError("a prompt of the category numeracy must count something, this one counts nothing")
    names = list(found)
    terms = []
    for thing, number in wanted:
        name = RENAMED.get(thing, thing)
        if name not in names:
            names = [name if name in other else other for other in names]
        terms.append(0.5 * (name in names) + 0.5 * (names.count(name) == number))
    return math.fsum(terms) / len(terms)


def three_in_one(kind: str, attribute: float, spatial: float | None, action: float | None) -> float | None:
    """The score of a prompt of the category complex, from those of its parts; None if one that counts is not there.

    Args:
        kind: Which list the prompt is in: "spatial" averages attribute and spatial, "action" attribute and action, and
            "spatialaction" all three.
        attribute: `attribute_score`.
        spatial: `spatial_score`.
        action: Cosine of picture and the prompt without its adjectives.
    """
    parts = {"spatial": (attribute, spatial), "action": (attribute, action)}.get(kind, (attribute, spatial, action))
    values = [value for value in parts if value is not None]
    return sum(values) / len(values) if len(values) == len(parts) else None


def _iou(first: Box, second: Box) -> float:
    shared = _shared(first, second, 0)
    union = _area(first, 0) + _area(second, 0) - shared
    return shared / union if union else 0.0


def _same(first: Box, second: Box) -> bool:
    shared = _shared(first, second, 1)
    a, b = _area(first, 1), _area(second, 1)
    return shared / (a + b - shared) > SAME or shared / a > SAME or shared / b > SAME


def _area(box: Box, edge: int) -> float:
    """Of a box whose corner pixels both belong to it, with `edge` 1."""
    return max(box[2] - box[0] + edge, 0) * max(box[3] - box[1] + edge, 0)


def _shared(first: Box, second: Box, edge: int) -> float:
    corners = (max(first[0], second[0]), max(first[1], second[1]), min(first[2], second[2]), min(first[3], second[3]))
    return _area(corners, edge)
