"""Supervised fine-tuning on winners: one plain regression, whatever the network predicts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffalign import commands
from diffalign.batches import Conditioning
from diffalign.predictions import Prediction
from diffalign.trainers.sft import SFT
from tests.trainers.gaussian import SD, GaussianPolicy, random_pairs
from tests.trainers.golden import ANSWERS, REFERENCE, Batches, TablePolicy, golden_batch, gradients
from tests.trainers.winners import winners_config


def test_the_golden_winner() -> None:
    """The errors of check 7.1.2: 0.008125 of the policy and 0.011875 of the reference."""
    answers = ANSWERS[:1].clone().requires_grad_(True)
    output = SFT(TablePolicy(answers, REFERENCE[:1])).loss(golden_batch())
    assert float(output.metrics["loss"]) == pytest.approx(0.008125, abs=1e-12)
    assert float(output.metrics["model_mse"]) == pytest.approx(0.008125, abs=1e-12)
    assert float(output.metrics["ref_mse"]) == pytest.approx(0.011875, abs=1e-12)
    output.loss.backward()
    assert answers.grad is not None
    torch.testing.assert_close(answers.grad[0], torch.tensor([-0.05, 0.025, 0.05, -0.05], dtype=torch.float64))


@pytest.mark.parametrize("prediction", [Prediction.EPSILON, Prediction.V])
def test_the_target_is_the_networks_own(prediction: Prediction) -> None:
    """The loss by hand, pair by pair, with every pair's own timestep, noise and weight."""
    policy, batch = GaussianPolicy(prediction), random_pairs(5)
    batch = dataclasses.replace(batch, weight=torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0]))
    output = SFT(policy).loss(batch)
    expected = []
    for row, draw in enumerate(batch.draws):
        t = int(1000 * draw.uniform("timestep"))
        abar = SD.alphas_cumprod[t]
        x0, noise = batch.chosen[row], draw.normal("noise", (8,)).double()
        noisy = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
        target = noise if prediction is Prediction.EPSILON else abar.sqrt() * noise - (1 - abar).sqrt() * x0
        answer = policy.predict(noisy[None], torch.tensor([t]), Conditioning({"hidden": torch.zeros(1, 1)}))[0]
        expected.append((answer - target).square().mean())
    losses = torch.stack(expected)
    torch.testing.assert_close(output.losses, losses)
    torch.testing.assert_close(output.loss, (batch.weight * losses).mean())


def test_rejected_images_and_the_reference_may_be_missing() -> None:
    batch = random_pairs(3)
    without = dataclasses.replace(batch, rejected=torch.full_like(batch.rejected, float("nan")))
    policy = GaussianPolicy()
    trainer = SFT(policy, log_reference=False)
    trainer.reference = None  # type: ignore[assignment]
    output = trainer.loss(without)
    assert torch.equal(output.loss, SFT(policy).loss(batch).loss)
    assert set(output.metrics) == {"loss", "model_mse"}


@pytest.mark.slow
def test_gradients_reach_the_weights_and_lower_the_loss(lora_policy: Any, batches: Batches, policies: Any) -> None:
    policies.move_away(lora_policy)
    trainer, batch = SFT(lora_policy), batches(4)
    before = float(trainer.loss(batch).metrics["loss"])
    found = gradients(trainer, batch)
    with torch.no_grad():
        for name, parameter in lora_policy.named_trainable():
            parameter -= 0.01 * found[name]
    assert float(trainer.loss(batch).metrics["loss"]) < before


@pytest.mark.slow
def test_train_from_winners_to_weights(tiny_pipeline: Path, tmp_path: Path) -> None:
    """The command, on a folder without rejected images, with validation on winners set aside."""
    config = winners_config(tmp_path, tiny_pipeline, {"name": "sft"})
    commands.train(str(config), ["training.num_validation_pairs=2", "training.validation_steps=2"])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    validation = [row for row in rows if "validation/loss" in row]
    assert [row["step"] for row in validation] == [0, 2, 4]
    assert all(row["train/ref_mse"] > 0 for row in rows if "train/loss" in row)
    weights = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    assert any(
        float(tensor.abs().max()) > 0 for name, tensor in weights.items() if "lora.up" in name or "lora_B" in name
    )
