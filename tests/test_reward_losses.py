"""Losses of reward models against closed forms, and VisionReward's regression against known weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffalign.checklist_regression import fit_checklist
from diffalign.comparisons import comparison_loss, outcome_probabilities
from diffalign.reward_losses import (
    CONSTANT_MARGIN,
    bradley_terry_loss,
    comparison_weights,
    contrastive_loss,
    displacement_loss,
    expected_preference,
    hinge_loss,
    joint_deviation,
    listwise_loss,
    preference_loss,
    ranking_hinge_loss,
    ranking_pairs,
    rating_loss,
    scaled_bradley_terry_loss,
    uncertainty_loss,
)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- closed forms ----------------------------------------------------------------------------------------------------


def test_equal_rewards() -> None:
    zero, half = double(0.0), double(0.5)
    for preference in (0.0, 0.3, 0.5, 1.0):
        assert float(preference_loss(zero, double(preference))) == pytest.approx(math.log(2))
    assert float(preference_loss(zero, half, relative=True)) == pytest.approx(0.0)  # PickScore: a perfect tie
    assert float(bradley_terry_loss(zero)) == pytest.approx(math.log(2))
    assert float(bradley_terry_loss(zero, CONSTANT_MARGIN)) == pytest.approx(math.log(1 + math.exp(0.57)))
    assert float(hinge_loss(zero, double(1.0))) == 1.0
    assert float(uncertainty_loss(zero, zero)) == pytest.approx(math.log(2))


def test_preference_loss_is_the_cross_entropy_of_the_softmax() -> None:
    rewards = normal(6, 2)
    preference = double(0.0, 0.2, 0.5, 0.7, 1.0, 1.0)
    probabilities = rewards.exp() / rewards.exp().sum(1, keepdim=True)
    expected = -(preference * probabilities[:, 0].log() + (1 - preference) * probabilities[:, 1].log())
    difference = rewards[:, 0] - rewards[:, 1]
    torch.testing.assert_close(preference_loss(difference, preference), expected)
    target = torch.stack([preference, 1 - preference], dim=1)
    torch.testing.assert_close(listwise_loss(rewards, target), expected)
    torch.testing.assert_close(preference_loss(-difference, 1 - preference), expected)  # who is first does not matter
    torch.testing.assert_close(bradley_terry_loss(difference), preference_loss(difference, torch.ones_like(difference)))
    divergence = preference_loss(difference, preference, relative=True)
    at_the_truth = preference_loss(torch.logit(preference[1:4]), preference[1:4], relative=True)
    assert (divergence >= 0).all()
    torch.testing.assert_close(at_the_truth, torch.zeros(3, dtype=torch.float64))


def test_margins_scales_and_displacement() -> None:
    d = normal(5)
    margin = normal(5, seed=1).abs()
    torch.testing.assert_close(bradley_terry_loss(d, margin), -torch.sigmoid(d - margin).log())
    torch.testing.assert_close(scaled_bradley_terry_loss(d, margin), -margin * torch.sigmoid(d).log())
    first, second = normal(5, seed=2), normal(5, seed=3)
    torch.testing.assert_close(displacement_loss(first, second, 0.5), -torch.sigmoid(first - 0.5 * second).log())
    assert hinge_loss(double(0.3, 0.3, 3.0), double(1.0, 0.0, 1.0)).tolist() == pytest.approx([0.7, 1.3, 0.0])
    ratings = double(0.0, 5.0, 1.0)
    assert rating_loss(double(9.0, 1.0, -1.0), ratings).tolist() == [0.0, 1.0, 1.0]


def test_ties_have_no_gradient_at_equal_rewards_and_probabilities_sum_to_one() -> None:
    first, second = normal(8), normal(8, seed=1)
    for k in (1.0, 1.5, 5.0):
        torch.testing.assert_close(sum(outcome_probabilities(first, second, k)), torch.ones(8, dtype=torch.float64))
    d = double(0.0, 0.7).requires_grad_(True)
    loss = comparison_loss(d, torch.zeros_like(d), 5.0)
    # -log sigmoid(-log 5) twice, minus log 24: the probability of a tie of equals is 24/36.
    assert float(loss[0].detach()) == pytest.approx(-math.log(24 / 36))
    loss.sum().backward()
    assert d.grad is not None
    assert float(d.grad[0]) == pytest.approx(0.0, abs=1e-15)
    assert float(d.grad[1]) > 0.1  # towards equal rewards


def test_uncertainty_by_draws_and_by_quadrature() -> None:
    """Monte Carlo within three of its own standard errors; no uncertainty is Bradley and Terry's; a bound of Jensen."""
    mean, deviation = double(-1.5, 0.0, 0.4, 2.0), double(0.3, 1.0, 2.0, 0.7)
    draws = 20_000
    noise = normal(draws, 4)
    each = -torch.sigmoid(mean + deviation * noise).log()
    error = each.std(0) / math.sqrt(draws)
    exact = uncertainty_loss(mean, deviation)
    assert ((uncertainty_loss(mean, deviation, noise) - exact).abs() < 3 * error).all()
    torch.testing.assert_close(uncertainty_loss(mean, deviation, noise), each.mean(0))
    torch.testing.assert_close(uncertainty_loss(mean, torch.zeros_like(mean)), bradley_terry_loss(mean))
    probability = expected_preference(mean, deviation)
    assert (exact > -probability.log()).all()
    assert ((torch.sigmoid(mean + deviation * noise).mean(0) - probability).abs() < 0.01).all()
    a, b = double(-0.5, 0.2), double(0.3, -1.0)
    torch.testing.assert_close(joint_deviation(a, b), ((2 * a).exp() + (2 * b).exp()).sqrt())


