"""The pretended GPU refuses what a GPU refuses, and notes what would wait for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.devices import send
from tests.pretended_gpu import GPU, PretendedGPU


@pytest.mark.parametrize(
    "mistake",
    [
        lambda number: number + torch.ones(3),
        lambda number: torch.stack([number, torch.ones(3)]),
        lambda number: torch.stack([number.sum(), torch.tensor(1.0)]),
        lambda number: number.numpy(),
        lambda number: number.pin_memory(),
        lambda number: torch.randn(3, generator=torch.Generator(), device=GPU),
        lambda number: torch.nn.Linear(3, 1)(number),
    ],
    ids=["sum", "stack", "stacked numbers", "numpy", "pin", "generator", "network"],
)
def test_what_a_gpu_refuses_is_refused(mistake: Callable[[Tensor], Any]) -> None:
    with PretendedGPU().on():
        number = torch.zeros(3, device=GPU)
        with pytest.raises((RuntimeError, TypeError), match="device|cuda"):
            mistake(number)


@pytest.mark.parametrize(
    "look",
    [
        float,
        lambda number: number.expand(3).tolist(),
        lambda number: bool((number > 0).any()),
        lambda number: number[number > 0],
        lambda number: number.nonzero(),
        lambda number: torch.equal(number, number),
        lambda number: number.cpu(),
        lambda number: torch.ones(3).to(GPU),
        lambda number: torch.ones(3).to(GPU, non_blocking=True),  # not pinned
        lambda number: torch.ones(3).pin_memory().to(GPU),
        lambda number: torch.tensor([1.0], device=GPU),
        lambda number: torch.zeros(1).copy_(number),
        lambda number: number.copy_(torch.tensor(2.0)),
        lambda number: number.repeat_interleave(number.long()),
        lambda number: number.unique_consecutive(),
        lambda number: number[torch.tensor([0])],
    ],
)
def test_what_waits_is_noted(look: Callable[[Tensor], Any]) -> None:
    with PretendedGPU().on() as gpu:
        number = torch.ones(1, device=GPU)
        assert gpu.waits == []
        look(number)
    assert len(gpu.waits) == 1
    assert gpu.waits[0].startswith("test_pretended_gpu.py, ")


def test_what_does_not_wait_is_computed() -> None:
    with PretendedGPU().on() as gpu:
        there = send(torch.ones(3), GPU)
        there[1:] *= 2
        there = torch.cat([there, there.new_zeros(1), torch.arange(2, device=GPU)]).bfloat16().float() + 0.5
        assert float(torch.ones(3).sum()) == 3
        assert gpu.waits == []
        assert there.device == GPU
        assert there.tolist() == [1.5, 2.5, 2.5, 0.5, 0.5, 1.5]


def test_gradients_are_there_too() -> None:
    layer, gpu = torch.nn.Linear(2, 1), PretendedGPU()
    gpu.put(layer)
    with gpu.on():
        layer(torch.ones(1, 2, device=GPU)).sum().backward()
        weight = layer.weight
        torch.optim.SGD(layer.parameters(), lr=1.0).step()
        assert weight.grad is not None
        assert weight.grad.device == GPU
        assert weight.grad.tolist() == [[1.0, 1.0]]
