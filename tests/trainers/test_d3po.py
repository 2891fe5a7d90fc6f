"""The self-checks of D3PO: step densities, the bounded ratio, ties, guidance, and a naive computation of the loss.

The number of each check stands in its test's docstring; 4 and 9, on rollouts, are in `tests/test_rollouts.py`.
"""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from diffalign.backbones import LoRA
from diffalign.batches import Conditioning
from diffalign.config import ConfigError, RunConfig, trainer_settings
from diffalign.predictions import Prediction
from diffalign.randomness import Draw
from diffalign.rollouts import TransitionPairs
from diffalign.schedules import DiscreteSchedule
from diffalign.trainers.d3po import D3PO, D3POConfig
from diffalign.transitions import DDIM
from tests.trainers.golden import Batches, TablePolicy, double, gradients

CHAIN = DiscreteSchedule.scaled_linear()
STEP = (501, 451)
STD = 0.42932115
NEXT = double((0.1, -0.2, 0.3))
MEAN, REFERENCE_MEAN = double((0, -0.1, 0.2)), double((0.05, -0.25, 0.35))
LN2 = math.log(2)


class ChainPolicy(TablePolicy):
    """`TablePolicy` on Stable Diffusion's chain, answering with noise."""

    def __init__(self, answers: Tensor, reference_answers: Tensor) -> None:
        super().__init__(answers.clone().requires_grad_(True), reference_answers, Prediction.EPSILON)
        self.schedule = CHAIN


def slope(step: tuple[int, int] = STEP) -> float:
    """d mean / d epsilon of a DDIM step; at latents 0 the mean is the slope times epsilon."""
    ones = torch.ones(1, 1, dtype=torch.float64)
    return float(DDIM(CHAIN, Prediction.EPSILON).step(ones, 0 * ones, *map(torch.tensor, ([step[0]], [step[1]]))).mean)


def transitions(drawn: Tensor, preference: float = 1.0, step: tuple[int, int] = STEP) -> TransitionPairs:
    """One pair at latents 0 whose next latents are the two rows of `drawn`."""
    zero = torch.zeros_like(drawn[:1])
    return TransitionPairs(
        conditioning=Conditioning({"hidden": torch.zeros(1, 1)}),
        chosen=zero,
        rejected=zero,
        weight=torch.ones(1),
        draws=(Draw(0, 0, "golden"),),
        next_chosen=drawn[:1],
        next_rejected=drawn[1:],
        timesteps=torch.tensor([step[0]]),
        next_timesteps=torch.tensor([step[1]]),
        preference=torch.tensor([preference]),
        unconditional=Conditioning({"hidden": torch.ones(1, 1)}),
    )


def trainer_with(means: Tensor, reference_means: Tensor, step: tuple[int, int] = STEP, **options: Any) -> D3PO:
    """A trainer whose policy and reference have these means, both [2, d], for the step from latents 0."""
    policy = ChainPolicy(means / slope(step), reference_means / slope(step))
    return D3PO(policy, **{"guidance_scale": 1.0, **options})


def gradient(trainer: Any, batch: TransitionPairs) -> Tensor:
    trainer.loss(batch).loss.backward()
    found: Tensor = trainer.policy.answers.grad
    return found


# --- 1, 2: densities of the sampler's steps --------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_deviations_and_densities_on_the_samplers_grid(eta: float) -> None:
    """Checks 7.2.1 and 7.2.2: golden numbers at eta 1, and an eta that scales them all."""
    sampler = trainer_with(MEAN.repeat(2, 1), MEAN.repeat(2, 1), eta=None if eta == 1 else eta).sampler
    golden = {951: (0.644391, -0.479489), 501: (0.429321, -0.073388), 51: (0.040597, 2.285129), 1: (0.020648, 2.961183)}
    assert len(sampler.grid) == 21
    for now, after in pairwise(sampler.grid.tolist()):
        if now in golden:
            x = torch.zeros(1, 3, dtype=torch.float64)
            law = sampler.solver.step(x, x, torch.tensor([now]), torch.tensor([after]))
            std, density = golden[now]
            assert float(law.std) == pytest.approx(eta * std, abs=1e-6)
            assert float(law.log_prob(law.mean)) == pytest.approx(density - math.log(eta), abs=2e-5)


