"""The self-checks 1 to 20 of the pair loss; the number of each stands in its test's docstring.

Checks 11, 12 and 18 concern data as well: `tests/data` looks at readers, source and cache, this file at the trainer.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from pydantic import ValidationError
from torch import Tensor, nn
from torch.func import functional_call

from diffalign.backbones import LoRA, load_policy
from diffalign.batches import Conditioning, Moments, PairBatch
from diffalign.losses import margin_loss, per_sample_error
from diffalign.monitor import EarlyWarnings
from diffalign.policy import Policy, Predictor
from diffalign.predictions import Prediction
from diffalign.randomness import Draw
from diffalign.schedules import FlowSchedule, Schedule
from diffalign.trainers.diffusion_dpo import DiffusionDPO

Batches = Callable[..., PairBatch]


# --- a policy whose answers are free parameters ----------------------------------------------------------------------


class TablePolicy(Policy):
    """Answers with a table: `answers` [2B, d] with gradient, `reference_answers` [2B, d] without.

    A flow of four elements: its target, noise minus latents, may differ between the halves of a pair though they
    share their noise.
    """

    def __init__(
        self, answers: Tensor, reference_answers: Tensor, prediction: Prediction = Prediction.VELOCITY
    ) -> None:
        self.schedule: Schedule = FlowSchedule()
        self.prediction = prediction
        self.latent_shape = tuple(answers.shape[1:])
        self.answers, self.reference_answers = answers, reference_answers

    @property
    def resolution(self) -> int:
        return 2

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return self.answers

    def frozen(self) -> Predictor:
        class Reference:
            @staticmethod
            def predict(noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
                return self.reference_answers

        return Reference()

    def _unused(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("a pair trainer has no business here")

    encode_prompts = token_counts = encode = decode = sample = trainable_parameters = _unused
    save_trained = load_trained = encoder_fingerprint = free_encoders = reload_encoders = _unused


def double(*rows: Sequence[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


TARGETS = double((0.5, -0.25, 0, 1), (-1, 0.5, 0.25, 0))
ANSWERS = double((0.4, -0.2, 0.1, 0.9), (-0.9, 0.4, 0.3, 0.1))
REFERENCE = double((0.45, -0.3, 0.05, 0.8), (-0.95, 0.45, 0.2, 0.05))
GRADIENTS = double((-0.962280, 0.481140, 0.962280, -0.962280), (-0.962280, 0.962280, -0.481140, -0.962280))


def golden_batch(pairs: int = 1) -> PairBatch:
    """Pairs whose flow targets are `TARGETS`: the latents are the noise minus the target."""
    draws = tuple(Draw(0, 0, f"golden-{i}") for i in range(pairs))
    noise = torch.stack([draw.normal("noise", (4,)) for draw in draws]).double()
    conditioning = Conditioning({"hidden": torch.zeros(pairs, 1)})
    return PairBatch(conditioning, noise - TARGETS[0], noise - TARGETS[1], torch.ones(pairs), draws)


def golden_trainer(swapped: bool = False, **options: Any) -> DiffusionDPO:
    order = [1, 0] if swapped else [0, 1]
    answers = ANSWERS[order].clone().requires_grad_(True)
    return DiffusionDPO(TablePolicy(answers, REFERENCE[order]), **options)


def swap(batch: PairBatch) -> PairBatch:
    return dataclasses.replace(batch, chosen=batch.rejected, rejected=batch.chosen)


def gradients(trainer: Any, batch: PairBatch) -> dict[str, Tensor]:
    """One backward pass; gradients by parameter name."""
    for parameter in trainer.policy.trainable_parameters():
        parameter.grad = None
    trainer.loss(batch).loss.backward()
    named = trainer.policy.named_trainable()
    assert all(parameter.grad is not None for _, parameter in named)
    return {name: parameter.grad.clone() for name, parameter in named}


@pytest.fixture
def lora_policy(tiny_pipeline: Path) -> Any:
    return load_policy(str(tiny_pipeline), lora=LoRA(rank=2), train=True)


@pytest.fixture
def full_policy(tiny_pipeline: Path) -> Any:
    return load_policy(str(tiny_pipeline), train=True)


# --- 1: ln 2 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [1.0, 2000.0, 1e6])
def test_01_loss_is_exactly_ln_2_for_a_fresh_adapter(lora_policy: Any, batches: Batches, beta: float) -> None:
    """Check 7.1.1, LoRA: Delta is exactly 0, so the loss is float32's ln 2 to the last bit, for any beta."""
    output = DiffusionDPO(lora_policy, beta=beta).loss(batches(4))
    ln2 = float(torch.tensor(math.log(2)))
    assert output.losses.tolist() == [ln2] * 4
    assert output.loss.item() == ln2
    assert float(output.metrics["z_mean"]) == float(output.metrics["z_square"]) == 0
    assert float(output.metrics["implicit_accuracy"]) == 0.5
    assert float(output.metrics["gate"]) == 0.5


def test_01_loss_is_exactly_ln_2_for_a_fresh_copy(full_policy: Any, batches: Batches) -> None:
    """Check 7.1.1, full fine-tuning: the same dtype and the same code path give the same bits."""
    output = DiffusionDPO(full_policy, beta=5000.0).loss(batches(4))
    assert output.losses.tolist() == [float(torch.tensor(math.log(2)))] * 4


