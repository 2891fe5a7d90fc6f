"""DDIM-InPO under training: gradients, batches, whose network inverts, and what is refused; checks 6 and 7."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from diffalign.backbones import LoRA
from diffalign.batches import NoisyStates, PairBatch
from diffalign.predictions import Prediction
from diffalign.schedules import FlowSchedule
from diffalign.trainers.inpo import InPO
from tests.trainers.gaussian import GaussianPolicy, inverted, random_pairs
from tests.trainers.golden import Batches, gradients

# --- 6: gradients and batches ----------------------------------------------------------------------------------------


class _Fed(InPO):
    """InPO at states that were computed before."""

    states: NoisyStates

    def noisy_states(self, batch: PairBatch) -> NoisyStates:
        return self.states


@pytest.mark.slow
@pytest.mark.parametrize("net", ["policy", "reference"])
def test_6_no_gradient_flows_through_the_inversion(lora_policy: Any, batches: Batches, policies: Any, net: str) -> None:
    """Check 7.4.6: gradients are those at constant states, and reach every trained tensor."""
    policies.move_away(lora_policy)
    trainer, fed, batch = InPO(lora_policy, inversion_net=net), _Fed(lora_policy), batches(2)
    states = trainer.noisy_states(batch)
    assert not states.noisy_latents.requires_grad
    assert not states.target.requires_grad
    fed.states = dataclasses.replace(
        states, noisy_latents=states.noisy_latents.detach().clone(), target=states.target.detach().clone()
    )
    found, expected = gradients(trainer, batch), gradients(fed, batch)
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.slow
def test_6_every_pair_goes_to_its_own_timestep(tiny_pipeline: Path, batches: Batches, policies: Any) -> None:
    """Check 7.4.6: a batch equals a loop over single pairs, with the noise of eta."""
    policy = policies.double(tiny_pipeline, lora=LoRA(rank=2))
    policies.move_away(policy)
    trainer = InPO(policy, eta=0.1)
    together = trainer.noisy_states(batches(4, dtype=torch.float64))
    assert len(set(together.timesteps.tolist())) == 4
    for i in range(4):
        single, rows = trainer.noisy_states(batches(1, first=i, dtype=torch.float64)), [i, 4 + i]
        assert torch.equal(single.timesteps, together.timesteps[rows])
        torch.testing.assert_close(single.noisy_latents, together.noisy_latents[rows], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(single.target, together.target[rows], rtol=1e-9, atol=1e-9)


def test_6_finished_samples_cost_nothing() -> None:
    """Two pairs at 150 and 402: both in two moves, one in three more."""
    policy = GaussianPolicy()
    inverted(InPO(policy), 150, 402)
    assert policy.told == [[101, 101] * 2, [150, 201] * 2, [301] * 2, [401] * 2, [402] * 2]


def test_half_precision_latents_are_inverted_in_float32() -> None:
    batch, trainer = random_pairs(2), InPO(GaussianPolicy())
    halves, exact = trainer.noisy_states(batch.to("cpu", torch.bfloat16)), trainer.noisy_states(batch)
    assert halves.noisy_latents.dtype == halves.target.dtype == torch.float32
    torch.testing.assert_close(halves.noisy_latents.double(), exact.noisy_latents, rtol=0.01, atol=0)


@pytest.mark.parametrize("eta", [0.0, 0.1])
def test_6_processes_that_must_call_together_get_the_same_states(monkeypatch: pytest.MonkeyPatch, eta: float) -> None:
    """Ten calls with all samples, whatever the timesteps: another process may need them."""
    policy, batch = GaussianPolicy(), random_pairs(3)
    alone = InPO(policy, eta=eta).noisy_states(batch)
    policy.told.clear()
    monkeypatch.setattr(InPO, "_calls_together", lambda _: True)
    together = InPO(policy, eta=eta).noisy_states(batch)
    assert [len(told) for told in policy.told] == [6] * 10
    assert torch.equal(alone.noisy_latents, together.noisy_latents)


def test_6_who_must_call_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several processes with sharded weights, or with buffers under DDP; nobody else."""

    class Wrapper(DistributedDataParallel):
        def __init__(self, module: nn.Module) -> None:
            nn.Module.__init__(self)
            self.module = module

    plain, buffered = nn.Linear(1, 1), nn.BatchNorm1d(1)
    trainer = InPO(GaussianPolicy())
    assert trainer._calls_together() is False
    for count, wrapped, expected in (
        (1, plain, False),
        (2, plain, True),
        (2, Wrapper(plain), False),
        (2, Wrapper(buffered), True),
    ):
        group = SimpleNamespace(
            is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda c=count: c
        )
        monkeypatch.setattr("diffalign.trainers.inpo.distributed", group)
        trainer.policy.wrapped = wrapped
        assert trainer._calls_together() is expected


