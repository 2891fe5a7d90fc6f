"""DDIM-InPO: the numbers of inversion on Gaussian data, levels, losses and noise: checks 1 to 5.

The number of each check stands in its test's docstring; the others are in `test_inpo_training.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.backbones import LoRA, load_policy
from diffalign.batches import Conditioning
from diffalign.predictions import Prediction
from diffalign.randomness import Draw
from diffalign.trainers.diffusion_dpo import DiffusionDPO
from diffalign.trainers.inpo import InPO
from tests.trainers.gaussian import LN2, GaussianPolicy, deviation, inverted, random_pairs, some_draws, walk, walk_back
from tests.trainers.golden import Batches

# --- 1: Gaussian data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", [Prediction.EPSILON, Prediction.V])
@pytest.mark.parametrize(("points", "value"), [(10, 1.974192), (50, 2.006524), (200, 1.993865)])
def test_1_the_network_is_told_where_a_move_goes(prediction: Prediction, points: int, value: float) -> None:
    """Check 7.4.1: the release's levels with that rule; the exact flow gives 1.986937."""
    trainer = InPO(GaussianPolicy(prediction))
    grid = [0, *range(1, 902, 1000 // points)]
    assert float(walk(trainer, torch.ones(1, 1, dtype=torch.float64), grid)) == pytest.approx(value, abs=1e-6)
    assert deviation(901) / deviation(0) == pytest.approx(1.986937, abs=1e-6)


def test_1_the_release_tells_it_where_a_move_comes_from() -> None:
    """Check 7.4.1: 19 % of the amplitude are lost."""
    assert inverted(InPO(GaussianPolicy(), inversion="release"), 901) == pytest.approx([1.605134], abs=1e-6)


@pytest.mark.parametrize("prediction", [Prediction.EPSILON, Prediction.V])
def test_1_paths_that_end_at_t(prediction: Prediction) -> None:
    """Check 7.4.1: four values of the default, all of one batch, beside those of the exact flow."""
    timesteps = 500, 777, 950, 999
    arrived = inverted(InPO(GaussianPolicy(prediction)), *timesteps)
    assert arrived == pytest.approx([1.830879, 1.974660, 1.992129, 1.993069], abs=1e-6)
    exact = [deviation(t) / deviation(0) for t in timesteps]
    assert exact == pytest.approx([1.778465, 1.963493, 1.991268, 1.993961], abs=1e-6)


def test_1_more_moves_come_nearer_to_the_exact_flow() -> None:
    """From twenty on: with ten, errors of both signs cancel in part."""
    exact = deviation(500) / deviation(0)
    distances = [abs(inverted(InPO(GaussianPolicy(), inversion_steps=n), 500)[0] - exact) for n in (20, 50, 100, 500)]
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
        inverted(trainer, 402)
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
    batch = random_pairs(3)
    timesteps = trainer.draw_timesteps(batch.draws).repeat(2).tolist()
    trainer.loss(batch)
    assert policy.told[-1] == reference.told[-1] == timesteps
    assert len(reference.told) == 1


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
    back = walk_back(trainer, walk(trainer, start, grid), grid, Conditioning({"hidden": torch.zeros(1, 1)}))
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
        distances.append(float((walk_back(trainer, noisy, grid, conditioning) - latents).square().mean()))
    assert distances[0] > 2 * distances[1] > 4 * distances[2] > 0


# --- 5: noise of its own ---------------------------------------------------------------------------------------------


def test_5_without_eta_nothing_is_drawn() -> None:
    """Check 7.4.5: another epoch brings another timestep, and no noise."""
    trainer, noisy = InPO(GaussianPolicy()), InPO(GaussianPolicy(), eta=0.1)
    batch, later = random_pairs(2), random_pairs(2, epoch=1)
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
    added = walk(trainer, torch.zeros(4, 20000, dtype=torch.float64), [source, destination], some_draws(2))
    assert float(added.std()) == pytest.approx(deviation, rel=0.02)
    exact = float(trainer.added_std(torch.tensor([source]), torch.tensor([destination])))
    assert exact == pytest.approx(deviation, abs=5e-5)
    assert float(added.std()) == pytest.approx(exact, rel=0.01)
    correlations = torch.corrcoef(added) - torch.eye(4)
    assert float(correlations.abs().max()) < 0.03  # every sample has its own


def test_5_every_move_has_its_own_noise() -> None:
    trainer, nothing = InPO(GaussianPolicy(), eta=0.1), torch.zeros(2, 20000, dtype=torch.float64)
    first, both = (walk(trainer, nothing, grid, some_draws(1)) for grid in ([0, 1], [0, 1, 2]))
    scale = float(walk(InPO(GaussianPolicy()), torch.ones(1, 1, dtype=torch.float64), [1, 2]))
    second = both - scale * first
    assert abs(float(torch.corrcoef(torch.stack([first[0], second[0]]))[0, 1])) < 0.03
