"""Pairs per second of the embedded models' steps: `python -m benchmarks.training_step`, which `make bench` calls.

Several ways to train a model on the same pairs with the same random numbers: Diffusion-DPO on the UNet and on the video
transformer, Flow-DPO on the flow transformer. Each way has a process of its own, and they take turns step by step:

- `plain`: pictures and prompts encoded at every step, as public scripts do (`benchmarks/plain_step.py`)
- `live`: `diffalign.fit` on the encoded cache, the reference asked at every step
- `cached`: the same with `trainer.reference: cached`; the first pass over all draws is timed apart
- `cached+...`: with further switches, see `benchmarks/ways.py`; on a CPU compiled by inductor

For each: pairs per second; the ratio to `plain`, step against the step beside it, the median over all rounds with the
middle half of them, and that of all steps together; the ratio that the time split of `plain` predicts (its step without
the parts that the way leaves out), and how much of it was reached; useful work over what the CPU does in a large matrix
product (MFU); the process's largest memory; the largest difference of the losses from those of `plain`. Then how the
milliseconds of a step split, medians; "rest" is everything between these parts, logging and Python's own time
included. A step is all that happens from one batch to the next.

    python -m benchmarks.training_step                  three models, all weights and adapters
    python -m benchmarks.training_step --models unet    one of them
    python -m benchmarks.training_step --quick          two steps of adapters each, to try the script

All together take half an hour on two cores; killed on the way, it goes on behind the last mode that was finished.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import diffalign as da
from benchmarks import plain_step, steps
from benchmarks.accounting import measure_peak, share, units
from benchmarks.embedded import LR, MODELS, SEED, Model, Scene
from benchmarks.machine import hide_accelerators, machine
from benchmarks.records import RESULTS, publish
from benchmarks.steps import Timeline, split_of, watching
from benchmarks.turns import Job, Stopwatch, Turn, take_turns
from benchmarks.ways import PLAIN, Way
from diffalign.loop import make_accelerator
from diffalign.resumable import read_object, write_atomically

MODES = {"all weights": False, "LoRA, rank 8": True}
"""Name -> whether adapters are trained."""
WAYS = ("live", "cached", "cached+fused", "cached+channels_last", "cached+channels_last+fused")
COMPILED = ("cached+compile", "cached+compile+channels_last+fused")
COLUMNS = ("pairs/s", "times plain", "middle half", "all steps", "predicted", "of it", "MFU", "GiB", "loss difference")
PARTS = tuple(dict.fromkeys((*plain_step.PARTS[:2], *steps.PARTS, "rest")))


@dataclass(frozen=True)
class Settings:
    """How long it is measured.

    Attributes:
        rounds: Timed steps of each way.
        warmup: First steps that do not count.
        pairs: On the disk.
        batch_size: Pairs of a step; None takes each model's own.
        quick: One way after another, in this process.
    """

    rounds: int
    warmup: int
    pairs: int
    batch_size: int | None
    quick: bool

    @property
    def counted(self) -> slice:
        """The steps that count."""
        return slice(self.warmup, self.warmup + self.rounds)


def ways_for(model: Model, names: Sequence[str]) -> dict[str, Way]:
    """Those ways that a model can go, by name, without what only helps convolutions where it has none."""
    found = [Way.parse(name).fit_for(model.is_unet) for name in names]
    return {str(way): way for way in found}


def leaves_out(way: Way) -> tuple[str, ...]:
    """Parts of the plain step that a way does without."""
    return ("images", "text", "reference") if way.start == "cached" else ("images", "text")


class _InTurn:
    """A source that waits for its turn before every step, which begins then."""

    def __init__(self, source: Any, turn: Turn, timeline: Timeline) -> None:
        self.source, self.turn, self.timeline = source, turn, timeline

    def batch(self, step: int, micro_step: int) -> Any:
        self.turn.next()
        self.timeline.begin_step()
        with self.timeline.part("data"):
            return self.source.batch(step, micro_step)

    def update(self, step: int) -> None:
        self.source.update(step)


def run_plain(turn: Turn, scene: Scene) -> dict[str, Any]:
    """Losses of every step, and how its seconds split."""
    step = scene.plain_step()
    for number in range(scene.steps):
        turn.next()
        step(number)
    return {"losses": step.losses, "split": step.seconds, "peak_gib": _peak_gib()}


def run_way(turn: Turn, scene: Scene, way: Way) -> dict[str, Any]:
    """Losses of every step, how its seconds split, and those of the pass over the reference if this way made it."""
    policy = scene.policy()
    source = scene.source()
    policy.free_encoders()
    with way.on(policy, "inductor") as switched, tempfile.TemporaryDirectory(dir=scene.folder) as output:
        trainer = scene.trainer(policy, way.start)
        batches = trainer.source(source, SEED)
        first_pass: list[float] = []
        if trainer.cached is not None and not trainer.cached.folder.exists():
            started = time.perf_counter()
            trainer.begin(0, scene.folder)
            first_pass.append(time.perf_counter() - started)
        config = da.TrainingConfig(
            output_dir=output,
            max_train_steps=scene.steps,
            per_device_train_batch_size=scene.batch_size,
            learning_rate=LR,
            lr_scheduler="constant",
            checkpointing_steps=scene.steps,
            **switched,
        )
        accelerator, timeline = make_accelerator(config), Timeline(policy.device)
        with watching(timeline, trainer, accelerator):
            da.fit(trainer, _InTurn(batches, turn, timeline), config, accelerator=accelerator)
        lines = (Path(output) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "train/loss" in row]
    split = timeline.seconds()
    return {
        "losses": [row["train/loss"] for row in rows],
        "split": split,
        "first_pass": first_pass,
        "peak_gib": _peak_gib(),
    }


def measure(model: Model, folder: Path, names: Sequence[str], settings: Settings, *, lora: bool) -> dict[str, Any]:
    """All ways of a model in turn, round after round."""
    batch_size = settings.batch_size or model.batch_size
    scene = Scene(model, folder, lora, batch_size, settings.warmup + settings.rounds + 1)
    scene.write_pairs(settings.pairs)
    started = time.perf_counter()
    encoded = scene.encoded()
    encoding = time.perf_counter() - started
    ways = ways_for(model, names)
    jobs: dict[str, Job] = {PLAIN: (run_plain, (scene,))}
    jobs |= {name: (run_way, (scene, way)) for name, way in ways.items()}
    found = _alone(jobs) if settings.quick else take_turns(jobs, scene.steps - 1, f"{len(jobs)} ways in turn")
    tflop, peak = _forward_tflop(scene.policy()), measure_peak(torch.device("cpu"), side=1024)
    rows = {}
    for name, (times, result) in found.items():
        seconds = statistics.median(times[settings.counted])
        split = [
            one | {"step": whole} for one, whole in zip(result["split"], times, strict=False)
        ]  # the steps by their turns; the one that is saved after the last has none
        worth = units("lora" if lora else "full", cached=name.startswith("cached"))
        rows[name] = {
            "seconds": seconds,
            "pairs_per_second": batch_size / seconds,
            "split_seconds": split_of(split[settings.counted], PARTS[:-1]),
            "mfu": share(batch_size / seconds, worth, tflop, peak),
            "peak_gib": result["peak_gib"],
        }
    plain = rows.pop(PLAIN)
    for name, row in rows.items():
        row |= _compared(plain, found[PLAIN], found[name], leaves_out(ways[name]), settings.counted)
    return {
        PLAIN: plain,
        "ways": rows,
        "forward_tflop": tflop,
        "peak_tflops": peak,
        "encoding_seconds": encoding,
        "first_pass_seconds": [s for name in ways for s in found[name][1]["first_pass"]],
        "pairs": len(encoded),
        "batch_size": batch_size,
    }


def _compared(
    plain: Mapping[str, Any],
    one: tuple[list[float], Any],
    other: tuple[list[float], Any],
    missing: Sequence[str],
    counted: slice,
) -> dict[str, Any]:
    """A way beside the plain step: times and results of both."""
    times, theirs = one[0][counted], other[0][counted]
    ratios = [a / b for a, b in zip(times, theirs, strict=True)]
    saved = sum(plain["split_seconds"][part] for part in missing)
    losses = zip(one[1]["losses"], other[1]["losses"], strict=True)
    return {
        "ratio": statistics.median(ratios),
        "middle_half": _middle_half(ratios),
        "ratio_of_sums": sum(times) / sum(theirs),
        "predicted_ratio": plain["seconds"] / (plain["seconds"] - saved),
        "largest_loss_difference": max(abs(a - b) for a, b in losses),
    }


def _alone(jobs: dict[str, Job]) -> dict[str, tuple[list[float], Any]]:
    """As `take_turns`, in this process, one after another: to see that everything runs."""
    found = {}
    for name, (function, arguments) in jobs.items():
        watch = Stopwatch()
        result = function(watch, *arguments)
        found[name] = (watch.seconds, result)
    return found


def _peak_gib() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _forward_tflop(policy: Any) -> float:
    """Of one sample through the denoiser."""
    latents, counter = torch.zeros(1, *policy.latent_shape), FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        policy.frozen().predict(latents, torch.zeros(1, dtype=torch.long), policy.encode_prompts([""]))
    return counter.get_total_flops() / 1e12


def _middle_half(values: list[float]) -> list[float]:
    if len(values) < 4:
        return [min(values), max(values)]
    low, _, high = statistics.quantiles(values, n=4)
    return [low, high]


def table(record: Mapping[str, Any]) -> str:
    """The record as Markdown."""
    return "\n\n".join(
        _table_of(f"{name}, {mode}", found) for name, modes in record["models"].items() for mode, found in modes.items()
    )


def _table_of(title: str, found: Mapping[str, Any]) -> str:
    plain, ways = found[PLAIN], found["ways"]
    shares = ", ".join(f"{part} {plain['split_seconds'][part] / plain['seconds']:.0%}" for part in plain_step.PARTS)
    lines = [
        f"**{title}**, {found['batch_size']} pairs a step; of a plain step: {shares}",
        "",
        f"| way | {' | '.join(COLUMNS)} |",
        f"| --- |{' ---: |' * len(COLUMNS)}",
        f"| plain | {plain['pairs_per_second']:.1f} | 1.00 | | 1.00 | 1.00 | "
        f"| {plain['mfu']:.0%} | {plain['peak_gib']:.1f} | 0 |",
    ]
    for name, way in ways.items():
        (low, high), reached = way["middle_half"], way["ratio"] / way["predicted_ratio"]
        lines.append(
            f"| {name} | {way['pairs_per_second']:.1f} | {way['ratio']:.2f} | {low:.2f} to {high:.2f} "
            f"| {way['ratio_of_sums']:.2f} | {way['predicted_ratio']:.2f} | {reached:.0%} "
            f"| {way['mfu']:.0%} | {way['peak_gib']:.1f} | {way['largest_loss_difference']:.1e} |"
        )
    lines += ["", f"| milliseconds | {' | '.join(PARTS)} | step |", f"| --- |{' ---: |' * (len(PARTS) + 1)}"]
    for name, row in {PLAIN: plain, **ways}.items():
        split = row["split_seconds"]
        cells = [f"{1000 * split[part]:.0f}" if split[part] else "" for part in PARTS]
        lines.append(f"| {name} | {' | '.join(cells)} | {1000 * row['seconds']:.0f} |")
    once = found["first_pass_seconds"][0] if found["first_pass_seconds"] else 0.0
    lines += ["", f"Encoding {found['pairs']} pairs {found['encoding_seconds']:.1f} s, their reference {once:.1f} s."]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=16, help="timed steps of each way")
    parser.add_argument("--warmup", type=int, default=4, help="first steps that do not count")
    parser.add_argument("--batch-size", type=int, help="pairs of a step, in the place of each model's own")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), default=list(MODES))
    parser.add_argument("--ways", nargs="+", metavar="WAY", help="such as cached+fused, see benchmarks/ways.py")
    parser.add_argument("--quick", action="store_true", help="two steps of adapters alone, one way after another")
    parser.add_argument("--output", type=Path, default=RESULTS / "training_step_cpu.json")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.warmup, options.batch_size, options.pairs = 1, 1, 2, 4
        options.modes = list(MODES)[-1:]
    names = options.ways or (WAYS if options.quick else WAYS + COMPILED)
    try:
        for name in names:
            if Way.parse(name).start == PLAIN:
                raise ValueError(f"way {name!r}: the plain step is measured anyhow; leave it out")
    except ValueError as error:
        parser.error(str(error))
    settings = Settings(options.rounds, options.warmup, options.pairs, options.batch_size, options.quick)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    record = run(options.models, options.modes, names, settings, options.output.with_suffix(".partial.json"))
    publish(record, table(record), options.output)
    options.output.with_suffix(".partial.json").unlink()
    return 0


def run(
    models: Sequence[str], modes: Sequence[str], names: Sequence[str], settings: Settings, partial: Path
) -> dict[str, Any]:
    """The record; what was measured is in the file `partial` at once, and is not measured again after a kill."""
    record: dict[str, Any] = {"machine": machine(), "settings": asdict(settings) | {"ways": list(names)}, "models": {}}
    if partial.is_file():
        begun = read_object(partial)
        same = all(begun.get(key) == record[key] for key in ("machine", "settings"))
        record = begun if same else record
    asked = {
        model: {mode: found for mode, found in begun.items() if mode in modes}
        for model, begun in record["models"].items()
    }
    record["models"] = {model: found for model, found in asked.items() if model in models}
    partial.parent.mkdir(parents=True, exist_ok=True)
    for model, mode in product(models, modes):
        done = record["models"].setdefault(model, {})
        if mode not in done:
            sys.stderr.write(f"{model}, {mode}\n")
            with tempfile.TemporaryDirectory() as folder:
                done[mode] = measure(MODELS[model], Path(folder), names, settings, lora=MODES[mode])
        write_atomically(partial, (json.dumps(record, indent=2) + "\n").encode())
    return record


if __name__ == "__main__":
    hide_accelerators()
    sys.exit(main())
