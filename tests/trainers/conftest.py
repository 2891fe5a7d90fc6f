"""Policies on the tiny pipeline, under training; loaded once, and copied for every test, which may change its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffalign.backbones import LoRA, load_policy
from tests.read_once import Mould


@pytest.fixture(scope="session")
def lora_mould(tiny_pipeline: Path) -> Mould:
    return Mould(load_policy(str(tiny_pipeline), lora=LoRA(rank=2), train=True))


@pytest.fixture(scope="session")
def full_mould(tiny_pipeline: Path) -> Mould:
    return Mould(load_policy(str(tiny_pipeline), train=True))


@pytest.fixture
def lora_policy(lora_mould: Mould) -> Any:
    return lora_mould.copy()


@pytest.fixture
def full_policy(full_mould: Mould) -> Any:
    return full_mould.copy()
