"""DDIM-InPO: the numbers of inversion on Gaussian data, and what its states are on a real UNet.

The number of each check stands in its test's docstring.
"""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffalign.backbones import LoRA, load_policy
from diffalign.batches import Conditioning, NoisyStates, PairBatch
from diffalign.predictions import Prediction
from diffalign.randomness import Draw
from diffalign.schedules import DiscreteSchedule, FlowSchedule, expand
from diffalign.trainers.diffusion_dpo import DiffusionDPO
from diffalign.trainers.inpo import InPO
from tests.trainers.golden import Batches, TablePolicy, double, gradients

SD = DiscreteSchedule.scaled_linear()
LN2 = float(torch.tensor(math.log(2)))


class GaussianPolicy(TablePolicy):
    """The perfect network for data N(0, variance I); its reference knows other data. It writes down what it is told."""

    def __init__(self, prediction: Prediction = Prediction.EPSILON, variance: float = 0.25) -> None:
        super().__init__(double([0.0]), double([0.0]), prediction)
        self.schedule, self.variance = SD, variance
        self.told: list[list[int]] = []

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        assert len(noisy_latents) == len(timesteps) == len(conditioning)
        self.told.append(timesteps.tolist())
        alphas, sigmas = SD.scales(timesteps.clamp(min=0))
        noise = expand(sigmas / (self.variance * alphas**2 + sigmas**2), noisy_latents) * noisy_latents
        latents = (noisy_latents - expand(sigmas, noise) * noise) / expand(alphas, noise)
        return self.prediction.target(latents, noise, alphas, sigmas)

    def frozen(self) -> GaussianPolicy:
        return GaussianPolicy(self.prediction, variance=2.0)


def _deviation(timestep: int) -> float:
    abar = float(SD.alphas_cumprod[timestep])
    return math.sqrt(0.25 * abar + 1 - abar)


def _draws(count: int, epoch: int = 0) -> tuple[Draw, ...]:
    return tuple(Draw(0, epoch, f"pair-{i}") for i in range(count))


def _inverted(trainer: InPO, *timesteps: int) -> list[float]:
    """Where clean latents of 1 arrive at each of the timesteps."""
    both = torch.tensor(timesteps).repeat(2)
    ones, nothing = torch.ones(len(both), 1, dtype=torch.float64), Conditioning({"hidden": torch.zeros(len(both), 1)})
    arrived = trainer.invert(ones, both, nothing, _draws(len(timesteps)))[:, 0]
    assert torch.equal(arrived[: len(timesteps)], arrived[len(timesteps) :])
    return arrived[: len(timesteps)].tolist()


def _walk(trainer: InPO, latents: Tensor, grid: list[int], draws: tuple[Draw, ...] = ()) -> Tensor:
    """All latents along one grid, the network told where each move goes."""
    levels = torch.tensor(grid)[:, None].expand(-1, len(latents))
    return trainer.walk(latents, levels, levels[1:], Conditioning({"hidden": torch.zeros(len(latents), 1)}), draws)


def _back(trainer: InPO, latents: Tensor, grid: list[int], conditioning: Conditioning) -> Tensor:
    """Plain DDIM sampling down the grid."""
    for level, cleaner in pairwise(reversed(grid)):
        now, then = (torch.full((len(latents),), value) for value in (level, cleaner))
        with torch.no_grad():
            noise = trainer.noise_seen(latents, now, conditioning)
        latents = trainer.solver.step(noise, latents, now, then).mean
    return latents


