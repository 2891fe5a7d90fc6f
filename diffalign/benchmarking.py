"""The body of `diffalign evaluate MODEL --benchmark ...`: plan, draw, score, aggregate, compare, tables.

The output folder holds `pictures/` (see `picture_cache`), `models.json` (which pictures are whose), and for every
benchmark a folder with one folder for each model (see `eval/runner.py`).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from diffalign.benchmark_models import PICTURES, Asked, Side, check_model, draw_side, free_memory, recall_side
from diffalign.benchmark_options import Opened, open_benchmarks
from diffalign.config import ConfigError
from diffalign.devices import pick_device
from diffalign.generation import SamplingConfig
from diffalign.processes import Processes, launched
from diffalign.prompts import read_prompts
from diffalign.resumable import claim_folder, read_object

if TYPE_CHECKING:
    from diffalign.eval.runner import BenchmarkRun

logger = logging.getLogger("diffalign")

Stage = Literal["generate", "score", "aggregate"]
IMPORTED = "imported"
"""Folder among the pictures for those that were cut out of files made elsewhere."""


def evaluate_benchmarks(
    model: str,
    benchmarks: Sequence[str],
    *,
    output: str | None = None,
    adapter: str | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    guidance_scale: float | None = None,
    num_inference_steps: int | None = None,
    batch_size: int | None = None,
    torch_compile: bool = False,
    deep_cache: int | None = None,
    **options: Any,
) -> str:
    """Body of `diffalign evaluate MODEL --benchmark ...`; `options` are those of `evaluate_model`."""
    if output is None:
        raise ValueError("--output is missing; name the folder for pictures, rows and reports")
    if (height is None) != (width is None):
        raise ValueError("--height and --width go together; give both or neither")
    size = (height, width) if height is not None and width is not None else None
    sampling = SamplingConfig(
        guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps,
        batch_size=batch_size,
        torch_compile=torch_compile,
        deep_cache=deep_cache,
    )
    return evaluate_model(Asked(model, adapter, sampling, size, num_frames), benchmarks, output, **options)


def evaluate_images(
    folder: str,
    against: str,
    metrics: Sequence[str],
    *,
    output: str | None = None,
    limit: int | None = None,
    blocks: int = 20,
    fid_weights: str | None = None,
    cmmd_weights: str | None = None,
) -> str:
    """Body of `diffalign evaluate-images`."""
    from diffalign.eval import write_json
    from diffalign.eval.image_quality import compare_folders, render

    given = {"fid": fid_weights, "cmmd": cmmd_weights}
    weights = {name: path for name, path in given.items() if path is not None}
    device = pick_device()
    report = compare_folders(folder, against, metrics, weights=weights, limit=limit, blocks=blocks, device=device)
    if output is None:
        return render(report)
    write_json(output, report.to_dict(torch.device(device).type))
    return f"{render(report)}\nreport: {output}"


def evaluate_model(
    asked: Asked,
    names: Sequence[str],
    output: str | Path,
    *,
    against: str | None = None,
    held_out: Sequence[str] = (),
    limit: int | None = None,
    samples: int | None = None,
    stage: Stage | None = None,
    options: Sequence[str] = (),
    imported: str | Path | None = None,
    exported: str | Path | None = None,
    training_prompts: str | None = None,
) -> str:
    """Evaluates a model on benchmarks; what an earlier call with the same output folder did is not done again.

    Args:
        asked: The model and how it draws.
        names: Of the benchmarks.
        output: Folder for everything; one folder may serve many models.
        against: Another model to compare with, drawn in the same way.
        held_out: Reward models that training has not seen, to be marked as such in the comparison, and the others as
            used.
        limit: Take only so many prompts of each benchmark.
        samples: Pictures per prompt.
        stage: Do only that step; None does all.
        options: Arguments of benchmarks, as "geneval.mode=strict".
        imported: Folder with pictures made elsewhere, in the layout of the benchmark's original tool; nothing is drawn.
        exported: Folder to which pictures are written, too, in the layout of the benchmark's original tool: a folder
            for each benchmark and model, named as in `output`.
        training_prompts: Prompts that the model was trained on, as `read_prompts` reads them: a warning says how many
            of a benchmark's are among them.

    Returns:
        What the terminal shows last.

    Raises:
        ValueError: If something does not fit; as far as it can be known, before any weights load.
    """
    if imported is not None and (against is not None or stage == "generate"):
        raise ConfigError("--import judges pictures that are there; leave out --against and --stage generate")
    known = frozenset(row.prompt for row in read_prompts(training_prompts)) if training_prompts else frozenset()
    opened = open_benchmarks(names, options, limit=limit, samples=samples)
    for one in opened if stage in (None, "score") else ():
        one.benchmark.check()
    _check_held_out(held_out, against, opened)
    if exported is not None:
        _check_export(opened)
    models = [asked] if against is None else [asked.with_model(against), asked]
    draws = imported is None and stage in (None, "generate")
    benchmarks = [one.benchmark for one in opened]
    sources = [check_model(model, benchmarks) for model in models] if draws else []
    output, processes = Path(output), launched()
    for one in opened:
        processes.on_first(partial(claim_folder, output / one.folder, one.settings(), ()))
    sides: list[Side] = []
    if draws:
        for model, source in zip(models, sources, strict=True):
            sides.append(draw_side(output, model, source, benchmarks, sides, processes))
    elif imported is None:
        sides = [recall_side(output, model, benchmarks) for model in models]
    texts = []
    compared: dict[str, Path] = {}
    while opened:
        one = opened.pop(0)
        runs = [_run(output, one, side) for side in sides]
        if imported is not None:
            runs = [_imported_run(output, one, asked, Path(imported), processes)]
        text, folder = _judge(runs, stage, known, held_out or None, processes)
        texts.append(text)
        if exported is not None:
            for run in runs:
                place = Path(exported) / one.folder / run.folder.name
                texts.append(f"exported {processes.on_first(partial(run.export, place))} files to {place}")
        if folder is not None and one.benchmark.scorers:
            compared[one.folder if one.benchmark.name in compared else one.benchmark.name] = folder
        del one, runs, benchmarks[0]
        free_memory()  # a benchmark's judge goes before the next one's comes
    if len(compared) > 1:
        texts.append(processes.on_first(partial(_over_sets, compared)))
    return "\n\n".join(texts)


def _check_held_out(held_out: Sequence[str], against: str | None, opened: Sequence[Opened]) -> None:
    """Refuses a mark that would be nowhere, before anything is drawn."""
    if held_out and against is None:
        raise ConfigError("--held-out marks reward models in a comparison; name the other model with --against")
    known = sorted({name for one in opened for name in one.benchmark.scorers})
    for name in held_out:
        if name not in known:
            raise ConfigError(f"--held-out: no benchmark here is scored by {name!r} (available: {', '.join(known)})")


def _check_export(opened: Sequence[Opened]) -> None:
    """Refuses benchmarks without a layout of their own, before anything is drawn."""
    from diffalign.eval.base import Benchmark

    for one in opened:
        if type(one.benchmark).export_media is Benchmark.export_media:
            raise ConfigError(f"--export: benchmark {one.benchmark.name!r} has no layout of an original tool")


def _over_sets(folders: Mapping[str, Path]) -> str:
    """The win rates of several benchmarks side by side."""
    from diffalign.eval.compare import Comparison, read_run
    from diffalign.eval.win_rates import over_sets, render_sets

    runs = {name: read_run(folder) for name, folder in folders.items()}
    found = {name: Comparison.from_dict(read_object(folder / "comparison.json")) for name, folder in folders.items()}
    return render_sets(over_sets(runs, found))


def _run(output: Path, one: Opened, side: Side) -> BenchmarkRun:
    """One benchmark on one model's drawn pictures."""
    from diffalign.eval.runner import BenchmarkRun

    files = {case.id: side.cache.file(case.prompt, case.seed) for case in one.benchmark.cases()}
    return BenchmarkRun(one.benchmark, output / one.folder / side.name, files, side.model, side.sampling)


