"""A Diffusion-DPO step at real widths as public scripts write it: `benchmarks/plain_step.py` on a GPU.

Pictures and prompts are encoded at every step, by autoencoder and text encoders of the published widths; the reference
answers in a forward pass of its own; the optimizer is AdamW as it comes; the loss is read at every step; nothing is
compiled. Pictures arrive decoded and resized, as a script's data loader hands them over from its own processes, and
noise is drawn on the accelerator. Weights that are not trained are in half precision, and both forward passes run under
the same autocast, as in a careful script. Activations are recomputed where the other ways recompute them too. What
differs between families is in `benchmarks/plain_families.py`.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.architectures import Architecture
from benchmarks.building import add_encoders
from benchmarks.plain_families import FAMILIES
from benchmarks.plain_step import PARTS, dpo_loss, errors
from benchmarks.profiling import Profiler
from benchmarks.steps import BETA, PROFILED, Timeline, split_of, summary, synchronise
from diffalign.batches import Conditioning


class PlainWideStep:
    """Trains a policy on random pictures or videos, step after step.

    Args:
        policy: With adapters, or with all weights trained.
        architecture: Its own.
        batch_size: Pairs of a step.
        dtype: Of autocast and the encoders; float32 for none.

    Attributes:
        pictures: The chosen ones first, [2B, 3, H, W] or [2B, 3, T, H, W], uint8 on the CPU.
        timeline: When parts of the steps began and ended.
        losses: Of every step.
    """

    def __init__(self, policy: Any, architecture: Architecture, batch_size: int, dtype: torch.dtype) -> None:
        add_encoders(policy, architecture, dtype)
        if architecture.checkpointed:
            policy.denoiser.enable_gradient_checkpointing()
        self.policy, self.reference, self.dtype = policy, policy.frozen(), dtype
        self.pipeline, self.device = policy.pipeline, policy.device
        self.family = FAMILIES[architecture.family]
        self.optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=1e-5)
        draw = torch.Generator().manual_seed(0)
        shape = (2 * batch_size, *architecture.pixels)
        self.pictures = torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
        self.prompts = [f"a photo of thing number {number}" for number in range(batch_size)]
        self.timeline = Timeline(self.device)
        self.losses: list[float] = []

    def __call__(self) -> None:
        """One optimizer step."""
        self.timeline.begin_step()
        autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with self.timeline.part("images"), torch.no_grad():
            pixels = self.pictures.to(self.device).to(self.dtype) / 127.5 - 1
            latents = self.family.latents(self.pipeline, pixels).float()
        with self.timeline.part("text"), torch.no_grad():
            embedded = Conditioning(self.family.text(self.pipeline, self.prompts)).repeat(2)
        noisy, timesteps, target = self.family.noised(self.pipeline, latents)
        with self.timeline.part("reference"), torch.no_grad(), autocast:
            reference = errors(self.reference.predict(noisy, timesteps, embedded).float(), target)
        with self.timeline.part("policy"):
            with autocast:
                prediction = self.policy.predict(noisy, timesteps, embedded)
            loss = dpo_loss(errors(prediction.float(), target), reference, BETA)
        with self.timeline.part("backward"):
            loss.backward()  # type: ignore[no-untyped-call]
        with self.timeline.part("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.policy.trainable_parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(float(loss.detach()))


def measure(
    policy: Any,
    architecture: Architecture,
    *,
    batch_size: int,
    dtype: torch.dtype,
    steps: int,
    warmup: int,
    rounds: int,
    profiler: Profiler | None = None,
) -> dict[str, Any]:
    """Runs the plain step and reads the clock; arguments and result as `benchmarks.steps.measure`."""
    step = PlainWideStep(policy, architecture, batch_size, dtype)
    device = step.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(warmup):
        step()
    rates = []
    for _ in range(rounds):
        synchronise(device)
        started = time.perf_counter()
        for _ in range(steps):
            step()
        synchronise(device)
        rates.append(batch_size * steps / (time.perf_counter() - started))
    profile = None
    step.timeline.begin_step()  # ends the last one
    if profiler is not None:
        profiler.start()
        for _ in range(PROFILED):
            step()
        synchronise(device)
        profile = profiler.stop(PROFILED)
    synchronise(device)
    times = step.timeline.seconds()[: warmup + rounds * steps]
    split = split_of(times[warmup:], PARTS)
    return summary(policy, batch_size, rates, split, times[0]["step"], step.losses, profile)
