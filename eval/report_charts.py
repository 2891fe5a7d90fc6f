"""Training curves of one or several runs as inline SVG: drawn without a display, in the page's own font and colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

CHARTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Loss", "", ("loss", "ipo_raw_loss")),
    (
        "Implicit accuracy",
        "Share of pairs whose margin favours the chosen picture; 0.5 at the start.",
        ("implicit_accuracy",),
    ),
    ("Margin z", "beta times the margin, over the pairs; 0 at the start.", ("z_mean", "z_std")),
    (
        "Errors",
        "Mean squared errors of policy and reference. A rising error of the chosen half is drift.",
        ("error_chosen", "ref_error_chosen", "error_rejected", "ref_error_rejected"),
    ),
    ("Gradient gate", "sigmoid(-z), the factor of every gradient: 0.5 at the start, 0 when saturated.", ("gate",)),
    ("Gradient norm", "", ("grad_norm",)),
    ("Learning rate", "", ("learning_rate", "lr")),
)
"""Title, explanation, and the metrics drawn together, by the last part of their names."""
HIDDEN_METRICS = frozenset({"z_square", "model_mse", "ref_mse", "step", "epoch", "time", "seconds"})
MAX_OTHER_CHARTS = 9
MAX_POINTS = 400
MAX_FAINT = 4
"""Curves of one chart that may be shown with the values they smooth; of more, one would see nothing."""
SMOOTHING = 25
"""Curves of more than three times as many points are drawn as running means over this share of them."""
WIDTH, HEIGHT = 440, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 428, 10, 182
"""The frame that curves are drawn in, in the units of the drawing."""


@dataclass(frozen=True)
class Chart:
    """One drawing.

    Attributes:
        title: What is drawn.
        note: What it means.
        lines: Names of its curves, each with the number of its colour and whether it is dashed.
        svg: The drawing.
        data: What a pointer on it may read: steps and values of every curve, and the scale of the steps.
    """

    title: str
    note: str
    lines: tuple[tuple[str, int, bool], ...]
    svg: Markup
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Curve:
    """A named series of values over steps, both [N], steps ascending."""

    name: str
    steps: NDArray[np.float64]
    values: NDArray[np.float64]
    color: int
    dashed: bool


def draw_charts(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Chart]:
    """A chart for each group of `CHARTS` that was logged, then one for every other metric.

    Args:
        runs: Name of a run -> records of its `metrics.jsonl`. Several runs share a chart for each metric.
    """
    series = {name: read_series(records) for name, records in runs.items()}
    keys = list(dict.fromkeys(key for own in series.values() for key in own))
    wanted, used = [], set()
    for title, note, names in CHARTS:
        group = [key for name in names for key in keys if key.rpartition("/")[2] == name]
        used.update(group)
        if len(runs) == 1:
            wanted += [(title, note, group)] if group else []
        else:  # one metric a chart: the curves of several runs are many already
            parts = {name: [key for key in group if key.rpartition("/")[2] == name] for name in names}
            alone = sum(map(bool, parts.values())) == 1
            wanted += [(title if alone else f"{title}: {name}", note, own) for name, own in parts.items() if own]
    others = [key for key in keys if key not in used and key.rpartition("/")[2] not in HIDDEN_METRICS]
    wanted += [(key, "", [key]) for key in others[:MAX_OTHER_CHARTS]]
    charts = []
    for title, note, group in wanted:
        curves: list[Curve] = []
        for number, (name, own) in enumerate(series.items(), 1):
            for key in (key for key in group if key in own):
                points = sorted(own[key].items())
                steps, values = (np.array(part, dtype=np.float64) for part in zip(*points, strict=True))
                if len(runs) == 1:
                    dashed = key.rpartition("/")[2].startswith("ref_")
                    curves.append(Curve(key, steps, values, len(curves) + 1, dashed))
                else:
                    dashed = key.startswith("validation/")
                    curves.append(Curve(f"{name}, validation" if dashed else name, steps, values, number, dashed))
        charts.append(_draw(title, note, curves))
    return charts


def read_series(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Metric -> step -> value. After a resume a step may occur twice: the later record counts."""
    series: dict[str, dict[int, float]] = {}
    for record in records:
        step = record.get("step")
        if not isinstance(step, int) or "event" in record:
            continue
        for key, value in record.items():
            if key == "step" or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if math.isfinite(value):
                series.setdefault(key, {})[step] = float(value)
    return series