# --- 1: Gaussian data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", [Prediction.EPSILON, Prediction.V])
@pytest.mark.parametrize(("points", "value"), [(10, 1.974192), (50, 2.006524), (200, 1.993865)])
def test_1_the_network_is_told_where_a_move_goes(prediction: Prediction, points: int, value: float) -> None:
    """Check 7.4.1: the release's levels with that rule; the exact flow gives 1.986937."""
    trainer = InPO(GaussianPolicy(prediction))
    grid = [0, *range(1, 902, 1000 // points)]
    assert float(_walk(trainer, torch.ones(1, 1, dtype=torch.float64), grid)) == pytest.approx(value, abs=1e-6)
    assert _deviation(901) / _deviation(0) == pytest.approx(1.986937, abs=1e-6)


def test_1_the_release_tells_it_where_a_move_comes_from() -> None:
    """Check 7.4.1: 19 % of the amplitude are lost."""
    assert _inverted(InPO(GaussianPolicy(), inversion="release"), 901) == pytest.approx([1.605134], abs=1e-6)


@pytest.mark.parametrize("prediction", [Prediction.EPSILON, Prediction.V])
def test_1_paths_that_end_at_t(prediction: Prediction) -> None:
    """Check 7.4.1: four values of the default, all of one batch, beside those of the exact flow."""
    timesteps = 500, 777, 950, 999
    arrived = _inverted(InPO(GaussianPolicy(prediction)), *timesteps)
    assert arrived == pytest.approx([1.830879, 1.974660, 1.992129, 1.993069], abs=1e-6)
    exact = [_deviation(t) / _deviation(0) for t in timesteps]
    assert exact == pytest.approx([1.778465, 1.963493, 1.991268, 1.993961], abs=1e-6)


def test_1_more_moves_come_nearer_to_the_exact_flow() -> None:
    """From twenty on: with ten, errors of both signs cancel in part."""
    exact = _deviation(500) / _deviation(0)
    distances = [abs(_inverted(InPO(GaussianPolicy(), inversion_steps=n), 500)[0] - exact) for n in (20, 50, 100, 500)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] == pytest.approx(0.005481, abs=1e-6)


# --- 2: levels -------------------------------------------------------------------------------------------------------


def test_2_levels_and_what_the_network_is_told() -> None:
    """Check 7.4.2: the default ends at t, the release at the next level of its grid."""
    exact, release = InPO(GaussianPolicy()), InPO(GaussianPolicy(), inversion="release")
    ends = {0: 1, 1: 1, 2: 101, 101: 101, 102: 201, 402: 501, 901: 901, 902: 901, 999: 901}
    assert release.path(torch.tensor(list(ends)))[0][-1].tolist() == list(ends.values())
    for trainer, told in ((exact, [101, 201, 301, 401, 402]), (release, [-99, 1, 101, 201, 301, 401])):
        policy: Any = trainer.policy
        _inverted(trainer, 402)
        assert policy.told == [[t, t] for t in told]


@pytest.mark.slow
def test_2_noise_joins_latents_and_noisy_latents_where_the_networks_look(lora_policy: Any, batches: Batches) -> None:
    """Check 7.4.2: x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps*, in both modes."""
    for inversion in ("exact", "release"):
        states = InPO(lora_policy, inversion=inversion).noisy_states(batches(6))
        joined = lora_policy.schedule.add_noise(states.latents, states.noise, states.timesteps)
        torch.testing.assert_close(joined, states.noisy_latents, rtol=0, atol=1e-5)
        assert torch.equal(states.target, states.noise)
        assert states.noise.dtype == torch.float32


def test_2_both_networks_look_at_the_pairs_timestep() -> None:
    policy = GaussianPolicy()
    trainer = InPO(policy)
    reference: Any = trainer.reference
    batch = _random_pairs(3)
    timesteps = trainer.draw_timesteps(batch.draws).repeat(2).tolist()
    trainer.loss(batch)
    assert policy.told[-1] == reference.told[-1] == timesteps
    assert len(reference.told) == 1


def _random_pairs(count: int, size: int = 8, epoch: int = 0) -> PairBatch:
    draws = _draws(count, epoch)
    chosen, rejected = (torch.stack([d.normal(half, (size,)) for d in _draws(count)]).double() for half in "wl")
    return PairBatch(Conditioning({"hidden": torch.zeros(count, 1)}), chosen, rejected, torch.ones(count), draws)


@pytest.mark.parametrize(("inversion", "mean"), [("exact", 5.49), ("release", 6.38)])
def test_6_no_level_lies_outside_the_table(inversion: str, mean: float) -> None:
    """Check 7.4.6 for every timestep, with the mean number of forward passes."""
    trainer = InPO(GaussianPolicy(), inversion=inversion)
    timesteps = torch.arange(2 if inversion == "exact" else 0, 1000)
    levels, told = trainer.path(timesteps)
    assert (int(levels.min()), int(told.max())) == (0, 999 if inversion == "exact" else 801)
    assert int(levels.max()) == (999 if inversion == "exact" else 901)
    assert bool((levels.diff(dim=0) >= 0).all())
    moves = (levels.diff(dim=0) > 0).sum(0).double()
    assert (int(moves.min()), int(moves.max())) == (1, 10)
    assert float(moves.mean()) == pytest.approx(mean, abs=0.005)
    if inversion == "exact":
        assert torch.equal(levels[-1], timesteps)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [2, 251, 999]),
        ({"timestep_sampling": "refiner"}, [2, 51, 199]),
        ({"inversion": "release"}, [0, 250, 999]),
    ],
)
def test_timesteps_are_uniform_from_two(options: Any, expected: list[int]) -> None:
    class Fixed(Draw):
        def uniform(self, purpose: str) -> float:
            assert purpose == "timestep"
            return float(self.pair_id)

    draws = [Fixed(0, 0, str(value)) for value in (0.0, 0.25, 1 - 2**-53)]
    assert InPO(GaussianPolicy(), **options).draw_timesteps(draws).tolist() == expected


