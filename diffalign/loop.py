"""`fit`: the only file that knows gradient steps, checkpoints and resuming; accelerate is set up in `launching.py`.

One optimizer step: the source gives the step's micro-batches, the trainer turns each into a loss, accelerate does
backward, gradients are clipped, optimizer and schedule step, then trainer and source are told. The source is a pure
function of the step and every random number of the pair, so a resumed run computes what the uninterrupted one does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm import tqdm

from diffalign import checkpoints, sharding
from diffalign.backbones.precision import DTYPES, under_autocast
from diffalign.batches import PairBatch
from diffalign.checkpoints import CheckpointFolder
from diffalign.config import TrainingConfig
from diffalign.failures import NonFiniteLossError, NumberGuard, replay
from diffalign.launching import Terminated, anyone, check_wrapped, kernel_settings, largest, make_accelerator
from diffalign.monitor import EarlyWarnings, MetricsFile
from diffalign.optimizers import make_optimizer
from diffalign.step_records import StepRecord, read_values

__all__ = ["BatchSource", "NonFiniteLossError", "Waiting", "fit", "make_accelerator", "replay"]

logger = logging.getLogger("diffalign")

Validate = Callable[[int], Mapping[str, float]]


class BatchSource(Protocol):
    """Where batches come from: a pure function of the optimizer step.

    A source may have two methods more. `metrics() -> Mapping[str, float]` is logged with the trainer's after every
    step, as means over the processes; all of them give the same names. `waiting(step) -> str | None` says before a step
    what a person has to do first, if there is anything; see `Waiting`.
    """

    def batch(self, step: int, micro_step: int) -> PairBatch:
        """This process's pairs of one micro-batch."""
        ...

    def update(self, step: int) -> None:
        """Called after every optimizer step."""
        ...


