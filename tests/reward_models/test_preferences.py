"""Ranks, z-scores, votes and win rates against loops over their definitions."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch

from diffalign.reward_models.preferences import majority_vote, omni_score, ranks, vote_win_rates, win_rates, zscores


@pytest.fixture
def columns() -> torch.Tensor:
    """Scores [6, 3] with ties, one column of equal values, and one whose mean is not exact."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (6, 3), generator=generator).float()
    scores[:, 2] = 0.1
    return scores


def test_zscores_by_hand(columns):
    found = zscores(columns)
    for k in range(2):
        values = columns[:, k].double().tolist()
        mean, deviation = statistics.fmean(values), statistics.stdev(values)
        assert found[:, k].tolist() == pytest.approx([(v - mean) / (deviation + 1e-8) for v in values])
    assert found[:, 2].tolist() == [0.0] * 6  # equal scores, whatever their mean rounds to
    torch.testing.assert_close(zscores(columns * 7 + 3), found, rtol=1e-6, atol=1e-6)


def test_ranks_by_sorting(columns):
    found = ranks(columns)
    for k in range(3):
        values = columns[:, k].tolist()
        places = {v: [i + 1 for i, w in enumerate(sorted(values)) if w == v] for v in values}
        assert found[:, k].tolist() == [statistics.fmean(places[v]) for v in values]
    assert found.sum(0).tolist() == [21.0] * 3


def test_votes_by_counting(columns):
    for i, j in itertools.product(range(6), repeat=2):
        wins = sum(float(a > b) - float(a < b) for a, b in zip(columns[i], columns[j], strict=True))
        assert majority_vote(columns[i], columns[j]).item() == (wins > 0) - (wins < 0)
    assert torch.equal(majority_vote(columns, columns.flip(0)), -majority_vote(columns.flip(0), columns))


def test_votes_do_not_depend_on_scales_and_abstain_on_ties():
    a, b = torch.tensor([1e-3, 100.0, 5.0]), torch.tensor([0.0, 99.0, 6.0])
    assert majority_vote(a, b).item() == 1
    assert majority_vote(a * torch.tensor([1e6, 1.0, 1e6]), b * torch.tensor([1e6, 1.0, 1e6])).item() == 1
    assert majority_vote(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 4.0])).item() == -1
    assert majority_vote(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])).item() == 0
    assert majority_vote(a, b, torch.tensor([1.0, 1.0, 3.0])).item() == -1
    weights = torch.tensor([0.1, 0.2, 0.3])
    assert majority_vote(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 1.0]), weights).item() == 0


def test_win_rates_are_means_over_the_others():
    beats = torch.tensor([[9.0, 1.0, 0.5], [0.0, 9.0, float("nan")], [0.5, float("nan"), 9.0]])
    assert win_rates(beats).tolist() == [0.75, 0.0, 0.5]
    assert win_rates(torch.full((2, 2), float("nan"))).isnan().all()


def test_vote_win_rates_by_tournament(columns):
    expected = []
    for i in range(6):
        results = []
        for j in range(6):
            lead = sum(float(a > b) - float(a < b) for a, b in zip(columns[i], columns[j], strict=True))
            results += [1.0 if lead > 0 else 0.5 if lead == 0 else 0.0] if i != j else []
        expected.append(statistics.fmean(results))
    found = vote_win_rates(columns)
    assert found.tolist() == pytest.approx(expected)
    assert found.sum().item() == pytest.approx(3.0)  # half a win for each of the six


def test_one_scorers_win_rates_are_its_scaled_ranks(columns):
    torch.testing.assert_close(vote_win_rates(columns[:, :1]), (ranks(columns[:, :1])[:, 0] - 1) / 5)


def test_groups_of_one_are_refused():
    for function in (zscores, ranks, vote_win_rates):
        with pytest.raises(ValueError, match=r"at least two media, got \[1, 3\]"):
            function(torch.zeros(1, 3))


def test_omni_score_by_hand():
    dims = {
        "quality": torch.tensor([0.2, 0.6, 0.4, float("nan")]),
        "motion": torch.tensor([10.0, 20.0, 10.0, 10.0]),
        "same": torch.full((4,), 3.0),
    }
    weights = {"quality": 2.0, "motion": 1.0, "same": 1.0}
    found = omni_score(dims, weights)
    assert found[:3].tolist() == pytest.approx([0.0, 3 / 4, 1 / 4])
    assert found[3].isnan()
    spread = statistics.stdev([0.2, 0.6, 0.4])
    expected = [(v - 0.4) / spread for v in (0.2, 0.6, 0.4)]
    assert omni_score({"quality": dims["quality"]}, normalise="zscore")[:3].tolist() == pytest.approx(
        expected, abs=1e-6
    )


def test_omni_score_refuses_what_does_not_fit():
    dims = {"a": torch.zeros(2)}
    with pytest.raises(ValueError, match="a weight for each dimension"):
        omni_score(dims, {"b": 1.0})
    with pytest.raises(ValueError, match="add up to something positive"):
        omni_score(dims, {"a": 0.0})
    with pytest.raises(ValueError, match="normalise must be"):
        omni_score(dims, normalise="rank")
