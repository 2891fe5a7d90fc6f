"""The judge against human eyes on 200 generated pictures.

`generated/sheet.png` holds 200 pictures of 64x64 pixels, 20 a row: 100 of the embedded base model and 100 of an aligned
one, drawn at random and shuffled. `generated/labels.jsonl` says of each whether somebody who saw picture and prompt,
but not the judge's verdict, called it correct.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffalign.shapes.judge import judge
from diffalign.shapes.scenes import IMAGE_SIZE, parse_prompt

FOLDER = Path(__file__).parent / "generated"


@pytest.mark.slow
def test_the_judge_agrees_with_eyes() -> None:
    """At least 92 of 100 verdicts agree; the judge is the stricter of the two."""
    labels = [json.loads(line) for line in (FOLDER / "labels.jsonl").read_text(encoding="utf-8").splitlines()]
    sheet = np.asarray(Image.open(FOLDER / "sheet.png").convert("RGB"))
    rows = sheet.reshape(-1, IMAGE_SIZE, 20, IMAGE_SIZE, 3).swapaxes(1, 2)
    pictures = rows.reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert len(pictures) == len(labels) == 200
    verdicts = np.array([judge(p, parse_prompt(r["prompt"])).correct for p, r in zip(pictures, labels, strict=True)])
    eyes = np.array([row["correct"] for row in labels])
    assert (verdicts == eyes).mean() >= 0.92
    assert (verdicts & ~eyes).mean() <= 0.03
