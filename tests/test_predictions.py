from __future__ import annotations

from itertools import product

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from diffalign.predictions import Prediction
from diffalign.randomness import generator
from diffalign.schedules import DiscreteSchedule, FlowSchedule, expand

SCHEDULES = {"chain": DiscreteSchedule.scaled_linear(), "flow": FlowSchedule()}
KINDS = {
    "chain": [Prediction.EPSILON, Prediction.V, Prediction.SAMPLE],
    "flow": [Prediction.EPSILON, Prediction.VELOCITY, Prediction.SAMPLE],
}
CASES = [(name, a, b) for name, kinds in KINDS.items() for a, b in product(kinds, kinds)]


def draw(*key: str, shape: tuple[int, ...] = (3, 4, 2, 2)) -> Tensor:
    return torch.randn(shape, generator=generator(*key), dtype=torch.float64)


def case(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Latents, noise, noisy latents and scales at three timesteps, double precision."""
    latents, noise, timesteps = draw("latents"), draw("noise"), torch.tensor([20, 500, 980])
    alphas, sigmas = SCHEDULES[name].scales(timesteps)
    return latents, noise, SCHEDULES[name].add_noise(latents, noise, timesteps), alphas, sigmas


def square_error(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().flatten(1).sum(1)


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n, kinds in KINDS.items() for k in kinds])
def test_a_perfect_output_gives_back_latents_and_noise(name: str, kind: Prediction) -> None:
    latents, noise, noisy, alphas, sigmas = case(name)
    output = kind.target(latents, noise, alphas, sigmas)
    x0, epsilon = kind.to_sample_and_noise(output, noisy, alphas, sigmas)
    torch.testing.assert_close(x0, latents, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(epsilon, noise, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "kind", "other"), CASES)
def test_converting_there_and_back_changes_nothing(name: str, kind: Prediction, other: Prediction) -> None:
    _, _, noisy, alphas, sigmas = case(name)
    output = draw("an imperfect output")
    there = kind.convert(output, other, noisy, alphas, sigmas)
    torch.testing.assert_close(other.convert(there, kind, noisy, alphas, sigmas), output, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n, kinds in KINDS.items() for k in kinds])
def test_any_output_splits_the_noisy_latents_consistently(name: str, kind: Prediction) -> None:
    _, _, noisy, alphas, sigmas = case(name)
    x0, epsilon = kind.to_sample_and_noise(draw("output"), noisy, alphas, sigmas)
    torch.testing.assert_close(expand(alphas, x0) * x0 + expand(sigmas, x0) * epsilon, noisy, rtol=1e-9, atol=1e-9)


def test_v_equals_the_diffusers_velocity() -> None:
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    latents, noise, timesteps = draw("latents").float(), draw("noise").float(), torch.tensor([0, 500, 999])
    expected = scheduler.get_velocity(latents, noise, timesteps)
    ours = Prediction.V.target(latents, noise, *SCHEDULES["chain"].scales(timesteps))
    torch.testing.assert_close(ours, expected, rtol=0, atol=3e-5)


def test_targets_by_their_definitions() -> None:
    latents, noise, _, alphas, sigmas = case("chain")
    a, s = alphas.reshape(3, 1, 1, 1), sigmas.reshape(3, 1, 1, 1)
    assert Prediction.EPSILON.target(latents, noise, alphas, sigmas) is noise
    assert Prediction.SAMPLE.target(latents, noise, alphas, sigmas) is latents
    torch.testing.assert_close(Prediction.V.target(latents, noise, alphas, sigmas), a * noise - s * latents)
    torch.testing.assert_close(Prediction.VELOCITY.target(latents, noise, alphas, sigmas), noise - latents)


def test_error_identities_of_the_variance_preserving_chain() -> None:
    """SE_eps = abar SE_v, SE_x0 = (1 - abar) / abar SE_eps = (1 - abar) SE_v."""
    latents, noise, noisy, alphas, sigmas = case("chain")
    v = draw("an imperfect v")
    x0, epsilon = Prediction.V.to_sample_and_noise(v, noisy, alphas, sigmas)
    se_v = square_error(v, Prediction.V.target(latents, noise, alphas, sigmas))
    abar = alphas**2
    torch.testing.assert_close(square_error(epsilon, noise), abar * se_v, rtol=1e-10, atol=0)
    torch.testing.assert_close(square_error(x0, latents), (1 - abar) * se_v, rtol=1e-10, atol=0)
    torch.testing.assert_close(
        square_error(x0, latents), (1 - abar) / abar * square_error(epsilon, noise), rtol=1e-10, atol=0
    )


def test_error_ratio_at_timestep_500_is_the_golden_one() -> None:
    latents, noise, noisy, alphas, sigmas = case("chain")
    x0, epsilon = Prediction.EPSILON.to_sample_and_noise(draw("output"), noisy, alphas, sigmas)
    ratio = square_error(x0, latents) / square_error(epsilon, noise)
    assert float(ratio[1]) == pytest.approx(2.618826, abs=5e-7)


def test_error_identities_and_recoveries_of_the_flow() -> None:
    """SE_eps = (1-t)^2 SE_v, SE_x0 = t^2 SE_v; eps = x_t + (1-t) v, x0 = x_t - t v."""
    latents, noise, noisy, alphas, sigmas = case("flow")
    velocity, t = draw("an imperfect velocity"), sigmas.reshape(3, 1, 1, 1)
    x0, epsilon = Prediction.VELOCITY.to_sample_and_noise(velocity, noisy, alphas, sigmas)
    torch.testing.assert_close(epsilon, noisy + (1 - t) * velocity, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x0, noisy - t * velocity, rtol=1e-12, atol=1e-12)
    se_v = square_error(velocity, noise - latents)
    torch.testing.assert_close(square_error(epsilon, noise), (1 - sigmas) ** 2 * se_v, rtol=1e-10, atol=0)
    torch.testing.assert_close(square_error(x0, latents), sigmas**2 * se_v, rtol=1e-10, atol=0)


def test_epsilon_weights_are_the_closed_forms() -> None:
    for name in ("chain", "flow"):
        _, _, _, alphas, sigmas = case(name)
        expected = {
            Prediction.EPSILON: torch.ones(3, dtype=torch.float64),
            Prediction.SAMPLE: alphas**2 / sigmas**2,
            Prediction.V: alphas**2,
            Prediction.VELOCITY: alphas**2,
        }
        for kind in KINDS[name]:
            torch.testing.assert_close(kind.epsilon_weight(alphas, sigmas), expected[kind], rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(3, 4, 2, 2), (3, 4, 5, 2, 2)])
def test_images_and_videos_go_through_the_same_algebra(shape: tuple[int, ...]) -> None:
    alphas, sigmas = SCHEDULES["chain"].scales(torch.tensor([20, 500, 980]))
    latents, noise = draw("latents", shape=shape), draw("noise", shape=shape)
    output = Prediction.V.target(latents, noise, alphas, sigmas)
    noisy = expand(alphas, latents) * latents + expand(sigmas, latents) * noise
    x0, _ = Prediction.V.to_sample_and_noise(output, noisy, alphas, sigmas)
    torch.testing.assert_close(x0, latents, rtol=1e-10, atol=1e-10)


def test_names_of_diffusers() -> None:
    assert Prediction.from_diffusers("epsilon") is Prediction.EPSILON
    assert Prediction.from_diffusers("v_prediction") is Prediction.V
    assert Prediction.from_diffusers("sample") is Prediction.SAMPLE
    assert Prediction.from_diffusers("flow_prediction") is Prediction.VELOCITY
    with pytest.raises(ValueError, match="unknown prediction type 'score'; expected one of epsilon"):
        Prediction.from_diffusers("score")
