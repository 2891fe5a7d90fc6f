"""A museum: mistakes that public code of these methods made, each with the check that keeps it out of here.

Where a mistake was seen stands in its docstring; `docs/papers.md` says what the methods do instead.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from diffalign.backbones import LoRA, load_policy
from diffalign.batches import Conditioning
from diffalign.data import DataConfig, load_pairs
from diffalign.losses import per_sample_error
from diffalign.predictions import Prediction
from diffalign.randomness import Draw
from diffalign.rollouts import StochasticSampler, sampling_grid
from diffalign.schedules import DiscreteSchedule, FlowSchedule
from diffalign.timesteps import draw_timesteps
from diffalign.trainers.diffusion_dpo import DiffusionDPO
from diffalign.trainers.inpo import InPO
from diffalign.transitions import DDIM, FlowSDE
from tests.tiny import move_away, random_batch
from tests.trainers.gaussian import GaussianPolicy, random_pairs
from tests.trainers.golden import ANSWERS, REFERENCE, TablePolicy, golden_batch

CHAIN = DiscreteSchedule.scaled_linear()


def test_the_loss_is_a_mean_of_log_sigmoids_and_not_the_log_sigmoid_of_a_mean() -> None:
    """Forks average z over the batch first: one easy pair then silences all hard ones."""
    answers = torch.cat([ANSWERS[:1], REFERENCE[:1], ANSWERS[1:], REFERENCE[1:]])  # the second pair has z = 0
    reference = torch.cat([REFERENCE[:1]] * 2 + [REFERENCE[1:]] * 2)
    trainer = DiffusionDPO(TablePolicy(answers, reference), beta=2000.0, timestep_sampling="uniform")
    output = trainer.loss(golden_batch(2))
    z = torch.tensor([9.375, 0.0], dtype=torch.float64)
    torch.testing.assert_close(output.loss, F.softplus(-z).mean(), rtol=1e-6, atol=0)
    assert abs(float(output.loss - F.softplus(-z.mean()))) > 0.3


def test_ties_are_no_wins(tmp_path: Path) -> None:
    """diffusers' and Diffusion-NPO's scripts swap where label_0 is 0, so that a tie makes image 0 the winner."""
    import io

    from datasets import Dataset
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    rows = [{"caption": "x", "jpg_0": buffer.getvalue(), "jpg_1": buffer.getvalue(), "label_0": v} for v in (0, 0.5, 1)]
    Dataset.from_list(rows).to_parquet(tmp_path / "pairs.parquet")
    pairs = load_pairs(DataConfig(dataset_name=str(tmp_path / "pairs.parquet")))
    assert len(pairs) == 2  # type: ignore[arg-type]
    assert pairs.report.summary().count("1 tie") == 1


@pytest.mark.parametrize("prediction", [Prediction.EPSILON, Prediction.VELOCITY])
def test_both_halves_of_a_pair_share_noise_and_timestep(prediction: Prediction) -> None:
    """Separate noise, as the paper's equation is written, buries the difference of a pair under that of its noise."""
    policy = GaussianPolicy(prediction) if prediction is Prediction.EPSILON else TablePolicy(ANSWERS, REFERENCE)
    batch = random_pairs(3, size=4)
    states = DiffusionDPO(policy, beta=1.0).noisy_states(batch)
    assert torch.equal(*states.noise.chunk(2))
    assert torch.equal(*states.timesteps.chunk(2))
    other = dataclasses.replace(batch, rejected=batch.rejected + 1)
    again = DiffusionDPO(policy, beta=1.0).noisy_states(other)
    assert torch.equal(again.noisy_latents[:3], states.noisy_latents[:3])


def test_every_pair_of_a_batch_has_its_own_timestep() -> None:
    """InPO's script takes `timesteps[0]` for its whole local batch, which is right for a batch of one only."""
    draws = [Draw(0, 0, f"pair-{i}") for i in range(64)]
    assert len(set(draw_timesteps(CHAIN, draws).tolist())) > 50
    trainer = InPO(GaussianPolicy(), beta=1.0)
    batch = random_pairs(4)
    together = trainer.noisy_states(batch)
    assert len(set(together.timesteps[:4].tolist())) == 4
    for row in range(4):
        alone = trainer.noisy_states(
            dataclasses.replace(
                batch,
                conditioning=batch.conditioning[[row]],
                chosen=batch.chosen[[row]],
                rejected=batch.rejected[[row]],
                weight=batch.weight[[row]],
                draws=batch.draws[row : row + 1],
            )
        )
        torch.testing.assert_close(alone.noisy_latents[0], together.noisy_latents[row])


