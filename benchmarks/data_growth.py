"""How opening and reading a cache grow with the data: `python -m benchmarks.data_growth`.

Simulates finished caches of 10^2 to 10^6 pairs: real files with real ids and prompts, and latents of a few numbers,
since their size changes nothing here. Each is measured in fresh processes, with the files in the system's page cache:

- `open`: the cache as `data.check_source: false` opens it
- `first batch`: the source of batches, the first epoch's permutation, and the batch
- `next batch`: one more
- `new epoch`: the permutation of the next epoch
- `check files`: what `data.check_source: true` does to the cache beside reading the data: the size of every file
- `split`: setting pairs aside for validation
- `index`: made once, when a cache is finished, from the headers of all files

Memory is the growth of the process's peak while it does each, as `own + mapped` MiB: what it holds itself, and what of
the mapped files is in memory. The latter is the system's page cache, shared by all processes and given back when memory
runs short; a page comes with its neighbours, up to 2 MiB of each column.

    python -m benchmarks.data_growth                            all sizes, some minutes
    python -m benchmarks.data_growth --pairs 100 1000 --rounds 1
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from benchmarks.records import publish
from diffalign.data import EncodedPairs, PairSource, ReadReport
from diffalign.data.index import MANIFEST, shard_path, text_path, write_index

ROOT = Path(__file__).resolve().parents[1]
PAIRS = (100, 1_000, 10_000, 100_000, 1_000_000)
SHARD_SIZE = 256
LATENT = (4, 1, 1)
EMBEDDING = (2, 4)
STAGES = ("open", "first batch", "next batch", "new epoch", "check files", "split")
MEASURES = ("seconds", "own", "mapped")
STATUS = Path("/proc/self/status")


def simulate(folder: Path, pairs: int, pairs_per_prompt: int) -> float:
    """Writes the files of a finished cache and gives the seconds that its index took."""
    folder.mkdir(parents=True)
    prompts = ["", *(f"a photograph of scene number {number}" for number in range(-(-pairs // pairs_per_prompt)))]
    shards, parts = _parts(pairs), _parts(len(prompts))
    for number, rows in enumerate(shards):
        latents = {
            f"{side}.{moment}": torch.rand(len(rows), 1, *LATENT)
            for side in ("chosen", "rejected")
            for moment in ("mean", "std")
        }
        header = {
            "ids": [f"pair-{row}" for row in rows],
            "weights": [1.0] * len(rows),
            "prompts": [prompts[1 + row // pairs_per_prompt] for row in rows],
            "corrupt": [],
            "seen": len(rows),
            "number": number,
        }
        _write(shard_path(folder, number), latents, folder.name, header)
    for number, rows in enumerate(parts):
        texts = {"text.hidden": torch.rand(len(rows), *EMBEDDING)}
        header = {"prompts": [prompts[row] for row in rows], "long_prompts": 0}
        _write(text_path(folder, number), texts, folder.name, header)
    manifest = {
        "fingerprint": folder.name,
        "views": 1,
        "cache": "moments",
        "shard_size": SHARD_SIZE,
        "shards": len(shards),
        "text_shards": len(parts),
        "report": ReadReport(rows=pairs, kept=pairs).to_json(),
    }
    started = time.perf_counter()
    write_index(folder, manifest)
    seconds = time.perf_counter() - started
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return seconds


def _parts(count: int) -> list[range]:
    return [range(start, min(start + SHARD_SIZE, count)) for start in range(0, count, SHARD_SIZE)]


def _write(path: Path, tensors: dict[str, torch.Tensor], fingerprint: str, header: dict[str, Any]) -> None:
    about = json.dumps({"fingerprint": fingerprint, **header})
    safetensors.torch.save_file(tensors, path, metadata={"shard": about})


def measure(folder: Path, batch_size: int) -> dict[str, dict[str, float]]:
    """Seconds, own and mapped MiB of every stage, in this process."""
    found: dict[str, dict[str, float]] = {}

    def stage(name: str, function: Callable[[], Any]) -> Any:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is the present again
        before, mapped, started = _mebibytes("VmRSS"), _mebibytes("RssFile"), time.perf_counter()
        result = function()
        seconds = time.perf_counter() - started
        mapped = max(0.0, _mebibytes("RssFile") - mapped)
        found[name] = {"seconds": seconds, "own": max(0.0, _mebibytes("VmHWM") - before - mapped), "mapped": mapped}
        return result

    pairs = stage("open", lambda: EncodedPairs.open(folder, check_files=False))
    source = PairSource(pairs, seed=0, batch_size=batch_size, prefetch=False)
    stage("first batch", lambda: source.batch(0, 0))
    stage("next batch", lambda: source.batch(1, 0))
    stage("new epoch", lambda: source.visits(len(pairs) // batch_size + 1))
    stage("check files", lambda: EncodedPairs.open(folder))
    stage("split", lambda: pairs.split(max(1, min(1000, len(pairs) // 10)), seed=0))
    return found


def _mebibytes(name: str) -> float:
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


def table(record: dict[str, Any]) -> str:
    """The record as Markdown: milliseconds and own + mapped MiB of every stage."""
    lines = [
        "| pairs | " + " | ".join(STAGES) + " | index, once |",
        "| ---: |" + " ---: |" * (len(STAGES) + 1),
    ]
    for size in record["sizes"]:
        cells = []
        for one in map(size["stages"].__getitem__, STAGES):
            cells.append(f"{one['seconds'] * 1000:.1f} ms, {one['own']:.1f} + {one['mapped']:.1f} MiB")
        lines.append(f"| {size['pairs']:,} | {' | '.join(cells)} | {size['index_seconds']:.2f} s |")
    return "\n".join(lines)


def _in_fresh_process(folder: Path, batch_size: int) -> dict[str, dict[str, float]]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.data_growth",
        "--measure",
        str(folder),
        "--batch-size",
        str(batch_size),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring {folder} failed: {done.stderr.strip()}")
    found: dict[str, dict[str, float]] = json.loads(done.stdout)
    return found


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Simulates and measures every size."""
    from benchmarks.machine import machine  # not in the processes that are measured

    sizes = []
    for pairs in options.pairs:
        cache = folder / f"pairs-{pairs}"
        seconds = simulate(cache, pairs, options.pairs_per_prompt)
        rounds = [_in_fresh_process(cache, options.batch_size) for _ in range(options.rounds)]
        stages = {
            name: {what: statistics.median(one[name][what] for one in rounds) for what in MEASURES} for name in STAGES
        }
        sizes.append({"pairs": pairs, "index_seconds": seconds, "stages": stages})
    settings = {name: getattr(options, name) for name in ("batch_size", "pairs_per_prompt", "rounds")}
    return {"machine": machine(), "settings": settings, "sizes": sizes}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_growth", description=__doc__.split("\n\n")[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=PAIRS)
    parser.add_argument("--pairs-per-prompt", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument(
        "--rounds", type=int, default=3, help="fresh processes for each size, of which the median counts"
    )
    parser.add_argument("--measure", type=Path, metavar="FOLDER", help="measure one cache in this process")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "data_growth.json")
    options = parser.parse_args(arguments)
    if options.measure is not None:
        sys.stdout.write(json.dumps(measure(options.measure, options.batch_size)))
        return 0
    if not STATUS.is_file():
        parser.error("memory is read from /proc, which only Linux has")
    with tempfile.TemporaryDirectory() as folder:
        record = run(options, Path(folder))
    publish(record, table(record), options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
