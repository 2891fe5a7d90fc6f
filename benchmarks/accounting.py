"""What a training step is worth: forward passes, useful units of a pair, and the share of the chip they use.

A unit is one forward pass of one sample through the denoiser; a backward pass through weights and activations is worth
two, one through activations alone is worth one. A pair of two samples then is worth

    full   2 policy + 4 backward + 2 reference = 8 units
    LoRA   2 policy + 2 backward + 2 reference = 6 units

and two less where the reference's errors are read from a cache. Recomputed activations, encoders and the optimizer are
worth nothing: whoever avoids them is faster at the same worth.

    python -m benchmarks.accounting --peak-tflops 790     forward passes counted, and the goals on such a chip
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import product

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.architectures import Architecture
from benchmarks.building import build
from benchmarks.published_widths import PUBLISHED
from diffalign.batches import Conditioning

UNITS = {"full": 8, "lora": 6}
"""Mode -> units of a pair with a live reference."""
GOALS = (0.40, 0.50)
"""Shares of the chip that are the goals, the first one first."""


def units(mode: str, *, cached: bool) -> int:
    """Useful units of a pair, see the module."""
    return UNITS[mode] - 2 * cached


def share(pairs_per_second: float, units: int, forward_tflop: float, peak_tflops: float) -> float:
    """Model FLOP utilisation: useful work per second over what the chip can do."""
    return pairs_per_second * units * forward_tflop / peak_tflops


def goal(share: float, units: int, forward_tflop: float, peak_tflops: float) -> float:
    """Pairs per second at that share of the chip."""
    return share * peak_tflops / (units * forward_tflop)


def count_tflop(architecture: Architecture) -> float:
    """TFLOP of one sample through the denoiser: matrix products, convolutions and attention, counted without weights.

    Norms, activations and sums are left out, as everywhere in such accounts.
    """
    policy = build(architecture, lora=False, dtype=torch.float32, device="meta", train=False)  # adapters count too
    latents = torch.empty((1, *architecture.latents), device="meta")
    embedded = Conditioning({name: tensor.to("meta") for name, tensor in architecture.embeddings().items()})
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        policy.predict(latents, torch.empty(1, device="meta"), embedded)
    return counter.get_total_flops() / 1e12


def measure_peak(device: torch.device, *, side: int = 8192, repeats: int = 10) -> float:
    """TFLOP/s of a square matrix product: bfloat16 on an accelerator, float32 on a CPU. Random data, not zeros."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    draw = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn((side, side), generator=draw, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for number in range(3):
        _wait(device)
        started = time.perf_counter()
        for _ in range(repeats):
            torch.matmul(a, b)
        _wait(device)
        if number:  # the first round warms up
            best = min(best, time.perf_counter() - started)
    return 2 * side**3 * repeats / best / 1e12


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(peak_tflops: float) -> str:
    """Every published architecture's forward pass and goals, as Markdown; counts take half a minute."""
    head = ["model", "TFLOP counted", "TFLOP accounted", "mode", "units", *(f"pairs/s at {one:.0%}" for one in GOALS)]
    lines = [f"| {' | '.join(head)} |", f"| --- | ---: | ---: | --- | ---: |{' ---: |' * len(GOALS)}"]
    for architecture in PUBLISHED.values():
        counted = count_tflop(architecture)
        accounted = architecture.forward_tflop or counted
        for mode, cached in product((one for one in UNITS if one in architecture.pairs), (False, True)):
            worth = units(mode, cached=cached)
            goals = [f"{goal(one, worth, accounted, peak_tflops):.3g}" for one in GOALS]
            named = [f"{mode}, cached reference" if cached else mode, str(worth), *goals]
            lines.append(f"| {' | '.join([architecture.name, f'{counted:.4g}', f'{accounted:.4g}', *named])} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accounting", description=__doc__.split("\n\n")[0])
    parser.add_argument("--peak-tflops", type=float, default=790.0, help="of the chip in bf16; 790 on an H200")
    options = parser.parse_args(arguments)
    sys.stdout.write(table(options.peak_tflops) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
