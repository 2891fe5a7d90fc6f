"""Pairs of pictures that the renderer draws: `python -m diffalign.shapes.scene_pairs --out FOLDER`.

The chosen picture is a scene of the prompt, the other one the same scene spoilt, so that it shows something else. They
come from elsewhere than the model, as the pairs of public data sets do; InPO needs such pairs, see
`configs/shapes_inpo.yaml`.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from diffalign.resumable import write_atomically
from diffalign.shapes.scenes import draw_scene, render, spoil_scene
from diffalign.shapes.stages import PromptSampler


def write_scene_pairs(out: Path, pairs: int, seed: int = 0) -> Path:
    """Writes `index.jsonl` and `images/*.png`; pair number i depends on `seed` and i alone.

    Args:
        out: The folder.
        pairs: How many, of the training prompts.
        seed: Of prompts and scenes.

    Returns:
        The index, written last.
    """
    draw = PromptSampler()
    (out / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in tqdm(range(pairs), desc="scenes", unit="pair", mininterval=1):
        generator = np.random.default_rng(np.random.SeedSequence([seed, number]))
        prompt = draw(generator)
        scene = draw_scene(prompt, generator, tidy=True)
        row = {"id": f"{number:05d}", "prompt": prompt.text}
        for side, drawn in (("chosen", scene), ("rejected", spoil_scene(prompt, scene, generator))):
            row[side] = f"images/{number:05d}-{side}.png"
            content = io.BytesIO()
            Image.fromarray(render(drawn)).save(content, format="PNG")
            write_atomically(out / row[side], content.getvalue())
        rows.append(row)
    index = out / "index.jsonl"
    write_atomically(index, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return index


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m diffalign.shapes.scene_pairs", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the folder")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.stdout.write(f"index: {write_scene_pairs(options.out, options.pairs, options.seed)}\n")


if __name__ == "__main__":
    main()
