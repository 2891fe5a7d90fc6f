"""The self-checks of the pair loss, 1 to 8, 13 and 19: its values, signs and constants.

The number of each check stands in its test's docstring; the others are in `test_diffusion_dpo_training.py`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from diffalign.backbones import load_policy
from diffalign.losses import margin_loss, per_sample_error
from diffalign.predictions import Prediction
from diffalign.trainers.diffusion_dpo import DiffusionDPO
from tests.trainers.golden import (
    ANSWERS,
    GRADIENTS,
    REFERENCE,
    TARGETS,
    Batches,
    TablePolicy,
    double,
    golden_batch,
    golden_trainer,
    gradients,
    swap,
)

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


# --- 19: IPO ----------------------------------------------------------------------------------------------------------


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
