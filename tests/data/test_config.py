from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from diffalign.data import DataConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "found neither"),
        ({"dataset_name": "a", "train_data_dir": Path("b")}, "found both"),
        ({"dataset_name": "a", "index": "rows.jsonl"}, "train_data_dir, which is not set"),
        ({"dataset_name": "a", "datset_split": "train"}, "datset_split"),
        ({"dataset_name": "a", "resolution": 0}, "greater than or equal to 8"),
        ({"dataset_name": "a", "resolution": (480, 831)}, "multiple of 8"),
        ({"dataset_name": "a", "fps": 0}, "greater than 0"),
        ({"dataset_name": "a", "max_corrupt_fraction": 1.5}, "less than or equal to 1"),
    ],
)
def test_bad_values_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig(**values)


def test_defaults_of_the_spec() -> None:
    config = DataConfig(dataset_name="yuvalkirstain/pickapic_v2")
    assert (config.center_crop, config.random_flip, config.cache, config.max_corrupt_fraction) == (
        True,
        False,
        "moments",
        0.01,
    )
