"""How well scores predict what people preferred: the rules by which reward models are ranked, as functions on arrays.

Papers count ties in four ways, and numbers of two ways do not compare:

| rule | a human tie | a predicted tie |
| --- | --- | --- |
| `strict_accuracy` (ImageReward, VideoGen-RewardBench "without ties") | is left out | is wrong |
| `inversion_accuracy` (HPDv2) | is right | is right |
| `tie_rule_scores` (Pick-a-Pic) | against a preference one half, against a tie right | likewise |
| `tie_calibration` (VideoGen-RewardBench "with ties") | must be predicted | wherever scores differ by epsilon or less |

`preferences` are shares or probabilities with which people preferred the first of two, in [0, 1], 0.5 being a tie;
`margins` are score of the first minus score of the second. Both are [N] and finite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

__all__ = [
    "THRESHOLDS",
    "best_threshold",
    "brier_score",
    "calibration_error",
    "inversion_accuracy",
    "log_losses",
    "probabilities",
    "strict_accuracy",
    "tie_accuracy",
    "tie_auc",
    "tie_calibration",
    "tie_rule_scores",
]

Vector = NDArray[np.float64]

THRESHOLDS = tuple(k / 10 for k in range(11))
"""Among which Pick-a-Pic's evaluation chooses."""
BINS = 10
"""Of the calibration error, from 1/2 to 1."""


def strict_accuracy(preferences: ArrayLike, margins: ArrayLike) -> Vector:
    """1 where the score's order is the people's, else 0, for the pairs that people did not call a tie.

    Returns:
        One entry for each such pair, in their order; a predicted tie is wrong.
    """
    p, m = _both(preferences, margins)
    decided = p != 0.5
    return np.asarray(np.sign(m[decided]) == np.sign(p[decided] - 0.5), dtype=np.float64)


