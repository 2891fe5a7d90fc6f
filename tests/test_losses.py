from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffalign.losses import (
    ROBUST_CAP,
    convert_beta,
    hinge_loss,
    ipo_loss,
    ipo_raw_loss,
    margin_loss,
    per_sample_error,
    robust_loss,
    sigmoid_loss,
)
from diffalign.randomness import generator

MARGINS = torch.tensor([-1.0, 0.0, 0.5, 2.0], dtype=torch.float64)
"""Golden values are for these z, with beta folded in (beta = 1)."""


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda m: sigmoid_loss(m, 1.0), [1.3133, 0.6931, 0.4741, 0.1269]),
        (lambda m: ipo_loss(m, 1.0), [2.2500, 0.2500, 0.0000, 2.2500]),
        (lambda m: sigmoid_loss(m, 1.0, 0.1), [1.2133, 0.6931, 0.5241, 0.3269]),
        (lambda m: robust_loss(m, 1.0, 0.1), [1.4383, 0.6931, 0.4116, -0.1231]),
        (lambda m: hinge_loss(m, 1.0), [2.0000, 1.0000, 0.5000, 0.0000]),
    ],
    ids=["dpo", "ipo", "cdpo", "rdpo", "hinge"],
)
def test_golden_values(loss: Callable[[Tensor], Tensor], expected: list[float]) -> None:
    got = loss(MARGINS)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5.1e-5)


@pytest.mark.parametrize(
    ("loss", "slope"),
    [
        (lambda m: sigmoid_loss(m, 1.0), -0.5),
        (lambda m: ipo_loss(m, 1.0), -1.0),
        (lambda m: sigmoid_loss(m, 1.0, 0.1), -0.4),
        (lambda m: robust_loss(m, 1.0, 0.1), -0.5 / 0.8),
        (lambda m: hinge_loss(m, 1.0), -1.0),
    ],
    ids=["dpo", "ipo", "cdpo", "rdpo", "hinge"],
)
def test_slopes_at_the_start(loss: Callable[[Tensor], Tensor], slope: float) -> None:
    margin = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    loss(margin).sum().backward()
    assert margin.grad is not None
    assert float(margin.grad) == pytest.approx(slope, rel=1e-12)


@pytest.mark.parametrize("beta", [1.0, 100.0, 5000.0])
def test_ipo_is_its_raw_form_times_beta_squared(beta: float) -> None:
    """Check 7.1.19: (z - 1/2)^2 = kappa^2 (m - 1/(2 kappa))^2; at the start 0.25 with slope -1 in z."""
    difference = torch.randn(50, generator=generator("errors"), dtype=torch.float64) / beta
    kappa = beta / 2
    z = -kappa * difference
    theirs = kappa**2 * (-difference - 1 / (2 * kappa)) ** 2
    torch.testing.assert_close(ipo_loss(z / beta, beta), theirs, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(ipo_loss(z / beta, beta), beta**2 * ipo_raw_loss(z / beta, beta), rtol=1e-12, atol=1e-15)
    assert float(ipo_loss(torch.zeros(1), beta)) == 0.25


def test_conservative_loss_is_least_at_the_log_odds_of_a_right_label() -> None:
    z = torch.tensor([math.log(0.9 / 0.1)], dtype=torch.float64, requires_grad=True)
    sigmoid_loss(z, 1.0, 0.1).sum().backward()
    assert z.grad is not None
    assert abs(float(z.grad)) < 1e-12


def test_robust_loss_is_unbiased_under_flips() -> None:
    """The mean over flipped and unflipped labels, at the flip rate, is the loss of the clean label."""
    rate = 0.3
    mixed = (1 - rate) * robust_loss(MARGINS, 1.0, rate) + rate * robust_loss(-MARGINS, 1.0, rate)
    torch.testing.assert_close(mixed, sigmoid_loss(MARGINS, 1.0), rtol=1e-12, atol=1e-12)


def test_robust_loss_stays_constant_beyond_its_cap() -> None:
    margin = torch.tensor([ROBUST_CAP + 1, ROBUST_CAP + 500], dtype=torch.float64, requires_grad=True)
    loss = robust_loss(margin, 1.0, 0.1)
    loss.sum().backward()
    assert loss[0].item() == loss[1].item()
    assert margin.grad is not None
    assert margin.grad.tolist() == [0, 0]


def test_sigmoid_loss_overflows_nowhere() -> None:
    losses = sigmoid_loss(torch.tensor([-1e4, 1e4]), 5000.0)
    assert losses.tolist() == [5e7, 0.0]


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("loss", [sigmoid_loss, ipo_loss, ipo_raw_loss, hinge_loss])
def test_beta_must_be_positive(loss: Callable[[Tensor, float], Tensor], beta: float) -> None:
    with pytest.raises(ValueError, match=f"beta must be positive and finite, got {beta}"):
        loss(MARGINS, beta)


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 0.9])
def test_label_smoothing_has_its_range(smoothing: float) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 0.5\)"):
        sigmoid_loss(MARGINS, 1.0, smoothing)


