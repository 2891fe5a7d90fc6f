"""Times training steps of any policy through `diffalign.fit`, with random pairs in the place of a filled cache."""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import diffalign as da
from benchmarks.profiling import Profile, Profiler
from diffalign.loop import make_accelerator
from diffalign.reference_errors import ReferencedPairs

PARTS = ("data", "noise", "reference", "policy", "backward", "optimizer")
"""What a step consists of: reading and moving the batch with what the loop notes between steps, drawing the noise, both
forward passes, the backward pass, clipping with the optimizer's step. What is left of a step is "rest"."""
BETA = 2000.0
DRAWS = 4
"""Visits after which a pair repeats its draws, so that the reference's errors can be known beforehand."""
PROFILED = 3
"""Steps that are profiled, after those that are timed."""


class Enough(Exception):  # noqa: N818 - nothing went wrong
    """All steps that were asked for are done; leaves `fit` before it saves gigabytes of random weights."""


class RandomPairs:
    """A batch source of random latents and embeddings: what a filled cache gives, without its files.

    Args:
        latent_shape: Of one latent, [C, h, w] or [C, t, h, w].
        conditioning: Named tensors of one prompt, one row each.
        batch_size: Pairs of a micro-batch.

    Attributes:
        errors: The reference's errors on the draws of every visit, once `ask` was called.
    """

    def __init__(self, latent_shape: tuple[int, ...], conditioning: Mapping[str, Tensor], batch_size: int) -> None:
        shape = (batch_size, *latent_shape)
        generator = da.generator("benchmark")
        chosen, rejected = (torch.randn(shape, generator=generator) for _ in range(2))
        repeated = {name: tensor.expand(batch_size, *tensor.shape[1:]) for name, tensor in conditioning.items()}
        pairs = da.PairBatch(da.Conditioning(repeated), chosen, rejected, torch.ones(batch_size), ())
        self.pairs = pairs.pin_memory() if torch.cuda.is_available() else pairs  # as data on disk come
        self.errors: list[Tensor] = []

    def batch(self, step: int, micro_step: int) -> da.PairBatch:
        """The same tensors at every step, with draws that repeat after `DRAWS` steps."""
        visit = step % DRAWS
        draws = tuple(da.Draw(0, visit, f"{micro_step}/{number}") for number in range(len(self.pairs)))
        pairs = replace(self.pairs, draws=draws)
        if not self.errors:
            return pairs
        chosen, rejected = self.errors[visit].reshape(2, -1)
        return ReferencedPairs(**vars(pairs), chosen_error=chosen, rejected_error=rejected)

    def ask(self, trainer: Any) -> None:
        """Knows from now on what the trainer's reference says; as `reference: cached` does before its first step."""
        batches = [self.batch(visit, 0).to(trainer.policy.device) for visit in range(DRAWS)]
        found = [trainer.reference_errors(trainer.noisy_states(batch)).cpu() for batch in batches]
        self.errors = [errors.pin_memory() if torch.cuda.is_available() else errors for errors in found]

    def update(self, step: int) -> None:
        """Nothing to do."""


class Timeline:
    """When the parts of every step began and ended, on the accelerator's own clock.

    Events are put into the accelerator's queue and read when all is over, so that nothing waits for anything because
    it is watched. On a CPU the clock is the machine's.

    Attributes:
        optimized: When the last optimizer step ended, None before the first.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.starts: list[Any] = []
        self.watched = ExitStack()
        self.parts: list[list[tuple[str, Any, Any]]] = []
        self.optimized: Any = None

    def mark(self) -> Any:
        """This moment."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def begin_step(self) -> None:
        """A step starts here, and the one before it ends."""
        self.starts.append(self.mark())
        self.parts.append([])

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time in the block belongs to this part of the step."""
        started = self.mark()
        yield
        self.add(name, started, self.mark())

    def add(self, name: str, started: Any, ended: Any) -> None:
        """The time between two marks belongs to this part of the step."""
        self.parts[-1].append((name, started, ended))

    def watch(self, owner: Any, method: str, part: str) -> None:
        """Every call of the object's method belongs to this part, until `watched` is closed."""
        function: Callable[..., Any] = getattr(owner, method)

        def timed(*arguments: Any, **options: Any) -> Any:
            if not self.parts:
                return function(*arguments, **options)
            with self.part(part):
                return function(*arguments, **options)

        own = vars(owner).get(method)  # set on the object itself, as another watcher would do
        setattr(owner, method, timed)
        if own is None:
            self.watched.callback(delattr, owner, method)
        else:
            self.watched.callback(setattr, owner, method, own)

    def seconds(self) -> list[dict[str, float]]:
        """Of every step that ended: "step" and its parts; call it when the accelerator has finished."""
        found = []
        for number, following in enumerate(self.starts[1:]):
            split = {"step": self._between(self.starts[number], following)}
            for name, started, ended in self.parts[number]:
                split[name] = split.get(name, 0.0) + self._between(started, ended)
            found.append(split)
        return found

    def _between(self, started: Any, ended: Any) -> float:
        return float(ended - started if self.device.type != "cuda" else started.elapsed_time(ended) / 1000)