# --- 3: the loss -----------------------------------------------------------------------------------------------------


class _ForwardNoised(InPO):
    """InPO with the noise of Diffusion-DPO in place of inversion."""

    def invert(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, draws: Any) -> Tensor:
        noise = torch.stack([draw.normal("noise", latents.shape[1:]) for draw in draws]).repeat(2, 1, 1, 1)
        return self.schedule.add_noise(latents, noise.to(latents), timesteps)


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["tiny_pipeline", "tiny_v_pipeline"])
def test_3_with_forward_noise_it_is_diffusion_dpo(
    pipeline: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, batches: Batches, policies: Any
) -> None:
    """Check 7.4.3: to 1e-5, as eps* is recovered from x_t."""
    policy = load_policy(str(request.getfixturevalue(pipeline)), lora=LoRA(rank=2), train=True)
    policies.move_away(policy)
    inpo, dpo, batch = _ForwardNoised(policy, beta=100.0), DiffusionDPO(policy, beta=100.0), batches(6)
    monkeypatch.setattr("diffalign.trainers.base.draw_timesteps", lambda *_: inpo.draw_timesteps(batch.draws))
    losses = inpo.loss(batch).losses
    torch.testing.assert_close(losses, dpo.loss(batch).losses, rtol=1e-5, atol=0)
    assert float((losses - LN2).abs().min()) > 1e-4
    assert not torch.allclose(losses, InPO(policy, beta=100.0).loss(batch).losses, rtol=1e-3)


def test_3_a_fresh_adapter_starts_at_ln_2(lora_policy: Any, batches: Batches) -> None:
    """With either network for the inversion: policy and reference are the same."""
    for net in ("policy", "reference"):
        assert InPO(lora_policy, inversion_net=net).loss(batches(2)).losses.tolist() == [LN2, LN2]