def test_01_loss_is_near_ln_2_with_a_half_precision_reference(tiny_pipeline: Path, batches: Batches) -> None:
    """Check 7.1.1: with a half precision reference copy |loss - ln 2| < 0.05, and not exactly 0."""
    policy: Any = load_policy(str(tiny_pipeline), train=True, dtype=torch.bfloat16)
    assert policy.frozen().predict(torch.zeros(1, 4, 4, 4), torch.tensor([5]), batches(1).conditioning).dtype == (
        torch.bfloat16
    )
    assert all(p.dtype == torch.float32 for p in policy.trainable_parameters())
    loss = DiffusionDPO(policy, beta=20.0).loss(batches(8)).loss.item()
    assert 0 < abs(loss - math.log(2)) < 0.05


# --- 2, 3, 4: golden vectors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("beta", "z", "loss"), [(1, 0.0046875, 0.690806), (100, 0.46875, 0.485990), (2000, 9.375, 8.4815e-5)]
)
def test_02_golden_vector(beta: float, z: float, loss: float) -> None:
    """Check 7.1.2: the four errors, Delta, z and the loss, through the trainer's own steps."""
    output = golden_trainer(beta=beta).loss(golden_batch())
    metrics = {name: float(value) for name, value in output.metrics.items()}
    assert metrics["error_chosen"] == pytest.approx(0.008125, abs=1e-12)
    assert metrics["error_rejected"] == pytest.approx(0.008125, abs=1e-12)
    assert metrics["ref_error_chosen"] == pytest.approx(0.011875, abs=1e-12)
    assert metrics["ref_error_rejected"] == pytest.approx(0.0025, abs=1e-12)
    assert metrics["model_mse"] == pytest.approx(0.008125, abs=1e-12)
    assert metrics["ref_mse"] == pytest.approx((0.011875 + 0.0025) / 2, abs=1e-12)
    assert metrics["z_mean"] == pytest.approx(z, rel=1e-12)
    assert metrics["z_square"] == pytest.approx(z**2, rel=1e-12)
    assert metrics["implicit_accuracy"] == 1
    assert metrics["gate"] == pytest.approx(1 / (1 + math.exp(z)), rel=1e-10)
    assert metrics["loss"] == output.loss.item() == pytest.approx(loss, rel=1e-5)


def test_02_logs_belong_to_their_halves(lora_policy: Any, batches: Batches, policies: Any) -> None:
    """Check 7.1.2 with four different errors: each log is the mean of the errors it names."""
    policies.move_away(lora_policy)
    trainer, batch = DiffusionDPO(lora_policy, beta=100.0), batches(3)
    error, reference = (e.detach() for e in trainer.errors(trainer.noisy_states(batch)))
    metrics = {name: float(value) for name, value in trainer.loss(batch).metrics.items()}
    z = -50 * ((error[:3] - reference[:3]) - (error[3:] - reference[3:]))
    expected = {
        "model_mse": error,
        "ref_mse": reference,
        "error_chosen": error[:3],
        "error_rejected": error[3:],
        "ref_error_chosen": reference[:3],
        "ref_error_rejected": reference[3:],
        "z_mean": z,
        "z_square": z**2,
        "implicit_accuracy": (z > 0).float(),
        "gate": torch.sigmoid(-z),
        "loss": torch.nn.functional.softplus(-z),
    }
    assert metrics.keys() == expected.keys()
    assert len({metrics[name] for name in list(expected)[:6]}) == 6
    for name, values in expected.items():
        assert metrics[name] == pytest.approx(float(values.mean()), rel=1e-5), name


def test_03_golden_gradients() -> None:
    """Check 7.1.3: gradients of both predictions; descent pulls the chosen one in and pushes the other away."""
    trainer = golden_trainer(beta=100.0)
    trainer.loss(golden_batch()).loss.backward()
    gradient = trainer.policy.answers.grad
    torch.testing.assert_close(gradient, GRADIENTS, rtol=0, atol=5.1e-7)
    stepped = ANSWERS - 1e-4 * gradient
    before, after = per_sample_error(ANSWERS, TARGETS), per_sample_error(stepped, TARGETS)
    assert float(after[0]) < float(before[0])
    assert float(after[1]) > float(before[1])


def test_04_swapping_a_pair_negates_its_margin() -> None:
    """Check 7.1.4: loss(swapped) - loss = z; z changes sign; accuracy p becomes 1 - p."""
    plain = golden_trainer(beta=100.0).loss(golden_batch())
    swapped = golden_trainer(swapped=True, beta=100.0).loss(swap(golden_batch()))
    assert (swapped.loss - plain.loss).item() == pytest.approx(0.46875, abs=1e-12)
    assert swapped.loss.item() == pytest.approx(0.954740, abs=5e-7)
    assert float(swapped.metrics["z_mean"]) == -float(plain.metrics["z_mean"])
    assert (float(plain.metrics["implicit_accuracy"]), float(swapped.metrics["implicit_accuracy"])) == (1, 0)


