"""The HTML report of a run: one file that needs no network, no script and no other file.

`write_report` reads what a run has left in its folder and shows what is there; a part that is missing is named as
missing. Pictures are embedded, plots are SVG drawn without a display, and all text of the run is escaped.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from diffalign.eval.base import Row, read_jsonl, read_rows, unique_rows, write_text
from diffalign.eval.compare import SIDES, Comparison
from diffalign.eval.tables import number, percent, scorer_rows, task_rows, verdict

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
HIDDEN_METRICS = frozenset({"z_square", "model_mse", "ref_mse", "step", "epoch", "time"})
MAX_OTHER_CHARTS = 9
MAX_POINTS = 400
MAX_SIDE = 512
"""Larger pictures are embedded at this size, as JPEG."""
COLORS = ("#3f8fd2", "#e0803a", "#4fa564", "#b865a8")
_INK = "#010203"  # drawn as the page's own text colour, light or dark


@dataclass(frozen=True)
class Example:
    """Two pictures of one prompt and seed."""

    base: Row
    aligned: Row
    gain: float | None


def write_report(
    run_dir: str | Path, out_html: str | Path | None = None, *, scorer: str | None = None, examples: int = 6
) -> Path:
    """Writes the report of a run.

    Args:
        run_dir: Folder of the run. All of it is optional: `config.yaml`, `metrics.jsonl`, `run.json` (facts about how
            the run was made, such as "commands" and "kappa"), `evaluation/` with `base.jsonl`, `aligned.jsonl` and
            `comparison.json`, and `validation/step-<number>.png`, the validation prompts' pictures side by side.
        out_html: File to write; None writes `report.html` in the run's folder.
        scorer: The scorer whose largest gains and losses are shown; None takes the comparison's first.
        examples: Pictures of each kind (largest gains, random, largest losses).

    Returns:
        The file written.

    Raises:
        ValueError: If the folder does not exist, or a file in it is damaged.
    """
    run = Path(run_dir)
    if not run.is_dir():
        raise ValueError(f"run folder {str(run_dir)!r} does not exist")
    target = run / "report.html" if out_html is None else Path(out_html)
    evaluation = run / "evaluation"
    comparison, document = _comparison(evaluation / "comparison.json")
    scorer = scorer or (next(iter(comparison.scorers), None) if comparison else None)
    if scorer is not None and comparison is not None and scorer not in comparison.scorers:
        raise ValueError(f"no scorer {scorer!r} in this run; it was scored by {', '.join(comparison.scorers)}")
    records = read_jsonl(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
    config = (run / "config.yaml").read_text(encoding="utf-8") if (run / "config.yaml").is_file() else None
    page = _environment().get_template("report.html.j2")
    html = page.render(
        title=run.resolve().name,
        comparison=comparison,
        verdict=verdict(comparison, scorer) if comparison else None,
        scorers=scorer_rows(comparison) if comparison else [],
        tasks=task_rows(comparison) if comparison else [],
        scorer=scorer,
        examples=_examples(evaluation, scorer, examples),
        charts=_charts(records),
        validation=_validation(run / "validation", config),
        warnings=_warnings(records, comparison),
        events=[r for r in records if "event" in r and r["event"] != "warning"],
        config=config,
        facts=_facts(run / "run.json"),
        env=document.get("env", {}),
        created=document.get("created"),
    )
    write_text(target, html)
    return target


def _environment() -> Environment:
    templates = Path(__file__).parent / "templates"
    environment = Environment(
        loader=FileSystemLoader(templates),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent}
    environment.globals["css"] = Markup((templates / "report.css").read_text(encoding="utf-8"))
    return environment


def _load(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); make it again") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(document).__name__}")
    return document


def _comparison(path: Path) -> tuple[Comparison | None, dict[str, Any]]:
    if not path.is_file():
        return None, {}
    document = _load(path)
    try:
        return Comparison.from_dict(document), document
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a comparison ({error}); evaluate the run again") from error


def _facts(path: Path) -> dict[str, Any]:
    return _load(path) if path.is_file() else {}


def _warnings(records: Sequence[Mapping[str, Any]], comparison: Comparison | None) -> list[str]:
    """Warnings of training, equal ones once with their number and first step, then those of the evaluation."""
    steps: dict[str, list[Any]] = {}
    for record in records:
        if record.get("event") == "warning":
            steps.setdefault(str(record.get("message", "(no message)")), []).append(record.get("step", "?"))
    texts = [
        f"step {at[0]}: {message}" + (f" ({len(at)} times, last at step {at[-1]})" if len(at) > 1 else "")
        for message, at in steps.items()
    ]
    return texts + (list(comparison.warnings) if comparison else [])


# --- pictures ----------------------------------------------------------------------------------------------------


def _examples(evaluation: Path, scorer: str | None, amount: int) -> list[dict[str, Any]]:
    """Sections of example pairs: largest gains, random ones, largest losses; no pair twice."""
    files = [evaluation / f"{side}.jsonl" for side in SIDES]
    if not all(file.is_file() for file in files):
        return []
    base, aligned = (unique_rows(read_rows(file)) for file in files)
    pairs = [
        Example(row, aligned[key], _gain(row, aligned[key], scorer)) for key, row in base.items() if key in aligned
    ]
    ranked = sorted((p for p in pairs if p.gain is not None), key=lambda p: p.gain or 0.0, reverse=True)
    gains = [p for p in ranked if p.gain is not None and p.gain > 0][:amount]
    losses = [p for p in reversed(ranked) if p.gain is not None and p.gain < 0][:amount]
    rest = [p for p in pairs if not any(p is q for q in (*gains, *losses))]
    order = np.random.default_rng(0).permutation(len(rest))[:amount]
    sections = (
        ("Largest gains", gains, "No pair gained."),
        ("Random pairs", [rest[i] for i in order], "No further pair."),
        ("Largest losses", losses, "No pair lost."),
    )
    return [
        {"title": title, "empty": empty, "pairs": [_card(p, evaluation, scorer) for p in chosen]}
        for title, chosen, empty in sections
    ]


def _gain(base: Row, aligned: Row, scorer: str | None) -> float | None:
    """Score difference, or that of the verdicts where there is no scorer."""
    if scorer is not None:
        before, after = base.scores.get(scorer), aligned.scores.get(scorer)
        return None if before is None or after is None else after - before
    if base.correct is None or aligned.correct is None:
        return None
    return float(aligned.correct) - float(base.correct)


def _card(pair: Example, folder: Path, scorer: str | None) -> dict[str, Any]:
    sides = [
        {
            "side": side,
            "picture": _picture(folder, row.image),
            "score": row.scores.get(scorer) if scorer else None,
            "correct": row.correct,
            "reason": row.reason,
        }
        for side, row in zip(SIDES, (pair.base, pair.aligned), strict=True)
    ]
    return {"prompt": pair.base.prompt, "seed": pair.base.seed, "gain": pair.gain, "sides": sides}


def _picture(folder: Path, name: str | None, max_side: int = MAX_SIDE) -> dict[str, Any] | None:
    """A picture as a data URI, or None where it is missing, unreadable or outside the run's folder."""
    if name is None:
        return None
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve().parent) or not path.is_file():
        return None
    try:
        with Image.open(path) as opened:
            kind, size = opened.format, opened.size
            image = opened.convert("RGB")
    except (OSError, Image.DecompressionBombError):
        return None
    if max(size) <= max_side and kind in ("PNG", "JPEG", "WEBP"):
        content = path.read_bytes()
    else:
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        kind, content = "JPEG", buffer.getvalue()
    data = base64.b64encode(content).decode("ascii")
    return {"src": f"data:image/{kind.lower()};base64,{data}", "pixelated": min(size) <= 128}