def inversion_accuracy(ranks: Sequence[float], scores: Sequence[float]) -> float:
    """1 - inversions / (n (n - 1) / 2) of one prompt's ranking, in [0, 1].

    An inversion is a pair in strictly opposite order, so a tie on either side counts as right. The released HPSv2
    breaks predicted ties arbitrarily instead, by the order of a sort of half-precision scores.

    Args:
        ranks: People's, smaller is better, n >= 2 of them.
        scores: Larger is better, n of them.

    Raises:
        ValueError: If there are fewer than two, or not as many of each.
    """
    if len(ranks) != len(scores) or len(ranks) < 2:
        raise ValueError(f"expected two or more ranks and as many scores, got {len(ranks)} and {len(scores)}")
    r, s = np.asarray(ranks, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    better, higher = r[:, None] < r[None], s[:, None] < s[None]
    pairs = len(r) * (len(r) - 1) / 2
    return float(1 - (better & higher).sum() / pairs)


def tie_rule_scores(preferences: ArrayLike, probability: ArrayLike, threshold: float) -> Vector:
    """Pick-a-Pic's score of each pair, [N]: 1 if right, 1/2 if exactly one side says tie, else 0.

    Kirstain et al. 2023 (arXiv:2305.01569): a tie is predicted where |p1 - p0| <= threshold.

    Args:
        preferences: Labels.
        probability: Predicted probability that the first is better, [N].
        threshold: t, in [0, 1].
    """
    p, q = _both(preferences, probability)
    # Of decimal fractions such as .55 - .45 <= .1, which floating point misses by its last digit.
    predicted = np.where(np.abs(2 * q - 1) <= threshold + 1e-12, 0.0, np.sign(q - 0.5))
    wanted = np.sign(p - 0.5)
    return np.where(predicted == wanted, 1.0, np.where((predicted == 0) != (wanted == 0), 0.5, 0.0))


def best_threshold(preferences: ArrayLike, probability: ArrayLike) -> float:
    """The one of `THRESHOLDS` with the highest mean of `tie_rule_scores`; the smallest of several."""
    return max(THRESHOLDS, key=lambda t: (float(tie_rule_scores(preferences, probability, t).mean()), -t))


def tie_calibration(preferences: ArrayLike, margins: ArrayLike) -> tuple[float, float]:
    """The epsilon that gives the highest `tie_accuracy`, and that accuracy; the smallest of several.

    Deutsch et al. 2023, "Ties Matter: Meta-Evaluating Modern Metrics with Pairwise Accuracy and Tie Calibration"
    (arXiv:2305.14324), as VideoGen-RewardBench uses it: epsilon runs over all |margins|, equal ones at once. Chosen and
    reported on the same pairs, the number is optimistic by design.

    Returns:
        Epsilon and accuracy.
    """
    p, m = _both(preferences, margins)
    size = np.abs(m)
    order = np.argsort(size, kind="stable")
    wanted = np.sign(p - 0.5)
    concordant = ((np.sign(m) == wanted) & (m != 0) & (wanted != 0))[order]
    tied = (wanted == 0)[order]
    last = np.append(np.diff(size[order]) > 0, True)  # the last of equal sizes
    right = (concordant.sum() - np.cumsum(concordant) + np.cumsum(tied))[last]
    best = int(np.argmax(right))
    return float(size[order][last][best]), float(right[best] / len(m))


def tie_accuracy(preferences: ArrayLike, margins: ArrayLike, epsilon: float) -> Vector:
    """1 where first, second or tie is predicted as people said, else 0, [N]; |margin| <= epsilon predicts a tie."""
    p, m = _both(preferences, margins)
    predicted = np.where(np.abs(m) <= epsilon, 0.0, np.sign(m))
    return np.asarray(predicted == np.sign(p - 0.5), dtype=np.float64)


def probabilities(margins: ArrayLike, tau: float) -> Vector:
    """sigmoid(margin / tau), [N]: the probability of Bradley & Terry that the first is better."""
    m = np.asarray(margins, dtype=np.float64) / tau
    return np.exp(-np.logaddexp(0, -m))


def log_losses(preferences: ArrayLike, margins: ArrayLike, tau: float) -> Vector:
    """Minus the log-probability of each label, in nats, [N]; ln 2 for a model that knows nothing."""
    p, m = _both(preferences, margins)
    m = m / tau
    return p * np.logaddexp(0, -m) + (1 - p) * np.logaddexp(0, m)


def brier_score(preferences: ArrayLike, probability: ArrayLike) -> Vector:
    """Squared distance of probability and label, [N]; 1/4 for a model that knows nothing and labels without ties."""
    p, q = _both(preferences, probability)
    return (q - p) ** 2


def calibration_error(preferences: ArrayLike, probability: ArrayLike) -> float:
    """Expected calibration error, in [0, 1]: mean distance of confidence and people's share of agreement.

    Confidence is the probability of the side that is predicted; ten bins of equal width from 1/2 to 1, weighted by the
    number of pairs. Guo et al. 2017, "On Calibration of Modern Neural Networks" (arXiv:1706.04599), Eq. 3.
    """
    p, q = _both(preferences, probability)
    confidence = np.maximum(q, 1 - q)
    agreed = np.where(q > 0.5, p, np.where(q < 0.5, 1 - p, 0.5))
    bins = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    gaps = [abs(float((confidence[bins == b] - agreed[bins == b]).sum())) for b in range(BINS)]
    return math.fsum(gaps) / len(p)


def tie_auc(preferences: ArrayLike, margins: ArrayLike) -> float | None:
    """Probability that a human tie has a smaller |margin| than a decided pair, equal ones as half; None without both.

    1/2 says that the size of a margin tells nothing about ties.
    """
    p, m = _both(preferences, margins)
    tied = p == 0.5
    ties, decided = int(tied.sum()), int((~tied).sum())
    if not ties or not decided:
        return None
    ranks = rankdata(np.abs(m))
    return float((ranks[~tied].sum() - decided * (decided + 1) / 2) / (ties * decided))


def _both(first: ArrayLike, second: ArrayLike) -> tuple[Vector, Vector]:
    one, other = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if one.shape != other.shape or one.ndim != 1 or not one.size:
        raise ValueError(f"expected two lists of as many numbers, got shapes {list(one.shape)} and {list(other.shape)}")
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        raise ValueError("labels and scores must be finite numbers; leave pairs without a score out")
    return one, other