def test_04_swapping_real_pairs_negates_their_margins(lora_policy: Any, batches: Batches, policies: Any) -> None:
    """Check 7.1.4 on the real UNet: per pair loss(swapped) - loss = z, accuracies add up to 1."""
    policies.move_away(lora_policy)
    trainer, batch = DiffusionDPO(lora_policy, beta=100.0), batches(6)
    plain, swapped = trainer.loss(batch), trainer.loss(swap(batch))
    assert float(swapped.metrics["z_mean"]) == pytest.approx(-float(plain.metrics["z_mean"]), rel=1e-5)
    assert (swapped.loss - plain.loss).item() == pytest.approx(float(plain.metrics["z_mean"]), abs=1e-5)
    accuracies = float(plain.metrics["implicit_accuracy"]), float(swapped.metrics["implicit_accuracy"])
    assert sum(accuracies) == pytest.approx(1)
    assert 0 < accuracies[0] < 1


# --- 5, 6, 7, 8: constants, conventions, signs -----------------------------------------------------------------------


def test_05_no_gradient_reaches_the_reference(full_policy: Any, batches: Batches, policies: Any) -> None:
    """Check 7.1.5: the frozen copy neither asks for gradients nor gets any, and stays as it was."""
    policies.move_away(full_policy)
    trainer = DiffusionDPO(full_policy)
    copy: nn.Module = full_policy._frozen
    before = {name: p.clone() for name, p in copy.named_parameters()}
    trainer.loss(batches(2)).loss.backward()
    for name, parameter in copy.named_parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
    assert not {id(p) for p in copy.parameters()} & {id(p) for p in full_policy.trainable_parameters()}


def test_05_reference_values_do_not_change_the_gradient_at_the_start() -> None:
    """Check 7.1.5: where Delta is 0, S = 1/2 whatever the two reference errors are."""
    found = []
    for distance in (0.1, 0.7):
        policy = TablePolicy((TARGETS + 0.3).requires_grad_(True), TARGETS + distance)
        DiffusionDPO(policy, beta=100.0).loss(golden_batch()).loss.backward()
        found.append(policy.answers.grad)
    assert found[0] is not None
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(found[0], double([0.5 * 100 / 4 * 0.3] * 4, [-0.5 * 100 / 4 * 0.3] * 4))


@pytest.mark.parametrize(("convention", "beta"), [("sum_half", 100 / 4), ("sum", 50 / 4), ("mean", 50)])
def test_06_conventions_of_beta_agree(convention: str, beta: float) -> None:
    """Check 7.1.6: (mean, beta) equals (sum, beta / d), and the diffusers SD1.5 beta is half of this one."""
    plain, other = golden_trainer(beta=100.0), golden_trainer(beta=beta, beta_convention=convention)
    outputs = [trainer.loss(golden_batch()) for trainer in (plain, other)]
    assert outputs[1].loss.item() == pytest.approx(outputs[0].loss.item(), rel=1e-12)
    for output in outputs:
        output.loss.backward()
    torch.testing.assert_close(plain.policy.answers.grad, other.policy.answers.grad, rtol=1e-12, atol=0)
    assert plain.kappa == other.kappa == 50


def test_06_mean_errors_equal_an_independent_sum_with_its_own_beta() -> None:
    """Check 7.1.6: the loss written with sums and beta / d, by hand."""
    sums = ((ANSWERS - TARGETS) ** 2).sum(1) - ((REFERENCE - TARGETS) ** 2).sum(1)
    by_hand = math.log1p(math.exp(0.5 * (100 / 4) * float(sums[0] - sums[1])))
    assert golden_trainer(beta=100.0).loss(golden_batch()).loss.item() == pytest.approx(by_hand, rel=1e-12)


def test_06_kappa_is_printed() -> None:
    """Check 7.1.6: the start-up line has kappa and its equivalent per summed element."""
    text = golden_trainer(beta=50.0, beta_convention="mean").describe()
    assert "kappa 50 on mean errors" in text
    assert "12.5 per summed element" in text


def test_07_a_larger_beta_gives_a_smaller_loss_to_a_won_pair() -> None:
    """Check 7.1.7: at fixed Delta < 0 the loss falls with beta."""
    losses = [golden_trainer(beta=beta).loss(golden_batch()).loss.item() for beta in (1.0, 10.0, 100.0, 1000.0)]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 4


def test_07_the_first_gradient_is_proportional_to_beta(lora_policy: Any, batches: Batches) -> None:
    """Check 7.1.7: at the start z = 0 for every beta, so gradients scale with beta and nothing else."""
    small = gradients(DiffusionDPO(lora_policy, beta=10.0), batches(2))
    large = gradients(DiffusionDPO(lora_policy, beta=2000.0), batches(2))
    scale = max(float(gradient.abs().max()) for gradient in large.values())
    assert scale > 0
    for name, gradient in small.items():
        torch.testing.assert_close(large[name], 200 * gradient, rtol=0, atol=1e-5 * scale)


def test_08_a_small_step_raises_the_margin(lora_policy: Any, batches: Batches, policies: Any) -> None:
    """Check 7.1.8: after one small SGD step on a pair its z has risen, with the shared network."""
    policies.move_away(lora_policy)
    trainer, batch = DiffusionDPO(lora_policy, beta=100.0), batches(1)
    before = trainer.loss(batch)
    before.loss.backward()
    with torch.no_grad():
        for parameter in lora_policy.trainable_parameters():
            parameter -= 1e-4 * parameter.grad
    assert float(trainer.loss(batch).metrics["z_mean"]) > float(before.metrics["z_mean"])


