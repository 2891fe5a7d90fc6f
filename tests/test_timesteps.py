from __future__ import annotations

import math

import pytest
import torch

from diffalign.randomness import Draw
from diffalign.schedules import DiscreteSchedule, FlowSchedule
from diffalign.timesteps import TURBO_TIMESTEPS, draw_timesteps, effective_schedule

CHAIN = DiscreteSchedule.scaled_linear()
DRAWS = [Draw(0, 0, f"pair-{i}") for i in range(4000)]


def test_uniform_law_is_uniform_over_the_whole_chain() -> None:
    timesteps = draw_timesteps(CHAIN, DRAWS)
    assert timesteps.dtype == torch.int64
    assert 0 <= int(timesteps.min()) < 10
    assert 990 <= int(timesteps.max()) <= 999
    deviation = 1000 / math.sqrt(12 * len(DRAWS))
    assert abs(float(timesteps.double().mean()) - 499.5) < 4 * deviation


def test_refiner_law_is_the_uniform_one_folded_into_the_lowest_fifth() -> None:
    assert torch.equal(draw_timesteps(CHAIN, DRAWS, "refiner"), draw_timesteps(CHAIN, DRAWS) % 200)


@pytest.mark.parametrize(("law", "support"), [("turbo", (249, 499, 749, 999)), ("turbo_informative", (249, 499, 749))])
def test_turbo_laws_draw_their_steps_equally(law: str, support: tuple[int, ...]) -> None:
    timesteps = draw_timesteps(CHAIN, DRAWS, law)  # type: ignore[arg-type]
    share = 1 / len(support)
    deviation = math.sqrt(share * (1 - share) / len(DRAWS))
    assert set(timesteps.tolist()) == set(support)
    for value in support:
        assert abs(float((timesteps == value).double().mean()) - share) < 4 * deviation
    assert support[-1] == TURBO_TIMESTEPS[len(support) - 1]


def test_a_draw_gives_its_timestep_whatever_its_batch() -> None:
    whole = draw_timesteps(CHAIN, DRAWS[:8])
    assert torch.equal(torch.cat([draw_timesteps(CHAIN, [draw]) for draw in DRAWS[:8]]), whole)
    assert not torch.equal(draw_timesteps(CHAIN, [Draw(0, 1, d.pair_id) for d in DRAWS[:8]]), whole)


def test_turbo_trains_on_the_zero_snr_table_and_others_on_their_own() -> None:
    for law in ("turbo", "turbo_informative"):
        table = effective_schedule(CHAIN, law)  # type: ignore[arg-type]
        alphas, sigmas = table.scales(torch.tensor([999]))
        assert (float(alphas), float(sigmas)) == (0, 1)
    for law in ("uniform", "refiner"):
        assert effective_schedule(CHAIN, law) is CHAIN  # type: ignore[arg-type]


def test_flow_timesteps_are_real_numbers_and_know_only_the_uniform_law() -> None:
    timesteps = draw_timesteps(FlowSchedule(), DRAWS[:100])
    assert timesteps.is_floating_point()
    assert 0 <= float(timesteps.min()) <= float(timesteps.max()) < 1000
    for law in ("refiner", "turbo"):
        with pytest.raises(ValueError, match=f"'{law}' is for a discrete chain of steps, and this model is a flow"):
            draw_timesteps(FlowSchedule(), DRAWS[:1], law)  # type: ignore[arg-type]


def test_unknown_laws_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown timestep_sampling 'sobol'"):
        draw_timesteps(CHAIN, DRAWS[:1], "sobol")  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_density_of_stable_diffusion_3() -> None:
    """Golden values of the shift-3 table, and the law's median and tail: P(sigma > 0.5) = Phi(ln 3) = 0.864."""
    schedule = FlowSchedule(1000, shift=3.0)
    golden = schedule.timestep_of_index(torch.tensor([0, 250, 500, 750, 999])) / 1000
    torch.testing.assert_close(
        golden, torch.tensor([1, 0.9, 0.75, 0.5, 0.002994], dtype=torch.float64), rtol=0, atol=1e-6
    )
    count = 20_000
    sigmas = draw_timesteps(schedule, [Draw(0, 0, f"{i}") for i in range(count)], "logit_normal") / 1000
    assert float(sigmas.median()) == pytest.approx(0.75, abs=0.01)
    assert float((sigmas > 0.5).double().mean()) == pytest.approx(0.864, abs=0.01)
    unshifted = draw_timesteps(FlowSchedule(), [Draw(0, 0, f"{i}") for i in range(2000)], "logit_normal") / 1000
    assert float(unshifted.median()) == pytest.approx(0.5, abs=0.03)
    with pytest.raises(ValueError, match="'logit_normal' is for a flow, and this model is a discrete chain of steps"):
        draw_timesteps(DiscreteSchedule.scaled_linear(), [Draw(0, 0, "a")], "logit_normal")