def _imported_run(output: Path, one: Opened, asked: Asked, folder: Path, processes: Processes) -> BenchmarkRun:
    """One benchmark on pictures made elsewhere."""
    from diffalign.eval.runner import BenchmarkRun

    if not folder.is_dir():
        raise ConfigError(f"--import: there is no folder {str(folder)!r}")
    found = processes.on_first(partial(one.benchmark.import_media, folder, output / PICTURES / IMPORTED))
    cases = one.benchmark.cases()
    files = {case.id: found[case.id] for case in cases if case.id in found and found[case.id].is_file()}
    if not files:
        raise ConfigError(
            f"{folder} holds none of the {len(cases)} pictures of benchmark {one.benchmark.name!r}; expected the "
            f"layout of its original tool, or files named like {cases[0].id.replace('/', '-')}.png"
        )
    digest = hashlib.sha256()
    for key, file in files.items():
        digest.update(f"{key} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    said = asked.sampling.model_dump(exclude={"batch_size"}, exclude_defaults=True)
    said |= {"size": list(asked.size)} if asked.size else {}
    name = f"{asked.name}-imported-{digest.hexdigest()[:10]}"
    model = {"path": asked.model, "adapter": asked.adapter, "pictures": f"imported, sha256 {digest.hexdigest()[:16]}"}
    return BenchmarkRun(one.benchmark, output / one.folder / name, files, model, {**said, "pictures": "imported"})


def _judge(
    runs: Sequence[BenchmarkRun],
    stage: Stage | None,
    known_prompts: frozenset[str],
    held_out: Sequence[str] | None,
    processes: Processes,
) -> tuple[str, Path | None]:
    """Scores and aggregates one benchmark on each side: the text for the terminal, and the comparison's folder."""
    from diffalign.eval.runner import compare_runs
    from diffalign.eval.tables import render_reports, render_table

    lines = []
    for run in runs:
        processes.on_first(run.write_manifest)
        there = sum(file.is_file() for file in run.files.values())
        lines.append(f"{run.benchmark.name}, {run.folder.name}: {there} of {len(run.cases)} cases have a picture")
        if stage == "generate":
            lines.append(f"manifest: {run.folder / 'manifest.jsonl'}")
        elif stage != "aggregate":
            progress = run.score(processes)
            if progress.failed and processes.is_first:
                logger.warning("%s, %s: %s", run.benchmark.name, run.folder.name, progress)
            lines.append(f"rows: {run.folder / 'rows.jsonl'}: {progress}")
    if stage in ("generate", "score"):
        return "\n".join(lines), None
    folder = None
    if len(runs) == 2:
        folder = runs[0].folder.with_name(f"{runs[1].folder.name}-against-{runs[0].folder.name}")

    def conclude() -> str:
        device = torch.device(pick_device()).type
        reports = {run.folder.name: run.aggregate(device) for run in runs}
        blocks = [render_reports(reports)]
        if folder is not None:
            blocks += [render_table(compare_runs(runs[0], runs[1], folder, device, held_out))]
            blocks += [f"comparison: {folder / 'comparison.json'}"]
        cases = runs[0].cases
        seen = {case.prompt for case in cases} & known_prompts
        if seen:
            count = len({case.prompt for case in cases})
            blocks.append(
                f"warning: {len(seen)} of {count} prompts are among the training prompts; such scores say little"
            )
        blocks += [f"report: {run.report_file}" for run in runs]
        return "\n\n".join(blocks)

    return processes.on_first(conclude), folder
