"""What a training step at real widths holds in memory, predicted without a GPU: `python -m benchmarks.memory`.

For a batch of one pair: weights, reference, gradients and optimizer, whose sizes follow from the configurations, and
what the forward pass keeps for the backward pass, counted on fake tensors (`benchmarks/activations.py`): all of it,
with gradient checkpointing, and with selective checkpointing. The sum is an upper bound of what these hold at one time:
gradients come while activations go. Predicted, not measured: what operations need while they run and the allocator's
slack come on top.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.activations import Activations, count
from benchmarks.architectures import Architecture
from benchmarks.building import build
from benchmarks.machine import machine
from benchmarks.published_widths import PUBLISHED
from benchmarks.records import RESULTS, publish
from benchmarks.tiny_widths import TINY
from diffalign.checkpointing import Recompute
from diffalign.config import TrainingConfig
from diffalign.estimate import optimizer_bytes

GB = 10**9
PAIR = 2
"""Samples of a batch."""
WAYS: tuple[tuple[str, Recompute], ...] = (("all kept", False), ("checkpointing", True), ("selective", "selective"))
"""What happens to activations, under the table's names."""


NOTE = """GB (10^9 bytes) for one pair in bf16; predicted, not measured. Activations include the rounded copies of
weights that autocast makes and, where blocks are computed again, the largest of them. "again": the share of a forward
pass's multiplications that the backward pass makes a second time."""


@dataclass(frozen=True)
class Plan:
    """What is trained and how.

    Attributes:
        architecture: Name in `benchmarks/published_widths.py`.
        mode: "lora" or "full".
        optimizer: As `training.optimizer`.
        aim: Gigabytes (10^9 bytes) it should need less than; None without an aim.
        cached: Whether the reference's errors are cached, and its own weights wait in the CPU's memory.
    """

    architecture: str
    mode: Literal["lora", "full"]
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    aim: float | None = None
    cached: bool = False


PLANS = (
    Plan("sdxl-1024", "lora", aim=12.0),
    Plan("sd15-512", "full", aim=16.0),
    Plan("sd15-512", "full", cached=True, aim=16.0),
    Plan("sd15-512", "full", "adamw_8bit", aim=16.0),
    Plan("sd15-512", "lora"),
    Plan("sd35m-512", "lora"),
    Plan("sd35m-1024", "lora"),
)


def held(architecture: Architecture, plan: Plan, dtype: torch.dtype = torch.bfloat16) -> dict[str, int]:
    """Bytes that a training step holds beside activations, by part.

    Args:
        architecture: What is trained.
        plan: How.
        dtype: Of the weights that are not trained.
    """
    policy = build(architecture, lora=plan.mode == "lora", dtype=dtype, device="meta")
    trained: list[Tensor] = [*policy.trainable_parameters()]
    own = {id(parameter) for parameter in trained}
    frozen = [*(p for p in policy.denoiser.parameters() if id(p) not in own)]
    reference = [] if policy._frozen is None or plan.cached else [*policy._frozen.parameters()]
    return {
        "frozen weights": _bytes(frozen),
        "trained weights": _bytes(trained),
        "reference copy": _bytes(reference),
        "gradients": _bytes(trained),
        "optimizer": optimizer_bytes(TrainingConfig(optimizer=plan.optimizer), trained),
    }


def predict(architecture: Architecture, plan: Plan, ways: Mapping[str, Activations]) -> dict[str, Any]:
    """A plan's record: parts that are held, and activations of a pair by how they are kept.

    Args:
        architecture: What is trained.
        plan: How.
        ways: Activations of a pair; see `activations`.
    """
    parts = held(architecture, plan)
    return {
        "architecture": architecture.name,
        "mode": f"{plan.mode}, reference cached" if plan.cached else plan.mode,
        "optimizer": plan.optimizer,
        "aim_gb": plan.aim,
        "held": parts,
        "activations": {
            name: {"kept": one.kept, "largest_block": one.largest_block, "rounded_weights": one.rounded}
            for name, one in ways.items()
        },
        "recomputed": {name: one.recomputed for name, one in ways.items()},
        "together": {name: sum(parts.values()) + one.peak + one.rounded for name, one in ways.items()},
    }


def activations(architecture: Architecture, mode: str) -> dict[str, Activations]:
    """What a pair's forward pass leaves behind, by the names of `WAYS`; some ten seconds each for SDXL."""
    return {name: count(architecture, lora=mode == "lora", samples=PAIR, recompute=how) for name, how in WAYS}


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The records as Markdown, in GB of 10^9 bytes."""
    ways = list(records[0]["activations"])
    head = ["model", "mode", "optimizer", "weights", "reference", "gradients", "moments"]
    for way in ways:
        head += [f"activations, {way}", f"together, {way}"]
    head += [f"again, {way}" for way in ways[1:]]
    lines = [f"| {' | '.join([*head, 'aim'])} |", f"| --- | --- | --- |{' ---: |' * (len(head) - 2)}"]
    for record in records:
        parts = record["held"]
        weights = parts["frozen weights"] + parts["trained weights"]
        sizes = [weights, parts["reference copy"], parts["gradients"], parts["optimizer"]]
        for way in ways:
            found = record["activations"][way]
            sizes += [sum(found.values()), record["together"][way]]
        aim = "" if record["aim_gb"] is None else f"< {record['aim_gb']:g}"
        names = [record["architecture"], record["mode"], record["optimizer"]]
        again = [f"{record['recomputed'][way]:.0%}" for way in ways[1:]]
        lines.append(f"| {' | '.join([*names, *(f'{size / GB:.2f}' for size in sizes), *again, aim])} |")
    return "\n".join([*lines, "", NOTE])


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.split("\n\n")[0])
    parser.add_argument("--tiny", action="store_true", help="small widths of each family, to try the script")
    parser.add_argument("--output", type=Path, default=RESULTS / "memory.json")
    options = parser.parse_args(arguments)
    known = TINY if options.tiny else PUBLISHED
    plans = [plan for plan in PLANS if plan.architecture in known]
    counted: dict[tuple[str, str], dict[str, Activations]] = {}  # the same for all optimizers
    records = []
    for plan in plans:
        architecture, key = known[plan.architecture], (plan.architecture, plan.mode)
        if key not in counted:
            counted[key] = activations(architecture, plan.mode)
        records.append(predict(architecture, plan, counted[key]))
    record = {"machine": machine("cpu"), "plans": records}
    publish(record, table(records), options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
