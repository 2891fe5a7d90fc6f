"""What the writers of rendered pairs share: numbered pairs in the layout of the project, and their command line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from diffalign.resumable import write_atomically

DrawPair = Callable[[np.random.Generator], tuple[str, bytes, bytes]]
"""A prompt, and the contents of the chosen and of the rejected file."""
WritePairs = Callable[[Path, int, int], Path]


def write_pairs(out: Path, pairs: int, seed: int, draw: DrawPair, files: str) -> Path:
    """Writes `index.jsonl` and two files a pair; pair number i depends on `seed` and i alone.

    Args:
        out: The folder.
        pairs: How many.
        seed: Of everything random.
        draw: Draws a pair.
        files: Name of the files in the folder, `{}` standing for number and side: "images/{}.png".

    Returns:
        The index, written last.
    """
    (out / files).parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in tqdm(range(pairs), desc="draw", unit="pair", mininterval=1):
        prompt, *contents = draw(np.random.default_rng(np.random.SeedSequence([seed, number])))
        row = {"id": f"{number:05d}", "prompt": prompt}
        for side, content in zip(("chosen", "rejected"), contents, strict=True):
            row[side] = files.format(f"{number:05d}-{side}")
            write_atomically(out / row[side], content)
        rows.append(row)
    index = out / "index.jsonl"
    write_atomically(index, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return index


def run(program: str, description: str | None, write: WritePairs) -> None:
    """The command line of a writer of pairs."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=description)
    parser.add_argument("--out", type=Path, required=True, help="the folder")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.stdout.write(f"index: {write(options.out, options.pairs, options.seed)}\n")
