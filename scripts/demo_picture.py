"""Draws base and aligned pictures of a demo run side by side: `python scripts/demo_picture.py runs/demo OUT.png`.

Takes every n-th prompt of the evaluation, so that nobody chooses. A green frame is the judge's yes, a red one its no.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image

from diffalign.eval import read_rows


def main(run: str, out: str, columns: int = 10) -> None:
    """Writes the picture of `run` to `out`."""
    folder = Path(run) / "evaluation"
    sides = [read_rows(folder / f"{side}.jsonl") for side in ("base", "aligned")]
    step = len(sides[0]) / columns
    chosen = [int((k + 0.5) * step) for k in range(columns)]
    figure, axes = plt.subplots(2, columns, figsize=(1.5 * columns, 3.9), layout="constrained")
    for row, (name, rows) in enumerate(zip(("base", "aligned"), sides, strict=True)):
        for column, index in enumerate(chosen):
            item, axis = rows[index], axes[row, column]
            axis.imshow(Image.open(folder / str(item.image)), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set(color="tab:green" if item.correct else "tab:red", linewidth=2.5)
            if row == 0:
                axis.set_title(item.prompt.removeprefix("a photo of ").replace(" and ", "\nand "), fontsize=8)
            if column == 0:
                axis.set_ylabel(name, fontsize=11)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:3])
