"""Flow-DPO: the pair loss on velocities, and what a beta that depends on time changes."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from diffalign.batches import PairBatch
from diffalign.losses import per_sample_error
from diffalign.predictions import Prediction
from diffalign.randomness import Draw
from diffalign.schedules import FlowSchedule
from diffalign.timesteps import draw_timesteps
from diffalign.trainers.diffusion_dpo import DiffusionDPO
from diffalign.trainers.flow_dpo import FlowDPO
from tests.trainers.golden import ANSWERS, REFERENCE, TARGETS, TablePolicy, golden_batch


def _policy(prediction: Prediction = Prediction.VELOCITY) -> TablePolicy:
    return TablePolicy(ANSWERS.clone().requires_grad_(True), REFERENCE, prediction)


def _at(monkeypatch: pytest.MonkeyPatch, t: float) -> None:
    """Puts every pair at flow time t."""
    monkeypatch.setattr(
        "diffalign.trainers.base.draw_timesteps", lambda _, draws, __: torch.full((len(draws),), 1000 * t).double()
    )


def test_constant_beta_is_the_pair_loss() -> None:
    flow, pair = FlowDPO(_policy(), beta=100.0), DiffusionDPO(_policy(), beta=100.0)
    batch = golden_batch()
    assert torch.equal(flow.loss(batch).losses, pair.loss(batch).losses)
    assert float(flow.loss(batch).losses) == pytest.approx(0.485990, abs=1e-6)


@pytest.mark.parametrize("t", [0.3, 0.75])
def test_a_beta_in_time_is_the_loss_on_noise(monkeypatch: pytest.MonkeyPatch, t: float) -> None:
    """Check 7.6.2: with beta (1 - t)^2 it equals the loss of noise = x_t + (1 - t) velocity."""
    _at(monkeypatch, t)
    batch = golden_batch()
    loss = float(FlowDPO(_policy(), beta=100.0, beta_schedule="timestep").loss(batch).losses)
    latents = torch.cat([batch.chosen, batch.rejected])
    noise = latents[:1] + TARGETS[:1]
    noisy = (1 - t) * latents + t * noise
    errors = [per_sample_error(noisy + (1 - t) * velocity, noise.expand(2, -1)) for velocity in (ANSWERS, REFERENCE)]
    difference = errors[0] - errors[1]
    assert loss == pytest.approx(float(torch.nn.functional.softplus(50 * (difference[0] - difference[1]))), abs=1e-12)


def test_a_beta_in_time_vanishes_at_pure_noise_and_is_whole_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check 7.6.3."""
    gradients = {}
    for t in (0.0, 1.0):
        _at(monkeypatch, t)
        for schedule in ("constant", "timestep"):
            policy = _policy()
            FlowDPO(policy, beta=100.0, beta_schedule=schedule).loss(golden_batch()).loss.backward()
            gradients[t, schedule] = policy.answers.grad
    assert torch.equal(gradients[0.0, "timestep"], gradients[0.0, "constant"])
    assert float(gradients[1.0, "timestep"].abs().max()) == 0.0
    assert float(gradients[1.0, "constant"].abs().max()) > 0.0


def test_the_default_law_is_stable_diffusion_3s() -> None:
    """Check 7.6.8: on the table of shift 3, P(sigma > 0.5) = Phi(ln 3) = 0.864, and the median is 0.75."""
    law = FlowDPO(_policy()).config.timestep_sampling
    schedule = FlowSchedule(shift=3.0)
    sigmas = schedule.scales(draw_timesteps(schedule, [Draw(0, 0, f"{i}") for i in range(4000)], law))[1]
    assert float((sigmas > 0.5).double().mean()) == pytest.approx(0.864, abs=0.02)
    assert float(sigmas.median()) == pytest.approx(0.75, abs=0.02)
    table = schedule.timestep_of_index(torch.tensor([0, 250, 500, 750, 999])) / 1000
    assert table.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0.002994], abs=1e-6)


def test_only_flows_are_trained() -> None:
    with pytest.raises(ValueError, match="FlowDPO cannot train a model that predicts 'epsilon'; it knows velocity"):
        FlowDPO(_policy(Prediction.EPSILON))
    with pytest.raises(ValidationError, match="'constant' or 'timestep'"):
        FlowDPO(_policy(), beta_schedule="linear")


def test_metrics_show_the_z_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    _at(monkeypatch, 0.5)
    batch: PairBatch = golden_batch()
    output = FlowDPO(_policy(), beta=100.0, beta_schedule="timestep").loss(batch)
    assert float(output.metrics["z_mean"]) == pytest.approx(0.46875 / 4)
    assert float(output.losses) == pytest.approx(math.log1p(math.exp(-0.46875 / 4)))
