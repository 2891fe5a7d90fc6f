"""Losses that reward models are trained with: functions of rewards, one loss per comparison, nothing else.

`difference` is the reward of the first item minus that of the second, in the units of the paper (exp(logit_scale) times
a cosine for models on CLIP); `preference` is the probability, or the share of votes, with which the first was
preferred: 1, 0, 0.5 for a tie, or anything between. The law with ties of Rao and Kupper is in `diffalign.comparisons`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

CONSTANT_MARGIN = 0.57
"""Margin of the option "constant margin" in VideoReward's released code."""


def preference_loss(difference: Tensor, preference: Tensor, *, relative: bool = False) -> Tensor:
    """Cross entropy of (P(first), P(second)) = softmax of the two rewards against the observed preference.

    Wu et al. 2023, "Human Preference Score v2" (arXiv:2306.09341), and Kirstain et al. 2023, "Pick-a-Pic"
    (arXiv:2305.01569); with preference 1 it is the loss of Bradley & Terry, which ImageReward has
    (Xu et al. 2023, arXiv:2304.05977).

    Args:
        difference: Any shape.
        preference: In [0, 1], the same shape.
        relative: Subtract the preference's own entropy, which makes it the Kullback-Leibler divergence, 0 for a tie of
            equal rewards, as PickScore's code does. The gradient is the same.
    """
    loss = F.softplus(difference) - preference * difference
    return loss - _entropy(preference) if relative else loss


def listwise_loss(rewards: Tensor, target: Tensor) -> Tensor:
    """Cross entropy [B] of the softmax over the N items of a prompt against a distribution over them.

    Args:
        rewards: [B, N].
        target: Rows that sum to 1, [B, N]; for N = 2 this is `preference_loss`.
    """
    return -(target * rewards.log_softmax(dim=-1)).sum(dim=-1)


