"""Losses of a preference margin, as pure functions: margin [B] -> loss [B].

`margin` is the chosen minus the rejected log ratio, h = r^w - r^l; for diffusion models r = -(error -
reference_error) / 2 with *mean* squared errors, so h is of the order 1e-4 and beta of the order 1e3. Below,
z = beta * margin. Each function adds nothing to its paper but the scale said in its docstring.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

LossType = Literal["sigmoid", "ipo", "hinge", "robust"]
BetaConvention = Literal["mean_half", "mean", "sum_half", "sum"]

ROBUST_CAP = 10.0
"""The margin z beyond which the robust loss, unbounded below, stays constant."""


def _check(beta: float, label_smoothing: float) -> None:
    if not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"beta must be positive and finite, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}")


def sigmoid_loss(margin: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Negative log likelihood of the preferences under Bradley-Terry.

    Eq. 7 of Rafailov et al. 2023, "Direct Preference Optimization" (arXiv:2305.18290); Eq. 14 of Wallace et al.
    2023, "Diffusion Model Alignment Using Direct Preference Optimization" (arXiv:2311.12908). With label smoothing
    it is conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences"): the labels are taken to be
    wrong with that probability.

    Args:
        margin: Chosen minus rejected log ratio, [B].
        beta: Strength of the pull to the reference, > 0.
        label_smoothing: Assumed share of wrong labels, in [0, 0.5).

    Returns:
        Loss per pair, [B]: -(1 - eps) log S(z) - eps log S(-z).

    Raises:
        ValueError: If beta or label_smoothing lies outside its range.
    """
    _check(beta, label_smoothing)
    z = beta * margin
    loss = F.softplus(-z)
    return loss if label_smoothing == 0 else (1 - label_smoothing) * loss + label_smoothing * F.softplus(z)


def robust_loss(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Unbiased loss when labels are flipped at a known rate.

    Eq. 12 of Chowdhury et al. 2024, "Provably Robust DPO: Aligning Language Models with Noisy Feedback"
    (arXiv:2403.00409). It falls without bound as the margin grows; here z is capped at `ROBUST_CAP`, beyond which
    a pair has no gradient.

    Args:
        margin: Chosen minus rejected log ratio, [B].
        beta: Strength of the pull to the reference, > 0.
        label_smoothing: The flip rate eps, in (0, 0.5).

    Returns:
        Loss per pair, [B]: (-(1 - eps) log S(z) + eps log S(-z)) / (1 - 2 eps).

    Raises:
        ValueError: If beta or label_smoothing lies outside its range.
    """
    _check(beta, label_smoothing)
    if label_smoothing == 0:
        raise ValueError("the robust loss needs the share of flipped labels: label_smoothing in (0, 0.5), got 0")
    z = (beta * margin).clamp(max=ROBUST_CAP)
    mixed = (1 - label_smoothing) * F.softplus(-z) - label_smoothing * F.softplus(z)
    return mixed / (1 - 2 * label_smoothing)


def ipo_loss(margin: Tensor, beta: float) -> Tensor:
    """Squared distance of the scaled margin from one half.

    Eq. 17 of Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human Preferences"
    (arXiv:2310.12036), (h - 1 / (2 beta))^2, times beta^2: the raw form is about 1e-8 at the betas that diffusion
    models use and drowns in Adam's epsilon. `ipo_raw_loss` gives it for the logs.

    Args:
        margin: Chosen minus rejected log ratio, [B].
        beta: Regularisation strength (the paper's tau), > 0.

    Returns:
        Loss per pair, [B]: (z - 1/2)^2.

    Raises:
        ValueError: If beta is not positive.
    """
    _check(beta, 0.0)
    return (beta * margin - 0.5) ** 2


def ipo_raw_loss(margin: Tensor, beta: float) -> Tensor:
    """The IPO loss on the paper's own scale, (h - 1 / (2 beta))^2, [B]; see `ipo_loss`."""
    _check(beta, 0.0)
    return (margin - 1 / (2 * beta)) ** 2


def hinge_loss(margin: Tensor, beta: float) -> Tensor:
    """Distance by which the scaled margin falls short of one.

    Zhao et al. 2023, "SLiC-HF: Sequence Likelihood Calibration with Human Feedback" (arXiv:2305.10425), Eq. 4, on
    log ratios with margin one, as Liu et al. 2023 (RSO, arXiv:2309.06657), Eq. 12.

    Args:
        margin: Chosen minus rejected log ratio, [B].
        beta: Scale of the margin, > 0.

    Returns:
        Loss per pair, [B]: max(0, 1 - z).

    Raises:
        ValueError: If beta is not positive.
    """
    _check(beta, 0.0)
    return torch.relu(1 - beta * margin)


def margin_loss(loss_type: LossType, beta: float, label_smoothing: float = 0.0) -> Callable[[Tensor], Tensor]:
    """The loss TRL's `loss_type` names, with beta and label smoothing bound: margin [B] -> loss [B].

    Raises:
        ValueError: For an unknown name, or a label_smoothing the loss does not know.
    """
    _check(beta, label_smoothing)
    if loss_type == "sigmoid":
        return lambda margin: sigmoid_loss(margin, beta, label_smoothing)
    if loss_type == "robust":
        if label_smoothing == 0:
            raise ValueError("loss_type 'robust' needs label_smoothing, the share of flipped labels, in (0, 0.5)")
        return lambda margin: robust_loss(margin, beta, label_smoothing)
    if label_smoothing:
        raise ValueError(f"label_smoothing belongs to loss_type 'sigmoid' or 'robust', not to {loss_type!r}")
    if loss_type == "ipo":
        return lambda margin: ipo_loss(margin, beta)
    if loss_type == "hinge":
        return lambda margin: hinge_loss(margin, beta)
    raise ValueError(f"unknown loss_type {loss_type!r} (available: sigmoid, ipo, hinge, robust)")


def convert_beta(beta: float, convention: BetaConvention, latent_numel: int) -> float:
    """A beta from elsewhere in this project's convention: mean errors and the factor one half.

    The only number that matters is kappa in z = -kappa * (sum or mean of squared error differences). Here
    kappa = beta / 2 with means. Salesforce's DiffusionDPO and the diffusers SDXL script say the same
    ("mean_half"); the diffusers SD1.5 script leaves out the half ("mean"); derivations with squared norms sum
    over the latent's elements ("sum_half", "sum").

    Args:
        beta: The value taken from elsewhere, > 0.
        convention: How that place meant it.
        latent_numel: Number of elements of one latent, for the sums.

    Raises:
        ValueError: If beta is not positive, or the convention is unknown.
    """
    _check(beta, 0.0)
    factors = {"mean_half": 1.0, "mean": 2.0, "sum_half": float(latent_numel), "sum": 2.0 * latent_numel}
    if convention not in factors:
        raise ValueError(f"unknown beta_convention {convention!r} (available: {', '.join(factors)})")
    return beta * factors[convention]


def per_sample_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample over all its elements, [B], in at least float32.

    Half-precision inputs are cast before they are subtracted: a useful difference of two errors is about 1e-4,
    and the spacing of half precision near 0.1 is 6e-5.
    """
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    return (prediction.to(dtype) - target.to(dtype)).square().flatten(1).mean(1)
