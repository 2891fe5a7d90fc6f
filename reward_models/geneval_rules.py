"""GenEval's rules: from the objects a detector found in a picture to right or wrong, and why.

Source: Ghosh et al. 2023, "GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment"
(arXiv:2310.11513); where the paper gives no number, the released evaluation code does, and it is followed. The rules
are pure functions of boxes, scores and colour names. They need no image and no weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from diffalign.reward_models.geneval_prompts import COLORS, RELATIONS, Clause, Wanted

__all__ = [
    "Detection",
    "Mode",
    "Rules",
    "Verdict",
    "dense_score",
    "judge",
    "keep_objects",
    "overlap",
    "relations",
]

MIN_SHIFT = 1e-3
"""Centres that are no further apart than this, once the margin is taken off, have no relation; pixels."""
MIN_DIRECTION = 0.5
"""Share of the distance along an axis beyond which a relation holds; two can hold at once."""

Mode = Literal["official", "strict"]
Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 in pixels of the original image, x to the right and y down; x2 and y2 lie just outside."""


@dataclass(frozen=True, eq=False)
class Detection:
    """One object that a detector found.

    Attributes:
        label: Number of its class, as in the file of class names.
        score: In [0, 1].
        box: Around the mask.
        mask: Pixels of the object, bool [H, W] of the image; None if the detector gives no masks.
    """

    label: int
    score: float
    box: Box
    mask: NDArray[np.bool_] | None = None


Objects = Mapping[str, Sequence[Detection]]
"""The objects that count, by class name, the surest first; classes without any are left out."""
NameColors = Callable[[str, Sequence[Detection]], Sequence[str]]
"""Gives the colour of each object of a class."""


@dataclass(frozen=True)
class Rules:
    """The numbers of the released evaluation; the defaults are its own.

    Attributes:
        threshold: Objects count if their score is larger.
        counting_threshold: The same for prompts of the task "counting".
        max_objects: At most so many of a class count.
        max_overlap: Of two boxes of a class whose intersection over union reaches this, only the surer one counts; 1
            counts both, always.
        position_threshold: Share of the two objects' sizes by which centres must be apart along an axis before it
            matters.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_threshold: float = 0.1

    def __post_init__(self) -> None:
        for name in ("threshold", "counting_threshold", "max_overlap"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.max_objects < 1 or self.position_threshold < 0:
            raise ValueError(
                f"expected max_objects >= 1 and position_threshold >= 0, got {self.max_objects} and "
                f"{self.position_threshold}"
            )

    def threshold_for(self, tag: str) -> float:
        """The threshold of a task."""
        return self.counting_threshold if tag == "counting" else self.threshold


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows what was asked.

    Attributes:
        correct: Right or wrong.
        reasons: What is wrong, one text for each clause that failed, in their order.
    """

    correct: bool
    reasons: tuple[str, ...] = field(default=())


def keep_objects(
    found: Sequence[Detection], names: Sequence[str], tag: str, rules: Rules
) -> dict[str, list[Detection]]:
    """The detections that count for a prompt of task `tag`, by class name, the surest first.

    Args:
        found: All that was detected.
        names: Class names by number.
        tag: Task of the prompt.
        rules: Thresholds and limits.
    """
    # In single precision, as detectors give scores: a 0.3 of theirs is 0.300000012 in double, and must not pass.
    least = np.float32(rules.threshold_for(tag))
    passed = sorted((d for d in found if np.float32(d.score) > least), key=lambda d: -d.score)
    objects: dict[str, list[Detection]] = {}
    for label, name in enumerate(names):
        kept: list[Detection] = []
        for detection in [d for d in passed if d.label == label][: rules.max_objects]:
            if rules.max_overlap == 1 or all(overlap(k.box, detection.box) < rules.max_overlap for k in kept):
                kept.append(detection)
        if kept:
            objects[name] = kept
    return objects


def judge(wanted: Wanted, objects: Objects, name_colors: NameColors, rules: Rules, mode: Mode = "official") -> Verdict:
    """Whether the objects are what a prompt asks for.

    "official" is the released benchmark's rule: each clause needs at least its number of objects, and only that many,
    the surest ones, are looked at for colour and position. Further objects hurt only where a clause excludes them,
    which is so in the task "counting" alone. "strict" needs exactly the number everywhere. In both, one thing may
    serve as objects of two classes if the detector sees both in it.

    Args:
        wanted: What the prompt asks for.
        objects: What `keep_objects` gave.
        name_colors: Tells the colours of objects; called for clauses with a colour only.
        rules: For the margin of positions.
        mode: Which rule for numbers.
    """
    strict, relation = mode == "strict", "==" if mode == "strict" else ">="
    reasons: list[str] = []
    matched: list[Sequence[Detection] | None] = []
    for clause in wanted.include:
        everything = objects.get(clause.name, ())
        found = everything[: clause.count]
        reason = None
        if len(found) < clause.count or (strict and len(everything) > clause.count):
            reason = f"expected {clause.name}{relation}{clause.count}, found {len(everything)}"
        elif clause.color is not None:
            reason = _color_mismatch(clause, name_colors(clause.name, found), relation)
        if reason is None and clause.position is not None:
            reason = _position_mismatch(clause, clause.position, found, matched, rules)
        matched.append(found if reason is None else None)
        if reason is not None:
            reasons.append(reason)
    reasons += _too_many(wanted, objects)
    return Verdict(not reasons, tuple(reasons))