class Waiting(Exception):  # noqa: N818 - nothing went wrong
    """The source has no batch until somebody does what the message says; all that was trained is saved."""


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
        trainer: A `trainers.Trainer`, for example `trainers.DiffusionDPO`.
        source: Where batches come from.
        config: The loop's settings.
        settings: The whole run's configuration, to be compared when a checkpoint is resumed; `config` if None.
        accelerator: To share one with the caller, from `make_accelerator`; made from `config` if None.
        validate: Called every `validation_steps` with the step, before the first step included; gives metrics.

    Returns:
        The output folder, with the trained weights as diffusers publishes them.

    Raises:
        ValueError: If there is nothing to train, or the accelerator was made for another configuration.
        NonFiniteLossError: If a loss is infinite or not a number; the batch is saved for replay first.
        Waiting: If the source waits for somebody; checkpoint and trained weights are saved first.
        checkpoints.CheckpointError: If a checkpoint cannot be saved, or belongs to another configuration.
    """
    accelerator = accelerator or make_accelerator(config)
    if accelerator.gradient_accumulation_steps != config.gradient_accumulation_steps:
        raise ValueError(
            f"the accelerator accumulates {accelerator.gradient_accumulation_steps} micro steps, the configuration "
            f"{config.gradient_accumulation_steps}; make it with make_accelerator(config)"
        )
    run = _Run(trainer, source, config, settings or {"training": config.model_dump(mode="json")}, accelerator)
    with kernel_settings(config):
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
        parameters = self.policy.trainable_parameters()
        if not parameters:
            raise ValueError("the policy has no trainable parameters; load it with lora=... or train=True")
        pairs_per_step = (
            config.per_device_train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        )
        optimizer = make_optimizer(parameters, config, pairs_per_step)
        # The schedule is stepped here, once per optimizer step, so that warm-up counts optimizer steps on any
        # number of processes; accelerate would step a prepared one once per process. It comes before `prepare`, which
        # remembers the optimizer's `step` and would put one back that the schedule does not know.
        self.scheduler = get_scheduler(
            config.lr_scheduler,
            optimizer=optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        )
        self.policy.wrapped, self.optimizer = self._wrap(optimizer)
        # Sharding puts other parameters into the denoiser, so they are named again here.
        self.names, self.parameters = map(list, zip(*self.policy.named_trainable(), strict=True))
        self.deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED  # which steps and clips by itself
        self.sharded = self.deepspeed or sharding.is_sharded(self.policy.denoiser)
        self.ema = EMAModel(self.parameters, decay=config.ema_decay, foreach=True) if config.use_ema else None
        self.warnings = EarlyWarnings()
        self.step = 0
        self._gradients_seen = False
        self._skipped = 0
        self.guard = NumberGuard(self.policy, accelerator, self.output_dir, self.settings, plain=not self.sharded)
        self.sync_steps = self.guard.watch(self.optimizer, config.sync_steps)
        self._unread: list[tuple[StepRecord, dict[str, float]]] = []

    def _wrap(self, optimizer: Any) -> tuple[Any, Any]:
        """The denoiser as several processes train it, and the optimizer."""
        accelerator, denoiser = self.accelerator, self.policy.denoiser
        if self.config.mixed_precision != "no":
            self.policy.autocast = DTYPES[self.config.mixed_precision]
        if sharding.is_sharded(denoiser):  # the caller's own choice; accelerate would put DDP around it
            wrapped, prepared = denoiser, accelerator.prepare(optimizer)
        else:
            if accelerator.is_fsdp2:
                plugin = accelerator.state.fsdp_plugin
                plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or sharding.blocks(denoiser)
            wrapped, prepared = accelerator.prepare(denoiser, optimizer)
            if sharding.is_sharded(denoiser) and self.config.mixed_precision != "no":
                under_autocast(denoiser, DTYPES[self.config.mixed_precision])
        self.policy.shard_reference()
        check_wrapped(wrapped, accelerator.num_processes)
        return wrapped, prepared

    # --- the loop ------------------------------------------------------------------------------------------------

    def go(self, validate: Validate | None) -> Path:
        config, accelerator = self.config, self.accelerator
        self._resume()
        self.trainer.begin(self.step, self.output_dir)
        reason: str | None = None
        accelerator.step = 0  # counts micro steps; a run that failed in the middle of one may have left it anywhere
        if accelerator.log_with:
            accelerator.init_trackers("diffalign", config=checkpoints.plain(self.settings))
        bar = tqdm(
            total=config.max_train_steps,
            initial=self.step,
            desc="train",
            unit="step",
            disable=not accelerator.is_main_process,
        )
        try:
            with Terminated() as terminated:
                if self.step == 0 and validate and config.validation_steps:
                    self._validate(validate)
                while self.step < config.max_train_steps:
                    if (reason := self._waits()) is not None:
                        break
                    self._one_step()
                    last = self.step == config.max_train_steps
                    validation = validate and config.validation_steps and self._due(config.validation_steps)
                    checkpoint = self._due(config.checkpointing_steps)
                    stop = terminated.requested and accelerator.num_processes == 1
                    if not (validation or checkpoint or stop or self._due(self.sync_steps)):
                        continue
                    self._read(bar)
                    if validate and validation:
                        self._validate(validate)
                    stop = anyone(self.accelerator, terminated.requested)
                    if checkpoint or stop:
                        self._save()
                    if stop and not last:
                        logger.warning(
                            "SIGTERM: saved %s; go on with resume_from_checkpoint=latest", self.folder.path(self.step)
                        )
                        raise SystemExit(0)
                self._read(bar)
        except Exception:
            if accelerator.num_processes == 1:  # a process alone must not wait for the others
                self._read(bar)  # steps that were finished; or a bad number, which is then the cause
            raise
        finally:
            bar.close()
            for tracker in accelerator.trackers:  # `end_training` would also end the talk between processes
                tracker.finish()
        if reason is not None and self.step == 0:
            raise Waiting(reason)
        if reason is not None and self.step not in self.folder.steps():
            self._save()
        self._save_final()
        if reason is not None:
            raise Waiting(reason)
        return self.output_dir

    def _due(self, every: int) -> bool:
        """Whether it is time for what happens every so many steps and after the last one."""
        return self.step % every == 0 or self.step == self.config.max_train_steps

    def _validate(self, validate: Validate) -> None:
        forwards = self.policy.forwards
        values = validate(self.step)
        self.policy.forwards = forwards  # which tell what the method costs
        self._log(self.step, "validation", values)

    def _waits(self) -> str | None:
        """What somebody has to do before the next step, if the source says so in any process."""
        ask = getattr(self.source, "waiting", None)
        if ask is None:
            return None
        reason: str | None = ask(self.step)
        return (
            (reason or "another process waits; see its message")
            if anyone(self.accelerator, reason is not None)
            else None
        )

    def _one_step(self) -> None:
        config, accelerator = self.config, self.accelerator
        started, waited = time.perf_counter(), 0.0
        record = StepRecord(self.step)
        for micro in range(config.gradient_accumulation_steps):
            asked = time.perf_counter()
            batch = self.source.batch(self.step, micro)
            waited += time.perf_counter() - asked
            with accelerator.accumulate(self.policy.wrapped):
                output = self.trainer.loss(batch.to(accelerator.device))
                accelerator.backward(output.loss)  # which divides by the number of accumulation steps
            record.add(batch, output)
        if not self._gradients_seen and not self.deepspeed:
            self._check_gradients()
        limit = config.max_grad_norm if config.max_grad_norm > 0 else float("inf")
        record.norm = sharding.whole(torch.as_tensor(accelerator.clip_grad_norm_(self.parameters, limit)))
        self.guard.judge(record, self._skipped)
        self.optimizer.step()
        lr = self.scheduler.get_last_lr()[0]
        skipped = accelerator.optimizer_step_was_skipped
        self._skipped = self._skipped + 1 if skipped else 0
        if not skipped:
            self.scheduler.step()
            if self.ema is not None:
                self.ema.step(self.parameters)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.trainer.update(self.step)
        report = getattr(self.source, "metrics", None)
        own = dict(report()) if report is not None else {}
        self.source.update(self.step)
        forwards = self.policy.forwards * accelerator.num_processes
        seconds = time.perf_counter() - started
        record.known = {"lr": lr, "forwards": forwards, "seconds": seconds, "data_seconds": waited}
        self._unread.append((record, own))

    def _read(self, bar: Any) -> None:
        """Waits for the device and looks at the steps since the last time: refuses bad numbers, logs the others."""
        if not self._unread:
            return
        started = time.perf_counter()
        records, own = map(list, zip(*self._unread, strict=True))
        self._unread = []
        self.guard.check(records)
        rows = read_values(records, own, self.accelerator)
        waited = time.perf_counter() - started
        seconds = (sum(row["seconds"] for row in rows) + waited) / len(rows)
        for record, values in zip(records, rows, strict=True):
            values["seconds"] = seconds
            if self.accelerator.is_main_process:
                for message in self.warnings.observe(values):
                    self.metrics_file.write(record.step + 1, {"event": "warning", "message": message})
            if (record.step + 1) % self.config.logging_steps == 0:
                self._log(record.step + 1, "train", values)
        shown = {"loss": "loss", "acc": "implicit_accuracy"}
        bar.set_postfix({k: f"{rows[-1][v]:.4f}" for k, v in shown.items() if v in rows[-1]}, refresh=False)
        bar.update(len(rows))

    def _check_gradients(self) -> None:
        """After the first backward pass: an adapter switched off at the wrong moment loses gradients silently."""
        missing = [name for name, parameter in self.policy.named_trainable() if parameter.grad is None]
        if missing:
            raise RuntimeError(
                f"{len(missing)} of {len(self.parameters)} trained tensors got no gradient, {missing[0]} among them; "
                "was the adapter still switched off for the reference when the loss was differentiated?"
            )
        self._gradients_seen = True

    def _log(self, step: int, prefix: str, values: Mapping[str, float]) -> None:
        if not self.accelerator.is_main_process:
            return
        named = {f"{prefix}/{k}": v for k, v in values.items()}
        self.metrics_file.write(step, named)
        if self.accelerator.log_with:
            self.accelerator.log(named, step=step)

    # --- state ---------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        weights = self._whole_weights()
        state = {
            "step": self.step,
            "weights": weights,
            "optimizer": None if self.deepspeed else sharding.optimizer_state(self.optimizer),
            "scheduler": self.scheduler.state_dict(),
            "ema": self._ema_state(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
            "warnings": self.warnings.state(),
            "trainer": self.trainer.state(),
            "forwards": self.policy.forwards,
        }

        def write() -> None:
            with sharding.published(self.policy.denoiser, weights if self.sharded else {}):
                self.folder.save(self.step, state, self.settings, self.policy.save_trained)

        self._on_main(write)

    def _save_final(self) -> None:
        weights, ema = self._whole_weights(), self._ema_state()

        def write() -> None:
            try:
                with sharding.published(self.policy.denoiser, weights if self.sharded else {}):
                    self.policy.save_trained(self.output_dir)
                if ema is not None:
                    shadow = dict(zip(self.names, ema["shadow_params"], strict=True))
                    with sharding.published(self.policy.denoiser, shadow):
                        self.policy.save_trained(self.output_dir / "ema")
            except checkpoints.WRITE_ERRORS as error:
                raise checkpoints.CheckpointError(
                    f"could not save the trained weights in {self.output_dir}: "
                    f"{checkpoints.write_problem(error, self.output_dir)}; they are in {self.folder.path(self.step)}; "
                    "free some space and resume"
                ) from error

        self._on_main(write)

    def _on_main(self, write: Callable[[], None]) -> None:
        """Writes on the main process; all go on together when it is done, or stop together if it cannot."""
        problem: checkpoints.CheckpointError | None = None
        if self.accelerator.is_main_process:
            try:
                write()
            except checkpoints.CheckpointError as error:
                problem = error
        if anyone(self.accelerator, problem is not None):
            raise problem or checkpoints.CheckpointError("the main process could not save; see its message")

    def _whole_weights(self) -> dict[str, Tensor]:
        """The trained tensors by name; all processes ask for them, as they may have to put them together."""
        if self.deepspeed:
            state = self.accelerator.get_state_dict(self.policy.wrapped) or {}  # empty but on the main process
            return {name: state[name].cpu() for name in self.names if name in state}
        if not (self.sharded or self.accelerator.is_main_process):
            return {}
        return {n: sharding.whole(p).cpu() for n, p in zip(self.names, self.parameters, strict=True)}

    def _ema_state(self) -> dict[str, Any] | None:
        if self.ema is None:
            return None
        state: dict[str, Any] = self.ema.state_dict()
        return {**state, "shadow_params": [sharding.whole(p).cpu() for p in self.ema.shadow_params]}

    def _resume(self) -> None:
        wanted = self.config.resume_from_checkpoint
        path = self.folder.find(wanted) if wanted else None
        if path is None and self.folder.steps() and not wanted:
            raise checkpoints.CheckpointError(
                f"{self.output_dir} already holds checkpoints of a run; "
                "resume it with training.resume_from_checkpoint=latest, or choose another output_dir"
            )
        state = checkpoints.load(path, self.settings) if path is not None else None
        found = int(state["step"]) if state is not None else 0
        if anyone(self.accelerator, found < largest(self.accelerator, found)):
            raise checkpoints.CheckpointError(
                f"process {self.accelerator.process_index} finds step {found} in {self.output_dir} and another process "
                "a later one; put output_dir on a disk that all machines see"
            )
        if state is not None:
            with torch.no_grad():
                for name, parameter in zip(self.names, self.parameters, strict=True):
                    parameter.copy_(sharding.cut_like(state["weights"][name], parameter))
            sharding.load_optimizer_state(self.optimizer, state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            if self.ema is not None:
                shadow = zip(state["ema"]["shadow_params"], self.parameters, strict=True)
                self.ema.load_state_dict(
                    {**state["ema"], "shadow_params": [sharding.cut_like(value, p) for value, p in shadow]}
                )
                self.ema.to(self.accelerator.device)
            if self.accelerator.scaler is not None and state["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.warnings.restore(state["warnings"])
            self.trainer.load_state(state["trainer"])
            self.policy.forwards = state["forwards"]
            self.step = found
            logger.info("resumed from %s", path)
        if self.accelerator.is_main_process:
            self.metrics_file.rewind(self.step if path is not None else -1)
