"""Scores that exist only among others: z-scores, ranks, votes and win rates of a group, as functions on tensors.

A group is a set of G media of one prompt; K scorers give columns [G, K]. Nothing here depends on the order of a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

__all__ = ["majority_vote", "omni_score", "ranks", "vote_win_rates", "win_rates", "zscores"]

EPSILON = 1e-8
"""Added to standard deviations, as the training code of Pref-GRPO does."""

_TIE = 1e-6
"""Sums of vote weights nearer to zero than this are ties: 0.1 + 0.2 - 0.3 is not exactly zero."""


def zscores(columns: Tensor) -> Tensor:
    """(score - mean) / (deviation + 1e-8) of each column, with the unbiased deviation; float64 [G, K].

    This is how group-relative methods compare scorers of different scales. A column of equal scores gives zeros, and
    not the amplified rounding of their mean.

    Args:
        columns: Finite scores of G media by K scorers, [G, K].

    Raises:
        ValueError: If G is less than 2.
    """
    _at_least_two(columns)
    wide = columns.double()
    scaled = (wide - wide.mean(0)) / (wide.std(0, correction=1) + EPSILON)
    return scaled.masked_fill(wide.amax(0) == wide.amin(0), 0.0)


def ranks(columns: Tensor) -> Tensor:
    """Ranks 1 (lowest score) to G (highest) of each column; ties share the mean of their ranks; float64 [G, K].

    Args:
        columns: Finite scores of G media by K scorers, [G, K].

    Raises:
        ValueError: If G is less than 2.
    """
    _at_least_two(columns)
    lower = (columns[:, None] > columns[None]).sum(1)
    equal = (columns[:, None] == columns[None]).sum(1)  # with the medium itself
    return lower.double() + (equal.double() + 1) / 2


def win_rates(beats: Tensor) -> Tensor:
    """Mean outcome of each medium against the others that it was compared with; float64 [G].

    The reward of Wang et al. 2025, "Pref-GRPO: Pairwise Preference Reward-based GRPO for Stable Text-to-Image
    Reinforcement Learning" (arXiv:2508.20751). With every pair compared, rates sum to G / 2. Their code rounds rates to
    three decimals and counts an answer that cannot be read as a tie; here rates are exact, and such a comparison is
    left out.

    Args:
        beats: Outcome of row against column, [G, G]: 1 won, 0.5 tied, 0 lost, or a probability; NaN where there is
            none. The diagonal is not read.

    Returns:
        Rates in [0, 1]; NaN for a medium without any comparison.
    """
    outcomes = beats.double().clone().fill_diagonal_(float("nan"))
    return outcomes.nanmean(dim=1)


def majority_vote(a: Tensor, b: Tensor, weights: Tensor | None = None) -> Tensor:
    """1 where most scorers prefer `a`, -1 where most prefer `b`, 0 where they are split; float64 [...].

    The label of Tamboli et al. 2025, "BalancedDPO: Adaptive Multi-Metric Alignment" (arXiv:2503.12575):
    sign(sum_k w_k sign(a_k - b_k)). Only orders count, so that scales of scorers never mix; a scorer with two equal
    scores abstains. What becomes of ties is the caller's choice: the paper's is not confirmed here.

    Args:
        a: Finite scores by K scorers, [..., K].
        b: Scores of what is compared with it, broadcastable to `a`.
        weights: Weight of each vote [K]; None is one vote each.
    """
    votes = torch.sign(a.double() - b.double())
    total = (votes if weights is None else votes * weights.double()).sum(-1)
    return torch.sign(total.masked_fill(total.abs() < _TIE, 0.0))


def vote_win_rates(columns: Tensor, weights: Tensor | None = None) -> Tensor:
    """Share of the others in its group that each medium beats by majority vote, a tie being half a win; float64 [G].

    Args:
        columns: Finite scores of G media by K scorers, [G, K].
        weights: Weight of each scorer's vote [K]; None is one vote each.

    Raises:
        ValueError: If G is less than 2.
    """
    _at_least_two(columns)
    return win_rates((1 + majority_vote(columns[:, None], columns[None], weights)) / 2)


def omni_score(
    dims: Mapping[str, Tensor],
    weights: Mapping[str, float] | None = None,
    normalise: Literal["minmax", "zscore"] = "minmax",
) -> Tensor:
    """Weighted mean of scores that were first brought to one scale over a whole data set; float64 [N].

    The composite by which Liu et al. 2024, "VideoDPO: Omni-Preference Alignment for Video Diffusion Generation"
    (arXiv:2412.14167), choose the best and the worst of several videos. Which normalisation and which weights they
    used is not confirmed here: no complete code was released.

    Args:
        dims: Scores of the N media of a data set by dimension, each [N]; NaN where there is none.
        weights: Weight of each dimension, of any scale; None is one each.
        normalise: "minmax" maps each dimension to [0, 1], "zscore" to mean 0 and unbiased deviation 1.

    Returns:
        Scores; NaN for a medium that lacks a dimension. A dimension that is equal for all counts as 0.

    Raises:
        ValueError: If there is no dimension, a weight is of none, or weights do not add up to something positive.
    """
    weights = dict.fromkeys(dims, 1.0) if weights is None else weights
    if not dims or dims.keys() != weights.keys():
        raise ValueError(f"expected a weight for each dimension, got dims {sorted(dims)} and weights {sorted(weights)}")
    if not sum(weights.values()) > 0:
        raise ValueError(f"weights must add up to something positive, got {dict(weights)}")
    if normalise not in ("minmax", "zscore"):
        raise ValueError(f"normalise must be 'minmax' or 'zscore', got {normalise!r}")
    total = torch.zeros((), dtype=torch.float64)
    for name, values in dims.items():
        known = values.double()[values.isfinite()]
        low, spread = 0.0, 0.0
        if len(known) and known.max() > known.min():
            low = float(known.min() if normalise == "minmax" else known.mean())
            spread = float(known.max() - known.min() if normalise == "minmax" else known.std(correction=1))
        scaled = (values.double() - low) / spread if spread else values.double() * 0
        total = total + weights[name] * scaled
    return total / sum(weights.values())


def _at_least_two(columns: Tensor) -> None:
    if columns.ndim != 2 or len(columns) < 2:
        raise ValueError(f"expected scores [G, K] of a group of at least two media, got {list(columns.shape)}")
