"""Rollouts: the pipelines' own samplers with noise, and densities that can be recomputed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffalign.backbones import load_policy
from diffalign.randomness import Draw
from diffalign.rollouts import Rollouts, StochasticSampler, sampling_grid
from diffalign.schedules import DiscreteSchedule, FlowSchedule

pytestmark = pytest.mark.slow

PROMPTS = ("one circle", "two squares", "three stars")
STEPS = 4


def _draws(count: int, seed: int = 3) -> list[Draw]:
    return [Draw(seed, 0, f"prompt-{i}") for i in range(count)]


def _law(sampler: StochasticSampler, rollouts: Rollouts, step: int, rows: Sequence[int]) -> Any:
    """The law of one stored step of some images, computed again."""
    count, images = len(rows), rollouts.images_per_prompt
    return sampler.transition(
        sampler.policy,
        rollouts.latents[list(rows), step],
        rollouts.timesteps[step].expand(count),
        rollouts.next_timesteps[step].expand(count),
        rollouts.conditioning[[row // images for row in rows]],
        rollouts.unconditional,
    )


# --- the sampler -----------------------------------------------------------------------------------------------------


def test_grids_are_the_schedulers_own() -> None:
    chain = DiscreteSchedule.scaled_linear()
    assert sampling_grid(chain, 20).tolist() == [*range(951, 0, -50), 0]
    for shift in (1.0, 3.0):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(10)
        grid = sampling_grid(FlowSchedule(shift=shift), 10) / 1000
        assert torch.allclose(grid, scheduler.sigmas.double(), atol=1e-6)
    golden = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
    assert grid.tolist() == pytest.approx(golden, abs=5e-5)
    with pytest.raises(ValueError, match="expected 1 to 999 sampling steps"):
        sampling_grid(chain, 1000)


@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_with_hardly_any_noise_it_is_the_pipeline(
    kind: str, tiny_pipeline: Path, request: pytest.FixtureRequest
) -> None:
    """Grid, guidance and unconditional branch against diffusers' own loop, with DDIM at eta 0."""
    folder = tiny_pipeline if kind == "epsilon" else request.getfixturevalue("tiny_v_pipeline")
    policy: Any = load_policy(str(folder))
    _is_the_pipeline(policy, eta=0.0)


def test_with_hardly_any_noise_it_is_the_flow_pipeline(tmp_path: Path) -> None:
    """The same for Stable Diffusion 3, whose pipeline takes Euler steps."""
    from tests.backbones.families.sd3 import save_tiny

    _is_the_pipeline(load_policy(str(save_tiny(tmp_path / "sd3", t5=False))))


def _is_the_pipeline(policy: Any, **options: Any) -> None:
    sampler = StochasticSampler(policy, num_inference_steps=STEPS, guidance_scale=5.0, eta=1e-5)
    rollouts = sampler.rollout(PROMPTS, _draws(3), 1)
    drawn = policy.pipeline(
        list(PROMPTS),
        latents=rollouts.path[:, 0],
        guidance_scale=5.0,
        num_inference_steps=STEPS,
        output_type="latent",
        **options,
    ).images
    assert torch.allclose(rollouts.final, drawn, atol=2e-3 * float(drawn.abs().max()))
    plain = StochasticSampler(policy, num_inference_steps=STEPS, guidance_scale=1.0, eta=1e-5)
    apart = plain.rollout(PROMPTS, _draws(3), 1).final
    assert not torch.allclose(apart, drawn, atol=2e-3 * float(drawn.abs().max()))


def test_images_of_a_prompt_share_their_initial_noise_only(policy: Any) -> None:
    """Check 7.2.9."""
    draws = _draws(2)
    rollouts = StochasticSampler(policy, num_inference_steps=STEPS).rollout(PROMPTS[:2], draws, 3)
    assert rollouts.path.shape == (6, STEPS + 1, 4, 4, 4)
    assert rollouts.path.dtype == rollouts.log_probs.dtype == torch.float32
    assert rollouts.images_per_prompt == 3
    start = rollouts.latents[:, 0].reshape(2, 3, 4, 4, 4)
    for prompt in range(2):
        assert all(torch.equal(start[prompt, k], draws[prompt].normal("initial noise", (4, 4, 4))) for k in range(3))
    assert not torch.equal(start[0, 0], start[1, 0])
    after = rollouts.next_latents[:, 0]
    assert len({tuple(row.flatten().tolist()) for row in after}) == 6
    assert torch.equal(rollouts.next_latents[:, :-1], rollouts.latents[:, 1:])
    assert torch.equal(rollouts.final, rollouts.next_latents[:, -1])


def test_densities_can_be_recomputed(policy: Any) -> None:
    """Check 7.2.4: with unchanged weights and guidance the stored densities come back, without guidance others do."""
    sampler = StochasticSampler(policy, num_inference_steps=STEPS)
    rollouts = sampler.rollout(PROMPTS[:2], _draws(2), 2)
    off = StochasticSampler(policy, num_inference_steps=STEPS, guidance_scale=1.0)
    for step in range(STEPS):
        with torch.no_grad():
            drawn = rollouts.next_latents[:, step]
            again = _law(sampler, rollouts, step, range(4)).log_prob(drawn)
            one = _law(sampler, rollouts, step, [2]).log_prob(drawn[2:3])
            without = _law(off, rollouts, step, range(4)).log_prob(drawn)
        assert torch.allclose(again, rollouts.log_probs[:, step], atol=1e-4)
        assert torch.allclose(one, rollouts.log_probs[2:3, step], atol=1e-4)
        assert float((without - again).abs().min()) > 5e-4


def test_numbers_belong_to_the_prompt_and_the_place(policy: Any) -> None:
    """Another batch size, order or neighbourhood changes rounding at most; the noise of every step is its key's."""
    sampler = StochasticSampler(policy, num_inference_steps=STEPS)
    draws = _draws(3)
    rollouts = sampler.rollout(PROMPTS, draws, 2, batch_size=4)
    alone = sampler.rollout(PROMPTS[1:2], draws[1:2], 2, batch_size=1)
    assert torch.allclose(alone.path, rollouts.path[2:4], atol=1e-4)
    more = sampler.rollout(PROMPTS[1:2], draws[1:2], 3, batch_size=3)
    assert torch.allclose(more.path[:2], alone.path, atol=1e-4)
    for step in range(STEPS):
        with torch.no_grad():
            law = _law(sampler, rollouts, step, [3])
        noise = (rollouts.next_latents[3:4, step] - law.mean) / law.std.float().reshape(-1, 1, 1, 1)
        assert torch.allclose(noise[0], draws[1].normal(f"image 1, step {step}", (4, 4, 4)), atol=1e-3)


def test_final_latents_are_what_is_decoded(policy: Any) -> None:
    sampler = StochasticSampler(policy, num_inference_steps=2)
    rollouts = sampler.rollout(PROMPTS[:2], _draws(2), 2)
    images = sampler.decode(rollouts, batch_size=3)
    assert images.shape == (4, 3, 8, 8)
    assert torch.allclose(images, policy.decode(rollouts.path[:, -1]), atol=1e-5)


def test_what_cannot_be_drawn_is_refused(policy: Any) -> None:
    for eta in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="eta must be above 0 for steps to have a probability"):
            StochasticSampler(policy, eta=eta)
    sampler = StochasticSampler(policy, num_inference_steps=2)
    with pytest.raises(ValueError, match="expected one draw per prompt, got 2 prompts and 1 draws"):
        sampler.rollout(PROMPTS[:2], _draws(1))
    assert StochasticSampler(policy).eta == 1.0
