"""Times training steps of any policy through `diffalign.fit`, with random pairs in the place of a filled cache."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import diffalign as da


class RandomPairs:
    """A batch source of random latents and embeddings: what a filled cache gives, without its files.

    Args:
        latent_shape: Of one latent, [C, h, w] or [C, t, h, w].
        conditioning: Named tensors of one prompt, one row each.
        batch_size: Pairs of a micro-batch.
    """

    def __init__(self, latent_shape: tuple[int, ...], conditioning: Mapping[str, Tensor], batch_size: int) -> None:
        shape = (batch_size, *latent_shape)
        generator = da.generator("benchmark")
        self.chosen, self.rejected = (torch.randn(shape, generator=generator) for _ in range(2))
        self.conditioning = da.Conditioning(
            {name: tensor.expand(batch_size, *tensor.shape[1:]) for name, tensor in conditioning.items()}
        )
        self.batch_size = batch_size

    def batch(self, step: int, micro_step: int) -> da.PairBatch:
        """The same tensors at every step, with fresh draws."""
        draws = tuple(da.Draw(0, step, f"{micro_step}/{i}") for i in range(self.batch_size))
        return da.PairBatch(self.conditioning, self.chosen, self.rejected, torch.ones(self.batch_size), draws)

    def update(self, step: int) -> None:
        """Nothing to do."""


class Stopwatch:
    """Sums the time of a function's calls, waiting for the accelerator before and after."""

    def __init__(self, owner: Any, name: str, device: torch.device) -> None:
        self.seconds: list[float] = []
        self.function, self.device = getattr(owner, name), device
        setattr(owner, name, self)

    def __call__(self, *arguments: Any) -> Any:
        """Calls the function and notes how long it took."""
        synchronise(self.device)
        started = time.perf_counter()
        result = self.function(*arguments)
        synchronise(self.device)
        self.seconds.append(time.perf_counter() - started)
        return result


def synchronise(device: torch.device) -> None:
    """Waits until the accelerator has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    policy: Any,
    conditioning: Mapping[str, Tensor],
    *,
    steps: int,
    warmup: int,
    batch_size: int,
    mixed_precision: str,
) -> dict[str, Any]:
    """Runs Diffusion-DPO for a few steps and reads the clock.

    Args:
        policy: What is trained.
        conditioning: Named tensors of one prompt, one row each.
        steps: Optimizer steps.
        warmup: The first of them, which do not count.
        batch_size: Pairs per step.
        mixed_precision: "no" or "bf16".

    Returns:
        Numbers of parameters, pairs per second as the median over the counted steps, how a step's time splits, peak
        memory in GiB (None on a CPU), and the losses.
    """
    device = policy.device
    trainer = da.trainers.DiffusionDPO(policy, beta=2000.0)
    reference = Stopwatch(trainer.reference, "predict", device)
    forward = Stopwatch(policy, "predict", device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        config = da.TrainingConfig(
            output_dir=folder,
            max_train_steps=steps,
            per_device_train_batch_size=batch_size,
            mixed_precision=mixed_precision,  # type: ignore[arg-type]
            checkpointing_steps=steps,
        )
        da.fit(trainer, RandomPairs(policy.latent_shape, conditioning, batch_size), config)
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "train/loss" in row]
    counted = slice(warmup, None)
    step = statistics.median([row["train/seconds"] for row in rows][counted])
    split = {
        "reference_forward": statistics.median(reference.seconds[counted]),
        "policy_forward": statistics.median(forward.seconds[counted]),
    }
    split["backward_clip_optimizer"] = step - sum(split.values())
    return {
        "parameters": sum(p.numel() for p in policy.denoiser.parameters()),
        "trained_parameters": sum(p.numel() for p in policy.trainable_parameters()),
        "pairs_per_second": batch_size / step,
        "seconds_per_step": step,
        "split_seconds": split,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "losses": [row["train/loss"] for row in rows],
    }
