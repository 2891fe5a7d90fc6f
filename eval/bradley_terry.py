"""Strengths of several models from votes on pairs: Bradley-Terry, with intervals and an Elo-like scale.

Bradley & Terry 1952, "Rank Analysis of Incomplete Block Designs": P(i beats j) = sigmoid(b_i - b_j). A tie counts as
half a win of each. Ratings that are updated vote by vote (Elo) depend on the order of the votes; these do not.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from diffalign.eval.statistics import Interval

__all__ = ["Standing", "Strengths", "Vote", "bradley_terry"]

ELO_CENTRE = 1000.0
ELO_SCALE = 400 / math.log(10)
"""Points per nat: 400 points are odds of ten to one, as in chess."""
PSEUDO_WINS = 0.5
"""Wins given to each side where the votes alone would send a strength to infinity."""
TOLERANCE = 1e-10
_LOOSE = 1e-6  # of a resample, whose noise is thousands of times larger
_ROUNDS = 100_000
_CHUNK = 200


class Vote(NamedTuple):
    """One decision of one person, or judge, between media of two models.

    Attributes:
        first: Name of one model.
        second: Name of the other.
        outcome: 1 if the first won, 0 if the second did, 0.5 for a tie.
        voter: Who decided, if that is known.
    """

    first: str
    second: str
    outcome: float
    voter: Hashable | None = None


@dataclass(frozen=True)
class Standing:
    """One model among the others.

    Attributes:
        model: Its name.
        strength: b, in nats; the mean over the models is 0.
        elo: 1000 + 400 b / ln 10.
        elo_ci95: Interval of `elo`, from resampled votes; None without resamples, or with a single voter.
        wins: Votes won, ties as halves.
        votes: Votes it took part in.
    """

    model: str
    strength: float
    elo: float
    elo_ci95: Interval | None
    wins: float
    votes: int


@dataclass(frozen=True)
class Strengths:
    """Models by strength.

    Attributes:
        standings: The strongest first.
        votes: How many votes there are.
        ties: How many of them are ties.
        pseudo_wins: Whether some models never lost to, or never won against, the others, so that half a win each way
            was added between them: their distance is then a lower bound, not an estimate.
        clusters: What was resampled: "vote" or "voter".
    """

    standings: tuple[Standing, ...]
    votes: int
    ties: int
    pseudo_wins: bool
    clusters: str

    def __getitem__(self, model: str) -> Standing:
        found = next((standing for standing in self.standings if standing.model == model), None)
        if found is None:
            raise KeyError(f"no model {model!r} among {', '.join(s.model for s in self.standings)}")
        return found


def bradley_terry(votes: Iterable[Vote], *, resamples: int = 1000, seed: int = 0) -> Strengths:
    """The maximum-likelihood strengths of all models that votes name.

    Found by minorisation-maximisation (Hunter 2004, "MM Algorithms for Generalized Bradley-Terry Models"):
    exp(b_i) <- W_i / sum over j of n_ij / (exp(b_i) + exp(b_j)), until no strength changes by 1e-10.

    Intervals are percentiles over resampled votes. If every vote names its voter, whole voters are resampled: votes of
    one person are not independent.

    Args:
        votes: At least one.
        resamples: Of the bootstrap; 0 gives no intervals.
        seed: Of the bootstrap.

    Raises:
        ValueError: If there is no vote, a vote is malformed or of a model against itself, or some models were never
            compared with the others, even by way of third ones.
    """
    votes = list(votes)
    names, wins, games, cells = _count(votes)
    _refuse_disconnected(names, games)
    filled, pseudo = _with_pseudo_wins(wins, games)
    strengths = _fit(filled[None], TOLERANCE)[0]
    by_voter = all(vote.voter is not None for vote in votes)
    elos = _resampled(votes, cells, games, by_voter, resamples, seed)
    standings = []
    for i, name in enumerate(names):
        interval = None
        if elos is not None:
            low, high = np.percentile(elos[:, i], [2.5, 97.5])
            interval = Interval(float(low), float(high))
        strength = float(strengths[i])
        elo = ELO_CENTRE + ELO_SCALE * strength
        standings.append(Standing(name, strength, elo, interval, float(wins[i].sum()), int(games[i].sum())))
    standings.sort(key=lambda standing: -standing.strength)
    ties = sum(vote.outcome == 0.5 for vote in votes)
    return Strengths(tuple(standings), len(votes), ties, pseudo, "voter" if by_voter else "vote")


Matrix = NDArray[np.float64]


def _count(votes: Sequence[Vote]) -> tuple[list[str], Matrix, Matrix, list[tuple[int, int]]]:
    """Names; wins of i over j and games of i with j, [K, K]; and each vote's pair of numbers."""
    if not votes:
        raise ValueError("there are no votes to rank models by")
    numbers: dict[str, int] = {}
    for vote in votes:
        if vote.outcome not in (0, 0.5, 1):
            raise ValueError(f"a vote's outcome is 1, 0 or 0.5 for a tie, found {vote.outcome!r} in {vote}")
        if vote.first == vote.second:
            raise ValueError(f"a vote compares two models, found {vote.first!r} against itself")
        for name in (vote.first, vote.second):
            numbers.setdefault(name, len(numbers))
    cells = [(numbers[vote.first], numbers[vote.second]) for vote in votes]
    wins = np.zeros((len(numbers), len(numbers)))
    for (i, j), vote in zip(cells, votes, strict=True):
        wins[i, j] += vote.outcome
        wins[j, i] += 1 - vote.outcome
    return list(numbers), wins, wins + wins.T, cells


