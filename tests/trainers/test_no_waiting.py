"""No method's loss, backward pass or update waits for the GPU, on a pretended one.

That no family's network does is in `tests/backbones/test_on_a_gpu.py`, that the loop does not in
`tests/loop/test_on_a_gpu.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.methods import METHODS
from tests.pretended_gpu import GPU, PretendedGPU


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def networks(trainer: Any) -> list[Any]:
    """The denoiser, and the reference's own if it has one."""
    return [trainer.policy.denoiser, getattr(trainer.policy, "_frozen", None)]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_step_waits_for_nothing(name: str, folders: Path) -> None:
    trainer, batch = METHODS[name].start(folders)
    gpu = PretendedGPU()
    gpu.put(*networks(trainer))
    with gpu.on():
        trainer.begin(0, folders)
        trainer.loss(batch.to(GPU)).loss.backward()  # what is made once
        gpu.waits.clear()
        output = trainer.loss(batch.to(GPU))
        output.loss.backward()
        trainer.update(1)
        assert {value.device for value in (output.loss, output.losses, *output.metrics.values())} == {GPU}
    assert gpu.waits == []


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_step_gives_the_numbers_of_the_cpu(name: str, folders: Path) -> None:
    torch.manual_seed(0)
    trainer, batch = METHODS[name].start(folders)
    trainer.begin(0, folders)
    expected = trainer.loss(batch).losses.tolist()
    torch.manual_seed(0)
    trainer, batch = METHODS[name].start(folders)
    gpu = PretendedGPU()
    gpu.put(*networks(trainer))
    with gpu.on():
        trainer.begin(0, folders)
        assert trainer.loss(batch.to(GPU)).losses.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
