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
from diffalign.checkpointing import Recompute, is_kept, recompute_activations
from diffalign.trainers import DiffusionDPO

Batches = Callable[[int], PairBatch]


class Watch(TorchDispatchMode):
    """Counts what "selective" keeps, convolutions apart, and the memory that all that was computed still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = self.convolved = 0
        self.made: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.kept += is_kept(func, args)
        self.convolved += func is torch.ops.aten.convolution.default
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


def step(policy: Any, batch: PairBatch, how: Recompute) -> tuple[int, Watch, Watch, dict[str, Tensor]]:
    """Bytes held for the backward pass, what was computed before it and in both passes, gradients."""
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
        held, forward = watch.bytes, copy.copy(watch)
        loss.backward()
    return held, forward, watch, {name: p.grad for name, p in policy.named_trainable()}


@pytest.mark.slow
def test_memory_falls_no_number_changes_and_selective_repeats_no_convolution(trained: Any, batches: Batches) -> None:
    plain, selective, whole = (step(trained, batches(2), how) for how in (False, "selective", True))
    assert whole[0] < selective[0] < plain[0]
    assert plain[1].convolved == selective[1].convolved == whole[1].convolved
    assert selective[2].convolved == plain[2].convolved < whole[2].convolved
    assert plain[2].kept < whole[2].kept
    for found in (selective, whole):
        assert found[3].keys() == plain[3].keys()
        assert all(torch.equal(found[3][name], gradient) for name, gradient in plain[3].items())


@pytest.mark.parametrize(("inner", "outer", "kept"), [(64, 16, True), (16, 64, False), (16, 16, False)])
def test_products_that_narrow_are_kept(inner: int, outer: int, kept: bool) -> None:
    left, right, bias = torch.zeros(8, inner), torch.zeros(inner, outer), torch.zeros(outer)
    assert is_kept(torch.ops.aten.mm.default, (left, right)) == kept
    assert is_kept(torch.ops.aten.addmm.default, (bias, left, right)) == kept


def test_what_is_cheap_is_computed_again() -> None:
    assert is_kept(torch.ops.aten.convolution.default, ())
    assert not is_kept(torch.ops.aten.native_group_norm.default, (torch.zeros(1),))
