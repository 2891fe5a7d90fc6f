"""What the base class does for every reward model, on one whose scores are known by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from diffalign.reward_models import InvalidMediaError, RewardInfo, RewardModel
from diffalign.reward_models.base import Scores


class Numbers(RewardModel):
    """A medium is a picture of one colour, whose value is its score; 1 cannot be read, 0 gets no answer."""

    info = RewardInfo(name="numbers", license="none", weights=(), dims=("half", "overall"), needs_prompt=False)

    def preprocess(self, item: torch.Tensor) -> float:
        value = float(item.mean())
        if value == 1:
            raise InvalidMediaError("one is not a number here")
        return value

    def score_prepared(self, prepared: Sequence[float], texts: Sequence[str]) -> Scores:
        values = torch.tensor(prepared)
        return Scores(
            dims={"half": values / 2, "overall": values},
            uncertainty=values / 10,
            raw=[f"{value:g}" for value in prepared],
            errors=["no answer" if value == 0 else None for value in prepared],
        )


def pictures(*values: float) -> torch.Tensor:
    return torch.stack([torch.full((3, 2, 2), value) for value in values])


@pytest.mark.parametrize("batch_size", [1, 2, 32])
@pytest.mark.parametrize("workers", [1, 3])
def test_what_is_invalid_has_no_number_anywhere_and_the_order_stays(batch_size, workers):
    model = Numbers()
    model.workers = workers
    output = model.score(pictures(0.5, 1, 0.25, 0, 0.75), on_invalid="nan", batch_size=batch_size)
    nan = torch.nan
    expected = torch.tensor([0.5, nan, 0.25, nan, 0.75])
    assert output.valid.tolist() == [True, False, True, False, True]
    for found, factor in ((output.score, 1), (output.dims["half"], 0.5), (output.uncertainty, 0.1)):
        torch.testing.assert_close(found, expected * factor, equal_nan=True)
    assert output.errors == (None, "medium 1: one is not a number here", None, "medium 3: no answer", None)
    assert output.raw == ("0.5", "", "0.25", "0", "0.75")
    for i, message in ((1, "medium 1: one is not"), (3, "medium 1: no answer")):
        with pytest.raises(InvalidMediaError, match=message):
            model.score(pictures(0.5, (0, 1)[i == 1]), batch_size=batch_size)


def test_pairs_follow_the_direction_of_the_score():
    model = Numbers()
    a, b = pictures(0.75, 0.25, 0.5, 1), pictures(0.25, 0.75, 0.5, 0.5)
    more = model.compare(a, b, "", on_invalid="nan")
    model.info = replace(model.info, higher_is_better=False)
    less = model.compare(a, b, "", on_invalid="nan")
    high = torch.sigmoid(torch.tensor(0.5)).item()
    torch.testing.assert_close(more.p_a, torch.tensor([high, 1 - high, 0.5, torch.nan]), equal_nan=True)
    torch.testing.assert_close(less.p_a, 1 - more.p_a, equal_nan=True)
    for output in (more, less):
        assert output.tie.tolist() == [False, False, True, False]
        assert output.valid.tolist() == [True, True, True, False]


def test_arguments_are_checked_before_anything_is_read():
    bad = pictures(1)
    for options, message in (
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"on_invalid": "skip"}, "on_invalid must be 'raise' or 'nan', got 'skip'"),
        ({"prompts": ["a", "b"]}, "got 2 prompts for 1 media"),
    ):
        with pytest.raises(ValueError, match=message):
            Numbers().score(bad, **options)


def test_what_a_model_does_not_have_is_named():
    model = Numbers()
    assert Numbers.describe() is Numbers.info
    with pytest.raises(NotImplementedError, match=r"numbers has no gradient path to the pixels; use score\(\)"):
        model.score_tensor(pictures(0.5), "a")
    with pytest.raises(NotImplementedError, match="numbers is no dual encoder"):
        model.score_matrix(pictures(0.5), ["a"])
