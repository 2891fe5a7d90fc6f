"""Shared fixtures: a tiny Stable Diffusion pipeline with random weights, saved in the published layout.

Nothing heavy is imported here: pytest-xdist's own process reads this file too, before it starts its workers.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")

import pytest

QUICK_FAMILIES = ("sd-epsilon",)
"""The others' contract is slow only because they are many."""

# Collecting the tests imports some thousand modules whose objects stay for good: looking for garbage among them takes
# a quarter of the start-up time, and later again and again. They are frozen once all are there.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # what is never collected is reported as leaked by some libraries, after pytest's last line


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker for a file, which builds its fixtures once; the contract test is shared out by family."""
    for item in items:
        family = getattr(item, "callspec", None) and item.callspec.params.get("tiny")  # type: ignore[attr-defined]
        if family is not None and str(family) not in QUICK_FAMILIES:
            item.add_marker(pytest.mark.slow)
        item.add_marker(pytest.mark.xdist_group(f"{item.location[0]} {family or ''}"))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Tests reach no address but this machine's own."""
    if request.node.get_closest_marker("network"):
        return
    import socket

    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> object:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost", "::1"):
            raise RuntimeError(f"a test tried to reach {address}")
        return connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny epsilon pipeline, 8x8 images."""
    from tests.backbones.families.sd import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny") / "pipeline", "epsilon")


@pytest.fixture(scope="session")
def tiny_v_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny v-prediction pipeline."""
    from tests.backbones.families.sd import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny") / "v_pipeline", "v_prediction")


@pytest.fixture(scope="session")
def batches() -> Callable[..., Any]:
    """`random_batch` of tests/tiny.py."""
    from tests.tiny import random_batch

    return random_batch


@pytest.fixture(scope="session")
def policies() -> Any:
    """`double_policy` and `move_away` of tests/tiny.py."""
    from tests.tiny import double_policy, move_away

    return SimpleNamespace(double=double_policy, move_away=move_away)
