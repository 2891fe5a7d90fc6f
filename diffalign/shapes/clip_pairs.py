"""Pairs of clips of the moving world: `python -m diffalign.shapes.clip_pairs --out FOLDER --pairs 200`.

The chosen clip moves as its prompt says, the rejected one in another way; both are rendered. The folder is one that
`diffalign train` reads (docs/video_data.md); methods that learn from winners alone take the chosen ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from diffalign.resumable import write_atomically
from diffalign.shapes.clips import MOTIONS, clip_prompts, draw_clip, render_clip
from diffalign.videos import to_mp4

FRAME_RATE = 8.0
"""Frames per second of the files, CogVideoX's."""


def write_clip_pairs(out: Path, pairs: int, seed: int = 0) -> Path:
    """Writes `index.jsonl` and `clips/*.mp4`; pair number i depends on `seed` and i alone.

    Args:
        out: The folder.
        pairs: How many, of the training prompts.
        seed: Of prompts and places.

    Returns:
        The index, written last.
    """
    known = clip_prompts("train")
    (out / "clips").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in tqdm(range(pairs), desc="clips", unit="pair", mininterval=1):
        generator = np.random.default_rng(np.random.SeedSequence([seed, number]))
        prompt = known[int(generator.integers(len(known)))]
        other = str(generator.choice([motion for motion in MOTIONS if motion != prompt.motion]))
        row = {"id": f"{number:05d}", "prompt": prompt.text}
        for side, motion in (("chosen", prompt.motion), ("rejected", other)):
            frames = render_clip(draw_clip(prompt, generator, motion=motion))
            video = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
            row[side] = f"clips/{number:05d}-{side}.mp4"
            write_atomically(out / row[side], to_mp4(video, FRAME_RATE))
        rows.append(row)
    index = out / "index.jsonl"
    write_atomically(index, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return index


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m diffalign.shapes.clip_pairs", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the folder")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.stdout.write(f"index: {write_clip_pairs(options.out, options.pairs, options.seed)}\n")


if __name__ == "__main__":
    main()
