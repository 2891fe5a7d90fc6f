"""What optimizer steps leave on the device until somebody looks: losses, metrics, and whether they are numbers.

A number that the CPU reads from a GPU makes it wait for everything before that number, and the GPU, which then has
nothing to do, for the CPU. So steps are recorded, and several records are read at once, in two transfers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diffalign.batches import PairBatch

__all__ = ["StepRecord", "Verdict", "read_values", "read_verdicts"]


@dataclass(frozen=True)
class Verdict:
    """Whether what a step computed are numbers.

    Attributes:
        losses: Of each micro-batch of this process.
        norm: Of the gradient's norm, the same in every process.
    """

    losses: tuple[bool, ...]
    norm: bool


@dataclass
class StepRecord:
    """One optimizer step.

    Attributes:
        step: Steps done before it.
        micro_batches: What it learnt from, with the losses of the pairs, [B], on the device.
        norm: Of the gradient before clipping, [].
        known: What the CPU knows without asking: the learning rate and the like.
    """

    step: int
    micro_batches: list[tuple[PairBatch, Tensor]] = field(default_factory=list)
    norm: Tensor = field(default_factory=lambda: torch.zeros(()))
    known: dict[str, float] = field(default_factory=dict)
    _finite: list[Tensor] = field(default_factory=list)
    _sums: dict[tuple[str, ...], Tensor] = field(default_factory=dict)

    def add(self, batch: PairBatch, output: Any) -> None:
        """Notes a micro-batch and its `LossOutput`; nothing is computed that would have to be waited for."""
        self.micro_batches.append((batch, output.losses))
        self._finite.append(torch.isfinite(output.loss.detach()))
        if output.metrics:
            names = tuple(output.metrics)
            values = torch.stack([_wide(value) for value in output.metrics.values()])
            self._sums[names] = self._sums[names] + values if names in self._sums else values

    def flags(self) -> Tensor:
        """`Verdict` on the device, [micro-batches + 1], bool."""
        return torch.stack([*self._finite, torch.isfinite(self.norm)])

    def values(self, own: Mapping[str, float]) -> dict[str, Tensor]:
        """Means over the micro-batches and the norm, by name, on the device; with `own`, numbers of this process."""
        found: dict[str, Tensor] = {}
        for names, sums in self._sums.items():
            for name, value in zip(names, (sums / len(self.micro_batches)).unbind(), strict=True):
                found[name] = found[name] + value if name in found else value
        found["grad_norm"] = _wide(self.norm)
        if own:
            numbers = torch.tensor(list(own.values()), dtype=found["grad_norm"].dtype).to(self.norm.device)
            found |= dict(zip(own, numbers.unbind(), strict=True))
        return found


def read_verdicts(records: Sequence[StepRecord]) -> list[Verdict]:
    """Of each record, in one transfer."""
    flags = [record.flags() for record in records]
    read = torch.cat(flags).tolist()
    ends = [0, *torch.tensor([len(each) for each in flags]).cumsum(0).tolist()]
    return [Verdict(tuple(read[start : end - 1]), read[end - 1]) for start, end in pairwise(ends)]


def read_values(
    records: Sequence[StepRecord], own: Sequence[Mapping[str, float]], accelerator: Any
) -> list[dict[str, float]]:
    """What to log of each record: means over micro-batches and processes, and z's deviation from its two moments.

    Args:
        records: All processes have as many, with the same names.
        own: Numbers of this process beside each record, whose mean over processes is logged too.
        accelerator: Of the run.
    """
    named = [record.values(more) for record, more in zip(records, own, strict=True)]
    names = [sorted(values) for values in named]
    flat = torch.stack([values[name] for values, order in zip(named, names, strict=True) for name in order])
    mean = iter(accelerator.reduce(flat, reduction="mean").tolist())
    found = []
    for record, order in zip(records, names, strict=True):
        values = {name: next(mean) for name in order}
        if "z_square" in values:
            values["z_std"] = max(values.pop("z_square") - values["z_mean"] ** 2, 0.0) ** 0.5
        found.append(values | record.known)
    return found


def _wide(value: Tensor) -> Tensor:
    """In double precision, where the device has it."""
    return value.detach().float() if value.device.type == "mps" else value.detach().double()