def test_a_sampler_without_noise_is_refused_in_one_line() -> None:
    """Check 7.2.2: eta 0 would make every density infinite."""
    for eta in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValidationError, match="eta must be above 0, or the sampler's steps have no probability"):
            D3POConfig(eta=eta)
    run = RunConfig(
        output_dir="run",
        model={"pretrained_model_name_or_path": "a"},
        trainer={"name": "d3po", "eta": 0},
    )
    with pytest.raises(ConfigError, match="trainer.eta.*D3PO has 1") as error:
        trainer_settings(run)
    assert "\n" not in str(error.value)


# --- 3: golden ratio, and what is logged -----------------------------------------------------------------------------


def test_golden_ratio_and_logs() -> None:
    """Check 7.2.3 through the trainer: densities, their difference and the ratio; the other image's ratio is 1."""
    trainer = trainer_with(torch.cat([MEAN, MEAN]), torch.cat([REFERENCE_MEAN, MEAN]))
    batch = transitions(NEXT.repeat(2, 1))
    policy, reference = trainer.transitions(batch)
    assert float(policy.std[0]) == pytest.approx(STD, abs=1e-8)
    assert float(policy.log_prob(NEXT)[0].detach()) == pytest.approx(-0.100516, abs=1e-6)
    assert float(reference.log_prob(NEXT)[0]) == pytest.approx(-0.080170, abs=1e-6)
    output = trainer.loss(batch)
    metrics = {name: float(value) for name, value in output.metrics.items() if not name.startswith("grad_per_step")}
    z = 0.1 * math.log(0.979860)
    distance = float((MEAN - REFERENCE_MEAN).square().mean()) / (2 * STD**2)
    expected = {
        "loss": math.log1p(math.exp(-z)),
        "z_mean": z,
        "z_square": z**2,
        "implicit_accuracy": 0.0,
        "ratio_chosen": 0.979860,
        "ratio_rejected": 1.0,
        "clipped": 0.0,
        "ties": 0.0,
        "kl": distance / 2,  # the mean over two images, of which one has none
    }
    assert metrics == pytest.approx(expected, rel=1e-4)
    assert output.losses.item() == metrics["loss"] == output.loss.item()


def test_logs_follow_the_preference() -> None:
    """The better image's ratio is the chosen one's, wherever it stands; the share of ties and bounds is counted."""
    means, reference = torch.cat([MEAN, MEAN]), torch.cat([REFERENCE_MEAN, MEAN])
    batch = transitions(NEXT.repeat(2, 1), preference=-1.0)
    metrics = trainer_with(means, reference).loss(batch).metrics
    assert float(metrics["ratio_rejected"]) == pytest.approx(0.979860, abs=1e-6)
    assert float(metrics["implicit_accuracy"]) == 1.0
    metrics = trainer_with(means, reference, clip="released", clip_range=0.01).loss(batch).metrics
    assert float(metrics["clipped"]) == 0.5
    assert float(metrics["z_mean"]) == pytest.approx(-0.1 * math.log(0.99), rel=1e-6)
    metrics = trainer_with(means, reference).loss(dataclasses.replace(batch, preference=torch.zeros(1))).metrics
    assert (float(metrics["ties"]), float(metrics["implicit_accuracy"])) == (1.0, 0.5)