def test_08_free_predictions_move_both_rewards_the_right_way() -> None:
    """Check 7.1.8: the chosen implicit reward -(E - E_ref) rises, the rejected one falls."""
    trainer = golden_trainer(beta=100.0)
    trainer.loss(golden_batch()).loss.backward()
    answers = trainer.policy.answers

    def rewards() -> Tensor:
        return per_sample_error(REFERENCE, TARGETS) - per_sample_error(answers, TARGETS)

    before = rewards().detach()
    with torch.no_grad():
        answers -= 1e-3 * answers.grad
    change = rewards().detach() - before
    assert float(change[0]) > 0 > float(change[1])


# --- 9, 10: what pairs share and what they do not --------------------------------------------------------------------


def test_09_both_halves_share_timestep_and_noise(lora_policy: Any, batches: Batches) -> None:
    """Check 7.1.9: halves of t and noise are equal, and no two pairs share theirs."""
    states = DiffusionDPO(lora_policy).noisy_states(batches(5))
    for tensor in (states.timesteps, states.noise, states.conditioning.tensors["hidden"]):
        first, second = tensor.chunk(2)
        assert torch.equal(first, second)
    assert torch.equal(states.latents, torch.cat([batches(5).chosen, batches(5).rejected]))
    assert len(set(states.timesteps.tolist())) == 5
    assert len({tuple(noise.flatten().tolist()) for noise in states.noise}) == 5


def test_09_the_rejected_image_does_not_touch_the_chosen_states(lora_policy: Any, batches: Batches) -> None:
    """Check 7.1.9: another rejected image leaves the chosen x_t bit-identical."""
    trainer, batch = DiffusionDPO(lora_policy), batches(3)
    other = dataclasses.replace(batch, rejected=batch.rejected + 1)
    before, after = trainer.noisy_states(batch), trainer.noisy_states(other)
    assert torch.equal(before.noisy_latents[:3], after.noisy_latents[:3])
    assert torch.equal(before.target[:3], after.target[:3])
    assert not torch.equal(before.noisy_latents[3:], after.noisy_latents[3:])


def rows(batch: PairBatch, order: Sequence[int]) -> PairBatch:
    index = list(order)
    return PairBatch(
        batch.conditioning[index],
        batch.chosen[index],
        batch.rejected[index],
        batch.weight[index],
        tuple(batch.draws[i] for i in index),
    )


def test_10_permuting_pairs_permutes_their_losses(lora_policy: Any, batches: Batches, policies: Any) -> None:
    """Check 7.1.10: losses belong to pairs, not to places; permuting only the rejected halves changes them."""
    policies.move_away(lora_policy)
    trainer, batch, order = DiffusionDPO(lora_policy, beta=100.0), batches(4), [2, 0, 3, 1]
    losses = trainer.loss(batch).losses
    torch.testing.assert_close(trainer.loss(rows(batch, order)).losses, losses[order], rtol=1e-5, atol=1e-6)
    mixed = trainer.loss(dataclasses.replace(batch, rejected=batch.rejected[order])).losses
    assert float((mixed - losses).abs().max()) > 1e-3


# --- 11, 12, 18: the trainer's side of the data contract ---------------------------------------------------------


def test_11_weights_scale_the_pairs_and_nothing_else(lora_policy: Any, batches: Batches, policies: Any) -> None:
    """Check 7.1.11: the trainer sees no labels, only order and weight; a weight of 0 drops a pair's gradient."""
    policies.move_away(lora_policy)
    trainer, batch = DiffusionDPO(lora_policy, beta=100.0), batches(2)
    weighted = dataclasses.replace(batch, weight=torch.tensor([2.0, 0.0]))
    output = trainer.loss(weighted)
    assert torch.equal(output.losses, trainer.loss(batch).losses)
    assert output.loss.item() == pytest.approx(float(output.losses[0]))
    alone, both = gradients(trainer, rows(batch, [0])), gradients(trainer, weighted)
    scale = max(float(g.abs().max()) for g in alone.values())
    for name, gradient in alone.items():
        torch.testing.assert_close(both[name], gradient, rtol=0, atol=1e-5 * scale)


def test_12_a_dropped_caption_is_dropped_for_both_halves_and_both_models(lora_policy: Any, batches: Batches) -> None:
    """Check 7.1.12: policy and reference see the batch's own row, the same for chosen and rejected."""
    empty = lora_policy.encode_prompts([""])
    batch = batches(2)
    hidden = torch.cat([empty.tensors["hidden"], lora_policy.encode_prompts(["a red circle"]).tensors["hidden"]])
    batch = dataclasses.replace(batch, conditioning=Conditioning({"hidden": hidden}))
    seen: list[Tensor] = []
    lora_policy.denoiser.register_forward_pre_hook(lambda _, args: seen.append(args[2].detach().clone()))
    DiffusionDPO(lora_policy).loss(batch)
    assert len(seen) == 2  # reference and policy
    for conditioning in seen:
        for row, expected in ((0, 0), (1, 1), (2, 0), (3, 1)):
            assert torch.equal(conditioning[row], hidden[expected])


