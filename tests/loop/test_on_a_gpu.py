"""A whole run where everything is on a GPU, a pretended one: the CPU's numbers, and no waiting between two readings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import PartialState

from diffalign.loop import fit, make_accelerator
from tests.loop.results import same, weights_file
from tests.pretended_gpu import GPU, PretendedGPU

STEPS, TOGETHER = 8, 4
SETTINGS = {
    "max_train_steps": STEPS,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "sync_steps": TOGETHER,
    "checkpointing_steps": TOGETHER,
    "validation_steps": TOGETHER,
    "use_ema": True,
    "fused_optimizer": True,
}


class Noting:
    """A source that notes how often something had waited when a step asked for its batch."""

    def __init__(self, source: Any, gpu: PretendedGPU) -> None:
        self.source, self.gpu, self.before = source, gpu, {}  # type: ignore[var-annotated]

    def batch(self, step: int, micro_step: int) -> Any:
        self.before.setdefault(step, len(self.gpu.waits))
        return self.source.batch(step, micro_step).pin_memory()

    def update(self, step: int) -> None:
        self.source.update(step)


def run_on(gpu: PretendedGPU, trainer: Any, source: Any, config: Any) -> tuple[Path, Noting]:
    policy = trainer.policy
    policy.free_encoders()
    gpu.put(policy.denoiser, policy._frozen)
    accelerator = make_accelerator(config)
    for state in (accelerator.state, PartialState()):
        state.device = GPU
    noting = Noting(source, gpu)
    with gpu.on():
        folder = fit(trainer, noting, config, accelerator=accelerator, validate=lambda step: {"step": float(step)})
    return folder, noting


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def weights_in(folder: Path) -> Path:
    """Where a run's trained weights lie."""
    return folder / "unet" if (folder / "unet").is_dir() else folder


@pytest.mark.slow
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_run_on_a_gpu_is_the_run_on_the_cpu(start: Any, lora: bool) -> None:
    how = SETTINGS if lora else SETTINGS | {"lora": None}
    cpu = fit(*start("cpu", **how), validate=lambda step: {"step": float(step)})
    gpu = PretendedGPU()
    folder, noting = run_on(gpu, *start("gpu", **how))
    assert losses(folder) == pytest.approx(losses(cpu), abs=1e-6)
    assert len(losses(folder)) == STEPS
    assert same(weights_file(weights_in(folder)), weights_file(weights_in(cpu)))
    for step in range(1, STEPS):
        waited = gpu.waits[noting.before[step - 1] : noting.before[step]]
        assert step in (1, TOGETHER) or waited == []
    assert gpu.waits, "the readings themselves wait"
