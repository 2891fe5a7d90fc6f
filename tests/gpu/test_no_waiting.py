"""On a GPU, torch itself refuses whatever makes the CPU wait for it between two readings.

What happens here happens on a CPU too, in `tests/loop/test_sync_steps.py`, where nothing refuses it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.methods import METHODS, learn

STEPS = 8

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; this machine has none")


class Strict:
    """A source after whose first two batches nothing may wait, until the last step is begun."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def batch(self, step: int, micro_step: int) -> Any:
        torch.cuda.set_sync_debug_mode("error" if 2 <= step < STEPS - 1 else "default")
        return self.source.batch(step, micro_step).pin_memory()

    def update(self, step: int) -> None:
        self.source.update(step)


@pytest.fixture
def debug_mode() -> Iterator[None]:
    yield
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.usefixtures("debug_mode")
def test_steps_between_two_readings_never_wait(tmp_path: Path, name: str) -> None:
    assert len(learn(name, tmp_path, STEPS, Strict)) == STEPS