def synchronise(device: torch.device) -> None:
    """Waits until the accelerator has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def watching(timeline: Timeline, trainer: Any, accelerator: Any) -> Iterator[None]:
    """While the block calls `fit`, the parts of every step that the timeline begins are put on it."""
    watched = (
        (trainer, "noised", "noise"),
        (trainer.reference, "predict", "reference"),
        (trainer.policy, "predict", "policy"),
        (accelerator, "backward", "backward"),
        (accelerator, "clip_grad_norm_", "optimizer"),
    )
    for owner, method, part in watched:
        timeline.watch(owner, method, part)
    starts: list[Any] = []

    def before(*_: Any) -> None:
        starts.append(timeline.mark())

    def after(*_: Any) -> None:
        timeline.optimized = timeline.mark()
        timeline.add("optimizer", starts.pop(), timeline.optimized)

    hooks = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
    try:
        yield
    finally:
        timeline.watched.close()
        for hook in hooks:
            hook.remove()


class Watch:
    """Stands between `fit` and a trainer: times the parts of steps, profiles the last ones, and then ends the run.

    Args:
        trainer: What `fit` will train.
        pairs: Its source.
        cached: Ask the reference beforehand.
        warmup: First steps that do not count.
        rounds: Times of equal steps that follow.
        steps: Of a round.
        profiler: Watches `PROFILED` further steps, if there is one.

    Attributes:
        profile: What the profiler saw.
        losses: Of every step.
    """

    def __init__(
        self,
        trainer: Any,
        pairs: RandomPairs,
        *,
        cached: bool,
        warmup: int,
        rounds: int,
        steps: int,
        profiler: Profiler | None = None,
    ) -> None:
        self.trainer, self.pairs, self.cached, self.profiler = trainer, pairs, cached, profiler
        self.device: torch.device = trainer.policy.device
        self.timeline = Timeline(self.device)
        self.warmup, self.steps = warmup, steps
        self.timed = warmup + rounds * steps
        self.profile: Profile | None = None
        self.losses: list[Tensor] = []
        self._clock: list[float] = []
        self._begin, self._loss = trainer.begin, trainer.loss
        trainer.begin, trainer.loss = self._on_begin, self._on_loss

    @contextmanager
    def over(self, accelerator: Any) -> Iterator[None]:
        """The block calls `fit` with this accelerator; it ends when all steps are done."""
        try:
            with watching(self.timeline, self.trainer, accelerator):
                yield
        except Enough:
            pass

    def _on_begin(self, step: int, folder: Path) -> None:
        """After the loop has wrapped the denoiser, before the first batch."""
        self._begin(step, folder)
        if self.cached:
            self.pairs.ask(self.trainer)
            self.trainer.policy.rest_reference()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _on_loss(self, batch: Any) -> Any:
        """A step starts, or there were enough."""
        step = len(self.losses)
        counted = step - self.warmup
        if counted >= 0 and step <= self.timed and counted % self.steps == 0:
            synchronise(self.device)
            self._clock.append(time.perf_counter())
        if self.timeline.optimized is not None:  # of the step that ends now
            self.timeline.add("data", self.timeline.optimized, self.timeline.mark())
        self.timeline.begin_step()
        if step >= self.timed:
            self._profile(step - self.timed)
        output = self._loss(batch)
        self.losses.append(output.loss.detach())
        return output

    def _profile(self, step: int) -> None:
        """Profiles the steps that follow those that are timed."""
        if self.profiler is None:
            raise Enough
        if step == 0:
            self.profiler.start()
        if step == PROFILED:
            synchronise(self.device)
            self.profile = self.profiler.stop(PROFILED)
            raise Enough

    def rounds(self) -> list[float]:
        """Seconds of a step in every round, by the machine's clock."""
        return [(end - start) / self.steps for start, end in itertools.pairwise(self._clock)]

    def split(self) -> dict[str, float]:
        """Seconds of the parts of a step, medians over the steps of all rounds."""
        return split_of(self.timeline.seconds()[self.warmup : self.timed], PARTS)

    def first_step(self) -> float:
        """Seconds of the first step, compilation included."""
        return self.timeline.seconds()[0]["step"]


