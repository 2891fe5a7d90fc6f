"""Pairs per second of a Diffusion-DPO step: `python -m benchmarks.training_step`, which `make bench` calls.

Several ways to train the embedded model on the same pairs with the same random numbers. Each has a process of its own,
and they take turns step by step:

- `plain`: pictures and prompts encoded at every step, as public scripts do (`benchmarks/plain_step.py`)
- `live`: `diffalign.fit` on the encoded cache, the reference asked at every step
- `cached`: the same with `trainer.reference: cached`; the first pass over all draws is timed apart

Then `cached` with further switches; "fused" also reads losses ten steps at once. For each: pairs per second; the ratio
to `plain`, step against the step beside it, the median over all rounds with the middle half of them, and that of all
steps together; the ratio that the time split of `plain` predicts (its step without the parts that the way leaves out),
and how much of it was reached; useful work over what the CPU does in a large matrix product (MFU); the process's
largest memory; and the largest difference of the losses from those of `plain`. A step is all that happens from one
batch to the next, reading and logging included.

    python -m benchmarks.training_step                 all weights and adapters, some minutes on two cores
    python -m benchmarks.training_step --quick         two steps of adapters, one way after another, to try the script
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import diffalign as da
from benchmarks.accounting import measure_peak, share, units
from benchmarks.machine import machine
from benchmarks.plain_step import PARTS, PlainStep
from benchmarks.records import publish
from benchmarks.turns import Job, Stopwatch, Turn, take_turns
from diffalign.data import DataConfig, EncodedPairs, PairSource, encode_pairs, load_pairs
from diffalign.shapes.scene_pairs import write_scene_pairs
from diffalign.trainers import DiffusionDPO

RESULTS = Path(__file__).resolve().parent / "results"
MODEL = "diffalign://shapes"
SEED, BETA, LR = 0, 2000.0, 1e-5


@dataclass(frozen=True)
class Way:
    """How a step is made.

    Attributes:
        reference: "live" or "cached".
        training: Further settings of the loop.
        channels_last: Weights in the order that convolutions like.
        compiled: `torch.compile` of the denoiser.
    """

    reference: str = "live"
    training: dict[str, Any] = field(default_factory=dict)
    channels_last: bool = False
    compiled: bool = False

    @property
    def leaves_out(self) -> tuple[str, ...]:
        """Parts of the plain step that it does without."""
        return ("images", "text", "reference") if self.reference == "cached" else ("images", "text")


FUSED = {"fused_optimizer": True, "sync_steps": 10}
WAYS = {
    "live": Way(),
    "cached": Way("cached"),
    "cached, fused": Way("cached", FUSED),
    "cached, channels_last": Way("cached", channels_last=True),
    "cached, both": Way("cached", FUSED, channels_last=True),
}
COMPILED = {
    "cached, compiled": Way("cached", compiled=True),
    "cached, all three": Way("cached", FUSED, channels_last=True, compiled=True),
}
COLUMNS = ("way", "pairs/s", "times plain", "middle half", "all steps", "predicted", "of it", "MFU", "GiB")
COLUMNS += ("loss difference",)
MODES = {"all weights": False, "LoRA, rank 8": True}
"""Name -> whether adapters are trained."""


@dataclass(frozen=True)
class Scene:
    """Pairs on disk, how many make a step, and what is trained on them.

    Attributes:
        folder: With the pairs in `pairs/` and everything else beside it.
        lora: Adapters, or all weights.
        batch_size: Pairs of a step.
        steps: Steps that are begun; the last one is not timed.
    """

    folder: Path
    lora: bool
    batch_size: int
    steps: int

    @property
    def pairs(self) -> Path:
        """The pictures and their index."""
        return self.folder / "pairs"

    def rows(self) -> list[dict[str, str]]:
        """The index."""
        return [json.loads(line) for line in (self.pairs / "index.jsonl").read_text(encoding="utf-8").splitlines()]

    def policy(self) -> Any:
        """The model as training begins."""
        return da.load_policy(MODEL, lora=da.LoRA(rank=8) if self.lora else None, train=True)

    def encoded(self) -> EncodedPairs:
        """The cache, made when it is first asked for."""
        config = DataConfig(train_data_dir=self.pairs)
        return encode_pairs(load_pairs(config), self.policy(), config, self.folder / "cache")

    def source(self, *, prefetch: bool = True) -> PairSource:
        """Each pair with the same draw at every visit."""
        return PairSource(self.encoded(), seed=SEED, batch_size=self.batch_size, draws_per_pair=1, prefetch=prefetch)


class _InTurn:
    """A source that waits for its turn before every step."""

    def __init__(self, source: Any, turn: Turn) -> None:
        self.source, self.turn = source, turn

    def batch(self, step: int, micro_step: int) -> Any:
        self.turn.next()
        return self.source.batch(step, micro_step)

    def update(self, step: int) -> None:
        self.source.update(step)


def run_plain(turn: Turn, scene: Scene) -> dict[str, Any]:
    """Losses of every step, and how its seconds split."""
    step = PlainStep(scene.policy(), scene.source(prefetch=False), scene.pairs, scene.rows(), BETA, LR)
    for number in range(scene.steps):
        turn.next()
        step(number)
    return {"losses": step.losses, "split": step.seconds, "peak_gib": _peak_gib()}


def run_way(turn: Turn, scene: Scene, way: Way) -> dict[str, Any]:
    """Losses of every step, and the seconds of the pass over the reference if this way made it."""
    policy = scene.policy()
    source = scene.source()
    policy.free_encoders()
    if way.channels_last:
        policy.to_channels_last()
    if way.compiled:
        policy.compile()
    trainer = DiffusionDPO(
        policy, beta=BETA, caption_dropout=0.0, reference=way.reference, draws_per_pair=1, reference_batch_size=8
    )
    batches = trainer.source(source, SEED)
    first_pass: list[float] = []
    if trainer.cached is not None and not trainer.cached.folder.exists():
        started = time.perf_counter()
        trainer.begin(0, scene.folder)
        first_pass.append(time.perf_counter() - started)
    with tempfile.TemporaryDirectory(dir=scene.folder) as output:
        settings = {
            "output_dir": output,
            "max_train_steps": scene.steps,
            "per_device_train_batch_size": scene.batch_size,
            "learning_rate": LR,
            "lr_scheduler": "constant",
            "checkpointing_steps": scene.steps,
            **way.training,
        }
        da.fit(trainer, _InTurn(batches, turn), da.TrainingConfig(**settings))
        lines = (Path(output) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "train/loss" in row]
    return {"losses": [row["train/loss"] for row in rows], "first_pass": first_pass, "peak_gib": _peak_gib()}


def measure(folder: Path, options: argparse.Namespace, *, lora: bool) -> dict[str, Any]:
    """All ways in turn, round after round."""
    scene = Scene(folder, lora, options.batch_size, options.warmup + options.rounds + 1)
    write_scene_pairs(scene.pairs, options.pairs, SEED)
    started = time.perf_counter()
    encoded = scene.encoded()
    encoding = time.perf_counter() - started
    ways = {name: way for name, way in (WAYS | COMPILED).items() if name in options.ways}
    jobs: dict[str, Job] = {"plain": (run_plain, (scene,))}
    jobs |= {name: (run_way, (scene, way)) for name, way in ways.items()}
    found = _alone(jobs) if options.quick else take_turns(jobs, scene.steps - 1)
    counted = slice(options.warmup, options.warmup + options.rounds)
    seconds = {name: times[counted] for name, (times, _) in found.items()}
    plain = found["plain"][1]
    tflop, peak = _forward_tflop(scene.policy()), measure_peak(torch.device("cpu"), side=1024)
    split = {part: statistics.median(step[part] for step in plain["split"][counted]) for part in PARTS}
    whole = statistics.median(seconds["plain"])
    results = {}
    for name, way in ways.items():
        ratios = [one / other for one, other in zip(seconds["plain"], seconds[name], strict=True)]
        losses = found[name][1]["losses"]
        results[name] = {
            "pairs_per_second": scene.batch_size / statistics.median(seconds[name]),
            "ratio": statistics.median(ratios),
            "middle_half": _middle_half(ratios),
            "ratio_of_sums": sum(seconds["plain"]) / sum(seconds[name]),
            "predicted_ratio": whole / (whole - sum(split[part] for part in way.leaves_out)),
            "mfu": share(
                scene.batch_size / statistics.median(seconds[name]),
                units("lora" if lora else "full", cached=way.reference == "cached"),
                tflop,
                peak,
            ),
            "peak_gib": found[name][1]["peak_gib"],
            "largest_loss_difference": max(abs(a - b) for a, b in zip(losses, plain["losses"], strict=True)),
        }
    return {
        "plain": {
            "pairs_per_second": scene.batch_size / whole,
            "split_seconds": split,
            "seconds": whole,
            "mfu": share(scene.batch_size / whole, units("lora" if lora else "full", cached=False), tflop, peak),
            "peak_gib": plain["peak_gib"],
        },
        "forward_tflop": tflop,
        "peak_tflops": peak,
        "ways": results,
        "encoding_seconds": encoding,
        "first_pass_seconds": [s for name in ways for s in found[name][1]["first_pass"]],
        "pairs": len(encoded),
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


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    parts = []
    for mode, found in record["modes"].items():
        plain, split = found["plain"], found["plain"]["split_seconds"]
        shares = ", ".join(f"{part} {split[part] / plain['seconds']:.0%}" for part in PARTS)
        lines = [
            f"{mode}; of a plain step: {shares}",
            "",
            f"| {' | '.join(COLUMNS)} |",
            f"| --- |{' ---: |' * (len(COLUMNS) - 1)}",
            f"| plain | {plain['pairs_per_second']:.1f} | 1.00 | | 1.00 | 1.00 | "
            f"| {plain['mfu']:.0%} | {plain['peak_gib']:.1f} | 0 |",
        ]
        for name, way in found["ways"].items():
            (low, high), reached = way["middle_half"], way["ratio"] / way["predicted_ratio"]
            lines.append(
                f"| {name} | {way['pairs_per_second']:.1f} | {way['ratio']:.2f} | {low:.2f} to {high:.2f} "
                f"| {way['ratio_of_sums']:.2f} | {way['predicted_ratio']:.2f} | {reached:.0%} "
                f"| {way['mfu']:.0%} | {way['peak_gib']:.1f} | {way['largest_loss_difference']:.1e} |"
            )
        once = found["first_pass_seconds"][0] if found["first_pass_seconds"] else 0.0
        lines += [
            "",
            f"Encoding {found['pairs']} pairs {found['encoding_seconds']:.1f} s, their reference {once:.1f} s.",
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=24, help="timed steps of each way")
    parser.add_argument("--warmup", type=int, default=4, help="first steps that do not count")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), default=tuple(MODES))
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS | COMPILED), help="all if left out")
    parser.add_argument("--quick", action="store_true", help="two steps of adapters alone, one way after another")
    parser.add_argument("--output", type=Path, default=RESULTS / "training_step_cpu.json")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.warmup, options.batch_size, options.pairs = 1, 1, 2, 4
        options.modes = list(MODES)[-1:]
    options.ways = options.ways or tuple(WAYS if options.quick else WAYS | COMPILED)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    modes = {}
    with tempfile.TemporaryDirectory() as folder:
        for mode in options.modes:
            scene = Path(folder) / mode.split(",")[0].replace(" ", "_")
            modes[mode] = measure(scene, options, lora=MODES[mode])
    settings = {name: getattr(options, name) for name in ("warmup", "rounds", "batch_size")}
    record = {"machine": machine(), "settings": settings, "modes": modes}
    publish(record, table(record), options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
