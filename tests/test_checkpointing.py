"""Activations that are computed again: the same numbers, less memory, and with "selective" no matrix product twice."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffalign.backbones import LoRA, load_policy
from diffalign.batches import PairBatch
from diffalign.checkpointing import KEPT, Recompute, recompute_activations
from diffalign.trainers import DiffusionDPO

Batches = Callable[[int], PairBatch]


class Watch(TorchDispatchMode):
    """Counts the expensive operations, and the memory that what was computed so far still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.expensive = 0
        self.made: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.expensive += func in KEPT
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made[storage] = storage.nbytes()
        return result

    @property
    def bytes(self) -> int:
        return sum(self.made.values())


@pytest.fixture(params=["lora", "full"])
def trained(request: pytest.FixtureRequest, tiny_pipeline: Path, policies: Any) -> Any:
    """A policy whose weights have moved, with adapters or as a whole."""
    policy: Any = load_policy(str(tiny_pipeline), lora=LoRA(rank=3) if request.param == "lora" else None, train=True)
    policies.move_away(policy, 0.1)
    return policy


def step(policy: Any, batch: PairBatch, how: Recompute) -> tuple[int, int, int, dict[str, Tensor]]:
    """Bytes held for the backward pass, expensive operations of both passes, gradients."""
    policy = copy.deepcopy(policy)
    recompute_activations(policy.denoiser, how)
    # The reference's answers are known, so that only the policy's pass counts.
    trainer = DiffusionDPO(policy, beta=10.0)
    with torch.no_grad():
        states = trainer.noisy_states(batch)
        reference = trainer.reference_errors(states)
    with Watch() as watch:
        error, _ = trainer.errors(states, reference)
        loss = trainer.objective(trainer.margin(trainer.log_ratio(error, reference), states), states).mean()
        del error
        held, forward = watch.bytes, watch.expensive
        loss.backward()
    return held, forward, watch.expensive - forward, {name: p.grad for name, p in policy.named_trainable()}


@pytest.mark.slow
def test_memory_falls_no_number_changes_and_selective_repeats_nothing_expensive(trained: Any, batches: Batches) -> None:
    plain, selective, whole = (step(trained, batches(2), how) for how in (False, "selective", True))
    assert whole[0] < selective[0] < plain[0]
    assert plain[1] == selective[1] == whole[1]
    assert selective[2] == plain[2] < whole[2]
    for found in (selective, whole):
        assert found[3].keys() == plain[3].keys()
        assert all(torch.equal(found[3][name], gradient) for name, gradient in plain[3].items())
