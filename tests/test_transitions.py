"""Sampler steps as Gaussians: golden numbers, diffusers' own schedulers, marginals, and what is refused."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffalign.predictions import Prediction
from diffalign.schedules import DiscreteSchedule, FlowSchedule
from diffalign.transitions import DDIM, DanceSDE, Euler, FlowSDE, Transition, leading_timesteps, solver_for

SD = DiscreteSchedule.scaled_linear()
FLOW = FlowSchedule()


def _steps(*pairs: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([a for a, _ in pairs]), torch.tensor([b for _, b in pairs])


GOLDEN_STEPS = _steps((951, 901), (501, 451), (51, 1), (1, 0))


def test_the_grid_is_stable_diffusions() -> None:
    grid = leading_timesteps(SD, 20)
    assert grid.tolist() == [*range(951, 0, -50), 0]
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)
    scheduler.set_timesteps(20)
    assert grid[:-1].tolist() == scheduler.timesteps.tolist()


def test_ddim_golden_deviations_and_log_probabilities() -> None:
    """Deviations at eta 1 on the 20-step grid, and the density of the mean itself."""
    latents = torch.zeros(4, 1, 2, 2, dtype=torch.float64)
    step = DDIM(SD, Prediction.EPSILON).step(latents, latents, *GOLDEN_STEPS)
    assert step.std.tolist() == pytest.approx([0.644391, 0.429321, 0.040597, 0.020648], abs=1e-6)
    density = step.log_prob(step.mean)
    assert density.tolist() == pytest.approx([-0.479489, -0.073388, 2.285129, 2.961183], abs=1e-5)
    half = DDIM(SD, Prediction.EPSILON, eta=0.5).step(latents, latents, *GOLDEN_STEPS)
    assert torch.allclose(half.std * 2, step.std)
    assert torch.allclose(half.log_prob(half.mean), density + math.log(2))


def test_ddim_golden_slopes() -> None:
    """d mean / d epsilon: the step 51 -> 1 has the largest per unit of its deviation."""
    epsilon = torch.zeros(4, 1, dtype=torch.float64, requires_grad=True)
    step = DDIM(SD, Prediction.EPSILON).step(epsilon, torch.ones(4, 1, dtype=torch.float64), *GOLDEN_STEPS)
    (slope,) = torch.autograd.grad(step.mean.sum(), epsilon)
    assert slope[:, 0].tolist() == pytest.approx([-0.549634, -0.268818, -0.220477, -0.020714], abs=1e-6)
    assert (slope[:, 0] / step.std).tolist() == pytest.approx([-0.853, -0.626, -5.431, -1.003], abs=1e-3)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddim_is_diffusers_own(prediction: str, eta: float) -> None:
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False,
        set_alpha_to_one=False, prediction_type=prediction,
    )  # fmt: skip
    scheduler.set_timesteps(20)
    generator = torch.Generator().manual_seed(0)
    latents, output, noise = (torch.randn(1, 4, 3, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    solver = DDIM(SD, Prediction.from_diffusers(prediction), eta)
    for t, s in ((951, 901), (501, 451), (1, 0)):
        theirs = scheduler.step(output, t, latents, eta=eta, variance_noise=noise).prev_sample
        ours = solver.step(output, latents, torch.tensor([t]), torch.tensor([s])).draw(noise)
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)  # diffusers keeps its table in float32


def test_log_probability_golden() -> None:
    std = torch.tensor([0.42932115], dtype=torch.float64)
    means = [torch.tensor([m], dtype=torch.float64) for m in ([0.0, -0.1, 0.2], [0.05, -0.25, 0.35])]
    stored = torch.tensor([[0.1, -0.2, 0.3]], dtype=torch.float64)
    policy, reference = (float(Transition(mean, std).log_prob(stored)) for mean in means)
    assert (policy, reference) == pytest.approx((-0.100516, -0.080170), abs=1e-6)
    assert math.exp(policy - reference) == pytest.approx(0.979860, abs=1e-6)


def test_a_step_without_noise_has_no_density() -> None:
    latents = torch.zeros(1, 3)
    step = DDIM(SD, Prediction.EPSILON, eta=0.0).step(latents, latents, torch.tensor([501]), torch.tensor([451]))
    with pytest.raises(ValueError, match="no log-probability"):
        step.log_prob(latents)
    with pytest.raises(ValueError, match="eta must be above 0"):
        solver_for(SD, Prediction.EPSILON, 0.0)
    with pytest.raises(ValueError, match="at least 0"):
        DDIM(SD, Prediction.EPSILON, eta=-1.0)


def test_flow_golden_step() -> None:
    x, v = torch.tensor([[0.2]], dtype=torch.float64), torch.tensor([[-0.5]], dtype=torch.float64)
    times = torch.tensor([750.0]), torch.tensor([700.0])
    step = FlowSDE(FLOW, 0.7).step(v, x, *times)
    assert float(step.mean) == pytest.approx(0.221325, abs=1e-6)
    assert float(step.std) == pytest.approx(0.271109, abs=1e-6)
    assert float(Euler(FLOW).step(v, x, *times).mean) == pytest.approx(0.225, abs=1e-9)


def test_euler_is_diffusers_own() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    latents, velocity = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(0)).unbind(0)
    theirs = scheduler.step(velocity, scheduler.timesteps[0], latents).prev_sample
    ours = Euler(FLOW).step(velocity, latents, scheduler.timesteps[:1], scheduler.timesteps[1:2])
    assert torch.allclose(ours.mean, theirs, atol=1e-5)
    assert float(ours.std) == 0.0


@pytest.mark.parametrize("solver", [FlowSDE(FLOW, 0.7), DanceSDE(FLOW, 0.3), Euler(FLOW)])
def test_flow_solvers_keep_the_marginals(solver: FlowSDE | DanceSDE | Euler) -> None:
    """Standard normal data under its exact velocity stay standard normal, noise or not."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 1, generator=generator, dtype=torch.float64)
    for t, s in pairwise(torch.linspace(1000, 0, 201, dtype=torch.float64)):
        u = t / 1000
        velocity = (2 * u - 1) / ((1 - u) ** 2 + u**2) * x
        step = solver.step(velocity, x, t[None], s[None])
        x = step.draw(torch.randn(x.shape, generator=generator, dtype=torch.float64))
    assert float(x.std()) == pytest.approx(1.0, abs=0.02)


def test_half_precision_outputs_are_computed_in_float32() -> None:
    latents = torch.full((1, 2), 0.1, dtype=torch.bfloat16)
    times = torch.tensor([750.0]), torch.tensor([700.0])
    step = solver_for(FLOW, Prediction.VELOCITY, 0.7).step(latents, latents, *times)
    assert step.mean.dtype == torch.float32
    assert step.log_prob(latents).dtype == torch.float32
