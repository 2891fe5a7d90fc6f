"""Losses and gradients that are no numbers: kept from the weights, saved with what they met, and computed again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffalign.batches import PairBatch
from diffalign.launching import anyone, largest
from diffalign.step_records import StepRecord, read_verdicts

if TYPE_CHECKING:
    from accelerate import Accelerator

    from diffalign.policy import Policy

__all__ = ["NonFiniteLossError", "NumberGuard", "replay", "save"]

SYNC_STEPS = 10
"""Steps between two looks at an accelerator's numbers, unless `sync_steps` says otherwise."""
MAX_SKIPPED_STEPS = 30
"""A gradient scaler halves its scale at every skipped step; after so many the scale is not to blame."""


class NonFiniteLossError(RuntimeError):
    """The loss is not a number; the message names the batch and the file to replay it with."""


class NumberGuard:
    """Keeps bad numbers from the weights, and stops the run when it has seen one.

    Either each step is looked at before its optimizer step, or, with a fused AdamW, several at once: that optimizer is
    given a flag on the device, and from the first bad number on leaves the weights as they are. What is found later is
    what would have been found at once, the weights for `replay` included.

    Args:
        policy: What is trained.
        accelerator: Of the run.
        output_dir: Bad batches go into `failures/` there.
        settings: Of the run, saved with them.
        plain: Whether this process has all trained weights, to save them too.
    """

    def __init__(
        self, policy: Policy, accelerator: Accelerator, output_dir: Path, settings: Mapping[str, Any], *, plain: bool
    ) -> None:
        self.policy, self.accelerator, self.plain = policy, accelerator, plain
        self.output_dir, self.settings = output_dir, settings
        self._broken: Tensor | None = None  # 1 from the first bad number on

    def watch(self, optimizer: Any, sync_steps: int | None) -> int:
        """Steps between two looks at the device, from `training.sync_steps`.

        Raises:
            ValueError: If several were asked for where bad numbers would reach the weights meanwhile.
        """
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper has the real one
        fused = isinstance(inner, torch.optim.AdamW) and all(group["fused"] for group in inner.param_groups)
        heeded = self.accelerator.device.type in ("cpu", "cuda")  # Apple's fused AdamW takes the flag and ignores it
        able = fused and heeded and self.plain and self.accelerator.scaler is None
        if sync_steps is not None and sync_steps > 1 and not able:
            raise ValueError(
                f"training.sync_steps: {sync_steps} steps at once need training.fused_optimizer=true on CUDA or a CPU, "
                "and neither fp16 nor sharded weights, so that no bad number reaches the weights unseen; leave it out"
            )
        if sync_steps is None:
            each = self.accelerator.gradient_accumulation_steps  # batches of a step, which wait to be read too
            sync_steps = max(1, SYNC_STEPS // each) if able and self.accelerator.device.type != "cpu" else 1
        if sync_steps > 1:
            self._broken = torch.zeros((), device=self.accelerator.device)
            inner.found_inf = self._broken
        return sync_steps

    def judge(self, record: StepRecord, skipped: int) -> None:
        """Called before the optimizer step.

        Args:
            record: Of the step.
            skipped: Steps in a row that a gradient scaler has skipped.

        Raises:
            NonFiniteLossError: If each step is looked at, and something is not finite in any process.
        """
        if self._broken is not None:
            self._broken.copy_(torch.maximum(self._broken, (~record.flags().all()).float()))
            return
        # A scaler skips steps with infinite gradients by itself, and is right to for as long as its scale shrinks.
        self._refuse([record], norms_too=self.accelerator.scaler is None or skipped >= MAX_SKIPPED_STEPS)

    def check(self, records: Sequence[StepRecord]) -> None:
        """Called when the steps since the last time are read.

        Raises:
            NonFiniteLossError: If something is not finite in any process.
        """
        if self._broken is not None:
            self._refuse(records, norms_too=True)

    def _refuse(self, records: Sequence[StepRecord], *, norms_too: bool) -> None:
        """Stops all processes together, whichever met the bad number; one that stopped alone would hang the rest."""
        verdicts = read_verdicts(records)
        bad = [not all(v.losses) or (norms_too and not v.norm) for v in verdicts]
        first = -largest(self.accelerator, -(bad.index(True) if any(bad) else len(records)))
        if first == len(records):
            return
        record, losses = records[first], verdicts[first].losses
        own = not all(losses)
        somebody = anyone(self.accelerator, own)
        if own:
            self._report(record, losses.index(False), "loss")
        if somebody:
            raise NonFiniteLossError(
                f"the loss of step {record.step + 1} is not finite in another process, whose message names the pairs"
            )
        self._report(record, -1, "gradient")  # the same norm in every process

    def _report(self, record: StepRecord, micro_step: int, what: str) -> None:
        # Only plain weights: other processes, which may not have failed, would have to help with sharded ones.
        weights = dict(self.policy.named_trainable()) if self.plain else {}
        batch, losses = record.micro_batches[micro_step]
        path = self.output_dir / "failures" / f"step-{record.step}-rank-{self.accelerator.process_index}.pt"
        bad = save(path, record.step, batch, losses, weights, self.settings)
        saved = "the batch and the trained weights are" if self.plain else "the batch, without the sharded weights, is"
        raise NonFiniteLossError(
            f"the {what} of step {record.step + 1} is not finite for pair(s) {', '.join(bad)}; "
            f"{saved} saved in {path} for replay (diffalign.loop.replay); "
            "lower the learning rate, or leave the pair out"
        )


def save(
    path: Path, step: int, batch: PairBatch, losses: Tensor, weights: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> list[str]:
    """Writes what `replay` reads, and gives the names of the pairs to blame: all of them if each has a finite loss.

    Args:
        path: The file; its folder is made.
        step: Optimizer steps done.
        batch: Of any kind.
        losses: Of its pairs, [B].
        weights: The trained parameters by name; empty if they are spread over processes.
        settings: Of the run.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {
            "step": step,
            "batch": batch.to_state(),
            "losses": losses.cpu(),
            "weights": {name: parameter.detach().cpu() for name, parameter in weights.items()},
            "settings": dict(settings),
        },
        path,
    )
    names = [draw.pair_id for draw in batch.draws]
    return [name for name, loss in zip(names, losses.tolist(), strict=True) if not abs(loss) < 1e30] or names


def replay(path: Path, trainer: Any) -> Any:
    """Computes the loss of a saved batch again, with the weights it met; see `diffalign.loop.NonFiniteLossError`.

    Args:
        path: The file under `failures/`.
        trainer: A trainer on the same kind of policy. Where the method's reference moves, `trainer.begin` with the
            file's step and the run's folder brings back the one that the batch met.

    Returns:
        The trainer's `LossOutput`.
    """
    state = torch.load(path, weights_only=True)
    with torch.no_grad():
        for name, parameter in trainer.policy.named_trainable():
            if state["weights"]:
                parameter.copy_(state["weights"][name])
    return trainer.loss(PairBatch.from_state(state["batch"]))
