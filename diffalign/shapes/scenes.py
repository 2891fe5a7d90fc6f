"""Prompts and pictures of the embedded world: coloured shapes on a light ground, 64x64 pixels.

A `Prompt` is an English sentence with the clauses it asks for, in GenEval's six tasks (Ghosh et al. 2023,
"GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment", arXiv:2310.11513). A `Scene` is
what a picture shows: objects with shape, colour, centre and size. `draw_scene` invents a scene that a prompt
describes, `render` paints it. Everything is a pure function of a `numpy.random.Generator`.

The prompts are split by *combination of words*: a held-out prompt's combination (for example the two shapes of
a two-object prompt, in either order) never occurs in training, neither of the base model, nor of the scorer, nor
of an alignment run on `prompts("train")`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from itertools import permutations
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

IMAGE_SIZE = 64

SHAPES = (
    "circle",
    "square",
    "triangle",
    "diamond",
    "star",
    "heart",
    "cross",
    "ring",
    "moon",
    "arrow",
)

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 36),
    "orange": (245, 138, 20),
    "yellow": (240, 212, 20),
    "green": (30, 158, 62),
    "blue": (36, 84, 214),
    "purple": (138, 44, 190),
    "pink": (250, 132, 196),
    "black": (24, 24, 28),
}

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {1: "a", 2: "two", 3: "three", 4: "four"}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

SPLIT_SEED = 43
HELD_OUT = {"two_object": 20, "counting": 48, "colors": 40, "position": 24, "color_attr": 30}
"""Held-out combinations per task; `single_object` has too few prompts to hold any out."""

Split = Literal["train", "held_out", "all"]


@dataclass(frozen=True)
class Clause:
    """One thing a prompt asks for: `count` objects of one shape, and of one colour if it names one."""

    shape: str
    count: int = 1
    color: str | None = None


@dataclass(frozen=True)
class Prompt:
    """An English prompt and its meaning.

    Attributes:
        text: The sentence the text encoder reads.
        task: One of `TASKS`.
        clauses: What the picture must show, and nothing else.
        relation: For `position`: where the first clause's object lies seen from the second's.
    """

    text: str
    task: str
    clauses: tuple[Clause, ...]
    relation: str | None = None

    @property
    def combination(self) -> str:
        """The words that define the prompt's content, whatever their order; the split is made on it."""
        words = [f"{c.count} {c.color or 'any'} {c.shape}" for c in self.clauses]
        if self.relation is not None:
            if self.relation in ("right of", "below"):  # "a right of b" says what "b left of a" says
                return " ".join([words[1], OPPOSITE[self.relation], words[0]])
            return " ".join([words[0], self.relation, words[1]])
        return " + ".join(sorted(words))


@dataclass(frozen=True)
class Thing:
    """One object of a scene. Centre and size in pixels; `size` is the side of its bounding square."""

    shape: str
    color: str
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Scene:
    """What a picture shows: its objects and the grey level of its ground (RGB, 0 to 255)."""

    things: tuple[Thing, ...]
    background: tuple[int, int, int] = (240, 240, 240)


# --- prompts ---------------------------------------------------------------------------------------------------


def _article(word: str) -> str:
    return ("an " if word[0] in "aeiou" else "a ") + word


def _phrase(clause: Clause) -> str:
    words = f"{clause.color} {clause.shape}" if clause.color else clause.shape
    if clause.count == 1:
        return _article(words)
    return f"{NUMBERS[clause.count]} {words}{'es' if words.endswith('s') else 's'}"


def make_prompt(task: str, clauses: tuple[Clause, ...], relation: str | None = None) -> Prompt:
    """The prompt in GenEval's words, for example "a photo of a red circle and a blue square"."""
    joint = f" {relation} " if relation else " and "
    return Prompt("a photo of " + joint.join(_phrase(c) for c in clauses), task, clauses, relation)


def _all_prompts() -> Iterator[Prompt]:
    for shape in SHAPES:
        yield make_prompt("single_object", (Clause(shape),))
        for color in COLORS:
            yield make_prompt("colors", (Clause(shape, 1, color),))
        for count in (2, 3, 4):
            for wanted in (None, *COLORS):
                yield make_prompt("counting", (Clause(shape, count, wanted),))
    for first, second in permutations(SHAPES, 2):
        yield make_prompt("two_object", (Clause(first), Clause(second)))
        for relation in RELATIONS:
            yield make_prompt("position", (Clause(first), Clause(second)), relation)
        for one, other in permutations(COLORS, 2):
            yield make_prompt("color_attr", (Clause(first, 1, one), Clause(second, 1, other)))


