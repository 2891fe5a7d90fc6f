"""The rules of section 10 of each benchmark as truth tables, and the golden values."""

import math

import numpy as np
import pytest

from diffalign.eval import pair_metrics as metrics


@pytest.mark.parametrize(
    ("preference", "margin", "right"),
    [(1, 2.0, [1]), (1, -2.0, [0]), (1, 0.0, [0]), (0, -2.0, [1]), (0, 2.0, [0]), (0.5, 0.0, []), (0.5, 1.0, []),
     (0.7, 0.1, [1]), (0.3, 0.1, [0])],
)  # fmt: skip
def test_strict_accuracy_leaves_human_ties_out_and_counts_predicted_ones_as_wrong(preference, margin, right):
    assert metrics.strict_accuracy([preference], [margin]).tolist() == right


def test_strict_accuracy_of_the_recorded_ranking():
    # Human ranks 1, 2, 2 and rewards .5, .5, .1: the pairs 0-1 (tied prediction, wrong) and 0-2 (right).
    assert metrics.strict_accuracy([1.0, 1.0, 0.5], [0.0, 0.4, 0.4]).mean() == 0.5


@pytest.mark.parametrize(
    ("human", "scores", "expected"),
    [
        ([1, 1, 2], [3.0, 2.0, 1.0], 1.0),  # predicted ranks 0, 1, 2
        ([2, 1, 3], [3.0, 2.0, 1.0], 1 - 1 / 3),
        ([1, 2, 3], [1.0, 2.0, 3.0], 0.0),
        ([1, 2, 3], [5.0, 5.0, 5.0], 1.0),  # a predicted tie is no inversion
        ([2, 2, 2], [1.0, 2.0, 3.0], 1.0),
        ([1, 2, 3, 4], [4.0, 1.0, 2.0, 3.0], 1 - 3 / 6),
    ],
)
def test_inversion_accuracy(human, scores, expected):
    assert metrics.inversion_accuracy(human, scores) == pytest.approx(expected)


def test_inversion_accuracy_refuses_what_is_no_ranking():
    with pytest.raises(ValueError, match="two or more ranks and as many scores, got 2 and 3"):
        metrics.inversion_accuracy([1, 2], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="got 1 and 1"):
        metrics.inversion_accuracy([1], [1.0])


@pytest.mark.parametrize(
    ("label", "first", "threshold", "score"),
    [
        (0.5, 0.52, 0.1, 1.0), (1, 0.52, 0.1, 0.5), (0, 0.7, 0.1, 0.0),  # the recorded ones
        (1, 0.7, 0.1, 1.0), (0, 0.3, 0.1, 1.0), (0.5, 0.7, 0.1, 0.5), (0, 0.5, 0.0, 0.5), (0.5, 0.5, 0.0, 1.0),
        (1, 0.55, 0.1, 0.5),  # at the threshold itself it is a tie
        (1, 0.99, 1.0, 0.5),
    ],
)  # fmt: skip
def test_the_tie_rule_of_pick_a_pic(label, first, threshold, score):
    assert metrics.tie_rule_scores([label], [first], threshold).tolist() == [score]


def test_best_threshold_is_the_arg_max_and_the_smallest_of_several():
    labels, first = [0.5, 0.5, 1, 0], [0.55, 0.45, 0.9, 0.1]
    assert metrics.best_threshold(labels, first) == 0.1
    assert metrics.best_threshold([1, 0], [0.9, 0.1]) == 0.0


def test_tie_calibration_of_the_recorded_pairs():
    human, margins = [1.0, 0.0, 0.5], [0.5, -0.2, 0.1]
    assert metrics.tie_calibration(human, margins) == (0.1, 1.0)
    assert metrics.strict_accuracy(human, margins).mean() == 1.0


def test_equal_margins_become_ties_together():
    # Of two pairs with one margin, no epsilon calls the first a tie and not the second.
    assert metrics.tie_calibration([0.5, 1.0], [0.3, 0.3]) == (0.3, 0.5)


def test_tie_calibration_is_the_best_of_all_epsilons():
    generator = np.random.default_rng(3)
    human = generator.choice([0.0, 0.5, 1.0], 200)
    margins = np.round((human - 0.5) + generator.normal(0, 0.6, 200), 1)  # many equal sizes
    tried = {e: metrics.tie_accuracy(human, margins, e).mean() for e in sorted(set(np.abs(margins)))}
    best = max(tried, key=lambda e: (tried[e], -e))
    assert metrics.tie_calibration(human, margins) == pytest.approx((best, tried[best]))


@pytest.mark.parametrize(
    ("human", "margin", "right"),
    [(0.5, 0.1, 1), (0.5, 0.3, 0), (1, 0.1, 0), (1, 0.3, 1), (0, 0.3, 0), (0, -0.3, 1), (1, 0.2, 0), (0.5, -0.2, 1)],
)
def test_tie_accuracy_at_a_fifth(human, margin, right):
    assert metrics.tie_accuracy([human], [margin], 0.2).tolist() == [right]


def test_probabilities_log_loss_and_brier_in_closed_form():
    assert metrics.probabilities([0.0, 2.0, -1000.0], 2.0) == pytest.approx([0.5, 1 / (1 + math.exp(-1)), 0.0])
    assert metrics.log_losses([1, 0, 0.5], [0, 0, 0], 1.0) == pytest.approx([math.log(2)] * 3)
    q = metrics.probabilities([0.7], 1.0)[0]
    assert metrics.log_losses([0.3], [0.7], 1.0)[0] == pytest.approx(-0.3 * math.log(q) - 0.7 * math.log(1 - q))
    assert metrics.log_losses([0], [2000.0], 1.0) == pytest.approx([2000.0])  # no overflow
    assert metrics.brier_score([1, 0.5], [0.8, 0.8]) == pytest.approx([0.04, 0.09])


def test_calibration_error_in_closed_form():
    # Says .8 and is right four times of five: calibrated. Says .9 and is right half of the time: .4 off.
    labels, first = [1, 1, 1, 1, 0], [0.8] * 5
    assert metrics.calibration_error(labels, first) == pytest.approx(0.0, abs=1e-12)
    assert metrics.calibration_error([0, 1, 1, 0], [0.9, 0.9, 0.1, 0.1]) == pytest.approx(0.4)
    assert metrics.calibration_error([0.5], [0.5]) == 0.0


@pytest.mark.parametrize(
    ("labels", "margins", "expected"),
    [
        ([0.5, 1, 0], [0.1, 2.0, -2.0], 1.0), ([0.5, 1, 0], [3.0, 2.0, -2.0], 0.0), ([0.5, 1], [1.0, -1.0], 0.5),
        ([0.5, 0.5, 1, 1], [0.1, 0.3, 0.2, 0.4], 0.75), ([1, 0], [1.0, 1.0], None), ([0.5], [1.0], None),
    ],
)  # fmt: skip
def test_tie_auc(labels, margins, expected):
    assert metrics.tie_auc(labels, margins) == expected


@pytest.mark.parametrize("bad", [([], []), ([1.0], [1.0, 2.0]), ([1.0], [float("nan")]), ([float("inf")], [1.0])])
def test_numbers_that_are_none_are_refused(bad):
    with pytest.raises(ValueError, match=r"as many numbers|finite"):
        metrics.strict_accuracy(*bad)
