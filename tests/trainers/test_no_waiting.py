"""No method's loss, backward pass or update asks the device for anything, on one that is not there.

See `tests.elsewhere`. That no family's network does is in `tests/test_steps_on_a_gpu.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.batches import Conditioning
from diffalign.devices import send, send_like
from tests.elsewhere import DEVICE, Elsewhere, There
from tests.methods import METHODS, Method, move


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def step(method: Method, root: Path) -> list[str]:
    """Where a step of the method waits."""
    trainer, batch = method.start(root)
    with Elsewhere() as device:
        move(trainer, DEVICE)
        trainer.begin(0, root)
        trainer.loss(batch.to(DEVICE)).loss.backward()  # what is made once
        device.places.clear()
        output = trainer.loss(batch.to(DEVICE))
        output.loss.backward()
        trainer.update(1)
        assert {value.device for value in (output.loss, output.losses, *output.metrics.values())} == {DEVICE}
        return device.places


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_step_waits_for_nothing(name: str, folders: Path) -> None:
    assert step(METHODS[name], folders) == []


def waits(device: Elsewhere, call: Any) -> bool:
    device.places.clear()
    call()
    return bool(device.places)


def test_the_device_that_is_not_there_notices_who_waits() -> None:
    numbers, rows = torch.arange(6.0), torch.tensor([2, 0])
    with Elsewhere() as device:
        far = send(numbers, DEVICE)
        assert isinstance(far, There)
        assert far.device == DEVICE
        assert device.places == []
        near = {
            "item": lambda: far.sum().item(),
            "bool": lambda: bool((far > 1).any()),
            "list": lambda: far.tolist(),
            "to": lambda: numbers.to(DEVICE),
            "back": lambda: far.cpu(),
            "rows": lambda: far[rows],
            "mask": lambda: far[far > 1],
            "nonzero": lambda: far.nonzero(),
            "put": lambda: far.clone().__setitem__(rows, 0.0),
        }
        assert [name for name, call in near.items() if not waits(device, call)] == []
        fine = {
            "send": lambda: send_like(rows, far),
            "rows": lambda: Conditioning({"hidden": far})[rows],
            "slice": lambda: far[1:3],
            "where": lambda: torch.where(far > 1, far, 0.0),
            "made": lambda: torch.zeros(3, device=DEVICE) + far[:3],
        }
        assert [name for name, call in fine.items() if waits(device, call)] == []
        with pytest.raises(RuntimeError, match="on the CPU and elsewhere"):
            far + numbers
        total = (far * far).sum()
    assert total.inner == 55  # type: ignore[attr-defined]
