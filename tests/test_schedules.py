from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from diffalign.backbones.sd import schedule_from_config
from diffalign.randomness import generator
from diffalign.schedules import DiscreteSchedule, FlowSchedule, expand

GOLDEN = {0: 0.99915, 1: 0.998296, 51: 0.950524, 500: 0.276333, 951: 0.00815500, 999: 0.00466010}
"""abar of Stable Diffusion's chain, computed independently in double precision."""


def scaled_linear_by_hand(steps: int = 1000) -> list[float]:
    """The cumulative products, one multiplication after the other."""
    low, high = math.sqrt(0.00085), math.sqrt(0.012)
    abar, table = 1.0, []
    for i in range(steps):
        abar *= 1 - (low + (high - low) * i / (steps - 1)) ** 2
        table.append(abar)
    return table


@pytest.mark.parametrize(("timestep", "expected"), GOLDEN.items())
def test_stable_diffusion_goldens(timestep: int, expected: float) -> None:
    abar = float(DiscreteSchedule.scaled_linear().alphas_cumprod[timestep])
    assert f"{abar:.6g}" == f"{expected:.6g}"


def test_table_equals_the_products_multiplied_by_hand() -> None:
    table = DiscreteSchedule.scaled_linear().alphas_cumprod
    assert table.dtype == torch.float64
    torch.testing.assert_close(table, torch.tensor(scaled_linear_by_hand(), dtype=torch.float64), rtol=1e-12, atol=0)


def test_zero_terminal_snr_goldens() -> None:
    plain = DiscreteSchedule.scaled_linear()
    table = plain.zero_terminal_snr().alphas_cumprod
    assert float(table[999]) == 0
    assert float(table[500]) == pytest.approx(0.241019, abs=5e-7)
    assert float(table[0]) == pytest.approx(float(plain.alphas_cumprod[0]), rel=1e-14)


def test_zero_terminal_snr_agrees_with_diffusers() -> None:
    options = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    theirs = DDIMScheduler(**options, rescale_betas_zero_snr=True)
    ours = schedule_from_config(theirs.config)
    torch.testing.assert_close(ours.alphas_cumprod.sqrt().float(), theirs.alphas_cumprod.sqrt(), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.001 + 0.0001 * i for i in range(100)], "num_train_timesteps": 100},
    ],
)
def test_add_noise_equals_the_diffusers_scheduler(options: dict[str, object]) -> None:
    scheduler = DDPMScheduler(**options)
    schedule = schedule_from_config(scheduler.config)
    steps = scheduler.config.num_train_timesteps
    timesteps = torch.tensor([0, 1, steps // 2, steps - 2])
    latents = torch.randn(4, 4, 3, 3, generator=generator("latents"))
    noise = torch.randn(4, 4, 3, 3, generator=generator("noise"))
    expected = scheduler.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(schedule.add_noise(latents, noise, timesteps), expected, rtol=0, atol=3e-5)


def test_scales_are_variance_preserving_in_double_precision() -> None:
    alphas, sigmas = DiscreteSchedule.scaled_linear().scales(torch.arange(1000))
    assert alphas.dtype == sigmas.dtype == torch.float64
    torch.testing.assert_close(alphas**2 + sigmas**2, torch.ones(1000, dtype=torch.float64), rtol=1e-15, atol=0)


@pytest.mark.parametrize("bad", [[-1], [1000], [0, 5, 1000]])
def test_timesteps_outside_the_table_are_refused(bad: list[int]) -> None:
    with pytest.raises(IndexError, match=r"0\.\.999, got"):
        DiscreteSchedule.scaled_linear().scales(torch.tensor(bad))


@pytest.mark.parametrize("table", [[0.5, 0.6], [0.5, 0.5], [[0.9, 0.5]]])
def test_a_table_that_does_not_fall_is_refused(table: list[float]) -> None:
    with pytest.raises(ValueError, match="falling table"):
        DiscreteSchedule(torch.tensor(table))


def test_uniform_numbers_reach_every_timestep_equally() -> None:
    schedule = DiscreteSchedule.scaled_linear(steps=10)
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert torch.equal(schedule.timesteps_at(uniform).bincount(), torch.full((10,), 100))
    edge = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert schedule.timesteps_at(edge).tolist() == [0, 9]


def test_flow_scales_are_the_straight_line() -> None:
    flow = FlowSchedule()
    timesteps = torch.tensor([0.0, 250.0, 1000.0], dtype=torch.float64)
    alphas, sigmas = flow.scales(timesteps)
    assert alphas.tolist() == [1, 0.75, 0]
    assert sigmas.tolist() == [0, 0.25, 1]
    assert flow.timesteps_at(torch.tensor([0.0, 0.5])).tolist() == [0, 500]
    latents, noise = torch.ones(3, 2, 2), torch.full((3, 2, 2), -1.0)
    assert flow.add_noise(latents, noise, timesteps)[:, 0, 0].tolist() == [1, 0.5, -1]


@pytest.mark.parametrize("shape", [(2, 4, 3, 3), (2, 4, 5, 3, 3), (2, 7)])
def test_scales_broadcast_over_images_videos_and_tokens(shape: tuple[int, ...]) -> None:
    values = expand(torch.tensor([2.0, 3.0], dtype=torch.float64), torch.zeros(shape))
    assert values.dtype == torch.float32
    assert values.shape == (2, *[1] * (len(shape) - 1))
    noisy = DiscreteSchedule.scaled_linear().add_noise(torch.ones(shape), torch.zeros(shape), torch.tensor([0, 999]))
    assert torch.equal(noisy[0], torch.full(shape[1:], math.sqrt(1 - 0.00085)))