# --- 5, 8: the gradient at the start ---------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [(951, 901), (501, 451), (51, 1), (1, 0)])
@pytest.mark.parametrize("preference", [1.0, -1.0])
def test_start_and_slopes(step: tuple[int, int], preference: float) -> None:
    """Checks 7.2.5 and 7.2.8: ratio 1, loss ln 2, and beta / 2 times the densities' gradients, steepest at 51 -> 1.

    With next latents one deviation above the mean, d log p / d epsilon is slope / (deviation * elements).
    """
    slopes = {951: (-0.549634, -0.853), 501: (-0.268818, -0.626), 51: (-0.220477, -5.431), 1: (-0.020714, -1.003)}
    means = torch.cat([MEAN, REFERENCE_MEAN])
    trainer = trainer_with(means, means, step)
    std = float(trainer.transitions(transitions(means, step=step))[0].std[0])
    batch = transitions(means + std, preference, step)
    output = trainer.loss(batch)
    assert output.loss.item() == pytest.approx(LN2, abs=1e-12)
    assert float(output.metrics["ratio_chosen"]) == float(output.metrics["ratio_rejected"]) == 1.0
    assert float(output.metrics["implicit_accuracy"]) == 0.5
    assert slope(step) == pytest.approx(slopes[step[0]][0], abs=1e-6)
    assert slope(step) / std == pytest.approx(slopes[step[0]][1], abs=1e-3)
    density = slope(step) / std / 3
    found = gradient(trainer, batch)
    expected = -0.1 / 2 * preference * density
    logged = {name: float(value) for name, value in output.metrics.items() if name.startswith("grad_per_step/")}
    assert list(logged) == [f"grad_per_step/{time}" for time in trainer.sampler.grid[:-1].tolist()]
    assert logged.pop(f"grad_per_step/{step[0]}") == pytest.approx(20 * abs(expected) * math.sqrt(6))
    assert set(logged.values()) == {0.0}
    assert torch.allclose(found, torch.tensor([[expected], [-expected]], dtype=torch.float64).expand(2, 3))


# --- 6: bounds -------------------------------------------------------------------------------------------------------

FAR = double((1, 1, 1)), double((0, 0, 0))


@pytest.mark.parametrize("clip", ["released", "one_sided"])
def test_beyond_the_bound_on_the_good_side_nothing_is_learned(clip: str) -> None:
    """Check 7.2.6: the lower bound of the loss, and exactly no gradient for either image."""
    trainer = trainer_with(torch.cat(FAR), torch.cat(FAR).flip(0), clip=clip)
    batch = transitions(FAR[0].repeat(2, 1))
    assert trainer.loss(batch).loss.item() == pytest.approx(0.683164, abs=1e-6)
    assert float(trainer.loss(batch).metrics["clipped"]) == 1.0
    assert float(gradient(trainer, batch).abs().max()) == 0.0


def test_beyond_the_bound_on_the_bad_side() -> None:
    """Check 7.2.6: as released the loss has an upper bound and no gradient; the one-sided bound keeps both images'."""
    batch = transitions(FAR[0].repeat(2, 1) + 0.1)
    released = trainer_with(torch.cat(FAR).flip(0), torch.cat(FAR), clip="released")
    assert released.loss(batch).loss.item() == pytest.approx(0.703231, abs=1e-6)
    assert float(gradient(released, batch).abs().max()) == 0.0
    one_sided = trainer_with(torch.cat(FAR).flip(0), torch.cat(FAR))
    z = -0.1 * 2 * (1.1**2 - 0.1**2) / (2 * STD**2)
    assert one_sided.loss(batch).loss.item() == pytest.approx(math.log1p(math.exp(-z)), rel=1e-6)
    assert float(one_sided.loss(batch).metrics["clipped"]) == 0.0
    found = gradient(one_sided, batch)
    # Minus the gradient moves the better image's mean (slope times epsilon) up to what was drawn, the worse one's away.
    assert bool((-found[0] * slope() > 0).all())
    assert bool((-found[1] * slope() < 0).all())


def test_each_image_is_bounded_by_itself() -> None:
    """One image beyond the bound, the other within it: only the latter learns."""
    means = torch.cat([FAR[0], MEAN])
    trainer = trainer_with(means, torch.cat([FAR[1], MEAN]))
    found = gradient(trainer, transitions(torch.cat([FAR[0] + 0.1, NEXT])))
    assert float(found[0].abs().max()) == 0.0
    assert float(found[1].abs().min()) > 0.0