def _draw(title: str, note: str, curves: Sequence[Curve]) -> Chart:
    """The curves in one frame, described in words for those who cannot see it."""
    first, last = (float(f([f(c.steps) for c in curves])) for f in (np.min, np.max))
    low, high = (float(f([f(c.values) for c in curves])) for f in (np.min, np.max))
    ticks, across = nice_ticks(low, high), nice_ticks(first, last, whole=True)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    parts = []
    for tick in ticks:
        y = _place(tick, low, high, BOTTOM, TOP)
        parts.append(
            f'<path class="grid" d="M{LEFT} {y}H{RIGHT}"/><text x="{LEFT - 8}" y="{y + 4:g}">{tick:.4g}</text>'
        )
    for tick in across:
        x = _place(tick, first, last, LEFT, RIGHT)
        parts.append(f'<text class="under" x="{x}" y="{BOTTOM + 18}">{tick:g}</text>')
    words, data = [], []
    for curve in curves:
        start, end = (f"{curve.values[i]:.4g} at step {curve.steps[i]:g}" for i in (0, -1))
        words.append(f"{curve.name} from {start} to {end}")
        drawn, window = curve.values, len(curve.steps) // SMOOTHING
        if window >= 3 and title != "Learning rate":
            if len(curves) <= MAX_FAINT:
                parts.append(_path(curve, curve.values, (first, last, low, high), "faint"))
            drawn = running_mean(curve.values, window)
        parts.append(_path(curve, drawn, (first, last, low, high), "dashed" if curve.dashed else "line"))
        if len(curve.steps) < 30:
            parts += [
                f'<circle class="s{curve.color % 8}" cx="{_place(x, first, last, LEFT, RIGHT)}" '
                f'cy="{_place(y, low, high, BOTTOM, TOP)}" r="2.5"/>'
                for x, y in zip(curve.steps, drawn, strict=True)
            ]
        kept = evenly(len(curve.steps), MAX_POINTS)
        data.append([[curve.steps[i], float(f"{drawn[i]:.5g}")] for i in kept])
    label = escape(f"{title} over steps: {'; '.join(words)}")
    svg = f'<svg role="img" viewBox="0 0 {WIDTH} {HEIGHT}" aria-label="{label}">{"".join(parts)}</svg>'
    scale = {"from": first, "to": last, "left": LEFT / WIDTH, "right": RIGHT / WIDTH}
    lines = tuple((curve.name, curve.color % 8, curve.dashed) for curve in curves)
    return Chart(title, note, lines, Markup(svg), {"curves": data, "names": [c.name for c in curves], **scale})


def _path(curve: Curve, values: NDArray[np.float64], frame: tuple[float, float, float, float], kind: str) -> str:
    first, last, low, high = frame
    points = [
        f"{_place(curve.steps[i], first, last, LEFT, RIGHT)} {_place(values[i], low, high, BOTTOM, TOP)}"
        for i in evenly(len(values), MAX_POINTS)
    ]
    return f'<path class="{kind} s{curve.color % 8}" d="M{"L".join(points)}"/>'


def _place(value: float, low: float, high: float, start: float, end: float) -> float:
    """Where a value lies in the drawing, to a tenth of a unit; the middle where there is only one."""
    share = 0.5 if high == low else (value - low) / (high - low)
    return round(start + share * (end - start), 1)


def nice_ticks(low: float, high: float, *, whole: bool = False, most: int = 5) -> list[float]:
    """Round numbers from just below `low` to just above `high`, at most `most` + 1 of them.

    With `whole`, round whole numbers inside the range instead.
    """
    if high == low:
        return [low]
    rough = (high - low) / most
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * (1 - 1e-9))
    if whole:
        step = max(1.0, float(math.ceil(step)))
        return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    start, stop = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{step * i:.10g}") for i in range(start, stop + 1)]


def evenly(n: int, most: int) -> list[int]:
    """At most `most` of the numbers 0 to n - 1, evenly spread, with the first and the last."""
    return sorted({round(i) for i in np.linspace(0, n - 1, min(n, most))}) if n else []


def running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Mean of the `window` values around each, fewer at the ends; [N]."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    starts, ends = np.maximum(index - window // 2, 0), np.minimum(index + window // 2 + 1, len(values))
    means: NDArray[np.float64] = (sums[ends] - sums[starts]) / (ends - starts)
    return means