def test_12_caption_dropout_is_a_fifth_unless_told_otherwise(lora_policy: Any) -> None:
    """Check 7.1.12: the default rate; out of range is refused."""
    assert DiffusionDPO(lora_policy).config.caption_dropout == 0.2
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        DiffusionDPO(lora_policy, caption_dropout=1.1)


def test_18_cached_moments_give_what_encoding_on_the_fly_gives(lora_policy: Any, batches: Batches) -> None:
    """Check 7.1.18: moments rounded to bfloat16, as cached, change the batch's latents by less than their rounding."""
    images = torch.rand(2, 3, 8, 8, generator=Draw(0, 0, "images").generator("pixels"))
    moments: Moments = lora_policy.encode(images)
    noise = Draw(0, 0, "pair").normal("posterior/chosen", moments.mean.shape)
    cached = moments.mean.bfloat16().float() + moments.std.bfloat16().float() * noise
    direct = moments.mean + moments.std * noise
    bound = 2**-8 * (moments.mean.abs() + moments.std * noise.abs())
    assert bool(((cached - direct).abs() <= bound).all())
    trainer, batch = DiffusionDPO(lora_policy), batches(2)
    batch = dataclasses.replace(batch, chosen=direct, rejected=direct.flip(0))
    near = dataclasses.replace(batch, chosen=cached, rejected=cached.flip(0))
    a, b = trainer.loss(batch).metrics["model_mse"], trainer.loss(near).metrics["model_mse"]
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


