"""Pictures per second of sampling: `python -m benchmarks.sampling`, the second half of `make bench`.

In turn, several times, each round on prompts that were not drawn before:

- `one by one`: the model's diffusers pipeline, called with one prompt at a time
- `pipeline`: the same, called with a batch of prompts
- `evaluation`: `Policy.sample`, which `pairs`, `sample` and `evaluate` draw with, on that batch
- `rollout`: D3PO's sampler with stored transitions, on that batch, decoded
- `deep cache`: `evaluation` with every third step computed whole, other pictures than the rest's
- with `--compile`, `evaluation, compiled` and `rollout, compiled`

Every way draws the same number of pictures with the same steps and guidance. Ratios are to the same round of the
pipeline, medians over the rounds; the last column is the largest difference of a picture's value, of 0 to 1, from what
the pipeline draws of the same batch. A rollout has a sampler of its own, so its pictures are others.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import diffalign as da
from benchmarks.embedded import SHAPES
from benchmarks.machine import machine
from benchmarks.records import RESULTS, publish
from diffalign.backbones.deep_cache import DeepCache
from diffalign.devices import pick_device
from diffalign.prompts import read_prompts
from diffalign.rollouts import StochasticSampler

BASELINES = ("one by one", "pipeline")
INTERVAL = 3
SAME_SAMPLER = ("one by one", "pipeline", "evaluation", "deep cache", "evaluation, compiled")
"""Ways that draw what the pipeline draws, or would without a cache."""

Draw = Callable[[list[str]], Tensor]


def ways(steps: int, guidance: float, backend: str | None = None) -> dict[str, Draw]:
    """Name -> draws a picture [3, H, W] in [0, 1] of each prompt.

    Args:
        steps: Of the samplers.
        guidance: Scale of classifier-free guidance.
        backend: Of `torch.compile`, for the compiled ways; None leaves them out.
    """
    policy: Any = _load()

    def pipeline(prompts: list[str], first: int = 0) -> Tensor:
        generators = [torch.Generator().manual_seed(first + number) for number in range(len(prompts))]
        settings = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt"}
        images: Tensor = policy.pipeline(prompts, generator=generators, **settings).images
        return images

    def evaluation(prompts: list[str], drawing: Any = policy) -> Tensor:
        seeds = range(len(prompts))
        images: Tensor = drawing.sample(prompts, seeds, num_inference_steps=steps, guidance_scale=guidance)
        return images

    def deep_cache(prompts: list[str]) -> Tensor:
        policy.deep_cache = DeepCache(interval=INTERVAL)
        try:
            return evaluation(prompts)
        finally:
            policy.deep_cache = None

    def rollout(prompts: list[str], drawing: Any = policy) -> Tensor:
        sampler = StochasticSampler(drawing, num_inference_steps=steps, guidance_scale=guidance)
        draws = [da.Draw(0, 0, prompt) for prompt in prompts]
        return sampler.decode(sampler.rollout(prompts, draws, 1, len(prompts)), len(prompts))

    found: dict[str, Draw] = {
        "one by one": lambda prompts: torch.cat([pipeline([prompt], i) for i, prompt in enumerate(prompts)]),
        "pipeline": pipeline,
        "evaluation": evaluation,
        "rollout": rollout,
        "deep cache": deep_cache,
    }
    if backend is not None:
        compiled: Any = _load()
        compiled.compile(backend)
        found["evaluation, compiled"] = lambda prompts: evaluation(prompts, compiled)
        found["rollout, compiled"] = lambda prompts: rollout(prompts, compiled)
    return found


def measure(draws: dict[str, Draw], prompts: list[list[str]]) -> dict[str, dict[str, Any]]:
    """Name -> pictures per second, ratios to both baselines, largest difference from the pipeline's pictures.

    Args:
        draws: What `ways` gave.
        prompts: Of one round to warm up, and of the rounds that count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in draws}
    differences: dict[str, float | None] = dict.fromkeys(draws)
    for number, batch in enumerate(prompts):
        pictures = {}
        for name, draw in draws.items():
            started = time.perf_counter()
            pictures[name] = draw(batch).cpu()
            if number:
                seconds[name].append(time.perf_counter() - started)
        for name in draws.keys() & SAME_SAMPLER:
            difference = float((pictures[name] - pictures["pipeline"]).abs().max())
            differences[name] = max(difference, differences[name] or 0.0)

    def ratio(name: str, baseline: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[baseline], seconds[name], strict=True))

    return {
        name: {
            "pictures_per_second": len(prompts[0]) / statistics.median(seconds[name]),
            **{baseline: ratio(name, baseline) for baseline in BASELINES},
            "largest_difference": differences[name],
        }
        for name in draws
    }


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    lines = [
        "| way | pictures/s | times one by one | times pipeline | difference |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, way in record["ways"].items():
        difference = "" if way["largest_difference"] is None else f"{way['largest_difference']:.1e}"
        ratios = " | ".join(f"{way[baseline]:.2f}" for baseline in BASELINES)
        lines.append(f"| {name} | {way['pictures_per_second']:.1f} | {ratios} | {difference} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", metavar="BACKEND", nargs="?", const="inductor", help="draw compiled as well")
    parser.add_argument("--quick", action="store_true", help="one round of two pictures and three steps")
    parser.add_argument("--output", type=Path, default=RESULTS / "sampling_cpu.json")
    options = parser.parse_args(arguments)
    if options.quick:
        options.batch_size, options.steps, options.rounds = 2, 3, 1
    size = options.batch_size
    texts = [row.prompt for row in read_prompts("diffalign://shapes/train", size * (options.rounds + 1))]
    prompts = [texts[start : start + size] for start in range(0, len(texts), size)]
    found = measure(ways(options.steps, options.guidance_scale, options.compile), prompts)
    settings = {name: getattr(options, name) for name in ("batch_size", "steps", "guidance_scale", "rounds", "compile")}
    record = {"machine": machine(pick_device()), "settings": settings, "ways": found}
    publish(record, table(record), options.output)
    return 0


def _load() -> Any:
    return da.load_policy(SHAPES, lora=da.LoRA(rank=8), train=True, device=pick_device())


if __name__ == "__main__":
    sys.exit(main())