def _refuse_disconnected(names: Sequence[str], games: Matrix) -> None:
    count, groups = connected_components(sparse.csr_array(games), directed=False)
    if count > 1:
        islands = [", ".join(n for n, g in zip(names, groups, strict=True) if g == group) for group in range(count)]
        raise ValueError(
            f"no vote connects these groups of models: {' | '.join(islands)}; strengths across them mean nothing: "
            "collect votes between them, or rank each group alone"
        )


def _with_pseudo_wins(wins: Matrix, compared: Matrix) -> tuple[Matrix, bool]:
    """The wins, with half a win each way between groups of models of which one never lost to the other."""
    count, groups = connected_components(sparse.csr_array(wins), directed=True, connection="strong")
    if count == 1:
        return wins, False
    return wins + PSEUDO_WINS * ((groups[:, None] != groups[None]) & (compared > 0)), True


def _fit(wins: Matrix, tolerance: float) -> Matrix:
    """Strengths [R, K] with mean 0 of R matrices of wins [R, K, K]."""
    won = wins.sum(-1)
    games = wins + wins.transpose(0, 2, 1)
    strengths = np.zeros(won.shape)
    for _ in range(_ROUNDS):
        powers = np.exp(strengths)
        expected = (games / (powers[:, :, None] + powers[:, None, :])).sum(-1)
        updated: Matrix = np.log(won / expected)
        updated -= updated.mean(-1, keepdims=True)
        change = np.abs(updated - strengths).max()
        strengths = updated
        if change < tolerance:
            return strengths
    raise ValueError(f"the strengths have not settled after {_ROUNDS} rounds (last change {change:.1e})")


def _resampled(
    votes: Sequence[Vote],
    cells: Sequence[tuple[int, int]],
    compared: Matrix,
    by_voter: bool,
    resamples: int,
    seed: int,
) -> Matrix | None:
    """Elo-like ratings of resampled votes, [resamples, K]; None where there is nothing to resample."""
    k = len(compared)
    # Votes that say the same count together: drawing among kinds by their share is drawing among votes.
    keys = [vote.voter if by_voter else (*cell, vote.outcome) for vote, cell in zip(votes, cells, strict=True)]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    draws = len(numbers) if by_voter else len(votes)
    if resamples < 1 or draws < 2:
        return None
    own = sparse.lil_array((len(numbers), k * k))
    sizes = np.zeros(len(numbers))
    for key, (i, j), vote in zip(keys, cells, votes, strict=True):
        own[numbers[key], i * k + j] += vote.outcome
        own[numbers[key], j * k + i] += 1 - vote.outcome
        sizes[numbers[key]] += 1
    table = sparse.csr_array(own)
    if by_voter:
        shares = np.full(len(numbers), 1 / len(numbers))
    else:
        shares = sizes / len(votes)
        table = sparse.csr_array(sparse.diags_array(1 / sizes) @ table)
    generator = np.random.default_rng(seed)
    found = []
    for start in range(0, resamples, _CHUNK):
        times = generator.multinomial(draws, shares, size=min(_CHUNK, resamples - start))
        wins = np.asarray((table.T @ times.T.astype(np.float64)).T).reshape(-1, k, k)
        filled = np.stack([_with_pseudo_wins(one, compared)[0] for one in wins])
        found.append(ELO_CENTRE + ELO_SCALE * _fit(filled, _LOOSE))
    return np.concatenate(found)
