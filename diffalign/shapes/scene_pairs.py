"""Pairs of pictures that the renderer draws: `python -m diffalign.shapes.scene_pairs --out FOLDER`.

The chosen picture is a scene of the prompt, the other one the same scene spoilt, so that it shows something else. They
come from elsewhere than the model, as the pairs of public data sets do; InPO needs such pairs, see
`configs/shapes_inpo.yaml`.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from diffalign.shapes import drawn_pairs
from diffalign.shapes.scenes import Scene, draw_scene, render, spoil_scene
from diffalign.shapes.stages import PromptSampler


def write_scene_pairs(out: Path, pairs: int, seed: int = 0) -> Path:
    """Writes `index.jsonl` and `images/*.png` of training prompts; see `drawn_pairs.write_pairs`."""
    sampler = PromptSampler()

    def draw(generator: np.random.Generator) -> tuple[str, bytes, bytes]:
        prompt = sampler(generator)
        scene = draw_scene(prompt, generator, tidy=True)
        return prompt.text, _png(scene), _png(spoil_scene(prompt, scene, generator))

    return drawn_pairs.write_pairs(out, pairs, seed, draw, "images/{}.png")


def _png(scene: Scene) -> bytes:
    file = io.BytesIO()
    Image.fromarray(render(scene)).save(file, format="PNG")
    return file.getvalue()


if __name__ == "__main__":
    drawn_pairs.run("diffalign.shapes.scene_pairs", __doc__, write_scene_pairs)