def test_no_timestep_lies_past_the_schedule() -> None:
    """InPO's script, run with a later diffusers than it pins, reads the table at 1001 for every t above 901."""
    with pytest.raises(IndexError, match=r"0\.\.999, got 1001"):
        CHAIN.scales(torch.tensor([1001]))
    with pytest.raises(IndexError, match=r"got -1"):
        CHAIN.scales(torch.tensor([-1]))  # which Python would read from the table's end
    for steps in (1, 10, 20, 50, 999):
        grid = sampling_grid(CHAIN, steps)
        assert 0 <= float(grid.min()) <= float(grid.max()) <= 999
    top = dataclasses.replace(random_pairs(1), draws=(Draw(0, 0, "pair-0"),))
    assert int(InPO(GaussianPolicy(), beta=1.0).noisy_states(top).timesteps.max()) <= 999


def test_the_last_step_of_a_sampler_keeps_a_density() -> None:
    """With the final alpha of 1, the last DDIM step has no noise: its log-probability, if trained on, is infinite."""
    zero = torch.zeros(1, 1, 2, 2)
    for solver, grid in (
        (DDIM(CHAIN, Prediction.EPSILON, 1.0), sampling_grid(CHAIN, 20)),
        (FlowSDE(FlowSchedule(1000, 3.0), 0.7), sampling_grid(FlowSchedule(1000, 3.0), 10)),
    ):
        for now, after in pairwise(grid):
            law = solver.step(zero, zero, now.reshape(1), after.reshape(1))
            assert float(law.std) > 1e-3
            assert bool(law.log_prob(law.mean).isfinite())


@pytest.mark.slow
def test_the_last_latents_are_those_of_the_last_step_and_not_of_the_last_image(tiny_pipeline: Path) -> None:
    """flow_grpo's first upload takes index -1 of [image, step, ...] on the images' axis, and trains on one image."""
    policy: Any = load_policy(str(tiny_pipeline))
    sampler = StochasticSampler(policy, num_inference_steps=3, guidance_scale=1.0)
    rollouts = sampler.rollout(["a cat", "a dog"], [Draw(0, 0, "a"), Draw(0, 0, "b")], images_per_prompt=2)
    assert rollouts.path.shape[:2] == (4, 4)  # images, levels
    assert rollouts.final.shape == rollouts.path[:, 0].shape
    assert all(torch.equal(rollouts.final[i], rollouts.next_latents[i, -1]) for i in range(4))
    assert torch.equal(sampler.decode(rollouts), policy.decode(rollouts.final).float())


def test_an_exception_leaves_the_adapter_on(tiny_pipeline: Path) -> None:
    """Switched off by hand around the reference's pass, it stays off when that pass fails: training does nothing."""
    policy: Any = load_policy(str(tiny_pipeline), lora=LoRA(rank=2), train=True)
    move_away(policy)
    batch = random_batch(1)
    arguments = (batch.chosen, torch.tensor([500]), batch.conditioning)
    before = policy.predict(*arguments).detach()
    broken = Conditioning({"hidden": torch.zeros(1, 5, 3)})  # of the wrong width
    with pytest.raises(RuntimeError):
        policy.frozen().predict(batch.chosen, torch.tensor([500]), broken)
    assert torch.equal(policy.predict(*arguments).detach(), before)
    assert all(parameter.requires_grad for parameter in policy.trainable_parameters())
    assert not torch.equal(policy.frozen().predict(*arguments), before)


def test_errors_of_videos_are_means_over_all_their_axes() -> None:
    """`mean([1, 2, 3])`, right for images, leaves a video's last axis and mixes it with the batch."""
    video, target = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 4, 3, 8, 8)
    error = per_sample_error(video, target)
    assert error.shape == (2,)
    torch.testing.assert_close(error, (video - target).square().flatten(1).mean(1))
