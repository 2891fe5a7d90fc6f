"""What a step's record says of its micro-batches, read once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffalign.config import TrainingConfig
from diffalign.launching import make_accelerator
from diffalign.step_records import StepRecord, Verdict, read_values, read_verdicts


def output(loss: float, **metrics: float) -> Any:
    values = {name: torch.tensor(value) for name, value in metrics.items()}
    return SimpleNamespace(loss=torch.tensor(loss), losses=torch.tensor([loss]), metrics=values)


def record(*outputs: Any, norm: float = 1.0) -> StepRecord:
    made = StepRecord(0)
    for each in outputs:
        made.add(None, each)  # type: ignore[arg-type]
    made.norm, made.known = torch.tensor(norm), {"lr": 0.5}
    return made


def test_means_are_over_micro_batches_whatever_each_of_them_measured() -> None:
    """A metric that only some micro-batches have counts as 0 in the others, as a sum over all of them does."""
    records = [
        record(output(1, a=1.0, b=4.0), output(3, a=3.0, b=8.0)),
        record(output(1, a=1.0), output(3, a=3.0, b=8.0), norm=2.0),
    ]
    accelerator = make_accelerator(TrainingConfig())
    first, second = read_values(records, [{}, {"pictures": 7.0}], accelerator)
    assert first == {"a": 2.0, "b": 6.0, "grad_norm": 1.0, "lr": 0.5}
    assert second == {"a": 2.0, "b": 4.0, "grad_norm": 2.0, "pictures": 7.0, "lr": 0.5}


def test_deviation_comes_from_two_moments() -> None:
    accelerator = make_accelerator(TrainingConfig())
    (values,) = read_values([record(output(1, z_mean=3.0, z_square=25.0))], [{}], accelerator)
    assert values["z_std"] == pytest.approx(4.0)
    assert "z_square" not in values


def test_verdicts_are_told_apart() -> None:
    nan = float("nan")
    records = [record(output(1), output(nan)), record(output(1), norm=float("inf")), record(output(1))]
    assert read_verdicts(records) == [Verdict((True, False), True), Verdict((True,), False), Verdict((True,), True)]