# --- 13: prediction types --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["v", "velocity"])
def test_13_converted_predictions_weighted_in_time_give_the_epsilon_loss(kind: str, batches: Batches) -> None:
    """Check 7.1.13: an epsilon network read as v (as velocity), its errors times abar ((1-t)^2), is the same loss."""
    prediction = Prediction(kind)
    shape, batch = (4, 4, 4), batches(3, dtype=torch.float64)
    answers = batches(6, dtype=torch.float64, key="answers")
    table = TablePolicy(answers.chosen, answers.rejected, Prediction.EPSILON)
    if prediction is Prediction.V:
        from diffalign.schedules import DiscreteSchedule

        table.schedule = DiscreteSchedule.scaled_linear()
    trainer = DiffusionDPO(table, beta=100.0)
    states = trainer.noisy_states(batch)
    alphas, sigmas = table.schedule.scales(states.timesteps)
    converted = TablePolicy(
        *(
            Prediction.EPSILON.convert(a, prediction, states.noisy_latents, alphas, sigmas)
            for a in (table.answers, table.reference_answers)
        ),
        prediction,
    )
    converted.schedule = table.schedule
    other = DiffusionDPO(converted, beta=100.0)
    errors = other.errors(other.noisy_states(batch))
    weight = prediction.epsilon_weight(alphas, sigmas)
    margin = other.margin(other.log_ratio(weight * errors[0], weight * errors[1]), states)
    assert table.latent_shape == shape
    expected = trainer.loss(batch).losses
    torch.testing.assert_close(other.objective(margin, states), expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(other.loss(batch).losses, expected)


def test_13_a_method_refuses_a_prediction_it_has_no_equation_for() -> None:
    """Check 7.1.13: a network that predicts x0 is refused by name."""
    with pytest.raises(ValueError, match="DiffusionDPO cannot train a model that predicts 'sample'; it knows epsilon"):
        DiffusionDPO(TablePolicy(ANSWERS, REFERENCE, Prediction.SAMPLE))


# --- 14, 15: accumulation, overfitting -------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [True, False], ids=["float64", "float32"])
def test_14_eight_micro_batches_of_one_are_a_batch_of_eight(
    double: bool, tiny_pipeline: Path, batches: Batches, policies: Any
) -> None:
    """Check 7.1.14: loss, and weights after one SGD step, agree to 1e-6 in float32 (1e-12 in float64)."""
    lora, tolerance = LoRA(rank=2), 1e-12 if double else 1e-6
    policy = policies.double(tiny_pipeline, lora=lora) if double else load_policy(str(tiny_pipeline), lora=lora)
    policies.move_away(policy)
    dtype = torch.float64 if double else torch.float32
    trainer = DiffusionDPO(policy, beta=100.0)
    singles = [batches(1, first=i, dtype=dtype) for i in range(8)]
    whole = gradients(trainer, batches(8, dtype=dtype))
    parts = [gradients(trainer, single) for single in singles]
    for name, gradient in whole.items():
        mean = torch.stack([part[name] for part in parts]).mean(0)
        torch.testing.assert_close(0.1 * mean, 0.1 * gradient, rtol=0, atol=tolerance)
    assert max(float(0.1 * gradient.abs().max()) for gradient in whole.values()) > 1e-3
    mean_loss = sum(trainer.loss(single).loss.item() for single in singles) / 8
    assert trainer.loss(batches(8, dtype=dtype)).loss.item() == pytest.approx(mean_loss, rel=0, abs=tolerance)


def test_15_one_pair_can_be_learnt_by_heart(full_policy: Any, batches: Batches) -> None:
    """Check 7.1.15: 50 steps at 1e-3 on one pair: loss < 0.05, accuracy 1; swapped afterwards: accuracy 0."""
    trainer, batch = DiffusionDPO(full_policy, beta=2000.0), batches(1)
    optimizer = torch.optim.AdamW(full_policy.trainable_parameters(), lr=1e-3)
    for _ in range(50):
        optimizer.zero_grad()
        trainer.loss(batch).loss.backward()
        optimizer.step()
    with torch.no_grad():
        learnt, swapped = trainer.loss(batch), trainer.loss(swap(batch))
    assert learnt.loss.item() < 0.05
    assert float(learnt.metrics["implicit_accuracy"]) == 1
    assert float(swapped.metrics["implicit_accuracy"]) == 0


# --- 16: alarms ------------------------------------------------------------------------------------------------------


def test_16_a_saturated_trainer_raises_the_alarm(caplog: pytest.LogCaptureFixture) -> None:
    """Check 7.1.16: the gate of a trainer far beyond its pairs, for 100 steps. More in tests/test_monitor.py."""
    output = golden_trainer(beta=2000.0).loss(golden_batch())
    metrics = {name: float(value) for name, value in output.metrics.items()}
    assert metrics["gate"] < 0.02
    alarms = EarlyWarnings()
    with caplog.at_level(logging.WARNING, logger="diffalign"):
        given = [text for _ in range(100) for text in alarms.observe(metrics)]
    assert len(given) == 1
    assert "saturated" in given[0]
    assert given[0] in caplog.text


def test_16_a_rising_chosen_error_raises_the_alarm() -> None:
    """Check 7.1.16: both errors 20 % above the reference's, though the margin is 0."""
    policy = TablePolicy(TARGETS + 0.3 * math.sqrt(1.2), TARGETS + 0.3)
    metrics = {k: float(v) for k, v in DiffusionDPO(policy).loss(golden_batch()).metrics.items()}
    alarms = EarlyWarnings()
    given = [text for _ in range(30) for text in alarms.observe(metrics)]
    assert len(given) == 1
    assert "20 % above" in given[0]


# --- 17: adapter gradients -------------------------------------------------------------------------------------------


def test_17_every_adapter_tensor_has_a_gradient(lora_policy: Any, batches: Batches) -> None:
    """Check 7.1.17: none is None; A's are zero while B = 0, B's are not; no base weight has one."""
    found = gradients(DiffusionDPO(lora_policy), batches(2))
    assert len(found) == 2 * 4 * 8  # A and B of four projections in eight attention layers
    for name, gradient in found.items():
        assert bool(gradient.any()) == ("lora_B" in name), name
    trained = {id(p) for p in lora_policy.trainable_parameters()}
    assert all(p.grad is None for p in lora_policy.denoiser.parameters() if id(p) not in trained)


def test_17_every_weight_has_a_gradient_in_full_fine_tuning(full_policy: Any, batches: Batches) -> None:
    """Check 7.1.17: every weight of the UNet is reached."""
    found = gradients(DiffusionDPO(full_policy), batches(2))
    assert found.keys() == {name for name, _ in full_policy.denoiser.named_parameters()}


def test_17_an_adapter_left_off_fails_loudly(
    lora_policy: Any, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check 7.1.17: with the switch-back removed the loss has no gradient at all, and backward says so."""
    monkeypatch.setattr(lora_policy.denoiser, "enable_adapters", lambda: None)
    with pytest.raises(RuntimeError, match="does not require grad"):
        DiffusionDPO(lora_policy).loss(batches(2)).loss.backward()


def test_17_the_reference_pass_must_not_come_between_forward_and_backward(
    lora_policy: Any, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check 7.1.17, the trap the order avoids: policy first, reference left off, and all gradients are gone."""
    trainer = DiffusionDPO(lora_policy)
    states = trainer.noisy_states(batches(2))
    arguments = (states.noisy_latents, states.timesteps, states.conditioning)
    error = per_sample_error(lora_policy.predict(*arguments), states.target)
    monkeypatch.setattr(lora_policy.denoiser, "enable_adapters", lambda: None)
    reference_error = per_sample_error(trainer.reference.predict(*arguments), states.target)
    margin = trainer.margin(trainer.log_ratio(error, reference_error), states)
    trainer.objective(margin, states).mean().backward()
    assert all(parameter.grad is None for parameter in lora_policy.trainable_parameters())


def test_17_the_adapter_comes_back_on_when_the_reference_pass_fails(lora_policy: Any, batches: Batches) -> None:
    """Check 7.1.17: an error in the reference pass leaves policy and gradients as they were."""
    batch = batches(1)
    with pytest.raises(RuntimeError):
        lora_policy.frozen().predict(batch.chosen[:, :3], torch.tensor([3]), batch.conditioning)
    assert all(parameter.requires_grad for parameter in lora_policy.trainable_parameters())


# --- 19, 20: IPO, Turbo ----------------------------------------------------------------------------------------------


def test_19_ipo_starts_at_a_quarter_with_slope_minus_one(lora_policy: Any, batches: Batches) -> None:
    """Check 7.1.19: value 0.25 at the start, the raw form logged; the slope in z is -1, twice DPO's."""
    trainer = DiffusionDPO(lora_policy, beta=5000.0, loss_type="ipo")
    output = trainer.loss(batches(2))
    assert output.losses.tolist() == [0.25, 0.25]
    assert float(output.metrics["ipo_raw_loss"]) == pytest.approx(1e-8)
    ipo, dpo = gradients(trainer, batches(2)), gradients(DiffusionDPO(lora_policy, beta=5000.0), batches(2))
    scale = max(float(gradient.abs().max()) for gradient in dpo.values())
    assert scale > 0
    for name, gradient in dpo.items():
        torch.testing.assert_close(ipo[name], 2 * gradient, rtol=0, atol=1e-5 * scale)


def test_19_ipo_of_the_golden_vector() -> None:
    """Check 7.1.19: (z - 1/2)^2 and kappa^2 (m - 1 / (2 kappa))^2 with m = -Delta."""
    loss = golden_trainer(beta=100.0, loss_type="ipo").loss(golden_batch()).loss.item()
    assert loss == pytest.approx((0.46875 - 0.5) ** 2, rel=1e-10)
    assert loss == pytest.approx(50**2 * (0.009375 - 1 / 100) ** 2, rel=1e-10)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"loss_type": "hinge"}, 1 - 0.46875),
        ({"label_smoothing": 0.1}, 0.9 * 0.485990 + 0.1 * 0.954740),
        ({"loss_type": "robust", "label_smoothing": 0.1}, (0.9 * 0.485990 - 0.1 * 0.954740) / 0.8),
    ],
)
def test_19_other_objectives_differ_only_in_the_loss_of_the_margin(options: Any, expected: float) -> None:
    """The golden vector under the other losses; the margin's logs stay the same."""
    output = golden_trainer(beta=100.0, **options).loss(golden_batch())
    assert output.loss.item() == pytest.approx(expected, abs=1e-6)
    assert float(output.metrics["z_mean"]) == pytest.approx(0.46875, rel=1e-12)


