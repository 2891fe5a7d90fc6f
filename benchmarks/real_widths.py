"""Training steps of SD1.5, SDXL, SD3.5-medium, Wan 2.1 and FLUX.1-dev at their published widths: `make bench-gpu`.

Weights are random, which changes no time. Every cell of the table is one model, LoRA or all weights, and one way to
make a step. "plain" encodes with the published encoders at every step (`benchmarks/plain_widths.py`); the others run
the real loop on random pairs in the place of a filled cache, without encoders in memory:

    python -m benchmarks.real_widths                              every cell that is not in the record yet
    python -m benchmarks.real_widths --minutes 9                  ... for so long; call it again to go on
    python -m benchmarks.real_widths --only 'sdxl-1024/*'         cells whose name fits a pattern
    python -m benchmarks.real_widths --ways cached+attention=_native_cudnn    other ways, see benchmarks/ways.py
    python -m benchmarks.real_widths --trace 'sd15-512/lora/*/cached'         three steps under the profiler
    python -m benchmarks.real_widths --tiny                       small widths of each family, on a CPU
    python -m benchmarks.real_widths --table                      the table of the record that is there

A cell that does not fit into memory, or fails, is a line that says so. The record is written after every cell. Columns:
pairs per second, as the median of the rounds; that over the plain step's of the same model and batch; MFU, useful work
over the chip's peak (`benchmarks/accounting.py`); pairs per second at the goals; peak memory; how a step's time splits;
and the share of the time in which no kernel ran. A cell that was measured at another commit than the newest says so.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks import plain_step, plain_widths, steps
from benchmarks.accounting import GOALS, count_tflop, goal, measure_peak, share, units
from benchmarks.architectures import Architecture
from benchmarks.building import build
from benchmarks.machine import device_name, machine
from benchmarks.profiling import Profiler
from benchmarks.published_widths import PUBLISHED
from benchmarks.records import RESULTS
from benchmarks.tiny_widths import TINY
from benchmarks.ways import DEFAULT, PLAIN, QUICK, Way
from diffalign.resumable import read_object, write_atomically

MODES = ("lora", "full")
PARTS = dict.fromkeys((*plain_step.PARTS[:2], *steps.PARTS, "rest"))
"""Columns of the time split; encoding is of the plain step alone."""


@dataclass(frozen=True)
class Cell:
    """One line of the table.

    Attributes:
        architecture: What is trained.
        mode: "lora" or "full".
        pairs: Of a step.
        way: How a step is made.
    """

    architecture: Architecture
    mode: str
    pairs: int
    way: Way

    @property
    def name(self) -> str:
        """Such as "sd15-512/lora/16/cached+fused"."""
        return f"{self.architecture.name}/{self.mode}/{self.pairs}/{self.way}"

    @property
    def units(self) -> int:
        """Useful units of a pair."""
        return units(self.mode, cached=self.way.start == "cached")


def cells(architectures: Iterable[Architecture], ways: Iterable[Way], batch_size: int | None = None) -> list[Cell]:
    """All cells, way after way, so that each model has its first lines when time is over."""
    found: dict[str, Cell] = {}
    for way, architecture, mode in product(ways, architectures, MODES):
        possible = way.adapted(architecture)
        if possible is not None and mode in architecture.pairs:
            cell = Cell(architecture, mode, batch_size or architecture.pairs[mode], possible)
            found.setdefault(cell.name, cell)
    return list(found.values())


def measure(cell: Cell, options: argparse.Namespace, device: torch.device, trace: Path | None) -> dict[str, Any]:
    """One cell's row; profiled where there are kernels to see, or a trace is wanted."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    policy = build(
        cell.architecture,
        lora=cell.mode == "lora",
        dtype=dtype,
        device=device,
        attention=cell.way.attention,
    )
    profiler = Profiler(device, trace) if device.type == "cuda" or trace is not None else None
    shared = {"steps": options.steps, "warmup": options.warmup, "rounds": options.rounds, "profiler": profiler}
    if cell.way.start == PLAIN:
        return plain_widths.measure(policy, cell.architecture, batch_size=cell.pairs, dtype=dtype, **shared)
    with cell.way.on(policy) as training:
        return steps.measure(
            policy,
            cell.architecture.embeddings(),
            batch_size=cell.pairs,
            mixed_precision="no" if device.type == "cpu" else "bf16",
            reference="cached" if cell.way.start == "cached" else "live",
            training=training,
            **shared,
        )


