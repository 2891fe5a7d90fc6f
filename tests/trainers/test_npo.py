"""Diffusion-NPO is Diffusion-DPO on reversed pairs, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffalign.backbones import LoRA, load_policy
from diffalign.trainers.diffusion_dpo import DiffusionDPO
from diffalign.trainers.npo import NPO
from tests.trainers.golden import ANSWERS, REFERENCE, Batches, TablePolicy, golden_batch, swap


def test_its_loss_is_the_swapped_pairs_loss() -> None:
    """Check 7.5.1 and 7.1.4 on the golden pair: another answer table row first, the same bits."""
    policy = TablePolicy(ANSWERS.flip(0), REFERENCE.flip(0))
    npo, dpo = NPO(policy, beta=100.0), DiffusionDPO(policy, beta=100.0)
    losses = npo.loss(golden_batch()), dpo.loss(swap(golden_batch()))
    assert torch.equal(losses[0].losses, losses[1].losses)
    assert abs(float(losses[0].loss) - 0.954740) < 1e-6


@pytest.mark.slow
def test_three_steps_leave_the_weights_of_dpo_on_flipped_labels(tiny_pipeline: Path, batches: Batches) -> None:
    """Check 7.5.1: training NPO equals training DPO on a data set with its labels flipped."""
    weights = []
    for trainer_class, flip in ((NPO, False), (DiffusionDPO, True)):
        torch.manual_seed(0)
        policy = load_policy(str(tiny_pipeline), lora=LoRA(rank=2), train=True)
        trainer = trainer_class(policy, beta=1000.0, caption_dropout=0.0)
        optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=1e-3)
        for step in range(3):
            batch = batches(4, first=4 * step)
            optimizer.zero_grad()
            trainer.loss(swap(batch) if flip else batch).loss.backward()
            optimizer.step()
        weights.append([p.detach().clone() for p in policy.trainable_parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert any(float(p.abs().max()) > 0 for p in weights[0])
