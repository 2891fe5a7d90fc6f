"""The law of a comparison of two rewards, with ties: probabilities, and the loss of an observed outcome.

Rao & Kupper 1967, "Ties in Paired-Comparison Experiments: A Generalization of the Bradley-Terry Model", as Liu et al.
2025, "Improving Video Generation with Human Feedback" (arXiv:2501.13918) train their reward models with k = 5. With
d = r_A - r_B and S the logistic function,

    P(A better) = S(d - ln k)     P(B better) = S(-d - ln k)     P(tie) = (k^2 - 1) S(d - ln k) S(-d - ln k)

k = 1 is the law of Bradley & Terry, in which nothing is ever tied.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def outcome_probabilities(first: Tensor, second: Tensor, ties: float = 5.0) -> tuple[Tensor, Tensor, Tensor]:
    """(P(first better), P(second better), P(tie)) of rewards of one shape; they sum to 1.

    Raises:
        ValueError: If `ties` (k) is below 1.
    """
    log_k = _log(ties)
    better, worse = torch.sigmoid(first - second - log_k), torch.sigmoid(second - first - log_k)
    return better, worse, (ties**2 - 1) * better * worse


def comparison_loss(difference: Tensor, preference: Tensor, ties: float = 1.0) -> Tensor:
    """Minus the log-probability of what was observed, in the shape of `difference`.

    Args:
        difference: Reward of the first sample minus that of the second.
        preference: Positive where the first was better, negative where the second was, 0 for a tie; same shape.
        ties: k of the module's description, >= 1. With 1 a tie has no probability, and its loss is 0.

    Raises:
        ValueError: If `ties` is below 1.
    """
    log_k = _log(ties)
    better, worse = F.softplus(log_k - difference), F.softplus(log_k + difference)
    tied = better + worse - math.log(ties**2 - 1) if ties > 1 else torch.zeros_like(difference)
    return torch.where(preference > 0, better, torch.where(preference < 0, worse, tied))


def _log(ties: float) -> float:
    if not 1 <= ties < math.inf:
        raise ValueError(f"ties must be a finite number of at least 1, got {ties}")
    return math.log(ties)
