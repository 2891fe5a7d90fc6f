"""Policies on the tiny pipeline, under training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffalign.backbones import LoRA, load_policy


@pytest.fixture
def lora_policy(tiny_pipeline: Path) -> Any:
    return load_policy(str(tiny_pipeline), lora=LoRA(rank=2), train=True)


@pytest.fixture
def full_policy(tiny_pipeline: Path) -> Any:
    return load_policy(str(tiny_pipeline), train=True)
