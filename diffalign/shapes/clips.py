"""Moving scenes: clips of one coloured shape that goes left, right, up or down or stands still, and their judge.

A clip is six frames of the embedded world's pictures. Its prompt says what moves and how: "a video of a red circle
moving left". As with pictures, held-out combinations of shape, colour and motion never occur in any training. The judge
reads every frame with the judge of pictures and follows the object.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from diffalign.shapes.scenes import COLORS, IMAGE_SIZE, SHAPES, Scene, Split, Thing, render

FRAMES = 6
"""Frames of a clip."""
MOTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
"""Motion -> its direction in pixels, x to the right and y downwards."""
Motion = Literal["left", "right", "up", "down", "still"]

STEP = 5.0
"""Pixels that a moving object goes from frame to frame."""
SIZE = 23.0
GROUND = 240
HELD_OUT_CLIPS = 80
"""Of the 400 combinations of shape, colour and motion."""
SPLIT_SEED = 44

MIN_TRAVEL = 10.0
"""Pixels from the first readable frame to the last that count as motion; a motion's other axis may have half."""
MAX_DRIFT = 5.0
"""Pixels that a still object may drift."""
MIN_FRAMES = 4
"""Frames in which the judge must be able to read exactly one object."""


@dataclass(frozen=True)
class ClipPrompt:
    """What a clip shows.

    Attributes:
        text: The sentence the text encoder reads.
        shape: The object's shape.
        color: Its colour.
        motion: How it moves.
    """

    text: str
    shape: str
    color: str
    motion: str

    @property
    def task(self) -> str:
        """The motion, by which results are grouped."""
        return self.motion


@dataclass(frozen=True)
class ClipVerdict:
    """What the judge says of a clip.

    Attributes:
        correct: Whether object *and* motion are as asked.
        motion_correct: Whether the motion is, whatever the object is.
        reason: One line.
        motion: What was seen; None if it is none of the five.
        path: Centre of the object in every frame, None where no single object could be read.
    """

    correct: bool
    motion_correct: bool
    reason: str
    motion: str | None
    path: tuple[tuple[float, float] | None, ...]


def make_clip_prompt(shape: str, color: str, motion: str) -> ClipPrompt:
    """The prompt, for example "a video of an orange star standing still"."""
    article = "an" if color[0] in "aeiou" else "a"
    way = "standing still" if motion == "still" else f"moving {motion}"
    return ClipPrompt(f"a video of {article} {color} {shape} {way}", shape, color, motion)


def _all_clip_prompts() -> Iterator[ClipPrompt]:
    for shape in SHAPES:
        for color in COLORS:
            for motion in MOTIONS:
                yield make_clip_prompt(shape, color, motion)


@lru_cache(maxsize=3)
def clip_prompts(split: Split = "all") -> tuple[ClipPrompt, ...]:
    """All prompts of a split, in a fixed order.

    Raises:
        ValueError: For an unknown split.
    """
    if split not in ("train", "held_out", "all"):
        raise ValueError(f"unknown split {split!r}; expected 'train', 'held_out' or 'all'")
    found = tuple(_all_clip_prompts())
    held_out = set(np.random.default_rng(SPLIT_SEED).permutation(len(found))[:HELD_OUT_CLIPS].tolist())
    return tuple(p for i, p in enumerate(found) if split == "all" or (i in held_out) == (split == "held_out"))


@lru_cache(maxsize=1)
def _by_text() -> dict[str, ClipPrompt]:
    return {p.text: p for p in _all_clip_prompts()}


def parse_clip_prompt(text: str) -> ClipPrompt:
    """The meaning of a clip's prompt.

    Raises:
        ValueError: If the text is not one of the world's sentences.
    """
    try:
        return _by_text()[text.strip()]
    except KeyError:
        raise ValueError(
            f"{text!r} is no prompt of the moving world; expected a sentence like "
            "'a video of a red circle moving left' (diffalign.shapes.clips.clip_prompts() lists them all)"
        ) from None


