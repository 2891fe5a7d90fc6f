import math

import numpy as np
import pytest
from scipy import optimize

from diffalign.eval.bradley_terry import Vote, bradley_terry


def votes(*results):
    """Votes from (first, second, wins of the first, wins of the second, ties)."""
    return [
        Vote(a, b, outcome)
        for a, b, won, lost, tied in results
        for outcome, times in ((1, won), (0, lost), (0.5, tied))
        for _ in range(times)
    ]


def test_two_models_three_wins_to_one():
    found = bradley_terry(votes(("x", "y", 3, 1, 0)), resamples=0)
    assert found["x"].strength - found["y"].strength == pytest.approx(math.log(3), abs=1e-9)
    assert found["x"].elo - found["y"].elo == pytest.approx(190.8, abs=0.05)
    assert (found["x"].wins, found["x"].votes, found.votes, found.pseudo_wins) == (3.0, 4, 4, False)
    assert found["x"].elo_ci95 is None
    assert [s.model for s in found.standings] == ["x", "y"]


def test_a_tie_is_half_a_win_each():
    tied = bradley_terry(votes(("x", "y", 2, 0, 2)), resamples=0)
    split = bradley_terry(votes(("x", "y", 3, 1, 0)), resamples=0)
    assert tied["x"].strength == pytest.approx(split["x"].strength, abs=1e-9)
    assert tied.ties == 2


def test_strengths_are_the_maximum_of_the_likelihood():
    results = (("a", "b", 8, 3, 2), ("b", "c", 5, 6, 1), ("a", "c", 4, 4, 3), ("c", "d", 9, 2, 0), ("d", "a", 1, 7, 0))
    found = bradley_terry(votes(*results), resamples=0)
    names = "abcd"

    def loss(b):
        return sum(
            (won + tied / 2) * np.logaddexp(0, b[names.index(j)] - b[names.index(i)])
            + (lost + tied / 2) * np.logaddexp(0, b[names.index(i)] - b[names.index(j)])
            for i, j, won, lost, tied in results
        )

    best = optimize.minimize(loss, np.zeros(4), tol=1e-12).x
    assert [found[name].strength for name in names] == pytest.approx(best - best.mean(), abs=1e-4)
    assert sum(s.strength for s in found.standings) == pytest.approx(0, abs=1e-9)


def test_models_that_were_never_compared_are_refused():
    with pytest.raises(ValueError, match=r"no vote connects these groups of models: a, b \| c, d"):
        bradley_terry(votes(("a", "b", 3, 1, 0), ("c", "d", 2, 2, 0)))


def test_an_undefeated_model_gets_half_a_win_each_way():
    found = bradley_terry(votes(("a", "b", 5, 0, 0)), resamples=0)
    assert found.pseudo_wins
    assert found["a"].strength - found["b"].strength == pytest.approx(math.log(5.5 / 0.5), abs=1e-9)
    # Two models that beat each other and nobody else ever: they have no finite distance from the rest, either.
    both = bradley_terry(votes(("a", "b", 2, 2, 0), ("a", "c", 3, 0, 0), ("c", "d", 2, 1, 0)), resamples=0)
    assert both.pseudo_wins
    assert both["a"].strength - both["c"].strength == pytest.approx(math.log(3.5 / 0.5), abs=1e-6)
    assert both["c"].strength - both["d"].strength == pytest.approx(math.log(2), abs=1e-6)


def test_the_interval_is_that_of_the_share_of_wins():
    found = bradley_terry(votes(("x", "y", 60, 40, 0)), resamples=800)
    low, high = found["x"].elo_ci95
    # Of two models, 1000 + 200/ln 10 * logit(share): the binomial's own quantiles give the interval.
    wanted = [1000 + 200 / math.log(10) * math.log(share / (1 - share)) for share in (0.50, 0.69)]
    assert (low, high) == pytest.approx(wanted, abs=5)
    assert found.clusters == "vote"


def test_voters_are_resampled_whole():
    # Ten people who always vote alike know no more than ten votes.
    clustered = [Vote("x", "y", float(voter < 6), voter) for voter in range(10) for _ in range(10)]
    whole = bradley_terry(clustered, resamples=200)
    single = bradley_terry([vote._replace(voter=None) for vote in clustered], resamples=200)
    assert (whole.clusters, single.clusters) == ("voter", "vote")
    width = [s["x"].elo_ci95.high - s["x"].elo_ci95.low for s in (whole, single)]
    assert width[0] > 2 * width[1]
    assert bradley_terry(clustered[:10], resamples=10)["x"].elo_ci95 is None  # one voter


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "no votes"),
        ([Vote("a", "a", 1)], "against itself"),
        ([Vote("a", "b", 2)], "1, 0 or 0.5"),
        ([Vote("a", "b", float("nan"))], "1, 0 or 0.5"),
    ],
)
def test_bad_votes_are_named(bad, message):
    with pytest.raises(ValueError, match=message):
        bradley_terry(bad)
    with pytest.raises(KeyError, match="no model 'z' among a, b"):
        bradley_terry([Vote("a", "b", 0.5)])["z"]
