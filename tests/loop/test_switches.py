"""Every switch that makes a step faster or smaller: the same losses and gradients as without it.

`trainer.reference: cached` has a file of its own, tests/trainers/test_reference_errors.py, and so have `sync_steps`
(test_sync_steps.py), whole compilation (tests/test_estimate.py) and several processes (test_processes.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.backbones import inspect_model
from diffalign.config import RunConfig
from diffalign.data import EncodedPairs, PairSource
from diffalign.loop import fit
from diffalign.trainers import DiffusionDPO
from diffalign.training import training_policy
from tests.loop.results import column

ROUNDING = 2e-4
"""Of losses and norms of gradients, relative: what another order of summation leaves after three steps."""
SWITCHES: dict[str, dict[str, Any]] = {
    "channels_last": {"model": {"channels_last": True}},
    "gradient_checkpointing": {"model": {"gradient_checkpointing": True}, "exact": True},
    "selective checkpointing": {"model": {"gradient_checkpointing": "selective"}, "exact": True},
    "compiled blocks": {"model": {"torch_compile": "blocks", "torch_compile_backend": "eager"}},
    "fused optimizer": {"training": {"fused_optimizer": True}},
    "read several steps at once": {"training": {"fused_optimizer": True, "sync_steps": 3}},
    "no reading ahead": {"source": {"prefetch": False}, "exact": True},
    "half the batch twice": {"training": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}},
}


def losses(
    pipeline: Path, encoded: EncodedPairs, folder: Path, lora: bool, switch: dict[str, Any]
) -> list[list[float]]:
    """Loss and gradient norm of three steps."""
    config = RunConfig.model_validate(
        {
            "output_dir": str(folder),
            "model": {
                "pretrained_model_name_or_path": str(pipeline),
                "lora": {"rank": 2} if lora else None,
                **switch.get("model", {}),
            },
            "training": {
                "output_dir": str(folder),
                "max_train_steps": 3,
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-3,
                **switch.get("training", {}),
            },
        }
    )
    policy = training_policy(config, inspect_model(str(pipeline)), torch.device("cpu"))
    training = config.training
    source = PairSource(
        encoded,
        seed=5,
        batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        **switch.get("source", {}),
    )
    fit(DiffusionDPO(policy, beta=500.0), source, training)
    return [column(folder, "loss"), column(folder, "grad_norm")]


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch's own, of a block's input
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_no_switch_changes_what_is_learnt(
    tiny_pipeline: Path, encoded: EncodedPairs, tmp_path: Path, lora: bool
) -> None:
    plain = losses(tiny_pipeline, encoded, tmp_path / "plain", lora, {})
    assert plain[0][0] != plain[0][2], "the steps moved the model"
    for name, switch in SWITCHES.items():
        if not lora and "torch_compile" in switch.get("model", {}):
            continue  # seconds of capturing, of the same blocks
        found = losses(tiny_pipeline, encoded, tmp_path / name.replace(" ", "_"), lora, switch)
        if switch.get("exact"):
            assert found == plain, name
        else:
            assert found[0] == pytest.approx(plain[0], rel=ROUNDING), name
            assert found[1] == pytest.approx(plain[1], rel=ROUNDING * 10), name
