"""The batch whose loss was no number: saved with the weights it met, and computed again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.batches import PairBatch


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