def dense_score(
    wanted: Wanted, objects: Objects, name_colors: NameColors, rules: Rules, *, released_position: bool = False
) -> float:
    """The mean of partial terms, at most 1; below 0 where there are more than twice the objects asked for.

    The reward of Liu et al. 2025, "Flow-GRPO: Training Flow Matching Models via Online RL" (arXiv:2505.05470), as its
    released code computes it. Each clause gives 1 - |count - found| / count. If the number is right, a colour gives
    1 - |count - of that colour| / count and a position 1 or 0; if it is wrong, a colour or position gives a single 0.
    A position is looked at only if the colour was right (no prompt of GenEval has both). Excluded objects are not
    looked at; they are in the count.

    Args:
        wanted: What the prompt asks for.
        objects: What `keep_objects` gave.
        name_colors: Tells the colours of objects.
        rules: For the margin of positions.
        released_position: The released code gives a 1 after the 0 of a position that does not hold, so that such a
            clause never has less than half. True does so too.

    Returns:
        The score; 0 for a prompt that asks for nothing.
    """
    terms: list[float] = []
    matched: list[Sequence[Detection] | None] = []
    for clause in wanted.include:
        found = objects.get(clause.name, ())
        terms.append(_share(clause.count, len(found)))
        right = len(found) == clause.count
        if not right and (clause.color is not None or clause.position is not None):
            terms.append(0.0)
        if right and clause.color is not None:
            agreeing = list(name_colors(clause.name, found)).count(clause.color)
            terms.append(_share(clause.count, agreeing))
            right = agreeing == clause.count
        if right and clause.position is not None:
            target = matched[clause.position[1]]
            right = _position_mismatch(clause, clause.position, found, matched, rules) is None
            terms.append(float(right))
            if not right and target is not None and released_position:
                terms.append(1.0)
        matched.append(found if right else None)
    return math.fsum(terms) / len(terms) if terms else 0.0


def relations(box: Box, other: Box, margin: float = 0.1) -> frozenset[str]:
    """Where `box` lies as seen from `other`: some of `RELATIONS`, or none.

    The offset of the centres is cut by `margin` times the sum of the two sizes, along each axis, and divided by the
    length of the uncut offset; a relation holds where more than half is left.
    """
    offset = np.array([box[0] + box[2] - other[0] - other[2], box[1] + box[3] - other[1] - other[3]]) / 2
    sizes = np.array([box[2] - box[0] + other[2] - other[0], box[3] - box[1] + other[3] - other[1]])
    cut = np.sign(offset) * np.maximum(np.abs(offset) - margin * sizes, 0)
    if (np.abs(cut) < MIN_SHIFT).all():
        return frozenset()
    x, y = cut / np.linalg.norm(offset)
    holds = (x < -MIN_DIRECTION, x > MIN_DIRECTION, y < -MIN_DIRECTION, y > MIN_DIRECTION)
    return frozenset(relation for relation, true in zip(RELATIONS, holds, strict=True) if true)


def overlap(box: Box, other: Box) -> float:
    """Intersection over union of two boxes whose corner pixels both belong to them, as in the released code."""

    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(x2 - x1 + 1, 0) * max(y2 - y1 + 1, 0)

    shared = area(max(box[0], other[0]), max(box[1], other[1]), min(box[2], other[2]), min(box[3], other[3]))
    union = area(*box) + area(*other) - shared
    return shared / union if union else 0.0


def _share(count: int, found: int) -> float:
    return 1 - abs(count - found) / count


def _color_mismatch(clause: Clause, colors: Sequence[str], relation: str) -> str | None:
    right = list(colors).count(str(clause.color))
    if right == clause.count:  # never more: only `count` objects are looked at
        return None
    others = ", ".join(f"{list(colors).count(c)} {c}" for c in COLORS if c in colors)
    return f"expected {clause.color} {clause.name}{relation}{clause.count}, found {right} {clause.color}; and {others}"


def _position_mismatch(
    clause: Clause,
    position: tuple[str, int],
    found: Sequence[Detection],
    matched: Sequence[Sequence[Detection] | None],
    rules: Rules,
) -> str | None:
    relation, number = position
    target = matched[number]
    if target is None:
        return f"no target for {clause.name} to be {relation}"
    for detection in found:
        for other in target:
            seen = relations(detection.box, other.box, rules.position_threshold)
            if relation not in seen:
                where = " and ".join(r for r in RELATIONS if r in seen) or "no relation to the"
                return f"expected {clause.name} {relation} target, found {where} target"
    return None


def _too_many(wanted: Wanted, objects: Objects) -> list[str]:
    numbers = [(clause, len(objects.get(clause.name, ()))) for clause in wanted.exclude]
    return [f"expected {c.name}<{c.count}, found {number}" for c, number in numbers if number >= c.count]