def _validation(folder: Path, config: str | None) -> list[dict[str, Any]]:
    """The pictures of each validation step, at most eight steps, with the prompts as the configuration has them."""
    files = {}
    for path in sorted(folder.glob("*.png")):
        if match := re.search(r"(\d+)$", path.stem):
            files[int(match[1])] = path.name
    try:
        prompts = yaml.safe_load(config or "")["training"]["validation_prompts"]
    except (yaml.YAMLError, KeyError, TypeError):
        prompts = None
    alt = "; ".join(map(str, prompts)) if isinstance(prompts, list) else "validation pictures"
    steps = [sorted(files)[i] for i in _evenly(len(files), 8)]
    return [{"step": s, "picture": _picture(folder, files[s], 4 * MAX_SIDE), "alt": f"step {s}: {alt}"} for s in steps]


def _evenly(n: int, most: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, n - 1, min(n, most))}) if n else []


# --- curves ------------------------------------------------------------------------------------------------------


def _charts(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A chart for each group of `CHARTS` that was logged, then one for every other metric."""
    series = _series(records)
    charts, used = [], set()
    for title, note, names in CHARTS:
        keys = [k for name in names for k in series if k.rpartition("/")[2] == name]
        used.update(keys)
        if keys:
            charts.append((title, note, keys))
    others = [k for k in series if k not in used and k.rpartition("/")[2] not in HIDDEN_METRICS]
    charts += [(key, "", [key]) for key in others[:MAX_OTHER_CHARTS]]
    return [
        {"title": title, "note": note, "svg": _plot(f"plot{number}", title, {k: series[k] for k in keys})}
        for number, (title, note, keys) in enumerate(charts)
    ]


def _series(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Metric -> step -> value. After a resume a step may occur twice: the later record counts."""
    series: dict[str, dict[int, float]] = {}
    for record in records:
        step = record.get("step")
        if not isinstance(step, int) or "event" in record:
            continue
        for key, value in record.items():
            if (
                key != "step"
                and isinstance(value, int | float)
                and not isinstance(value, bool)
                and math.isfinite(value)
            ):
                series.setdefault(key, {})[step] = float(value)
    return series


def _plot(prefix: str, title: str, lines: Mapping[str, Mapping[int, float]]) -> Markup:
    """An inline SVG, described in words for those who cannot see it; its ids start with `prefix`."""
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "text.parse_math": False,
        "axes.formatter.limits": (-3, 4),
        "svg.hashsalt": prefix,
        "font.size": 9,
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "text.color": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    words = []
    with rc_context(style):
        figure = Figure(figsize=(5.2, 2.7))
        axes = figure.add_axes((0.12, 0.17, 0.86, 0.75))
        for index, (key, points) in enumerate(lines.items()):
            color = COLORS[index % len(COLORS)]
            steps = np.array(sorted(points))
            values = np.array([points[s] for s in steps])
            words.append(f"{key} from {values[0]:.4g} at step {steps[0]} to {values[-1]:.4g} at step {steps[-1]}")
            dots = dict(marker="o", markersize=3) if len(steps) < 30 else {}
            window = len(steps) // 25
            if window >= 3 and title != "Learning rate":
                _line(axes, steps, values, color=color, alpha=0.3, linewidth=0.7)
                values = _running_mean(values, window)
            dash = "--" if key.rpartition("/")[2].startswith("ref_") else "-"
            _line(axes, steps, values, color=color, linewidth=1.5, linestyle=dash, label=key, **dots)
        axes.set_xlabel("step")
        axes.grid(alpha=0.2, linewidth=0.5, color="#808080")
        axes.legend(fontsize=8, frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    label = f"{title} over steps: {'; '.join(words)}"
    return _inline(buffer.getvalue(), prefix, label)


def _line(axes: Any, steps: Any, values: Any, **style: Any) -> None:
    kept = _evenly(len(steps), MAX_POINTS)
    axes.plot(steps[kept], values[kept], **style)


def _running_mean(values: Any, window: int) -> Any:
    """Mean of the `window` values around each, fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    starts, ends = np.maximum(index - window // 2, 0), np.minimum(index + window // 2 + 1, len(values))
    return (sums[ends] - sums[starts]) / (ends - starts)


def _inline(svg: str, prefix: str, label: str) -> Markup:
    """A matplotlib SVG made fit for a page: no addresses, no page-wide style, ids of its own, the page's ink."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", body).replace(_INK, "currentColor")
    body = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{prefix}-", body)
    return Markup(f'<svg role="img" aria-label="{escape(label)}" {body.removeprefix("<svg ")}')