def test_20_pure_noise_teaches_nothing(lora_policy: Any, batches: Batches, policies: Any) -> None:
    """Check 7.1.20: under Turbo's law a pair at t = 999 has loss ln 2 and exactly no gradient."""
    policies.move_away(lora_policy)
    trainer = DiffusionDPO(lora_policy, beta=2000.0, timestep_sampling="turbo")
    batch = batches(40)
    at_999 = trainer.noisy_states(batch).timesteps[:40] == 999
    assert 3 <= int(at_999.sum()) <= 20
    picked = rows(batch, at_999.nonzero()[:2, 0].tolist())
    states = trainer.noisy_states(picked)
    assert torch.equal(*states.noisy_latents.chunk(2))
    assert torch.equal(states.noisy_latents, states.noise)
    assert trainer.loss(picked).losses.tolist() == [float(torch.tensor(math.log(2)))] * 2
    largest = max(float(g.abs().max()) for g in gradients(trainer, picked).values())
    other = rows(batch, (~at_999).nonzero()[:2, 0].tolist())
    scale = max(float(g.abs().max()) for g in gradients(trainer, other).values())
    assert scale > 0
    assert largest <= 1e-5 * scale  # the two halves cancel up to the order of summation


# --- everything against a naive computation --------------------------------------------------------------------------


def naive(
    unet: UNet2DConditionModel, weights: dict[str, Tensor], batch: PairBatch, beta: float, kind: str
) -> tuple[list[Tensor], Tensor]:
    """Margins and mean loss of a batch, one pair after the other, from the equations alone.

    `unet` holds the reference's weights; `weights` are the policy's for those names where they differ.
    """
    low, high = math.sqrt(0.00085), math.sqrt(0.012)
    abar, table = 1.0, []
    for i in range(1000):
        abar *= 1.0 - (low + (high - low) * i / 999) ** 2
        table.append(abar)
    margins, total = [], torch.zeros((), dtype=batch.chosen.dtype)
    for i, draw in enumerate(batch.draws):
        t = int(1000 * draw.uniform("timestep"))
        noise = draw.normal("noise", batch.chosen.shape[1:]).to(batch.chosen.dtype)
        prompt = batch.conditioning.tensors["hidden"][i : i + 1]
        difference = []
        for x0 in (batch.chosen[i], batch.rejected[i]):
            x_t = math.sqrt(table[t]) * x0 + math.sqrt(1 - table[t]) * noise
            y = noise if kind == "epsilon" else math.sqrt(table[t]) * noise - math.sqrt(1 - table[t]) * x0
            arguments = (x_t[None], torch.tensor([t]), prompt)
            answer = functional_call(unet, weights, arguments).sample[0]
            with torch.no_grad():
                reference = unet(*arguments).sample[0]
            difference.append(sum_of_squares(answer - y) / y.numel() - sum_of_squares(reference - y) / y.numel())
        delta = difference[0] - difference[1]
        margins.append(-delta / 2)
        total = total - torch.log(1 / (1 + torch.exp(beta / 2 * delta)))
    return margins, total / len(batch)


def sum_of_squares(tensor: Tensor) -> Tensor:
    return (tensor * tensor).sum()