def bradley_terry_loss(difference: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """-log sigmoid(d - m), where the first item is the preferred one.

    Bradley & Terry 1952, without a margin. With m the difference of two ratings it is the "margin" loss of
    VideoReward's code, with m = `CONSTANT_MARGIN` its "constant margin" (Liu et al. 2025, arXiv:2501.13918).
    """
    return F.softplus(margin - difference)


def scaled_bradley_terry_loss(difference: Tensor, scale: Tensor) -> Tensor:
    """-m log sigmoid(d): the "scaled" option of VideoReward's code, m >= 0 the difference of two ratings."""
    return scale * F.softplus(-difference)


def displacement_loss(first: Tensor, second: Tensor, temper: float = 1.0) -> Tensor:
    """-log sigmoid(r_preferred - tau r_other), HPSv3's option against rewards that sink together; `first` preferred."""
    return F.softplus(temper * second - first)


def hinge_loss(difference: Tensor, preference: Tensor, margin: float = 1.0) -> Tensor:
    """max(0, m - y d) with y = 2 preference - 1 in [-1, 1]: PAL's for distances (Chen et al. 2024, arXiv:2406.08469).

    A tie has the constant loss m and no gradient.
    """
    return (margin - (2 * preference - 1) * difference).clamp(min=0)


def rating_loss(rewards: Tensor, ratings: Tensor, centre: float = 3.0) -> Tensor:
    """(r - (rating - 3))^2, and 0 without a gradient where the rating is 0, "not given": VideoReward's "reg" loss."""
    return torch.where(ratings == 0, torch.zeros_like(rewards), (rewards - (ratings - centre)).square())


def uncertainty_loss(mean: Tensor, deviation: Tensor, noise: Tensor | None = None) -> Tensor:
    """Mean over e of -log sigmoid(mu_z + sigma_z e), e standard normal; the first item is the preferred one.

    Ma et al. 2025, "HPSv3: Towards Wide-Spectrum Human Preference Score" (arXiv:2508.03789), as released: an upper
    bound (Jensen) of -log E sigmoid(z), the probability that the paper writes, see `expected_preference`. The released
    code draws e in half precision; here everything is in the type of `mean`.

    Args:
        mean: mu_z = mu_first - mu_second, [...].
        deviation: sigma_z = sqrt(sigma_first^2 + sigma_second^2) >= 0, the same shape; see `joint_deviation`.
        noise: K draws of e, [K, ...]; None integrates with 32 nodes of Gauss and Hermite, without chance.
    """
    if noise is not None:
        return F.softplus(-(mean + deviation * noise)).mean(dim=0)
    nodes, weights = _hermite(mean)
    return (weights * F.softplus(-(mean[..., None] + deviation[..., None] * nodes))).sum(dim=-1)


def expected_preference(mean: Tensor, deviation: Tensor) -> Tensor:
    """E sigmoid(mu_z + sigma_z e) for a standard normal e, by 32 nodes of Gauss and Hermite; shapes as above."""
    nodes, weights = _hermite(mean)
    return (weights * torch.sigmoid(mean[..., None] + deviation[..., None] * nodes)).sum(dim=-1)


def joint_deviation(first: Tensor, second: Tensor) -> Tensor:
    """sqrt(e^(2 a_1) + e^(2 a_2)) of two logarithms of standard deviations, HPSv3's second output; same shape."""
    return (0.5 * torch.logaddexp(2 * first, 2 * second)).exp()


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """CLIP's loss [B]: each picture's own text among all, and each text's own picture among all, halved.

    Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision" (arXiv:2103.00020).

    Args:
        images: Unit embeddings [B, D].
        texts: Unit embeddings [B, D].
        scale: exp(logit_scale).
        same: Pairs of rows with equal texts, bool [B, B]: these are no wrong answers for each other.
    """
    logits = scale * images @ texts.T
    own = torch.arange(len(logits), device=logits.device)
    apart = same & ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(apart, float("-inf"))
    return (F.cross_entropy(logits, own, reduction="none") + F.cross_entropy(logits.T, own, reduction="none")) / 2


def ranking_pairs(ranks: Sequence[float]) -> list[tuple[int, int]]:
    """(better, worse) for every two items of a ranking with different ranks, smaller ranks being better.

    ImageReward's and HPSv2's rankings of up to 9 pictures become pairs in this way; tied ones give none.
    """
    return [(i, j) for i, rank in enumerate(ranks) for j, other in enumerate(ranks) if rank < other]


def ranking_hinge_loss(rewards: Tensor, ranks: Tensor, margin: float) -> Tensor:
    """Mean over the pairs i, j of a ranking, i better, of max(0, m - (r_i - r_j) (rank_j - rank_i)); a scalar.

    An option in HPSv2's released code, which also counts padded entries; there are none here. 0 if all are tied.

    Args:
        rewards: [N].
        ranks: Smaller is better, [N].
        margin: m.
    """
    pairs = ranking_pairs(ranks.tolist())
    if not pairs:
        return 0 * rewards.sum()
    better, worse = (torch.tensor(side, device=rewards.device) for side in zip(*pairs, strict=True))
    return (margin - (rewards[better] - rewards[worse]) * (ranks[worse] - ranks[better])).clamp(min=0).mean()


def comparison_weights(counts: Tensor) -> Tensor:
    """(1 / c_n) / sum(1 / c): what PickScore's code weighs a batch with, so that prompts count equally; they sum to 1.

    Args:
        counts: How many comparisons there are of each example's prompt, >= 1, [B].
    """
    inverse = 1 / counts.double()
    return (inverse / inverse.sum()).float()


def _entropy(preference: Tensor) -> Tensor:
    """-p log p - (1 - p) log(1 - p), 0 at 0 and 1."""
    return -torch.xlogy(preference, preference) - torch.xlogy(1 - preference, 1 - preference)


def _hermite(like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights with which the mean over a standard normal is a sum."""
    nodes, weights = np.polynomial.hermite.hermgauss(32)
    return like.new_tensor(nodes * math.sqrt(2)), like.new_tensor(weights / math.sqrt(math.pi))