def choose_held_out(seed: int = SPLIT_SEED) -> dict[str, list[str]]:
    """Draws the held-out combinations; `split.json` beside this file is its committed result."""
    generator = np.random.default_rng(seed)
    chosen = {}
    for task, amount in HELD_OUT.items():
        combinations = sorted({p.combination for p in _all_prompts() if p.task == task})
        picks = generator.choice(len(combinations), size=amount, replace=False)
        chosen[task] = sorted(combinations[i] for i in picks)
    return chosen


@lru_cache(maxsize=1)
def held_out_combinations() -> dict[str, list[str]]:
    """The committed split: task -> combinations of words that no training may see."""
    text = resources.files("diffalign.shapes").joinpath("split.json").read_text(encoding="utf-8")
    combinations: dict[str, list[str]] = json.loads(text)
    return combinations


@lru_cache(maxsize=8)
def prompts(split: Split = "all", task: str | None = None) -> tuple[Prompt, ...]:
    """All prompts of a split, in a fixed order, optionally of one task.

    Args:
        split: "train", "held_out" or "all". `single_object` prompts belong to both sides.
        task: One of `TASKS`, or None for all of them.

    Raises:
        ValueError: For an unknown split or task.
    """
    if split not in ("train", "held_out", "all"):
        raise ValueError(f"unknown split {split!r}; expected 'train', 'held_out' or 'all'")
    if task is not None and task not in TASKS:
        raise ValueError(f"unknown task {task!r}; expected one of {', '.join(TASKS)}")
    held_out = {task_: set(names) for task_, names in held_out_combinations().items()}

    def belongs(prompt: Prompt) -> bool:
        if split == "all" or prompt.task == "single_object":
            return True
        return (prompt.combination in held_out[prompt.task]) == (split == "held_out")

    return tuple(p for p in _all_prompts() if (task is None or p.task == task) and belongs(p))


@lru_cache(maxsize=1)
def _by_text() -> dict[str, Prompt]:
    return {p.text: p for p in _all_prompts()}


def parse_prompt(text: str) -> Prompt:
    """The meaning of a prompt of this world.

    Raises:
        ValueError: If the text is not one of the world's sentences.
    """
    try:
        return _by_text()[text.strip()]
    except KeyError:
        raise ValueError(
            f"{text!r} is not a prompt of the embedded world; expected a sentence like "
            "'a photo of two red circles' (diffalign.shapes.prompts() lists them all)"
        ) from None


# --- scenes ----------------------------------------------------------------------------------------------------


def draw_scene(prompt: Prompt, generator: np.random.Generator, *, tidy: bool = False) -> Scene:
    """Invents a scene that `prompt` describes: free colours, places and sizes are drawn at random.

    Args:
        prompt: What the scene shows.
        generator: Where the random numbers come from.
        tidy: Put objects on an 8-pixel grid, in one size per number of objects, on one ground: the scenes that the
            embedded base model draws. Otherwise places, sizes and ground vary freely.
    """
    wanted = [(c.shape, c.color) for c in prompt.clauses for _ in range(c.count)]
    colors = [color or str(generator.choice(list(COLORS))) for _, color in wanted]
    place = _place_tidily if tidy else _place
    while True:
        things = place([shape for shape, _ in wanted], colors, generator)
        if prompt.relation is None or related(things[0], things[1], prompt.relation, clearly=True):
            break
    ground = TIDY_GROUND if tidy else int(generator.integers(228, 253))
    return Scene(tuple(things), (ground, ground, ground))


def _place(shapes: list[str], colors: list[str], generator: np.random.Generator) -> list[Thing]:
    low, high = {1: (20, 32), 2: (18, 26), 5: (12, 15)}.get(len(shapes), (16, 21))
    while True:
        things: list[Thing] = []
        for shape, color in zip(shapes, colors, strict=True):
            size = float(generator.uniform(low, high))
            edge = size / 2 + 3
            x, y = generator.uniform(edge, IMAGE_SIZE - edge, size=2)
            things.append(Thing(shape, color, float(x), float(y), size))
        if all(_apart(a, b) for i, a in enumerate(things) for b in things[:i]):
            return things