def try_cell(
    cell: Cell, options: argparse.Namespace, device: torch.device, trace: Path | None = None
) -> dict[str, Any]:
    """One cell's row, or what kept it from being measured: the others still have their turn."""
    started = time.perf_counter()
    before = torch.cuda.memory_allocated(device) / 2**30 if device.type == "cuda" else None
    try:
        row = measure(cell, options, device, trace)
    except torch.OutOfMemoryError as error:
        row = {"out_of_memory": _first_line(error)}
    except (RuntimeError, ValueError) as error:  # what PyTorch and its compiler raise, and switches that are refused
        traceback.print_exc()
        row = {"failed": f"{type(error).__name__}: {_first_line(error)}"}
    if device.type == "cuda":  # after the exception is gone, whose frames hold the model
        gc.collect()
        torch.cuda.empty_cache()
    return row | {"took_seconds": time.perf_counter() - started, "held_before_gib": before}


def valued(row: dict[str, Any], cell: Cell, forward_tflop: float, peak_tflops: float) -> dict[str, Any]:
    """The row with what its pairs per second are worth."""
    profile = row.pop("profile", None)
    row |= {"units": cell.units, "forward_tflop": forward_tflop, "no_kernel": profile.gaps if profile else None}
    if "pairs_per_second" in row:
        row["mfu"] = share(row["pairs_per_second"], cell.units, forward_tflop, peak_tflops)
        row["goals"] = [goal(one, cell.units, forward_tflop, peak_tflops) for one in GOALS]
    return row


def table(record: Mapping[str, Any]) -> str:
    """The record as Markdown; a cell of another commit than the newest has that commit behind its name."""
    newest = record["machine"]["commit"]
    rates = ["pairs/s", "times plain", "MFU", *(f"{one:.0%} is" for one in GOALS)]
    head = ["cell", *rates, "peak GiB", *PARTS, "no kernel"]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    for name, row in sorted(record["cells"].items(), key=lambda item: item[0].rpartition("/")[0]):
        shown = name if row["commit"] == newest else f"{name} ({row['commit'] or 'commit unknown'})"
        if "pairs_per_second" not in row:
            why = "out of memory" if "out_of_memory" in row else row["failed"].replace("|", "/")
            lines.append(f"| {shown} | {why} |{' |' * (len(head) - 2)}")
            continue
        split = row["split_seconds"]
        whole = sum(split.values())
        shares = [f"{split[part] / whole:.0%}" if part in split else "" for part in PARTS]
        memory = "" if row["peak_memory_gib"] is None else f"{row['peak_memory_gib']:.1f}"
        gaps = "" if row["no_kernel"] is None else f"{row['no_kernel']:.0%}"
        rate = row["pairs_per_second"]
        plain = record["cells"].get(f"{name.rpartition('/')[0]}/{PLAIN}", {}).get("pairs_per_second")
        ratio = f"{rate / plain:.2f}" if plain else ""
        numbers = [f"{rate:.3g}", ratio, f"{row['mfu']:.1%}", *(f"{one:.3g}" for one in row["goals"])]
        lines.append(f"| {shown} | {' | '.join([*numbers, memory, *shares, gaps])} |")
    found = record["machine"]
    where = f"{found['device']}, PyTorch {found['versions']['torch']}, at commit {newest} where a cell names no other"
    return "\n".join([*lines, "", f"peak {record['peak_tflops']:.4g} TFLOP/s; {where}"])


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_widths", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="*", help="cells whose name fits one of these patterns, by commas")
    parser.add_argument("--ways", help="ways to make a step, by commas, in the place of the usual ones")
    parser.add_argument("--batch-size", type=int, help="pairs of a step, for all cells")
    parser.add_argument("--steps", type=int, help="of a round; 5, or 1 with --tiny")
    parser.add_argument("--warmup", type=int, help="first steps that do not count; 3, or 1 with --tiny")
    parser.add_argument("--rounds", type=int, help="3, or 1 with --tiny")
    parser.add_argument("--minutes", type=float, help="begin no further cell when so much would be over")
    parser.add_argument("--peak-tflops", type=float, help="of the chip in bf16; measured unless it is given")
    parser.add_argument("--again", action="store_true", help="also cells that are in the record already")
    parser.add_argument("--tiny", action="store_true", help="small widths of each family")
    parser.add_argument("--trace", metavar="PATTERN", help="profile three steps of the first cell that fits, alone")
    parser.add_argument("--table", action="store_true", help="only print the table of the record that is there")
    parser.add_argument("--commit", help="of the code, where git cannot say it")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the record")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Command line; 1 if a cell failed for another reason than memory."""
    parser = _parser()
    options = parser.parse_args(arguments)
    for name, usual in (("steps", 5), ("warmup", 3), ("rounds", 3)):
        if getattr(options, name) is None:
            setattr(options, name, 1 if options.tiny else usual)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not (options.tiny or options.table):
        parser.error("no GPU here; --tiny tries the script on a CPU")
    name = device_name(device).replace(" ", "_").lower()
    path = options.output / f"real_widths_{'tiny_' if options.tiny else ''}{name}.json"
    if options.table:
        if not path.is_file():
            parser.error(f"{path} is not there; measure something first")
        sys.stdout.write(table(read_object(path)) + "\n")
        return 0
    try:
        named = [Way.parse(text) for text in options.ways.split(",")] if options.ways else None
    except ValueError as error:
        parser.error(str(error))
    ways = named or (QUICK if options.tiny else DEFAULT)
    known = (TINY if options.tiny else PUBLISHED).values()
    patterns = (options.trace or options.only).split(",")
    wanted = [
        cell for cell in cells(known, ways, options.batch_size) if any(fnmatch(cell.name, one) for one in patterns)
    ]
    if not wanted:
        parser.error(f"no cell fits {', '.join(patterns)}; names are like {cells(known, ways)[0].name}")
    options.output.mkdir(parents=True, exist_ok=True)
    if options.trace:
        return _trace(wanted[0], options, device)
    return _run(wanted, options, device, path)


