"""The report of one or several runs: one HTML file that needs no network and no other file, or tables as text.

`write_report` reads what runs have left in their folders and shows what is there; a part that is missing is named as
missing. Pictures are embedded, curves are inline SVG, all text of the runs is escaped, and the page's policy lets no
script run but its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from diffalign.eval.base import Report, write_text
from diffalign.eval.report_charts import draw_charts, evenly
from diffalign.eval.report_gallery import MAX_IMAGES, VIDEO_SUFFIXES, build_gallery, embed, player
from diffalign.eval.report_runs import Pairing, RunFolder, distinct_sides, read_runs
from diffalign.eval.report_summary import latex, markdown, summarise, texts
from diffalign.eval.tables import published_rows, scorer_rows, task_rows, verdict

PAGE = Path(__file__).parent / "report_page"
SCRIPTS = ("page.js", "cards.js", "votes.js", "gallery.js", "detail.js")
"""Together the page's only script, in this order."""
SUFFIXES: Mapping[str, str] = {"html": ".html", "markdown": ".md", "latex": ".tex"}
"""What can be written, and how its files end."""
VOTES = "votes.jsonl"
MAX_NAMED = 3
"""Runs that the title names; of more it tells the number."""
MAX_VALIDATION_STEPS = 8
VALIDATION_SIDE = 2048


def write_report(
    runs: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    format: str = "html",
    scorer: str | None = None,
    force: bool = False,
    thumbnail: int | None = None,
    max_images: int = MAX_IMAGES,
) -> Path:
    """Writes the report of one run, or of several beside each other.

    Args:
        runs: Folders of the runs. All of a run is optional: `config.yaml`, `metrics.jsonl`, `run.json` (facts about how
            it was made), `evaluation/` with `base.jsonl`, `aligned.jsonl` and `comparison.json`, results files with
            their rows, and `validation/step-<number>.png`, the validation prompts' pictures side by side.
        out: File to write; None writes `report.html` (or `.md`, `.tex`) in the run's folder, and for several runs in
            the folder that holds them all.
        format: The page, or its tables alone as Markdown or LaTeX.
        scorer: The scorer that verdicts speak of and the gallery starts with; None takes the first.
        force: Let numbers that were made under different protocols share a column.
        thumbnail: Larger side of embedded pictures, in pixels; None chooses by their number.
        max_images: Of more pictures, an evenly spread part is shown.

    Returns:
        The file written.

    Raises:
        ValueError: If a folder does not exist, a file in it is damaged, no run has such a scorer, or numbers of
            different protocols would share a column.
    """
    if format not in SUFFIXES:
        raise ValueError(f"unknown format {format!r} (available: {', '.join(SUFFIXES)})")
    paths = [Path(run) for run in ([runs] if isinstance(runs, str | Path) else runs)]
    target = home(paths) / f"report{SUFFIXES[format]}" if out is None else Path(out)
    write_text(target, render_report(paths, format, scorer, force, thumbnail, max_images))
    return target