def measure(
    policy: Any,
    conditioning: Mapping[str, Tensor],
    *,
    batch_size: int,
    mixed_precision: str,
    steps: int,
    warmup: int,
    rounds: int = 1,
    reference: Literal["live", "cached"] = "live",
    training: Mapping[str, Any] | None = None,
    profiler: Profiler | None = None,
) -> dict[str, Any]:
    """Runs Diffusion-DPO for a few steps and reads the clock.

    Args:
        policy: What is trained.
        conditioning: Named tensors of one prompt, one row each.
        batch_size: Pairs per step.
        mixed_precision: "no" or "bf16".
        steps: Of a round.
        warmup: Steps before the first round, which do not count.
        rounds: How many.
        reference: "cached" knows the reference's errors before the first step.
        training: Further settings of the loop.
        profiler: Watches some more steps, which do not count either.

    Returns:
        Numbers of parameters, pairs per second of every round and as their median, how a step's time splits (see
        `PARTS`), the first step's time, peak memory in GiB (None on a CPU), all losses, and the profile or None.
    """
    device: torch.device = policy.device
    trainer = da.trainers.DiffusionDPO(policy, beta=BETA)
    pairs = RandomPairs(policy.latent_shape, conditioning, batch_size)
    watch = Watch(
        trainer,
        pairs,
        cached=reference == "cached",
        warmup=warmup,
        rounds=rounds,
        steps=steps,
        profiler=profiler,
    )
    with tempfile.TemporaryDirectory() as folder:
        last = watch.timed + PROFILED + 1  # never reached, as it would be saved
        settings: dict[str, Any] = {"max_train_steps": last, "checkpointing_steps": last, **(training or {})}
        settings |= {"output_dir": folder, "mixed_precision": mixed_precision}
        config = da.TrainingConfig(per_device_train_batch_size=batch_size, **settings)
        accelerator = make_accelerator(config)
        with watch.over(accelerator):
            da.fit(trainer, pairs, config, accelerator=accelerator)
    synchronise(device)
    at_once = batch_size * accelerator.num_processes
    rates = [at_once / seconds for seconds in watch.rounds()]
    return summary(policy, at_once, rates, watch.split(), watch.first_step(), watch.losses, watch.profile)


def summary(
    policy: Any,
    pairs: int,
    rates: list[float],
    split: Mapping[str, float],
    first_step: float,
    losses: Sequence[Tensor | float],
    profile: Profile | None,
) -> dict[str, Any]:
    """What `measure` gives, from pairs per second of every round of steps of so many pairs."""
    device: torch.device = policy.device
    rate, values = statistics.median(rates), [float(loss) for loss in losses]
    bad = [number for number, value in enumerate(values) if not math.isfinite(value)]
    if bad:
        raise RuntimeError(f"the loss of step {bad[0] + 1} is {values[bad[0]]}; such a run measures nothing")
    return {
        "parameters": sum(p.numel() for p in policy.denoiser.parameters()),
        "trained_parameters": sum(p.numel() for p in policy.trainable_parameters()),
        "pairs_per_second": rate,
        "rounds": rates,
        "seconds_per_step": pairs / rate,
        "split_seconds": dict(split),
        "first_step_seconds": first_step,
        "peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        "losses": values,
        "profile": profile,
    }


def split_of(steps: Sequence[Mapping[str, float]], parts: Sequence[str]) -> dict[str, float]:
    """Seconds of the parts of a step, medians over steps, and of what no part says: "rest"."""
    split = {name: statistics.median(step.get(name, 0.0) for step in steps) for name in parts}
    whole = statistics.median(step["step"] for step in steps)
    return split | {"rest": max(whole - sum(split.values()), 0.0)}