# --- 4: there and back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("points", "value"), [(10, 0.802662), (50, 0.963315), (200, 0.991090)])
def test_4_round_trips_on_gaussian_data(points: int, value: float) -> None:
    """Check 7.4.4: up to 901 and down again on one grid."""
    trainer, start = InPO(GaussianPolicy()), torch.ones(1, 1, dtype=torch.float64)
    grid = [0, *range(1, 902, 1000 // points)]
    back = _back(trainer, _walk(trainer, start, grid), grid, Conditioning({"hidden": torch.zeros(1, 1)}))
    assert float(back) == pytest.approx(value, abs=1e-6)


@pytest.mark.slow
def test_4_round_trips_of_a_real_network_come_nearer_with_more_steps(
    tiny_pipeline: Path, batches: Batches, policies: Any
) -> None:
    """Check 7.4.4 on the tiny UNet, in double precision."""
    policy = policies.double(tiny_pipeline, lora=LoRA(rank=2))
    batch, distances = batches(2, dtype=torch.float64), []
    end = torch.full((4,), 901)
    for steps in (4, 16, 64):
        trainer = InPO(policy, inversion_steps=steps)
        latents, conditioning = torch.cat([batch.chosen, batch.rejected]), batch.conditioning.repeat(2)
        grid = trainer.path(end)[0][:, 0].unique().tolist()
        noisy = trainer.invert(latents, end, conditioning, batch.draws)
        distances.append(float((_back(trainer, noisy, grid, conditioning) - latents).square().mean()))
    assert distances[0] > 2 * distances[1] > 4 * distances[2] > 0


# --- 5: noise of its own ---------------------------------------------------------------------------------------------


def test_5_without_eta_nothing_is_drawn() -> None:
    """Check 7.4.5: another epoch brings another timestep, and no noise."""
    trainer, noisy = InPO(GaussianPolicy()), InPO(GaussianPolicy(), eta=0.1)
    batch, later = _random_pairs(2), _random_pairs(2, epoch=1)
    at = torch.full((4,), 555)
    latents, nothing = torch.cat([batch.chosen, batch.rejected]), batch.conditioning.repeat(2)
    plain = [trainer.invert(latents, at, nothing, b.draws) for b in (batch, later)]
    assert torch.equal(*plain)
    drawn = [noisy.invert(latents, at, nothing, b.draws) for b in (batch, later, batch)]
    assert torch.equal(drawn[0], drawn[2])
    assert bool((drawn[0] != drawn[1]).all())
    assert bool((drawn[0] != plain[0]).all())


@pytest.mark.parametrize(
    ("source", "destination", "deviation"), [(0, 1, 0.0021), (1, 101, 0.0041), (101, 201, 0.0261), (801, 901, 0.0776)]
)
def test_5_deviation_of_what_eta_adds(source: int, destination: int, deviation: float) -> None:
    """Check 7.4.5: on latents of 0 a move of the Gaussian network is the added noise alone."""
    trainer = InPO(GaussianPolicy(), eta=0.1)
    added = _walk(trainer, torch.zeros(4, 20000, dtype=torch.float64), [source, destination], _draws(2))
    assert float(added.std()) == pytest.approx(deviation, rel=0.02)
    exact = float(trainer.added_std(torch.tensor([source]), torch.tensor([destination])))
    assert exact == pytest.approx(deviation, abs=5e-5)
    assert float(added.std()) == pytest.approx(exact, rel=0.01)
    correlations = torch.corrcoef(added) - torch.eye(4)
    assert float(correlations.abs().max()) < 0.03  # every sample has its own


def test_5_every_move_has_its_own_noise() -> None:
    trainer, nothing = InPO(GaussianPolicy(), eta=0.1), torch.zeros(2, 20000, dtype=torch.float64)
    first, both = (_walk(trainer, nothing, grid, _draws(1)) for grid in ([0, 1], [0, 1, 2]))
    scale = float(_walk(InPO(GaussianPolicy()), torch.ones(1, 1, dtype=torch.float64), [1, 2]))
    second = both - scale * first
    assert abs(float(torch.corrcoef(torch.stack([first[0], second[0]]))[0, 1])) < 0.03


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
    _inverted(InPO(policy), 150, 402)
    assert policy.told == [[101, 101] * 2, [150, 201] * 2, [301] * 2, [401] * 2, [402] * 2]


def test_half_precision_latents_are_inverted_in_float32() -> None:
    batch, trainer = _random_pairs(2), InPO(GaussianPolicy())
    halves, exact = trainer.noisy_states(batch.to("cpu", torch.bfloat16)), trainer.noisy_states(batch)
    assert halves.noisy_latents.dtype == halves.target.dtype == torch.float32
    torch.testing.assert_close(halves.noisy_latents.double(), exact.noisy_latents, rtol=0.01, atol=0)


@pytest.mark.parametrize("eta", [0.0, 0.1])
def test_6_processes_that_must_call_together_get_the_same_states(monkeypatch: pytest.MonkeyPatch, eta: float) -> None:
    """Ten calls with all samples, whatever the timesteps: another process may need them."""
    policy, batch = GaussianPolicy(), _random_pairs(3)
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