def test_contrast_leaves_equal_texts_out() -> None:
    """Two rows of one text: neither is a wrong answer for the other."""
    images, texts = (torch.nn.functional.normalize(normal(3, 4, seed=i), dim=1) for i in (0, 1))
    texts = texts[[0, 0, 1]]
    same = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    loss = contrastive_loss(images, texts, double(10.0)[0], same)
    logits = 10 * images @ texts.T
    of_the_picture = -logits[0, 0] + torch.stack([logits[0, 0], logits[0, 2]]).logsumexp(0)
    of_the_text = -logits[0, 0] + torch.stack([logits[0, 0], logits[2, 0]]).logsumexp(0)
    torch.testing.assert_close(loss[0], (of_the_picture + of_the_text) / 2)
    alone = contrastive_loss(images[:1], texts[:1], double(10.0)[0], same[:1, :1])
    assert alone.tolist() == [0.0]


def test_rankings_become_pairs() -> None:
    assert ranking_pairs([2, 1, 2, 3]) == [(0, 3), (1, 0), (1, 2), (1, 3), (2, 3)]
    assert ranking_pairs([1, 1]) == []
    # Pairs (0, 1) by rank difference 1 and reward difference 0.2, (0, 2) by 2 and 1.0, (1, 2) by 1 and 0.8.
    loss = ranking_hinge_loss(double(1.0, 0.8, 0.0), double(1.0, 2.0, 3.0), margin=1.0)
    assert float(loss) == pytest.approx((0.8 + 0.0 + 0.2) / 3)
    assert float(ranking_hinge_loss(double(1.0, 2.0), double(1.0, 1.0), margin=1.0)) == 0.0


def test_weights_of_comparisons() -> None:
    weights = comparison_weights(torch.tensor([1, 2, 4, 4]))
    assert weights.tolist() == pytest.approx([0.5, 0.25, 0.125, 0.125])


@pytest.mark.parametrize(
    "loss",
    [
        lambda d, p: preference_loss(d, p),
        lambda d, p: preference_loss(d, p, relative=True),
        lambda d, p: bradley_terry_loss(d, 0.57),
        lambda d, p: scaled_bradley_terry_loss(d, p),
        lambda d, p: comparison_loss(d, p - 0.5, 5.0),
        lambda d, p: displacement_loss(d, 2 * d, 0.3),
        lambda d, p: hinge_loss(d, p),
        lambda d, p: rating_loss(d, p + 2),
        lambda d, p: uncertainty_loss(d, (0.3 * d).exp()),
        lambda d, p: uncertainty_loss(d, joint_deviation(d, -d), normal(7, 4, seed=5)),
        lambda d, p: listwise_loss(d, p / p.sum()),
        lambda d, p: ranking_hinge_loss(d, p, 1.0),
    ],
)
def test_gradients(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    preference = double(0.0, 0.25, 0.5, 1.0)
    difference = (0.7 * normal(4)).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda d: loss(d, preference), (difference,))


