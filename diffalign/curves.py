"""The curves of a run, from `metrics.jsonl`: loss and implicit accuracy as one picture."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

PANELS = (("loss", "loss"), ("implicit_accuracy", "implicit accuracy"))
"""Metric, by the last part of its name, and the title of its panel."""
LINES = {"train": "#3f8fd2", "validation": "#e0803a"}
SMOOTHING = 25
"""Training curves of more than three times as many points are drawn as running means over this share of them."""


def draw_curves(folder: Path) -> bytes | None:
    """Loss and implicit accuracy of training and validation as a PNG; None if nothing was logged."""
    from matplotlib.figure import Figure

    series = read_series(folder / "metrics.jsonl")
    shown = panels(series)
    if not shown:
        return None
    figure = Figure(figsize=(5.0 * len(shown), 3.0), layout="constrained")
    for axes, (title, metric) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for line, color in LINES.items():
            points = sorted(series.get((line, metric), {}).items())
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            window = len(points) // SMOOTHING
            if line == "train" and window >= 3:
                axes.plot(steps, values, color=color, alpha=0.3, linewidth=0.7)
                values = tuple(_running_mean(values, window))
            axes.plot(steps, values, color=color, linewidth=1.5, marker="o" if len(points) < 30 else "", label=line)
        axes.set(title=title, xlabel="optimizer step")
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return buffer.getvalue()


def panels(series: Mapping[tuple[str, str], Any]) -> list[tuple[str, str]]:
    """(title, metric) of the panels that have something to show."""
    return [(title, metric) for metric, title in PANELS if any((line, metric) in series for line in LINES)]


def read_series(path: Path) -> dict[tuple[str, str], dict[int, float]]:
    """(train or validation, metric) -> step -> value; of a step that occurs twice, after a resume, the later one."""
    series: dict[tuple[str, str], dict[int, float]] = {}
    for record in _records(path):
        for key, value in record.items():
            line, _, metric = key.partition("/")
            if line in LINES and isinstance(value, int | float) and math.isfinite(value):
                series.setdefault((line, metric), {})[int(record["step"])] = float(value)
    return series


def _records(path: Path) -> Iterable[dict[str, Any]]:
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            record = json.loads(text)
        except json.JSONDecodeError:
            continue  # a line that a killed run left torn
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the values up to half a window away, fewer at the ends."""
    half = window // 2
    around = [values[max(i - half, 0) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in around]
