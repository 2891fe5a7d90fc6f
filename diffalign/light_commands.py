"""The bodies of the commands that load no diffusion model: `score`, `report` and others.

Apart from `diffalign.commands`, so that they do not wait for the libraries that draw and train.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.processes import launched
from diffalign.resumable import write_atomically


def score(
    source: str,
    rewards: Sequence[str],
    output: str | None,
    *,
    batch_size: int = 32,
    workers: int = 0,
    dtype: str = "float32",
    image_column: str | None = None,
    prompt_column: str | None = None,
    histograms: bool = True,
    options: Sequence[str] = (),
) -> str:
    """Body of `diffalign score`."""
    from diffalign.reward_models.inputs import HISTOGRAMS, open_input
    from diffalign.reward_models.score_files import check_suffix
    from diffalign.reward_models.scoring import check_models, score_index
    from diffalign.reward_models.scoring_report import draw_histograms
    from diffalign.reward_names import check_rewards, load_rewards

    place = Path(source).expanduser()
    out = (
        Path(output) if output else place.with_name(f"{place.name}.scores.jsonl" if place.is_dir() else "scores.jsonl")
    )
    check_suffix(out)
    infos = check_rewards(rewards, options)
    rows = open_input(place, image_column=image_column, prompt_column=prompt_column)
    rows.check_output(out)
    check_models(rows, infos)
    processes = launched()
    models = load_rewards(rewards, dtype, options)
    threads = workers or min(os.cpu_count() or 1, 16)
    for model in models:
        model.workers = threads
    summary = score_index(rows, models, out, batch_size, processes=processes, workers=threads)
    lines = [str(summary), f"scores: {out}"]
    picture = draw_histograms(summary.columns) if histograms and processes.is_first else None
    if picture is not None:
        drawn = out.with_name(out.stem + HISTOGRAMS)
        write_atomically(drawn, picture)
        lines.append(f"histograms: {drawn}")
    return "\n".join(lines)


def evaluate_reward(
    rewards: Sequence[str],
    benchmark: str,
    output: str,
    *,
    data: str | None = None,
    media_dir: str | None = None,
    calibration: str | None = None,
    calibration_media: str | None = None,
    batch_size: int = 32,
    workers: int = 0,
    dtype: str = "float32",
    options: Sequence[str] = (),
) -> str:
    """Body of `diffalign evaluate-reward`."""
    from diffalign.eval.judged_media import JudgedFile
    from diffalign.eval.reward_accuracy_table import render
    from diffalign.eval.reward_runs import evaluate_rewards, find_file
    from diffalign.reward_names import check_rewards, load_rewards

    check_rewards(rewards, options)
    name, file = find_file(benchmark, data)
    other = None if calibration is None else JudgedFile(calibration)
    processes = launched()
    report = evaluate_rewards(
        load_rewards(rewards, dtype, options),
        file,
        output,
        benchmark=name,
        media_folder=media_dir,
        calibration=other,
        calibration_media=calibration_media,
        batch_size=batch_size,
        workers=workers or min(os.cpu_count() or 1, 16),
        processes=processes,
    )
    return f"{render(report)}\nresults: {Path(output) / 'report.json'}"


def rewards(as_json: bool = False) -> str:
    """Body of `diffalign rewards`."""
    from diffalign.reward_models.catalogue import catalogue, render_catalogue, render_json

    return render_json(catalogue()) if as_json else render_catalogue(catalogue())


def serve_reward(
    rewards: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token_env: str | None = None,
    max_body: int = 64_000_000,
    max_pixels: int = 50_000_000,
    batch_size: int = 32,
    dtype: str = "float32",
    options: Sequence[str] = (),
) -> None:
    """Body of `diffalign serve-reward`; returns when it is interrupted."""
    from diffalign.reward_models.server import build_app, check_access, run_server
    from diffalign.reward_models.wire import Limits
    from diffalign.reward_names import check_rewards, load_rewards

    token = os.environ.get(token_env) if token_env else None
    if token_env and not token:
        raise ValueError(f"the environment variable {token_env!r} is not set; put the token into it")
    check_access(host, token)
    check_rewards(rewards, options)
    models = load_rewards(rewards, dtype, options)
    app = build_app(models, token=token, limits=Limits(max_body, max_pixels), batch_size=batch_size)
    run_server(app, host, port)


def report(runs: str | Sequence[str], output: str | None = None, format: str = "html", **options: Any) -> str:
    """Body of `diffalign report`: where the page is, or the tables themselves where they are written to no file.

    Args:
        runs: Folder of a run, or several of them.
        output: File to write; None is `report.html` in the run's folder, and the terminal for Markdown and LaTeX.
        format: "html", "markdown" or "latex".
        options: Those of `write_report`.
    """
    from diffalign.eval.report import render_report, write_report

    paths = [Path(run) for run in ([runs] if isinstance(runs, str) else runs)]
    if format != "html" and output is None:
        return render_report(paths, format, **options).rstrip("\n")
    return f"report: {write_report(paths, output, format=format, **options)}"


def doctor(output: str) -> str:
    """Body of `diffalign doctor`."""
    from diffalign.doctor import collect, render

    return render(collect(output))
