"""Shared fixtures: a tiny Stable Diffusion pipeline with random weights, saved in the published layout.

Nothing heavy is imported here: pytest-xdist's own process reads this file too, before it starts its workers.
"""

from __future__ import annotations

import gc
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")

import pytest

if TYPE_CHECKING:
    from tests.forks import Forks

QUICK_FAMILIES = ("sd-epsilon",)
"""The others' contract is slow only because they are many."""
LONGEST = ("test_wheel", "loop/test_processes", "test_processes", "shapes/test_build", "shapes/test_assets")
"""Files whose few tests take long: they go first, and the families last, so that no worker is left with a long one."""

# Collecting the tests imports some thousand modules whose objects stay for good: looking for garbage among them takes
# a quarter of the start-up time, and later again and again. They are frozen once all are there.
gc.disable()

FORKS = pytest.StashKey["Forks"]()


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.freeze()
    if "diffusers.pipelines.pipeline_utils" in sys.modules:
        from tests.read_once import install

        install()
    if any("forks" in getattr(item, "fixturenames", ()) for item in session.items):
        from tests.forks import Forks

        session.config.stash[FORKS] = Forks()
    gc.enable()
    gc.set_threshold(10_000, 20, 20)  # models of many small modules are made and dropped all the time


def pytest_unconfigure(config: pytest.Config) -> None:
    gc.unfreeze()  # what is never collected is reported as leaked by some libraries, after pytest's last line
    if FORKS in config.stash:
        config.stash[FORKS].close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the families that are slow, and puts the tests in order."""
    order = {}
    for item in items:
        file = item.nodeid.partition("::")[0]
        family = getattr(item, "callspec", None) and item.callspec.params.get("tiny")  # type: ignore[attr-defined]
        if family is not None and str(family) not in QUICK_FAMILIES:
            item.add_marker(pytest.mark.slow)
        name = Path(file).with_suffix("").as_posix().removeprefix("tests/")
        order[item] = LONGEST.index(name) if name in LONGEST else len(LONGEST) + (family is not None)
    items.sort(key=order.__getitem__)


def group(nodeid: str) -> str:
    """What one worker does: a file, whose fixtures it builds once; the contract test is shared out by family."""
    file, _, name = nodeid.partition("::")
    family = re.search(r"\[(.+?)(-lora|-full|-guidance-o\w+)?\]$", name)
    return f"{file} {family[1]}" if file.endswith("backbones/test_contract.py") and family else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Groups by our own rule: xdist 3.8 writes its marks' groups where pytest 9.2 does not read them any more."""
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    return ByGroup(config, log)


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
def forks(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Forks:
    """Starts functions in processes of their own; see tests/forks.py."""
    started = pytestconfig.stash[FORKS]
    started.folder = tmp_path_factory.mktemp("processes")
    return started


@pytest.fixture(scope="session")
def batches() -> Callable[..., Any]:
    """`random_batch` of tests/tiny.py."""
    from tests.tiny import random_batch

    return random_batch


@pytest.fixture(scope="module")
def policy(tiny_pipeline: Path, policies: Any) -> Any:
    """A tiny model with adapters, away from its reference; a file has its own, and may have another kind."""
    from diffalign.backbones import LoRA, load_policy

    policy: Any = load_policy(str(tiny_pipeline), lora=LoRA(rank=2), train=True)
    policies.move_away(policy)
    return policy


@pytest.fixture(scope="session")
def policies() -> Any:
    """`double_policy` and `move_away` of tests/tiny.py."""
    from tests.tiny import double_policy, move_away

    return SimpleNamespace(double=double_policy, move_away=move_away)
