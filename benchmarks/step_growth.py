"""How the cost of a training step of the embedded model grows on a CPU: `python -m benchmarks.step_growth`.

Pairs per second and seconds of a step with batches of 1 to 64 pairs, with latents of 8x8, 16x16 and 32x32 (the UNet is
convolutional and the latents are random), and with one and two processes that share the machine. A batch is what each
process sees. Points are measured in turn, round after round; said are medians over the rounds.

    python -m benchmarks.step_growth             some minutes on two cores
    python -m benchmarks.step_growth --quick     two points and one process, to try the script
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import diffalign as da
from benchmarks.embedded import SHAPES
from benchmarks.machine import hide_accelerators, machine
from benchmarks.records import RESULTS, publish
from benchmarks.steps import measure
from diffalign.resumable import read_object, write_atomically

BATCHES = (1, 2, 4, 8, 16, 32, 64)
SIDES = (8, 16, 32)
"""Of latents."""
USUAL_BATCH, USUAL_SIDE = 4, 8
"""While the other one varies."""


def points(batches: tuple[int, ...], sides: tuple[int, ...]) -> list[tuple[int, int]]:
    """Pairs of a batch and side of the latents of every point: one varies, then the other."""
    return list(dict.fromkeys([*((b, USUAL_SIDE) for b in batches), *((USUAL_BATCH, side) for side in sides)]))


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures all points with the processes that were started; every process calls it."""
    policy: Any = da.load_policy(SHAPES, lora=da.LoRA(rank=8), train=True)
    embedded = dict(policy.encode_prompts(["a red circle"]).tensors)
    policy.free_encoders()
    found: dict[tuple[int, int], list[float]] = {}
    for _ in range(options.rounds):
        for batch, side in points(options.batches, options.sides):
            policy.latent_shape = (policy.latent_shape[0], side, side)
            row = measure(
                policy, embedded, batch_size=batch, mixed_precision="no", steps=options.steps, warmup=options.warmup
            )
            policy.wrapped = policy.denoiser  # the next loop puts its own wrapper around it
            found.setdefault((batch, side), []).append(row["pairs_per_second"])
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return [
        {
            "processes": processes,
            "threads": torch.get_num_threads(),
            "batch_size": batch,
            "latents": side,
            "pairs_per_second": statistics.median(rates),
            "seconds_per_step": batch * processes / statistics.median(rates),
        }
        for (batch, side), rates in found.items()
    ]


def launch(processes: int, arguments: list[str]) -> list[dict[str, Any]]:
    """What `run` finds with several processes on this machine.

    Raises:
        RuntimeError: If they failed; their messages went to this process's.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [*launcher, "-m", "benchmarks.step_growth", *arguments, "--worker", str(path)]
        threads = max(1, (os.cpu_count() or 1) // processes)
        root = Path(__file__).resolve().parents[1]
        done = subprocess.run(command, cwd=root, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, check=False)
        if done.returncode:
            raise RuntimeError(f"{processes} processes ended with {done.returncode}; see their messages above")
        rows: list[dict[str, Any]] = read_object(path)["rows"]
    return rows


def table(record: Mapping[str, Any]) -> str:
    """The record as Markdown."""
    lines = ["| processes | threads of each | pairs of each | latents | pairs/s | s/step |"]
    lines.append(f"|{' ---: |' * 6}")
    for row in record["rows"]:
        side = row["latents"]
        cells = [row["processes"], row["threads"], row["batch_size"], f"{side}x{side}"]
        numbers = [f"{row['pairs_per_second']:.1f}", f"{row['seconds_per_step']:.4f}"]
        lines.append(f"| {' | '.join([*map(str, cells), *numbers])} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_growth", description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=5, help="of a round")
    parser.add_argument("--warmup", type=int, default=2, help="first steps that do not count")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="how many, one after the other")
    parser.add_argument("--quick", action="store_true", help="two points, one step, one process")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # a started process; where the first one writes
    parser.add_argument("--output", type=Path, default=RESULTS / "step_growth_cpu.json")
    options = parser.parse_args(arguments)
    options.batches, options.sides = BATCHES, SIDES
    if options.quick:
        options.steps, options.warmup, options.rounds, options.batches, options.sides = 1, 1, 1, (1, 2), ()
        options.processes = [1]
    if options.worker:
        rows = run(options)
        if int(os.environ["RANK"]) == 0:
            write_atomically(options.worker, json.dumps({"rows": rows}).encode())
        torch.distributed.destroy_process_group()
        return 0
    settings = {name: getattr(options, name) for name in ("steps", "warmup", "rounds")}
    passed = ["--quick"] if options.quick else [f"--{name}={value}" for name, value in settings.items()]
    rows = [row for count in options.processes for row in (run(options) if count == 1 else launch(count, passed))]
    record = {"machine": machine(), "settings": settings, "rows": rows}
    publish(record, table(record), options.output)
    return 0


if __name__ == "__main__":
    hide_accelerators()
    sys.exit(main())
