"""Whole commands on a machine whose GPU is pretended: draw and score pairs, train, evaluate; rollouts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from diffalign import commands
from diffalign.devices import pick_device
from tests.pretended_gpu import PretendedGPU

SMALL = (
    "training.max_train_steps=3",
    "training.checkpointing_steps=2",
    "training.per_device_train_batch_size=2",
    "training.num_validation_pairs=0",
    "training.validation_steps=0",
    "sampling.num_inference_steps=2",
    "evaluation.num_prompts=6",
)
PAIRS = ("pairs.num_prompts=6", "pairs.num_images_per_prompt=2")
ROLLOUTS = ("rollout.prompts_per_round=2", "rollout.num_images_per_prompt=2")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedGPU]:
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cuda:0")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    # which asks the driver whether a graph is being recorded
    monkeypatch.setattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda self: None)
    for module in list(sys.modules.values()):
        if getattr(module, "pick_device", None) is pick_device:
            monkeypatch.setattr(module, "pick_device", lambda: "cuda:0")
    with PretendedGPU().on() as gpu:
        yield gpu


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "settings"),
    [("demo", PAIRS), ("shapes_flow_dpo", PAIRS), ("shapes_d3po", ROLLOUTS)],
    ids=["demo", "flow_dpo", "d3po"],
)
def test_from_a_base_model_to_an_evaluation(
    config: str, settings: tuple[str, ...], tmp_path: Path, gpu: PretendedGPU
) -> None:
    path, everything = f"configs/{config}.yaml", [f"output_dir={tmp_path}", *SMALL, *settings]
    if settings is PAIRS:
        commands.pairs(path, everything)
    commands.train(path, everything)
    commands.evaluate(path, everything)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sum("train/loss" in line for line in lines) == 3
    assert (tmp_path / "evaluation" / "comparison.json").is_file()
    assert any(wait.startswith("step_records.py") for wait in gpu.waits), "numbers came from the GPU"