TIDY_GROUND = 240
_TIDY_SIZES = {1: 28.0, 2: 23.0, 3: 18.0, 4: 18.0}


def _place_tidily(shapes: list[str], colors: list[str], generator: np.random.Generator) -> list[Thing]:
    size = _TIDY_SIZES[len(shapes)]
    grid = [c for c in range(8, IMAGE_SIZE, 8) if size / 2 + 3 <= c <= IMAGE_SIZE - size / 2 - 3]
    while True:
        places = generator.choice(grid, size=(len(shapes), 2))
        things = [
            Thing(shape, color, float(x), float(y), size)
            for shape, color, (x, y) in zip(shapes, colors, places, strict=True)
        ]
        if all(_apart(a, b) for i, a in enumerate(things) for b in things[:i]):
            return things


def _apart(a: Thing, b: Thing) -> bool:
    return max(abs(a.x - b.x), abs(a.y - b.y)) >= (a.size + b.size) / 2 + 4


def related(a: Thing, b: Thing, relation: str, clearly: bool = False) -> bool:
    """Whether `a` lies in `relation` to `b`: mainly along that axis, and by at least 5 pixels.

    With `clearly`, the scenes drawn for training: by at least 16 pixels and 1.5 times the other axis.
    """
    dx, dy = b.x - a.x, b.y - a.y
    along, across = {
        "left of": (dx, dy),
        "right of": (-dx, dy),
        "above": (dy, dx),
        "below": (-dy, dx),
    }[relation]
    return along >= 16 and along >= 1.5 * abs(across) if clearly else along >= max(5.0, abs(across))


# --- rendering -------------------------------------------------------------------------------------------------

_OVERSAMPLING = 4


def _polygon(shape: str) -> list[tuple[float, float]]:
    """The outline of a polygonal shape in the square [-1, 1] x [-1, 1], y downwards."""
    if shape == "square":
        return [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]
    if shape == "triangle":
        return [(0.0, -0.95), (1.0, 0.9), (-1.0, 0.9)]
    if shape == "diamond":
        return [(0.0, -1.0), (0.72, 0.0), (0.0, 1.0), (-0.72, 0.0)]
    if shape == "star":
        angles = -np.pi / 2 + np.arange(10) * np.pi / 5
        radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
        return [(float(r * np.cos(t)), float(r * np.sin(t))) for r, t in zip(radii, angles, strict=True)]
    if shape == "heart":
        t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        x = 16 * np.sin(t) ** 3 / 17
        y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 15.5
        return [(float(a), float(b)) for a, b in zip(x, y - 0.12, strict=True)]
    if shape == "cross":
        w = 0.32
        corners = [(-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w)]
        return [*corners, *[(-a, -b) for a, b in corners]]
    if shape == "arrow":  # points to the right
        return [(-1, -0.3), (0.0, -0.3), (0.0, -0.9), (1, 0), (0.0, 0.9), (0.0, 0.3), (-1, 0.3)]
    raise ValueError(f"unknown shape {shape!r}; expected one of {', '.join(SHAPES)}")


def coverage(shape: str, x: float, y: float, size: float) -> NDArray[np.float32]:
    """How much of each pixel a shape covers, [64, 64] in [0, 1]; centre and size in pixels."""
    scale = _OVERSAMPLING
    left, top, side = int(x - size / 2) - 1, int(y - size / 2) - 1, int(size) + 4
    if min(left, top) < 0 or max(left, top) + side > IMAGE_SIZE:
        left, top, side = 0, 0, IMAGE_SIZE
    canvas = Image.new("L", (side * scale, side * scale))  # only the part around the shape, which is most of the time
    pen = ImageDraw.Draw(canvas)
    cx, cy, r = x * scale, y * scale, size * scale / 2

    def at(dx: float, dy: float) -> tuple[int, int]:  # whole numbers, as Pillow makes them, wherever the part lies
        return int(cx + dx * r) - left * scale, int(cy + dy * r) - top * scale

    def disc(dx: float, dy: float, radius: float, fill: int) -> None:
        pen.ellipse([at(dx - radius, dy - radius), at(dx + radius, dy + radius)], fill=fill)

    if shape == "circle":
        disc(0, 0, 0.95, 255)
    elif shape == "ring":
        disc(0, 0, 1.0, 255)
        disc(0, 0, 0.52, 0)
    elif shape == "moon":
        disc(0, 0, 1.0, 255)
        disc(0.55, 0, 0.82, 0)
    else:
        pen.polygon([at(a, b) for a, b in _polygon(shape)], fill=255)
    covered = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
    covered[top : top + side, left : left + side] = np.asarray(canvas.resize((side, side), Image.Resampling.BOX))
    return covered / 255.0


