"""`fit`: the only file that knows accelerate, gradient steps, checkpoints and resuming.

One optimizer step: the source gives the step's micro-batches, the trainer turns each into a loss, accelerate does
backward, gradients are clipped, optimizer and schedule step, then trainer and source are told. The source is a pure
function of the step and every random number of the pair, so a resumed run computes what the uninterrupted one does.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm import tqdm

from diffalign import checkpoints
from diffalign.batches import PairBatch
from diffalign.checkpoints import CheckpointFolder
from diffalign.config import TrainingConfig
from diffalign.monitor import EarlyWarnings, MetricsFile
from diffalign.optimizers import make_optimizer

logger = logging.getLogger("diffalign")

Validate = Callable[[int], Mapping[str, float]]


class BatchSource(Protocol):
    """Where batches come from: a pure function of the optimizer step."""

    def batch(self, step: int, micro_step: int) -> PairBatch:
        """This process's pairs of one micro-batch."""
        ...

    def update(self, step: int) -> None:
        """Called after every optimizer step."""
        ...


class NonFiniteLossError(RuntimeError):
    """The loss is not a number; the message names the batch and the file to replay it with."""


class _Terminated:
    """Remembers a SIGTERM until the step is finished."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> _Terminated:
        def note(signum: int, frame: FrameType | None) -> None:
            self.requested = True

        try:
            self._previous = signal.signal(signal.SIGTERM, note)
        except ValueError:  # not in the main thread, where only the caller can listen
            self._previous = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """The accelerator of a run: precision and trackers as configured.

    Raises:
        ValueError: If the launcher started several processes and accelerate sees but one.
    """
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to in (None, "none") else config.report_to,
        project_dir=config.output_dir,
        cpu=not torch.accelerator.is_available(),  # without it several processes on CPUs would not see each other
    )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise ValueError(
            f"{started} processes were started but {accelerator.num_processes} would train together; "
            "start them with `python -m torch.distributed.run --nproc_per_node N` or check `accelerate env`"
        )
    return accelerator


def fit(
    trainer: Any,
    source: BatchSource,
    config: TrainingConfig,
    *,
    settings: Mapping[str, Any] | None = None,
    accelerator: Accelerator | None = None,
    validate: Validate | None = None,
) -> Path:
    """Trains the trainer's policy to `config.max_train_steps` and saves it.

    Args:
        trainer: `loss(batch) -> LossOutput`, `update(step)`, `policy`; for example `trainers.DiffusionDPO`.
        source: Where batches come from.
        config: The loop's settings.
        settings: The whole run's configuration, to be compared when a checkpoint is resumed; `config` if None.
        accelerator: To share one with the caller; made from `config` if None.
        validate: Called every `validation_steps` with the step, before the first step included; gives metrics.

    Returns:
        The output folder, with the trained weights as diffusers publishes them.

    Raises:
        NonFiniteLossError: If a loss is infinite or not a number; the batch is saved for replay first.
        checkpoints.CheckpointError: If a checkpoint cannot be saved, or belongs to another configuration.
    """
    accelerator = accelerator or make_accelerator(config)
    run = _Run(trainer, source, config, settings or {"training": config.model_dump(mode="json")}, accelerator)
    return run.go(validate)


class _Run:
    """One call of `fit`: the state that a checkpoint holds, and the steps."""

    def __init__(
        self,
        trainer: Any,
        source: BatchSource,
        config: TrainingConfig,
        settings: Mapping[str, Any],
        accelerator: Accelerator,
    ) -> None:
        self.trainer, self.source, self.config, self.settings = trainer, source, config, settings
        self.accelerator = accelerator
        self.policy = trainer.policy
        self.output_dir = Path(config.output_dir)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.folder = CheckpointFolder(self.output_dir, config.checkpoints_total_limit)
        self.metrics_file = MetricsFile(self.output_dir / "metrics.jsonl")
        self.parameters: list[torch.nn.Parameter] = self.policy.trainable_parameters()
        if not self.parameters:
            raise ValueError("the policy has no trainable parameters; load it with lora=... or train=True")
        pairs_per_step = (
            config.per_device_train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        )
        optimizer = make_optimizer(self.parameters, config, pairs_per_step)
        self.policy.wrapped, self.optimizer = accelerator.prepare(self.policy.denoiser, optimizer)
        # The schedule is stepped here, once per optimizer step, so that warm-up counts optimizer steps on any
        # number of processes; accelerate would step a prepared one once per process.
        self.scheduler = get_scheduler(
            config.lr_scheduler,
            optimizer=optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        )
        self.ema = EMAModel(self.parameters, decay=config.ema_decay) if config.use_ema else None
        self.warnings = EarlyWarnings()
        self.step = 0
        self._gradients_seen = False

    # --- the loop ------------------------------------------------------------------------------------------------

    def go(self, validate: Validate | None) -> Path:
        config, accelerator = self.config, self.accelerator
        self._resume()
        if accelerator.log_with:
            accelerator.init_trackers("diffalign", config=_flat(self.settings))
        bar = tqdm(
            total=config.max_train_steps,
            initial=self.step,
            desc="train",
            unit="step",
            disable=not accelerator.is_main_process,
        )
        try:
            with _Terminated() as terminated:
                if self.step == 0 and validate and config.validation_steps:
                    self._log(0, "validation", validate(0))
                while self.step < config.max_train_steps:
                    self._one_step(bar)
                    last = self.step == config.max_train_steps
                    if validate and config.validation_steps and (self.step % config.validation_steps == 0 or last):
                        self._log(self.step, "validation", validate(self.step))
                    stop = self._anyone(terminated.requested)
                    if self.step % config.checkpointing_steps == 0 or stop or last:
                        self._save()
                    if stop and not last:
                        logger.warning(
                            "SIGTERM: saved %s; go on with resume_from_checkpoint=latest", self.folder.path(self.step)
                        )
                        raise SystemExit(0)
        finally:
            bar.close()
            if accelerator.log_with:
                accelerator.end_training()
        if accelerator.is_main_process:
            self._save_final()
        accelerator.wait_for_everyone()
        return self.output_dir

    def _one_step(self, bar: Any) -> None:
        config, accelerator = self.config, self.accelerator
        started = time.perf_counter()
        sums: dict[str, Tensor] = {}
        for micro in range(config.gradient_accumulation_steps):
            batch = self.source.batch(self.step, micro).to(accelerator.device)
            final = micro == config.gradient_accumulation_steps - 1
            if final:
                output = self._micro_step(batch, sums)
            else:
                with accelerator.no_sync(self.policy.wrapped):
                    self._micro_step(batch, sums)
        if not self._gradients_seen:
            self._check_gradients()
        limit = config.max_grad_norm if config.max_grad_norm > 0 else float("inf")
        norm = accelerator.clip_grad_norm_(self.parameters, limit)
        if accelerator.scaler is None and not bool(torch.isfinite(norm)):  # a scaler skips such steps by itself
            self._report_non_finite(batch, output, "gradient")
        self.optimizer.step()
        lr = self.scheduler.get_last_lr()[0]
        if not accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.ema is not None:
            self.ema.step(self.parameters)
        self.trainer.update(self.step)
        self.source.update(self.step)
        values = self._reduce(sums)
        values |= {"grad_norm": float(norm), "lr": lr, "seconds": time.perf_counter() - started}
        bar.set_postfix(loss=f"{values['loss']:.4f}", acc=f"{values['implicit_accuracy']:.2f}", refresh=False)
        bar.update()
        if accelerator.is_main_process:
            for message in self.warnings.observe(values):
                self.metrics_file.write(self.step, {"event": "warning", "message": message})
        if self.step % config.logging_steps == 0:
            self._log(self.step, "train", values)

    def _micro_step(self, batch: PairBatch, sums: dict[str, Tensor]) -> Any:
        output = self.trainer.loss(batch)
        if not bool(torch.isfinite(output.loss)):
            self._report_non_finite(batch, output, "loss")
        self.accelerator.backward(output.loss / self.config.gradient_accumulation_steps)
        for name, value in output.metrics.items():
            sums[name] = sums.get(name, 0) + value.double() / self.config.gradient_accumulation_steps
        return output

    def _check_gradients(self) -> None:
        """After the first backward pass: an adapter switched off at the wrong moment loses gradients silently."""
        missing = [name for name, parameter in self.policy.named_trainable() if parameter.grad is None]
        if missing:
            raise RuntimeError(
                f"{len(missing)} of {len(self.parameters)} trained tensors got no gradient, {missing[0]} among them; "
                "was the adapter still switched off for the reference when the loss was differentiated?"
            )
        self._gradients_seen = True

    def _reduce(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Means over micro-batches and processes; z's deviation from its first two moments."""
        names = sorted(sums)
        stacked = torch.stack([sums[n] for n in names]).to(self.accelerator.device)
        mean: Tensor = self.accelerator.reduce(stacked, reduction="mean")
        values = dict(zip(names, mean.tolist(), strict=True))
        if "z_square" in values:
            values["z_std"] = max(values.pop("z_square") - values["z_mean"] ** 2, 0.0) ** 0.5
        return values

    def _log(self, step: int, prefix: str, values: Mapping[str, float]) -> None:
        if not self.accelerator.is_main_process:
            return
        named = {f"{prefix}/{k}": v for k, v in values.items()}
        self.metrics_file.write(step, named)
        if self.accelerator.log_with:
            self.accelerator.log(named, step=step)

    def _report_non_finite(self, batch: PairBatch, output: Any, what: str) -> None:
        ids = [d.pair_id for d in batch.draws]
        bad = [i for i, loss in zip(ids, output.losses.tolist(), strict=True) if not abs(loss) < 1e30]
        path = self.output_dir / "failures" / f"step-{self.step}-rank-{self.accelerator.process_index}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(
            {
                "step": self.step,
                "draws": [(d.seed, d.epoch, d.pair_id) for d in batch.draws],
                "conditioning": {k: v.cpu() for k, v in batch.conditioning.tensors.items()},
                "chosen": batch.chosen.cpu(),
                "rejected": batch.rejected.cpu(),
                "weight": batch.weight.cpu(),
                "losses": output.losses.cpu(),
                "weights": {n: p.detach().cpu() for n, p in self.policy.named_trainable()},
                "settings": dict(self.settings),
            },
            path,
        )
        raise NonFiniteLossError(
            f"the {what} of step {self.step + 1} is not finite for pair(s) {', '.join(bad or ids)}; "
            f"the batch and the trained weights are saved in {path} for replay (diffalign.loop.replay); "
            "lower the learning rate, or leave the pair out"
        )

    # --- state ---------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            state = {
                "step": self.step,
                "weights": {n: p.detach().cpu() for n, p in self.policy.named_trainable()},
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "ema": self.ema.state_dict() if self.ema is not None else None,
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
                "warnings": self.warnings.state(),
            }
            self.folder.save(self.step, state, self.settings, self.policy.save_trained)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        wanted = self.config.resume_from_checkpoint
        path = self.folder.find(wanted) if wanted else None
        if path is not None:
            state = checkpoints.load(path, self.settings)
            with torch.no_grad():
                for name, parameter in self.policy.named_trainable():
                    parameter.copy_(state["weights"][name])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            if self.ema is not None:
                self.ema.load_state_dict(state["ema"])
                self.ema.to(self.accelerator.device)
            if self.accelerator.scaler is not None and state["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.warnings.restore(state["warnings"])
            self.step = int(state["step"])
            logger.info("resumed from %s", path)
        if self.accelerator.is_main_process:
            if path is None and self.folder.steps() and not wanted:
                raise checkpoints.CheckpointError(
                    f"{self.output_dir} already holds checkpoints of a run; "
                    "resume it with training.resume_from_checkpoint=latest, or choose another output_dir"
                )
            self.metrics_file.rewind(self.step if path is not None else -1)

    def _save_final(self) -> None:
        try:
            self.policy.save_trained(self.output_dir)
            if self.ema is not None:
                self.ema.store(self.parameters)
                self.ema.copy_to(self.parameters)
                self.policy.save_trained(self.output_dir / "ema")
                self.ema.restore(self.parameters)
        except checkpoints.WRITE_ERRORS as error:
            raise checkpoints.CheckpointError(
                f"could not save the trained weights in {self.output_dir}: "
                f"{checkpoints.write_problem(error, self.output_dir)}; they are in {self.folder.path(self.step)}; "
                "free some space and resume"
            ) from error

    def _anyone(self, flag: bool) -> bool:
        """Whether the flag is up on any process."""
        if self.accelerator.num_processes == 1:
            return flag
        value = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(value, reduction="sum") > 0)


def replay(path: Path, trainer: Any) -> Any:
    """Computes the loss of a saved batch again, with the weights it met; see `NonFiniteLossError`.

    Args:
        path: The file under `failures/`.
        trainer: A trainer on the same kind of policy.

    Returns:
        The trainer's `LossOutput`.
    """
    from diffalign.batches import Conditioning
    from diffalign.randomness import Draw

    state = torch.load(path, weights_only=True)
    with torch.no_grad():
        for name, parameter in trainer.policy.named_trainable():
            parameter.copy_(state["weights"][name])
    draws = tuple(Draw(*draw) for draw in state["draws"])
    batch = PairBatch(Conditioning(state["conditioning"]), state["chosen"], state["rejected"], state["weight"], draws)
    return trainer.loss(batch)


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as trackers want them: one level, plain values."""
    flat = checkpoints.flatten(dict(settings))
    return {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in flat.items()}