def test_names_give_the_losses_of_trl() -> None:
    cases = [
        ("sigmoid", 0.0, sigmoid_loss(MARGINS, 2.0)),
        ("sigmoid", 0.2, sigmoid_loss(MARGINS, 2.0, 0.2)),
        ("robust", 0.2, robust_loss(MARGINS, 2.0, 0.2)),
        ("ipo", 0.0, ipo_loss(MARGINS, 2.0)),
        ("hinge", 0.0, hinge_loss(MARGINS, 2.0)),
    ]
    for name, smoothing, expected in cases:
        assert torch.equal(margin_loss(name, 2.0, smoothing)(MARGINS), expected)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"unknown loss_type 'cpo' \(available: sigmoid, ipo"):
        margin_loss("cpo", 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'robust' needs label_smoothing"):
        margin_loss("robust", 1.0)
    for name in ("ipo", "hinge"):
        with pytest.raises(ValueError, match=f"belongs to loss_type 'sigmoid' or 'robust', not to '{name}'"):
            margin_loss(name, 1.0, 0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("convention", "kappa"),
    [("mean_half", 0.5 * 5000), ("mean", 5000), ("sum_half", 0.5 * 5000 * 16384), ("sum", 5000 * 16384)],
)
def test_beta_conventions_give_the_kappa_they_stand_for(convention: str, kappa: float) -> None:
    """Check 7.1.6: kappa on mean errors is half of the converted beta."""
    assert convert_beta(5000, convention, 16384) / 2 == kappa  # type: ignore[arg-type]


def test_summed_errors_with_a_smaller_beta_are_mean_errors_with_beta() -> None:
    """Check 7.1.6: (mean, beta) equals (sum, beta / d), and the diffusers SD1.5 beta_b equals 2 beta_b here."""
    assert convert_beta(5000 / 16384, "sum_half", 16384) == pytest.approx(5000, rel=1e-15)
    assert convert_beta(2500, "mean", 16384) == 5000
    assert 0.5 * 5000 / 16384 == pytest.approx(0.1526, abs=5e-5)  # the spec's example, per summed element


def test_bad_conventions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown beta_convention 'median' \(available: mean_half"):
        convert_beta(1.0, "median", 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="beta must be positive"):
        convert_beta(0.0, "sum", 4)


def test_errors_are_means_over_everything_but_the_batch() -> None:
    for shape in ((2, 4, 3, 3), (2, 4, 5, 3, 3)):
        a = torch.randn(shape, generator=generator("a"))
        b = torch.randn(shape, generator=generator("b"))
        expected = torch.stack([((a[i] - b[i]) ** 2).sum() / a[i].numel() for i in range(2)])
        torch.testing.assert_close(per_sample_error(a, b), expected)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.float16, torch.float16), torch.float32),
        ((torch.bfloat16, torch.float32), torch.float32),
        ((torch.float32, torch.float64), torch.float64),
        ((torch.float64, torch.float64), torch.float64),
    ],
)
def test_errors_are_computed_in_at_least_single_precision(
    dtypes: tuple[torch.dtype, torch.dtype], expected: torch.dtype
) -> None:
    a = torch.full((1, 64), 0.3137, dtype=dtypes[0])
    b = torch.zeros((1, 64), dtype=dtypes[1])
    error = per_sample_error(a, b)
    assert error.dtype == expected
    exact = float(a[0, 0].double()) ** 2
    assert float(error) == pytest.approx(exact, rel=1e-6)  # squared in half precision it would be off by 1e-4