# --- 7: ties and swaps -----------------------------------------------------------------------------------------------


def test_a_tie_teaches_nothing() -> None:
    """Check 7.2.7: loss ln 2, gradient exactly 0."""
    trainer = trainer_with(torch.cat([MEAN, REFERENCE_MEAN]), torch.cat([REFERENCE_MEAN, MEAN]))
    batch = transitions(NEXT.repeat(2, 1), preference=0.0)
    assert trainer.loss(batch).loss.item() == pytest.approx(LN2, abs=1e-15)
    assert float(gradient(trainer, batch).abs().max()) == 0.0


@pytest.mark.parametrize("clip", ["released", "one_sided"])
def test_swapping_images_and_labels_changes_nothing(clip: str) -> None:
    """Check 7.2.7; swapping the labels alone does change the loss."""
    rows, drawn = torch.cat([MEAN, FAR[0]]), torch.cat([NEXT, FAR[1]])
    reference = torch.cat([REFERENCE_MEAN, MEAN])
    trainer = trainer_with(rows, reference, clip=clip)
    loss = trainer.loss(transitions(drawn)).loss.item()
    swapped = trainer_with(rows.flip(0), reference.flip(0), clip=clip)
    assert swapped.loss(transitions(drawn.flip(0), preference=-1.0)).loss.item() == pytest.approx(loss, abs=1e-15)
    assert abs(trainer.loss(transitions(drawn, preference=-1.0)).loss.item() - loss) > 1e-4


def test_weights_leave_pairs_out() -> None:
    trainer = trainer_with(torch.cat([MEAN, MEAN]), torch.cat([REFERENCE_MEAN, MEAN]))
    batch = dataclasses.replace(transitions(NEXT.repeat(2, 1)), weight=torch.zeros(1))
    assert trainer.loss(batch).loss.item() == 0.0
    assert float(gradient(trainer, batch).abs().max()) == 0.0


# --- guidance, real networks -----------------------------------------------------------------------------------------


def test_guidance_is_part_of_policy_and_reference() -> None:
    """Two predictions u and c of every image act as one, u + w (c - u), in policy, reference and gradient."""
    without, told = torch.cat([MEAN, NEXT]), torch.cat([REFERENCE_MEAN, MEAN])
    batch = transitions(torch.cat([NEXT, REFERENCE_MEAN]))
    guided = trainer_with(torch.cat([without, told]), torch.cat([told, without]), guidance_scale=5.0)
    plain = trainer_with(without + 5 * (told - without), told + 5 * (without - told))
    assert guided.loss(batch).loss.item() == pytest.approx(plain.loss(batch).loss.item(), abs=1e-14)
    expected = gradient(plain, batch)
    assert torch.allclose(gradient(guided, batch), torch.cat([-4 * expected, 5 * expected]), atol=1e-12)


def _pairs(trainer: D3PO, step: int) -> TransitionPairs:
    """Two prompts' pairs of images at one step of their rollouts; the second pair's other image is the better."""
    draws = tuple(Draw(7, 0, f"prompt-{i}") for i in range(2))
    rollouts = trainer.sampler.rollout(["one circle", "two squares"], draws, 2)
    before, after = rollouts.latents[:, step].double(), rollouts.next_latents[:, step].double()
    return TransitionPairs(
        conditioning=rollouts.conditioning,
        chosen=before[0::2],
        rejected=before[1::2],
        weight=torch.tensor([1.0, 0.5]),
        draws=draws,
        next_chosen=after[0::2],
        next_rejected=after[1::2],
        timesteps=rollouts.timesteps[step].expand(2),
        next_timesteps=rollouts.next_timesteps[step].expand(2),
        preference=torch.tensor([1.0, -1.0]),
        unconditional=rollouts.unconditional,
    )