# --- the checklist's regression (5.5) --------------------------------------------------------------------------------


def _answers(pairs: int, weights: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Differences of answers in {-1, 0, 1} and labels drawn from the model with these weights."""
    generator = torch.Generator().manual_seed(seed)
    answers = torch.randint(-1, 2, (2, pairs, len(weights)), generator=generator).double()
    differences = answers[0] - answers[1]
    preferred = torch.rand(pairs, generator=generator, dtype=torch.float64) < torch.sigmoid(differences @ weights)
    return differences, preferred.double()


def test_known_weights_are_recovered() -> None:
    weights = double(1.2, 0.0, 0.4, 0.8, 0.0, 0.2)
    differences, labels = _answers(20_000, weights)
    fit = fit_checklist(differences, labels)
    assert (fit.weights >= 0).all()
    assert (fit.weights - weights).abs().max() < 0.05
    again = fit_checklist(differences, labels)
    assert torch.equal(fit.weights, again.weights)  # no chance is involved
    right = ((differences @ weights > 0) == labels.bool()).double().mean()
    assert fit.accuracy == pytest.approx(float(right), abs=0.02)


def test_the_minimum_is_one() -> None:
    """The gradient of the kept weights vanishes, and swapping all pairs changes nothing."""
    differences, labels = _answers(500, double(0.5, 1.0, 0.3))
    weights = fit_checklist(differences, labels, ridge=1e-3).weights.requires_grad_(True)
    loss = preference_loss(differences @ weights, labels).mean() + 5e-4 * weights.square().sum()
    (gradient,) = torch.autograd.grad(loss, weights)
    assert gradient.abs().max() < 1e-9
    swapped = fit_checklist(-differences, 1 - labels, ridge=1e-3).weights
    torch.testing.assert_close(swapped, weights.detach())


def test_duplicated_opposite_and_empty_columns() -> None:
    differences, labels = _answers(5_000, double(1.0, 0.6))
    nothing = torch.zeros(5_000, 1, dtype=torch.float64)
    columns = torch.cat([differences, differences[:, :1], -differences[:, 1:], nothing], dim=1)
    fit = fit_checklist(columns, labels)
    plain = fit_checklist(differences, labels).weights
    assert fit.dropped == (3,)
    assert fit.weights[[3, 4]].tolist() == [0.0, 0.0]
    assert float(fit.weights[0]) == pytest.approx(float(fit.weights[2]), abs=1e-6)
    torch.testing.assert_close(fit.weights[0] + fit.weights[2], plain[0], atol=1e-2, rtol=0)
    torch.testing.assert_close(fit.weights[1], plain[1], atol=1e-2, rtol=0)


def test_separable_pairs_stay_finite_and_bad_input_is_refused() -> None:
    fit = fit_checklist(double(1.0, 2.0, 1.0)[:, None], double(1.0, 1.0, 1.0))
    assert 1 < float(fit.weights[0]) < 20
    assert fit.accuracy == 1.0
    for differences, labels, message in (
        (torch.zeros(0, 2), torch.zeros(0), r"expected differences \[N, F\] and preference \[N\], got \[0, 2\]"),
        (torch.zeros(3, 2), torch.zeros(2), r"got \[3, 2\] and \[2\]"),
        (torch.full((1, 1), math.nan), torch.ones(1), "must be finite"),
        (torch.ones(1, 1), torch.tensor([2.0]), r"preference in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_checklist(differences, labels)
    with pytest.raises(ValueError, match="ridge must be positive, got 0"):
        fit_checklist(torch.ones(1, 1), torch.ones(1), ridge=0)
