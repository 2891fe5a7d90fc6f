"""What tests of kept files share: pairs of pictures, a kill, processes in turn; no test by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.batches import PairBatch
from diffalign.inversions import InvertedPairs, below
from diffalign.processes import Processes
from tests.trainers.winners import COUNT, write_index

T = TypeVar("T")


def pairs_folder(folder: Path) -> Path:
    """`COUNT` pairs of pictures of 8x8 pixels."""
    folder.mkdir(parents=True)
    for number in range(2 * COUNT):
        noise = np.random.default_rng(number).integers(0, 256, (8, 8, 3))
        Image.fromarray(noise.astype(np.uint8)).save(folder / f"{number}.png")
    names = [(f"p{n}", f"a photo of {n} stars", f"{n}.png", f"{COUNT + n}.png") for n in range(COUNT)]
    write_index(folder, [dict(zip(("id", "prompt", "chosen", "rejected"), name, strict=True)) for name in names])
    return folder


def inverted_pairs(trainer: Any, batch: PairBatch) -> InvertedPairs:
    """The batch as an `InvertedSource` gives it."""
    grid, timesteps = trainer.grid(), trainer.draw_timesteps(batch.draws)
    states = trainer.invert_to_grid(torch.cat([batch.chosen, batch.rejected]), batch.conditioning.repeat(2))
    levels: Tensor = below(grid, timesteps)
    chosen, rejected = states[torch.arange(len(states)), levels.repeat(2)].chunk(2)
    return InvertedPairs(
        **vars(batch),
        start_chosen=chosen,
        start_rejected=rejected,
        start_levels=grid[levels],
        captions=batch.conditioning,
    )


class Killed(BaseException):
    """Stands for a signal that nobody can catch."""


class Sharing(Processes):
    """One of two processes that come one after the other."""

    def on_first(self, function: Callable[[], T]) -> T:
        return function()

    def wait(self) -> None:
        pass


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "lock"}


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without the seconds that steps took."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith("seconds")} for row in rows]