def _run(wanted: list[Cell], options: argparse.Namespace, device: torch.device, path: Path) -> int:
    """Measures what the record does not hold, writes it after every cell, and prints the table."""
    began = time.monotonic()
    record: dict[str, Any] = read_object(path) if path.is_file() else {"cells": {}}
    side = 8192 if device.type == "cuda" else 512
    made = machine(device, options.commit)
    peak = options.peak_tflops or record.get("peak_tflops") or measure_peak(device, side=side)
    record = {"machine": made, **record, "peak_tflops": peak}
    tflop: dict[str, float] = {}
    longest = 0.0
    failed = False
    for cell in wanted:
        if cell.name in record["cells"] and not options.again:
            continue
        spent = time.monotonic() - began
        if options.minutes is not None and spent + longest > 60 * options.minutes:
            sys.stderr.write(f"stopped after {spent / 60:.1f} minutes before {cell.name}; call it again to go on\n")
            break
        sys.stderr.write(f"{cell.name}\n")
        architecture = cell.architecture
        if architecture.name not in tflop:
            tflop[architecture.name] = architecture.forward_tflop or count_tflop(architecture)
        row = valued(try_cell(cell, options, device), cell, tflop[architecture.name], record["peak_tflops"])
        failed |= "failed" in row
        longest = max(longest, row["took_seconds"])
        settings = {name: getattr(options, name) for name in ("steps", "warmup", "rounds")}
        record["machine"] = made
        record["cells"][cell.name] = row | {"settings": settings, "commit": made["commit"]}
        write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())
    sys.stdout.write(f"{table(record)}\n\nrecord: {path}\n")
    return 1 if failed else 0


def _trace(cell: Cell, options: argparse.Namespace, device: torch.device) -> int:
    """Profiles one cell and prints what it did."""
    name = cell.name.replace("/", "_").replace("+", "_")
    trace = options.output / f"trace_{'tiny_' if options.tiny else ''}{name}.json.gz"
    row = try_cell(cell, options, device, trace)
    profile = row.get("profile")
    if profile is None:
        sys.stdout.write(f"{cell.name}: {row.get('failed') or row.get('out_of_memory')}\n")
        return 1
    sys.stdout.write(f"{cell.name}\n\n{profile}\n\ntrace: {trace}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
