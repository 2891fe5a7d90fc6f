"""Runs on an accelerator, and the same code on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def _own_accelerator() -> Iterator[None]:
    """Accelerate keeps precision and devices for the whole process; each test starts anew."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
