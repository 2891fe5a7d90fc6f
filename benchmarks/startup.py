"""Seconds until something happens: `python -m benchmarks.startup`.

- `--help`, the answer of `diffalign --help`
- `mistake`, the answer to a key of a configuration that does not exist
- `report`, the report of a run without pictures
- `train, first time` and `train, again`: `diffalign train` on the embedded model until its first optimizer step is
  done, with eight pairs to encode, and with their latents and embeddings found where the first run left them

Medians over the rounds, each command in a process of its own. For `train` the same time in its parts: until the
libraries are there; until model and data are; until the loop begins its first step; that step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import run
from typing import Any

import yaml

from benchmarks.records import publish

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("libraries", "model and data", "loop", "first step")
MISTAKE = 2
"""What `diffalign` returns where the user can mend it."""

Command = Callable[[Sequence[str]], int]


def own_process(arguments: Sequence[str]) -> int:
    """Runs `diffalign` in a new process."""
    command = [sys.executable, "-m", "diffalign", *arguments]
    return run(command, cwd=ROOT, capture_output=True, check=False).returncode


def this_process(arguments: Sequence[str]) -> int:
    """Runs `diffalign` here, where the libraries may be there already."""
    from diffalign.cli import cli

    status = cli.main(args=list(arguments), prog_name="diffalign", standalone_mode=False)
    return status if isinstance(status, int) else 0


def seconds(command: Command, arguments: Sequence[str], expected: int = 0) -> float:
    """How long a command takes.

    Raises:
        RuntimeError: If it does not end as expected.
    """
    started = time.perf_counter()
    status = command(arguments)
    if status != expected:
        raise RuntimeError(f"diffalign {' '.join(arguments)} ended with status {status}, expected {expected}")
    return time.perf_counter() - started


def train(command: Command, folder: Path, name: str) -> dict[str, float]:
    """Seconds of each part of a training run until its first step is done.

    Args:
        command: Runs it.
        folder: With `pairs/`, and the encoded pairs of earlier runs.
        name: Of the run, new.
    """
    config, marks = folder / f"{name}.yaml", folder / f"{name}.json"
    settings = {
        "output_dir": str(folder / name),
        "model": {"pretrained_model_name_or_path": "diffalign://shapes", "lora": {"rank": 8}},
        "data": {"train_data_dir": str(folder / "pairs"), "encoded_dir": str(folder / "encoded")},
        "trainer": {"name": "benchmarks.first_step:FirstStep", "beta": 500.0, "marks": str(marks)},
        "training": {"max_train_steps": 1},
    }
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    before = time.time()
    seconds(command, ["train", str(config)])
    reached = json.loads(marks.read_text(encoding="utf-8"))
    times = [before, *(max(before, reached[part]) for part in PARTS)]  # in one process libraries are there before
    return {part: after - now for part, now, after in zip(PARTS, times, times[1:], strict=False)}


def measure(command: Command, rounds: int, folder: Path) -> dict[str, dict[str, float]]:
    """Name -> seconds: `whole`, and for training its parts."""
    from diffalign.shapes.scene_pairs import write_scene_pairs

    write_scene_pairs(folder / "pairs", 8)
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(rounds):
        first = folder / str(number)
        first.mkdir()
        (first / "pairs").symlink_to(folder / "pairs")
        once = {
            "train, first time": train(command, first, "first"),
            "train, again": train(command, first, "again"),
        }
        wrong = ["train", str(first / "first.yaml"), "training.learning_rat=1"]
        quick = {
            "--help": seconds(command, ["--help"]),
            "mistake": seconds(command, wrong, MISTAKE),
            "report": seconds(command, ["report", str(first / "first"), "--output", str(first / "report.html")]),
        }
        for name, whole in quick.items():
            found.setdefault(name, []).append({"whole": whole})
        for name, parts in once.items():
            found.setdefault(name, []).append({"whole": sum(parts.values()), **parts})
    return {
        name: {part: statistics.median(one[part] for one in rows) for part in rows[0]} for name, rows in found.items()
    }


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    lines = [f"| command | seconds | {' | '.join(PARTS)} |", f"| --- |{' ---: |' * (len(PARTS) + 1)}"]
    for name, times in record["commands"].items():
        parts = " | ".join(f"{times[part]:.2f}" if part in times else "" for part in PARTS)
        lines.append(f"| {name} | {times['whole']:.2f} | {parts} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round in this process: tries the script, no more")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "startup_cpu.json")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        command, rounds = (this_process, 1) if options.quick else (own_process, options.rounds)
        found = measure(command, rounds, Path(folder))
    from benchmarks.machine import machine

    record = {"machine": machine(), "settings": {"rounds": rounds}, "commands": found}
    publish(record, table(record), options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
