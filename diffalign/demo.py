"""`diffalign demo`: no program of its own, but the public commands, printed and run one after the other."""

from __future__ import annotations

import json
import logging
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import click

from diffalign import commands, light_commands
from diffalign.checkpoints import write_text
from diffalign.config import ConfigError

CONFIG = "configs/demo.yaml"
QUICK = (
    "pairs.num_prompts=6",
    "pairs.num_images_per_prompt=2",
    "sampling.num_inference_steps=2",
    "training.max_train_steps=2",
    "training.per_device_train_batch_size=4",
    "training.num_validation_pairs=2",
    "training.validation_steps=2",
    "evaluation.num_prompts=6",
)
"""Overrides of `--quick`: every stage runs, nothing is learnt."""


def run(output: str, seeds: list[int], quick: bool = False) -> None:
    """Runs the demo for each seed, and pools the evaluations of several.

    Args:
        output: Folder of the run; with several seeds, of their runs.
        seeds: Seeds of pairs, training and evaluation pictures.
        quick: A few pictures and steps only.

    Raises:
        ConfigError: If a launcher started several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("the demo runs in one process; its commands, which it prints, may each be started in several")
    started = time.monotonic()
    for seed in seeds:
        folder = output if len(seeds) == 1 else f"{output}/seed{seed}"
        _one(folder, seed, quick)
    if len(seeds) > 1:
        _pool(output, seeds)
    click.echo(f"finished in {(time.monotonic() - started) / 60:.1f} minutes")
    click.echo(f"report: {Path(output) / 'report.html'}" if len(seeds) == 1 else f"results: {output}/results.json")


def _one(folder: str, seed: int, quick: bool) -> None:
    overrides = [f"output_dir={folder}", f"seed={seed}", *(QUICK if quick else ())]
    stages: list[tuple[str, Callable[[], str]]] = [
        (_line("pairs", CONFIG, *overrides), lambda: commands.pairs(CONFIG, overrides)),
        (_line("train", CONFIG, *overrides), lambda: commands.train(CONFIG, overrides)),
        (_line("evaluate", CONFIG, *overrides), lambda: commands.evaluate(CONFIG, overrides)),
        (_line("report", folder), lambda: light_commands.report(folder, None)),
    ]
    shown = ""
    for number, (line, body) in enumerate(stages, 1):
        click.secho(f"\n[{number}/{len(stages)}] {line}", bold=True)
        if number == len(stages):
            _note_commands(Path(folder), [text for text, _ in stages])
        result = body()
        if number == 3:
            shown = result
        else:
            click.echo(result)
    click.echo(f"\n{shown}")


def _line(command: str, *arguments: str) -> str:
    return shlex.join(["diffalign", command, *arguments])


def _note_commands(folder: Path, lines: list[str]) -> None:
    """Adds the command lines to the run's facts, for the report."""
    path = folder / "run.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    write_text(path, json.dumps({**facts, "commands": lines}, indent=2))


def _pool(output: str, seeds: list[int]) -> None:
    from diffalign.eval import pool, write_json
    from diffalign.eval.compare import read_run
    from diffalign.eval.tables import render_pool

    logging.getLogger("diffalign").info("pooling %d seeds", len(seeds))
    pooled = pool({f"seed {s}": read_run(Path(output) / f"seed{s}" / "evaluation") for s in seeds})
    write_json(Path(output) / "results.json", pooled.to_dict("cpu"))
    click.echo(f"\n{render_pool(pooled)}")