def _naive(trainer: D3PO, batch: TransitionPairs, eta: float = 1.0) -> float:
    """The loss from the equations, image by image, with torch's own normal density and the schedule's own products."""
    abar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    total = 0.0
    for pair in range(2):
        t, p = int(batch.timesteps[pair]), int(batch.next_timesteps[pair])
        logit = 0.0
        for h, before, after in (
            (float(batch.preference[pair]), batch.chosen, batch.next_chosen),
            (-float(batch.preference[pair]), batch.rejected, batch.next_rejected),
        ):
            x, densities = before[pair : pair + 1], []
            for model in (trainer.policy, trainer.policy.frozen()):
                with_prompt = model.predict(x, torch.tensor([t]), batch.conditioning[[pair]])
                without = model.predict(x, torch.tensor([t]), batch.unconditional)
                noise = without + 5.0 * (with_prompt - without)
                clean = (x - (1 - abar[t]).sqrt() * noise) / abar[t].sqrt()
                std = eta * ((1 - abar[p]) / (1 - abar[t]) * (1 - abar[t] / abar[p])).sqrt()
                mean = abar[p].sqrt() * clean + (1 - abar[p] - std**2).sqrt() * noise
                normal: Any = torch.distributions.Normal(mean, std)
                densities.append(normal.log_prob(after[pair : pair + 1]).mean().item())
            ratio = math.exp(densities[0] - densities[1])
            ratio = min(ratio, 1.1) if h > 0 else max(ratio, 0.9)
            logit += 0.1 * h * math.log(ratio)
        total += float(batch.weight[pair]) * math.log1p(math.exp(-logit)) / 2
    return total


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 2, 3])
def test_loss_is_the_equations(tiny_pipeline: Path, policies: Any, step: int) -> None:
    """On a real UNet in double precision, with guidance, against a computation without any of the shared parts."""
    policy = policies.double(tiny_pipeline, lora=LoRA(rank=2))
    policies.move_away(policy)
    trainer = D3PO(policy, num_inference_steps=4)
    batch = _pairs(trainer, step)
    output = trainer.loss(batch)
    assert output.loss.item() == pytest.approx(_naive(trainer, batch), abs=1e-9)
    assert abs(float(output.metrics["ratio_chosen"]) - 1) > 1e-6


@pytest.mark.slow
def test_every_adapter_tensor_gets_a_gradient(lora_policy: Any, policies: Any) -> None:
    """And the first step is a fresh adapter's: policy and reference are the same, so all ratios are exactly 1."""
    trainer = D3PO(lora_policy, num_inference_steps=3)
    batch = _pairs(trainer, 1)
    output = trainer.loss(batch)
    assert float(output.metrics["ratio_chosen"]) == float(output.metrics["ratio_rejected"]) == 1.0
    assert output.losses.tolist() == [LN2] * 2
    policies.move_away(lora_policy)
    found = gradients(trainer, batch)
    assert any(float(value.abs().max()) > 0 for value in found.values())
    trained = {id(parameter) for parameter in lora_policy.trainable_parameters()}
    assert all(p.grad is None for p in lora_policy.denoiser.parameters() if id(p) not in trained)


# --- settings --------------------------------------------------------------------------------------------------------


def test_pairs_of_pictures_are_refused(lora_policy: Any, batches: Batches) -> None:
    with pytest.raises(TypeError, match="got a PairBatch; take batches from a RolloutSource"):
        D3PO(lora_policy).loss(batches(2))


@pytest.mark.parametrize(
    "options",
    [
        {"caption_dropout": 0.2},
        {"timestep_sampling": "turbo"},
        {"loss_type": "ipo"},
        {"beta_convention": "sum"},
        {"clip": "two_sided"},
        {"clip_range": 1.0},
        {"guidance_scale": -1.0},
    ],
)
def test_settings_of_other_methods_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        D3POConfig(**options)


def test_description_names_what_was_drawn_with() -> None:
    assert trainer_with(MEAN.repeat(2, 1), MEAN.repeat(2, 1)).describe() == (
        "D3PO: beta 0.1 on mean log ratios, clip one_sided at 0.1; 20 steps of DDIM with noise 1 and guidance 1; "
        "reference the start"
    )