def naive_weights(policy: Any, unet: UNet2DConditionModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The policy's weights for `naive`, and the leaves they are made of, by the policy's parameter names.

    An adapter is written out: W + alpha / rank * B A.
    """
    leaves = {name: p.detach().double().clone().requires_grad_(True) for name, p in policy.named_trainable()}
    if policy.lora is None:
        return dict(leaves), leaves
    scale = (policy.lora.alpha or policy.lora.rank) / policy.lora.rank
    weights = {}
    for name, a in leaves.items():
        if "lora_A" in name:
            layer = name.split(".lora_A")[0]
            b = leaves[name.replace("lora_A", "lora_B")]
            base = unet.get_parameter(f"{layer}.weight").detach()
            weights[f"{layer}.weight"] = base + scale * b @ a
    return weights, leaves


@pytest.mark.parametrize("lora", [LoRA(rank=2, alpha=3.0), None], ids=["lora", "full"])
@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_margin_loss_and_gradients_equal_a_naive_computation_in_double_precision(
    kind: str, lora: LoRA | None, tiny_pipeline: Path, tiny_v_pipeline: Path, batches: Batches, policies: Any
) -> None:
    """On the real UNet with everything in float64, to 1e-9, at the beta that is used on Stable Diffusion."""
    folder, beta = (tiny_pipeline if kind == "epsilon" else tiny_v_pipeline), 2000.0
    policy = policies.double(folder, lora=lora)
    assert {p.dtype for p in policy.denoiser.parameters()} == {torch.float64}
    policies.move_away(policy, 0.02 if lora is None else 0.1)
    batch = batches(3, dtype=torch.float64)
    batch = dataclasses.replace(batch, weight=torch.ones(3, dtype=torch.float64))
    trainer = DiffusionDPO(policy, beta=beta)
    states = trainer.noisy_states(batch)
    margin = trainer.margin(trainer.log_ratio(*trainer.errors(states)), states)
    loss = trainer.loss(batch).loss
    found = gradients(trainer, batch)

    unet = UNet2DConditionModel.from_pretrained(folder / "unet").double().requires_grad_(False)
    weights, leaves = naive_weights(policy, unet)
    margins, expected = naive(unet, weights, batch, beta, kind)
    expected.backward()
    assert loss.dtype == margin.dtype == torch.float64
    assert 1e-3 < beta * float(margin.detach().abs().max())
    torch.testing.assert_close(margin.detach(), torch.stack(margins).detach(), rtol=0, atol=1e-9 / beta)
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=0, atol=1e-9)
    scale = max(float(leaf.grad.abs().max()) for leaf in leaves.values() if leaf.grad is not None)
    assert scale > 1e-3
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        torch.testing.assert_close(found[name], leaf.grad, rtol=0, atol=1e-9 * max(scale, 1.0))


@pytest.mark.parametrize("lora", [LoRA(rank=2), None], ids=["lora", "full"])
def test_single_precision_is_as_near_as_beta_allows(
    lora: LoRA | None, tiny_pipeline: Path, batches: Batches, policies: Any
) -> None:
    """The same against the naive float64 computation, in float32.

    A forward pass in float32 gives each of the four errors with a relative rounding of at most 2^-19 (32 units in
    the last place), so z = -beta / 2 * Delta is off by at most beta / 2 * 2^-19 * (sum of the four errors); the loss,
    whose slope in z is at most 1, by no more. A gradient carries its own forward's and backward's rounding, and the
    factor S(-z), whose slope is at most 1/4: relative to the largest gradient, that bound / 4 / S(-z) and 2^-15.
    """
    beta = 2000.0
    policy: Any = load_policy(str(tiny_pipeline), lora=lora, train=True)
    policies.move_away(policy, 0.002 if lora is None else 0.02)
    trainer, batch = DiffusionDPO(policy, beta=beta), batches(3)
    output = trainer.loss(batch)
    error, reference_error = trainer.errors(trainer.noisy_states(batch))
    found = gradients(trainer, batch)
    assert error.dtype == torch.float32

    unet = UNet2DConditionModel.from_pretrained(tiny_pipeline / "unet").double().requires_grad_(False)
    weights, leaves = naive_weights(policy, unet)
    wide = batch.to("cpu", torch.float64)
    margins, expected = naive(unet, weights, wide, beta, "epsilon")
    expected.backward()
    sums = (error + reference_error).detach().double().reshape(2, -1).sum(0)
    bound = float(beta / 2 * 2**-19 * sums.max())
    assert bound < 0.02
    z = beta * trainer.margin(trainer.log_ratio(error, reference_error), trainer.noisy_states(batch)).detach()
    exact = beta * torch.stack(margins).detach()
    assert float((z.double() - exact).abs().max()) <= bound
    assert abs(output.loss.item() - expected.item()) <= bound
    gate = float(torch.sigmoid(-exact).min())
    scale = max(float(leaf.grad.abs().max()) for leaf in leaves.values() if leaf.grad is not None)
    tolerance = scale * (bound / 4 / gate + 2**-15)
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        torch.testing.assert_close(found[name].double(), leaf.grad, rtol=0, atol=tolerance)


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, -5.0])
def test_beta_must_be_positive(beta: float) -> None:
    with pytest.raises(ValidationError, match=f"beta must be positive and finite, got {beta}"):
        golden_trainer(beta=beta)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        golden_trainer(betta=1.0)


def test_objective_is_the_function_of_losses_with_the_converted_beta() -> None:
    trainer = golden_trainer(beta=10.0, beta_convention="sum_half")
    margin = double([0.01, -0.02]).flatten()
    assert torch.equal(trainer.objective(margin, None), margin_loss("sigmoid", 40.0)(margin))  # type: ignore[arg-type]