def render_report(
    paths: Sequence[Path],
    format: str = "html",
    scorer: str | None = None,
    force: bool = False,
    thumbnail: int | None = None,
    max_images: int = MAX_IMAGES,
) -> str:
    """What `write_report` writes."""
    if format not in SUFFIXES:
        raise ValueError(f"unknown format {format!r} (available: {', '.join(SUFFIXES)})")
    found = read_runs(paths)
    comparisons = [(run, pairing) for run in found for _, pairing in run.pairings]
    scorers = list(dict.fromkeys(scorer for _, pairing in comparisons for scorer in pairing.comparison.scorers))
    if scorer is not None and scorer not in scorers:
        raise ValueError(f"no scorer {scorer!r} in these runs; they were scored by {', '.join(scorers) or 'none'}")
    summary = summarise(found, force=force)
    if format != "html":
        return (markdown if format == "markdown" else latex)(summary)
    sides = distinct_sides(found)
    gallery = build_gallery(sides, home(paths), thumbnail=thumbnail, max_images=max_images)
    gallery |= {"folder": _shown(home(paths)), "votes": VOTES, "scorer": scorer}
    charts = draw_charts({run.name: run.records for run in found if run.records})
    script = _script()
    page = _environment().get_template("page.html.j2")
    return page.render(
        title=" · ".join(run.name for run in found) if len(found) <= MAX_NAMED else f"{len(found)} runs",
        runs=found,
        summary=summary,
        sides=[side.label for side in sides],
        verdicts=[(_between(run, pairing), _verdict(pairing, scorer)) for run, pairing in comparisons],
        comparisons=[(_between(run, pairing), pairing.comparison) for run, pairing in comparisons],
        warnings=[(run.name, text) for run in found for text in _warnings(run)],
        charts=charts,
        curves_of=sum(bool(run.records) for run in found),
        gallery=gallery,
        data={"gallery": _json(gallery), "charts": _json([chart.data for chart in charts])},
        validation={run.name: _validation(run) for run in found},
        published=_published(found),
        css=Markup((PAGE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
    )


def _between(run: RunFolder, pairing: Pairing) -> str:
    """What a comparison compares; where the report names its models like the comparison does, just the run."""
    base, aligned = run.sides[pairing.base].label, run.sides[pairing.aligned].label
    about = run.name if base.endswith("base") else f"{aligned} against {base}"
    name = pairing.comparison.benchmark
    return about if name == "comparison" else f"{name}: {about}"


def _verdict(pairing: Pairing, scorer: str | None) -> str:
    return verdict(pairing.comparison, scorer if scorer in pairing.comparison.scorers else None)


def home(paths: Sequence[Path]) -> Path:
    """The folder of a run, or the one that holds several: where a report lies, and what its votes' files begin at."""
    if len(paths) == 1:
        return paths[0]
    common = Path(os.path.commonpath([path.resolve() for path in paths]))
    here = Path.cwd()
    return common.relative_to(here) if common.is_relative_to(here) else common


def _shown(folder: Path) -> str:
    """A folder as the page names it: an absolute path says nothing to those the page is sent to."""
    return folder.resolve().name if folder.is_absolute() or str(folder) == "." else folder.as_posix()


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"texts": texts}
    environment.globals |= {"scorer_rows": scorer_rows, "task_rows": task_rows}
    return environment


def _script() -> str:
    """All scripts as one, whose names are seen by nobody else."""
    body = "\n".join((PAGE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return f'"use strict";\n(() => {{\n{body}}})();\n'


def _json(value: object) -> Markup:
    """JSON that may stand inside a script element: no text in it can end the element or begin a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


def _warnings(run: RunFolder) -> list[str]:
    """Warnings of training, equal ones once with their number and first step, then those of the evaluation."""
    steps: dict[str, list[Any]] = {}
    for record in run.records:
        if record.get("event") == "warning":
            steps.setdefault(str(record.get("message", "(no message)")), []).append(record.get("step", "?"))
    found = [
        f"step {at[0]}: {message}" + (f" ({len(at)} times, last at step {at[-1]})" if len(at) > 1 else "")
        for message, at in steps.items()
    ]
    reports = [report for side in run.sides.values() for report in side.reports.values()]
    reports += [pairing.comparison for _, pairing in run.pairings]
    return list(dict.fromkeys([*found, *(text for report in reports for text in report.warnings)]))


def _published(runs: Sequence[RunFolder]) -> dict[str, list[dict[str, str]]]:
    """Benchmark -> these models among those that others published numbers of."""
    reports: dict[str, dict[str, Report]] = {}
    for side in distinct_sides(runs):
        for benchmark, report in side.reports.items():
            reports.setdefault(benchmark, {})[side.label] = report
    tables = {benchmark: published_rows(named) for benchmark, named in reports.items()}
    return {benchmark: rows for benchmark, rows in tables.items() if rows}


def _validation(run: RunFolder) -> list[dict[str, Any]]:
    """The pictures or clips of each validation step, at most eight steps, with the prompts of the configuration."""
    files = {}
    for path in sorted((run.folder / "validation").glob("*.*")):
        match = re.search(r"(\d+)$", path.stem)
        if match and path.suffix.lower() in {".png", *VIDEO_SUFFIXES}:
            files[int(match[1])] = path
    try:
        prompts = yaml.safe_load(run.config or "")["training"]["validation_prompts"]
    except (yaml.YAMLError, KeyError, TypeError):
        prompts = None
    alt = "; ".join(map(str, prompts)) if isinstance(prompts, list) else "validation pictures"
    steps = [sorted(files)[i] for i in evenly(len(files), MAX_VALIDATION_STEPS)]
    shown = []
    for step in steps:
        picture = embed(files[step], VALIDATION_SIDE)
        clip = player(files[step]) if files[step].suffix.lower() in VIDEO_SUFFIXES else None
        shown.append({"step": step, "picture": picture, "clip": clip, "alt": f"step {step}: {alt}"})
    return shown