def draw_clip(
    prompt: ClipPrompt, generator: np.random.Generator, *, motion: str | None = None, tidy: bool = True
) -> tuple[Scene, ...]:
    """Invents a clip that `prompt` describes, one scene per frame.

    Args:
        prompt: What the clip shows.
        generator: Where the random numbers come from.
        motion: Move in this way instead of the prompt's: a clip that misses its prompt.
        tidy: Start on a 4-pixel grid.
    """
    dx, dy = MOTIONS[motion or prompt.motion]
    edge, travel = SIZE / 2 + 3, STEP * (FRAMES - 1)

    def start(direction: int) -> float:
        low = edge + (travel if direction < 0 else 0)
        high = IMAGE_SIZE - edge - (travel if direction > 0 else 0)
        place = float(generator.uniform(low, high))
        return float(np.clip(round(place / 4) * 4, low, high)) if tidy else place

    x, y = start(dx), start(dy)
    things = [Thing(prompt.shape, prompt.color, x + dx * STEP * k, y + dy * STEP * k, SIZE) for k in range(FRAMES)]
    return tuple(Scene((thing,), (GROUND,) * 3) for thing in things)


def render_clip(scenes: tuple[Scene, ...]) -> NDArray[np.uint8]:
    """Paints a clip. Returns RGB frames, [T, 64, 64, 3], uint8."""
    return np.stack([render(scene) for scene in scenes])


def judge_clip(frames: NDArray[np.uint8] | NDArray[np.floating], prompt: ClipPrompt) -> ClipVerdict:
    """Says whether a clip shows what `prompt` asks.

    Args:
        frames: RGB, [T, 64, 64, 3], uint8 or float in [0, 1].
        prompt: What was asked.

    Raises:
        ValueError: If the clip has another shape.
    """
    from diffalign.shapes.judge import read_image  # needs SciPy, which drawing does not

    if frames.ndim != 4:
        raise ValueError(f"the judge reads clips [T, {IMAGE_SIZE}, {IMAGE_SIZE}, 3], got {list(frames.shape)}")
    path: list[tuple[float, float] | None] = []
    named: list[str] = []
    for frame in frames:
        reading = read_image(frame)
        thing = reading.things[0] if len(reading.things) == 1 and not reading.unreadable else None
        path.append((thing.x, thing.y) if thing is not None else None)
        if thing is not None:
            named.append(f"{thing.color} {thing.shape}")
    if len(named) < min(MIN_FRAMES, len(frames)):
        reason = f"one object can be read in {len(named)} of {len(frames)} frames only"
        return ClipVerdict(False, False, reason, None, tuple(path))
    motion = _motion([place for place in path if place is not None])
    moves = motion == prompt.motion
    fitting = named.count(f"{prompt.color} {prompt.shape}")
    if not moves:
        reason = f"moves {motion or 'in no clear direction'}, asked was {prompt.motion}"
    elif 2 * fitting <= len(named):
        reason = f"expected {prompt.color} {prompt.shape}, found {max(named, key=named.count)}"
    else:
        reason = "shows what was asked"
    return ClipVerdict(moves and 2 * fitting > len(named), moves, reason, motion, tuple(path))


def object_share(frames: NDArray[np.uint8] | NDArray[np.floating], prompt: ClipPrompt) -> float:
    """The share of a clip's frames, in [0, 1], that show the asked object and nothing else."""
    from diffalign.shapes.judge import read_image

    readings = [read_image(frame) for frame in frames]
    fitting = [
        len(reading.things) == 1
        and not reading.unreadable
        and (reading.things[0].color, reading.things[0].shape) == (prompt.color, prompt.shape)
        for reading in readings
    ]
    return sum(fitting) / len(fitting)


def _motion(places: list[tuple[float, float]]) -> str | None:
    """The motion along centres in order; None if it is none of the five."""
    (x0, y0), (x1, y1) = places[0], places[-1]
    dx, dy = x1 - x0, y1 - y0
    spread = max(max(abs(x - x0), abs(y - y0)) for x, y in places)
    if spread <= MAX_DRIFT:
        return "still"
    along = "x" if abs(dx) >= abs(dy) else "y"
    travel, other = (dx, dy) if along == "x" else (dy, dx)
    steps = np.diff([x if along == "x" else y for x, y in places]) * np.sign(travel)
    if abs(travel) < MIN_TRAVEL or abs(other) > abs(travel) / 2 or bool((steps < -2.0).any()):
        return None
    if along == "x":
        return "right" if travel > 0 else "left"
    return "down" if travel > 0 else "up"
