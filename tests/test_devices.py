"""Where models run: "auto" is the accelerator that is there, and a process of several takes its own."""

from __future__ import annotations

import pytest
import torch

from diffalign.devices import pick_device, pinned, resolve_device


def test_auto_is_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu") == torch.device(pick_device())
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert resolve_device("auto") == torch.device("mps")
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == torch.device("cpu")


def test_processes_take_the_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert resolve_device("auto") == torch.device("cuda:1")


def test_expanded_tensors_can_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CUDA: `pin_memory` fills memory of the same strides, which overlap in an expanded tensor."""

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride()).copy_(tensor)

    row = torch.arange(3.0)[None].expand(4, 3)
    with pytest.raises(RuntimeError, match="single memory location"):
        pin_memory(row)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    assert torch.equal(pinned(row), row)
    whole = torch.arange(6.0).reshape(2, 3)
    assert pinned(whole).stride() == whole.stride()