# --- 7, and whose network inverts ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_7_halves_share_the_timestep_and_nothing_else(lora_policy: Any, batches: Batches) -> None:
    """Check 7.4.7; and another rejected image leaves the chosen one's states alone."""
    trainer, batch = InPO(lora_policy), batches(3)
    states = trainer.noisy_states(batch)
    assert torch.equal(states.timesteps[:3], states.timesteps[3:])
    assert bool((states.noise[:3] - states.noise[3:]).flatten(1).abs().amax(1).gt(1e-3).all())
    other = trainer.noisy_states(dataclasses.replace(batch, rejected=batch.rejected + 1))
    torch.testing.assert_close(other.noisy_latents[:3], states.noisy_latents[:3], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(other.noisy_latents[3:], states.noisy_latents[3:], atol=1e-2)


@pytest.mark.slow
def test_the_reference_inverts_as_the_untrained_policy_does(
    tiny_pipeline: Path, batches: Batches, policies: Any
) -> None:
    policy, batch = policies.double(tiny_pipeline, lora=LoRA(rank=2)), batches(3, dtype=torch.float64)
    by = {net: InPO(policy, inversion_net=net) for net in ("policy", "reference")}
    untrained = by["policy"].noisy_states(batch).noisy_latents
    policies.move_away(policy)
    torch.testing.assert_close(by["reference"].noisy_states(batch).noisy_latents, untrained, rtol=1e-9, atol=1e-9)
    assert float((by["policy"].noisy_states(batch).noisy_latents - untrained).abs().max()) > 1e-4


@pytest.mark.slow
def test_a_small_step_raises_the_margin(lora_policy: Any, batches: Batches, policies: Any) -> None:
    policies.move_away(lora_policy)
    trainer, batch = InPO(lora_policy, beta=100.0, inversion_net="reference"), batches(1)
    before = trainer.loss(batch)
    before.loss.backward()
    with torch.no_grad():
        for parameter in lora_policy.trainable_parameters():
            parameter -= 1e-4 * parameter.grad
    assert float(trainer.loss(batch).metrics["z_mean"]) > float(before.metrics["z_mean"])


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", [Prediction.VELOCITY, Prediction.SAMPLE])
def test_models_it_cannot_invert_are_refused_by_what_they_predict(prediction: Prediction) -> None:
    with pytest.raises(
        ValueError, match=f"InPO cannot train a model that predicts '{prediction}'; it knows epsilon, v"
    ):
        InPO(GaussianPolicy(prediction))


def test_models_without_a_chain_or_with_a_short_one_are_refused() -> None:
    policy = GaussianPolicy()
    policy.schedule = FlowSchedule()
    with pytest.raises(ValueError, match="on a discrete chain, and this model has a FlowSchedule; train flows"):
        InPO(policy)
    with pytest.raises(ValueError, match="inversion_steps must be at most 500, half of the model's noise levels"):
        InPO(GaussianPolicy(), inversion_steps=501)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timestep_sampling": "turbo"}, "has no path of small steps to invert; use diffusion_dpo"),
        ({"timestep_sampling": "turbo_informative"}, "has no path of small steps to invert; use diffusion_dpo"),
        ({"timestep_sampling": "logit_normal"}, "DDIM does not invert; use uniform, or train with flow_dpo"),
        ({"inversion": "renoise"}, "'exact' or 'release'"),
        ({"inversion_net": "ema"}, "'policy' or 'reference'"),
        ({"inversion_steps": 0}, "greater than or equal to 1"),
        ({"eta": -0.1}, "greater than or equal to 0"),
        ({"eta": 1.5}, "less than or equal to 1"),
    ],
)
def test_settings_without_meaning_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        InPO.Config(**options)


def test_the_start_up_line_says_how_it_inverts() -> None:
    line = InPO(GaussianPolicy(), beta=2000.0, inversion_net="reference", eta=0.1).describe()
    assert "kappa 1000 on mean errors" in line
    assert line.endswith("; exact inversion by the reference in at most 10 passes, eta 0.1")
