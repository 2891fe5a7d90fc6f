"""Comparisons of the embedded world that the renderer draws and decides: no judge is asked in training.

The better picture is a scene drawn for the prompt; the worse one is spoilt (it shows something else), badly drawn, or
both. The held-out set is of prompts that no training sees, and there the judge decides: kept are the pairs of which it
finds exactly one right.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffalign.data.compared import Comparison, ComparisonList
from diffalign.data.images import ImageSource
from diffalign.shapes.judge import judge
from diffalign.shapes.scenes import Prompt, degrade, draw_scene, prompts, render, spoil_scene
from diffalign.shapes.stages import PromptSampler, generators

SPOILT, DEGRADED = 0.6, 0.3
"""How many of the worse pictures are spoilt, and how many badly drawn; the rest are both. As `build.train_scorer`."""

POOR = 0.6
"""How many pictures of the set `mixed` are badly drawn, good or bad for their prompts: what a CLIP is trained on before
people are asked. As many as the denoiser's later training pictures, see `build.POOR_SHARE`."""

Array = NDArray[np.uint8]


class DrawnComparisons:
    """Comparisons of training prompts, each drawn when it is asked for, always the same; see `data.Comparisons`.

    Args:
        count: How many there are.
        seed: Of all drawings.
        poor_share: How many of the better pictures are badly drawn all the same.
    """

    buckets: ClassVar[None] = None

    def __init__(self, count: int, seed: int, poor_share: float = 0.0) -> None:
        self._count, self._seed, self._poor_share = count, seed, poor_share
        self._prompt = PromptSampler()

    def __len__(self) -> int:
        return self._count

    def pair_id(self, row: int) -> str:
        """See `Comparisons`."""
        return str(row)

    def __getitem__(self, row: int) -> Comparison:
        generator, _ = generators(self._seed, 11, row)
        prompt = self._prompt(generator)
        better, worse = draw_pair(prompt, generator)
        if self._poor_share and generator.random() < self._poor_share:
            better = degrade(better, generator)
        return _comparison(str(row), prompt, better, worse, preference=1.0)


def held_out_comparisons(count: int, seed: int) -> ComparisonList:
    """Comparisons of held-out prompts, all in turn, that the judge decides.

    Args:
        count: How many, >= 1.
        seed: Of all drawings.
    """
    asked = prompts("held_out")
    items: list[Comparison] = []
    number = 0
    while len(items) < count:
        generator, _ = generators(seed, 12, number)
        prompt = asked[number % len(asked)]
        better, worse = draw_pair(prompt, generator)
        verdicts = [judge(picture, prompt).correct for picture in (better, worse)]
        if verdicts[0] != verdicts[1]:
            items.append(_comparison(f"held-out {number}", prompt, better, worse, preference=float(verdicts[0])))
        number += 1
    return ComparisonList(items, "held-out scenes")


def draw_pair(prompt: Prompt, generator: np.random.Generator) -> tuple[Array, Array]:
    """A good picture of the prompt and a worse one, RGB [64, 64, 3]."""
    scene = draw_scene(prompt, generator)
    better = render(scene)
    way = generator.random()
    if SPOILT <= way < SPOILT + DEGRADED:
        return better, degrade(better, generator)
    worse = render(spoil_scene(prompt, scene, generator))
    return better, worse if way < SPOILT else degrade(worse, generator)


def _comparison(name: str, prompt: Prompt, better: Array, worse: Array, *, preference: float) -> Comparison:
    first, second = (ImageSource(Image.fromarray(picture)) for picture in (better, worse))
    return Comparison(name, prompt.text, first, second, preference)
