"""On a GPU, torch itself refuses whatever makes the CPU wait for it between two readings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.steps import RandomPairs
from diffalign.backbones import LoRA, load_policy
from diffalign.config import TrainingConfig
from diffalign.loop import fit
from diffalign.trainers import DiffusionDPO

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; this machine has none")


class Strict:
    """A source after whose first two batches nothing may wait, until the last step is begun."""

    def __init__(self, source: Any, last: int) -> None:
        self.source, self.last = source, last

    def batch(self, step: int, micro_step: int) -> Any:
        torch.cuda.set_sync_debug_mode("error" if 2 <= step < self.last else "default")
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
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.usefixtures("debug_mode")
def test_steps_between_two_readings_never_wait(tiny_pipeline: Path, tmp_path: Path, lora: bool) -> None:
    policy: Any = load_policy(str(tiny_pipeline), lora=LoRA(rank=2) if lora else None, train=True, device="cuda")
    embedded = {name: t.cpu() for name, t in policy.encode_prompts([""]).tensors.items()}
    policy.free_encoders()
    source = RandomPairs(policy.latent_shape, embedded, batch_size=2)
    config = TrainingConfig(
        output_dir=str(tmp_path), max_train_steps=8, sync_steps=8, checkpointing_steps=8, fused_optimizer=True
    )
    fit(DiffusionDPO(policy, beta=500.0), Strict(source, last=7), config)
    assert (tmp_path / "metrics.jsonl").read_text().count('"train/loss"') == 8
