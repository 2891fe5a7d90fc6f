"""Pairs of clips of the moving world: `python -m diffalign.shapes.clip_pairs --out FOLDER --pairs 200`.

The chosen clip moves as its prompt says, the rejected one in another way; both are rendered. The folder is one that
`diffalign train` reads (docs/video_data.md); methods that learn from winners alone take the chosen ones.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from diffalign.shapes import drawn_pairs
from diffalign.shapes.clips import MOTIONS, clip_prompts, draw_clip, render_clip
from diffalign.videos import to_mp4

FRAME_RATE = 8.0
"""Frames per second of the files, CogVideoX's."""


def write_clip_pairs(out: Path, pairs: int, seed: int = 0) -> Path:
    """Writes `index.jsonl` and `clips/*.mp4` of training prompts; see `drawn_pairs.write_pairs`."""
    known = clip_prompts("train")

    def draw(generator: np.random.Generator) -> tuple[str, bytes, bytes]:
        prompt = known[int(generator.integers(len(known)))]
        other = str(generator.choice([motion for motion in MOTIONS if motion != prompt.motion]))
        chosen, rejected = (
            to_mp4(torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255, FRAME_RATE)
            for frames in (render_clip(draw_clip(prompt, generator, motion=way)) for way in (prompt.motion, other))
        )
        return prompt.text, chosen, rejected

    return drawn_pairs.write_pairs(out, pairs, seed, draw, "clips/{}.mp4")


if __name__ == "__main__":
    drawn_pairs.run("diffalign.shapes.clip_pairs", __doc__, write_clip_pairs)
