"""VisionReward's weights of a checklist: logistic regression on pairs, without negative weights.

Xu et al. 2024, "VisionReward: Fine-Grained Multi-Dimensional Human Preference Learning for Image and Video Generation"
(arXiv:2412.21059): items are answered on a checklist, +1 for yes, -1 for no, 0 for a question that does not apply;
P(first preferred) = sigmoid(w (x_first - x_second)), without an intercept, which would cancel. A question whose weight
turns out negative is dropped and the rest fitted again, until none is left.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

_MAX_STEPS = 100
_FLAT = 1e-10
"""Newton's method has arrived where the gradient's largest entry is below this."""


@dataclass(frozen=True)
class ChecklistFit:
    """What the regression found.

    Attributes:
        weights: One per feature, >= 0, float64 [F]; 0 for those that were dropped.
        dropped: Features in the order in which they went; those of one round in their own order.
        loss: Mean cross entropy over the pairs, without the ridge.
        accuracy: Share of the decided pairs that come out right; equal scores are right by half.
    """

    weights: Tensor
    dropped: tuple[int, ...]
    loss: float
    accuracy: float


def fit_checklist(differences: Tensor, preference: Tensor, *, ridge: float = 1e-4) -> ChecklistFit:
    """The weights that explain N pairs best among those that are not negative; always with the same result.

    Each round is minimised by Newton's method in float64. The ridge, ridge / 2 |w|^2, is this project's: it shares a
    weight evenly between columns that say the same, leaves 0 to columns that say nothing, and keeps weights finite
    where they separate the pairs.

    Args:
        differences: Features of the first items minus those of the second ones, [N, F].
        preference: 1 where the first was preferred, 0 where the second was, between the two for divided votes, [N].
        ridge: Strength, > 0; small against 1, the scale of the mean cross entropy.

    Raises:
        ValueError: If there are no pairs, shapes do not fit, a number is not finite, or `ridge` is not positive.
    """
    x, y = differences.detach().double().cpu(), preference.detach().double().cpu()
    if x.ndim != 2 or y.shape != x.shape[:1] or not len(x):
        raise ValueError(f"expected differences [N, F] and preference [N], got {list(x.shape)} and {list(y.shape)}")
    if not (x.isfinite().all() and y.isfinite().all()) or y.min() < 0 or y.max() > 1:
        raise ValueError("differences must be finite and preference in [0, 1]; leave out pairs without an answer")
    if not ridge > 0:
        raise ValueError(f"ridge must be positive, got {ridge}")
    kept = list(range(x.shape[1]))
    dropped: list[int] = []
    weights = torch.zeros(x.shape[1], dtype=torch.float64)
    while kept:
        found = _newton(x[:, kept], y, ridge)
        negative = {feature for feature, weight in zip(kept, found.tolist(), strict=True) if weight < 0}
        if not negative:
            weights[kept] = found
            break
        dropped += [feature for feature in kept if feature in negative]
        kept = [feature for feature in kept if feature not in negative]
    scores = x @ weights
    right = ((scores * (y - 0.5)).sign() / 2 + 0.5)[y != 0.5]
    accuracy = float(right.mean()) if len(right) else float("nan")
    return ChecklistFit(weights, tuple(dropped), float(_cross_entropy(scores, y)), accuracy)


def _newton(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """The minimum of the mean cross entropy plus the ridge; the sum is strictly convex."""
    weights = x.new_zeros(x.shape[1])

    def objective(w: Tensor) -> Tensor:
        return _cross_entropy(x @ w, y) + ridge / 2 * w.square().sum()

    for _ in range(_MAX_STEPS):
        p = torch.sigmoid(x @ weights)
        gradient = x.T @ (p - y) / len(x) + ridge * weights
        if gradient.abs().max() < _FLAT:
            break
        curvature = x.T @ (x * (p * (1 - p))[:, None]) / len(x) + ridge * torch.eye(len(weights), dtype=x.dtype)
        step = torch.linalg.solve(curvature, gradient)
        size, here, slope = 1.0, objective(weights), gradient @ step
        # Far from the minimum a whole step may overshoot; rounding ends the search near it.
        while objective(weights - size * step) > here - 1e-4 * size * slope and size > 1e-8:
            size /= 2
        weights = weights - size * step
    return weights


def _cross_entropy(scores: Tensor, y: Tensor) -> Tensor:
    return (F.softplus(scores) - y * scores).mean()