def render(scene: Scene) -> NDArray[np.uint8]:
    """Paints a scene. Returns RGB, [64, 64, 3], uint8."""
    image = np.broadcast_to(np.array(scene.background, np.float32), (IMAGE_SIZE, IMAGE_SIZE, 3))
    for thing in scene.things:
        mask = coverage(thing.shape, thing.x, thing.y, thing.size)[..., None]
        image = image * (1 - mask) + np.array(COLORS[thing.color], np.float32) * mask
    return np.round(image).astype(np.uint8)


# --- scenes that miss their prompt, for the scorer's training ----------------------------------------------------


def spoil_scene(prompt: Prompt, scene: Scene, generator: np.random.Generator) -> Scene:
    """A scene that `prompt` does *not* describe any more, made from one that it does.

    One of: a changed colour or shape, an object added or taken away, two objects that swap their places or
    their colours; only changes that the prompt's words notice are made.
    """
    ways = ["shape", "add"]
    if len(scene.things) > 1:
        ways.append("remove")
    if any(c.color for c in prompt.clauses):
        ways += ["color", "color"]
    if prompt.task == "color_attr":
        ways += ["swap colors", "swap colors"]
    if prompt.relation:
        ways += ["swap places", "swap places"]
    if prompt.task == "counting":
        ways += ["add", "remove"]
    return _spoil(str(generator.choice(ways)), scene, generator)


def _spoil(way: str, scene: Scene, generator: np.random.Generator) -> Scene:
    things = list(scene.things)
    i = int(generator.integers(len(things)))
    thing = things[i]
    if way == "shape":
        others = [s for s in SHAPES if s not in {t.shape for t in things}]
        things[i] = replace(thing, shape=str(generator.choice(others)))
    elif way == "color":
        others = [c for c in COLORS if c not in {t.color for t in things}]
        things[i] = replace(thing, color=str(generator.choice(others)))
    elif way == "remove":
        del things[i]
    elif way == "swap colors":
        a, b = things
        things = [replace(a, color=b.color), replace(b, color=a.color)]
    elif way == "swap places":
        a, b = things
        things = [replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)]
    else:
        shapes = [t.shape for t in things] + [str(generator.choice([t.shape for t in things] + list(SHAPES)))]
        colors = [t.color for t in things] + [str(generator.choice([t.color for t in things]))]
        things = _place(shapes, colors, generator)
    return replace(scene, things=tuple(things))


def degrade(image: NDArray[np.uint8], generator: np.random.Generator) -> NDArray[np.uint8]:
    """A badly drawn version of a picture: smeared, faded, torn or blotted, [64, 64, 3] uint8."""
    way = int(generator.integers(4))
    pixels = image.astype(np.float32)
    ground = np.median(pixels.reshape(-1, 3), axis=0)
    if way == 0:  # smear: strong blur by repeated box sums along one axis
        axis = int(generator.integers(2))
        reach = int(generator.integers(3, 7))
        pixels = np.mean([np.roll(pixels, s, axis=axis) for s in range(-reach, reach + 1)], axis=0)
    elif way == 1:  # fade towards the ground
        pixels = ground + (pixels - ground) * float(generator.uniform(0.25, 0.55))
    elif way == 2:  # tear: rows shifted against each other
        for row in range(0, IMAGE_SIZE, 4):
            pixels[row : row + 4] = np.roll(pixels[row : row + 4], int(generator.integers(-5, 6)), axis=1)
    else:  # blots of the ground colour over the drawing
        mask = np.abs(pixels - ground).sum(-1) > 60
        ys, xs = np.nonzero(mask)
        rows, columns = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
        for _ in range(int(generator.integers(2, 5))):
            pick = int(generator.integers(max(len(ys), 1)))
            cy, cx = (ys[pick], xs[pick]) if len(ys) else (32, 32)
            radius = float(generator.uniform(3, 6))
            pixels[(rows - cy) ** 2 + (columns - cx) ** 2 < radius**2] = ground
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)
