"""What a file of scores looks like at a glance: statistics and histogram of every column."""

from __future__ import annotations

import io
import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["ColumnSummary", "Columns", "draw_histograms", "render_table"]

PERCENTILES = (5, 25, 50, 75, 95)
BINS = 40
_PANELS_PER_ROW = 3


@dataclass(frozen=True)
class ColumnSummary:
    """The numbers of one column; NaN where it holds none.

    Attributes:
        name: Of the column: a model, or "MODEL/DIMENSION".
        count: Rows with a number.
        missing: Rows without.
        mean: Their mean.
        std: Their standard deviation, with count - 1; NaN for a single one.
        minimum: The smallest.
        maximum: The largest.
        percentiles: At `PERCENTILES`, linear between neighbours.
        histogram: Rows in each of `BINS` bins of equal width from minimum to maximum.
    """

    name: str
    count: int
    missing: int
    mean: float
    std: float
    minimum: float
    maximum: float
    percentiles: tuple[float, ...]
    histogram: tuple[int, ...]


class Columns:
    """Numbers by column, collected row by row; 4 bytes each."""

    def __init__(self) -> None:
        self._values: dict[str, array[float]] = {}
        self._rows = 0

    def add(self, row: Mapping[str, float | None]) -> None:
        """One row's numbers, by name of column; None counts as missing, as does a column that a row leaves out."""
        self._rows += 1
        for name, value in row.items():
            values = self._values.setdefault(name, array("f"))
            if value is not None:
                values.append(value)

    def summaries(self) -> tuple[ColumnSummary, ...]:
        """Statistics of every column, in the order in which they appeared."""
        return tuple(_summarise(name, values, self._rows) for name, values in self._values.items())


def _summarise(name: str, values: array[float], rows: int) -> ColumnSummary:
    if not values:
        none = (math.nan,) * len(PERCENTILES)
        return ColumnSummary(name, 0, rows, math.nan, math.nan, math.nan, math.nan, none, (0,) * BINS)
    numbers = np.asarray(values, dtype=np.float64)
    low, high = float(numbers.min()), float(numbers.max())
    return ColumnSummary(
        name=name,
        count=len(numbers),
        missing=rows - len(numbers),
        mean=float(numbers.mean()),
        std=float(numbers.std(ddof=1)) if len(numbers) > 1 else math.nan,
        minimum=low,
        maximum=high,
        percentiles=tuple(np.percentile(numbers, PERCENTILES).tolist()),
        histogram=tuple(np.histogram(numbers, BINS, (low, high))[0].tolist()),
    )


def render_table(columns: Sequence[ColumnSummary]) -> str:
    """The statistics as lines of equal width; empty without columns."""
    if not columns:
        return ""
    head = ("column", "valid", "mean", "std", "min", *(f"p{p}" for p in PERCENTILES), "max")
    rows = [
        (c.name, str(c.count), *(f"{v:.4f}" for v in (c.mean, c.std, c.minimum, *c.percentiles, c.maximum)))
        for c in columns
    ]
    return aligned([head, *rows], left=1)


def aligned(rows: Sequence[Sequence[str]], left: int) -> str:
    """Cells in columns two spaces apart, the first `left` of them flush left, the others flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(cell.ljust(width) if i < left else cell.rjust(width)
                  for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )  # fmt: skip
    return "\n".join(line.rstrip() for line in lines)


def draw_histograms(columns: Iterable[ColumnSummary]) -> bytes | None:
    """A PNG with one panel per column that holds numbers; None if none does."""
    from matplotlib.figure import Figure

    shown = [column for column in columns if column.count]
    if not shown:
        return None
    across = min(len(shown), _PANELS_PER_ROW)
    down = math.ceil(len(shown) / across)
    figure = Figure(figsize=(4.0 * across, 2.8 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for axes, column in zip(panels, shown, strict=False):
        # Where all values are equal, numpy counts from half below to half above.
        spread = 0.0 if column.maximum > column.minimum else 0.5
        edges = np.linspace(column.minimum - spread, column.maximum + spread, BINS + 1)
        axes.stairs(column.histogram, edges, fill=True, color="#3f8fd2")
        axes.axvline(column.mean, color="#e0803a", linewidth=1.2, label=f"mean {column.mean:.4g}")
        missing = f", {column.missing} without" if column.missing else ""
        axes.set(title=column.name, ylabel="rows", xlabel=f"{column.count} rows{missing}")
        axes.legend(frameon=False, fontsize=8)
    for axes in panels[len(shown) :]:
        axes.remove()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return buffer.getvalue()
