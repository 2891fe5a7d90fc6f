"""`data.check_source: false`: a run that takes the finished cache and never looks at the data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from diffalign.config import RunConfig
from diffalign.training import train_config


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["train/loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_goes_without_the_data_that_were_encoded(tiny_pipeline: Path, pair_folder: Path, tmp_path: Path) -> None:
    data = shutil.copytree(pair_folder, tmp_path / "data")

    def train(name: str, **changes: Any) -> Path:
        config = {
            "output_dir": str(tmp_path / name),
            "model": {"pretrained_model_name_or_path": str(tiny_pipeline), "lora": {"rank": 2}},
            "data": {"train_data_dir": str(data), "encoded_dir": str(tmp_path / "cache"), **changes},
            "training": {"max_train_steps": 2, "per_device_train_batch_size": 2, "num_validation_pairs": 2},
        }
        return train_config(RunConfig.model_validate(config))

    with pytest.raises(ValueError, match="check_source is false, and .* holds no finished cache"):
        train("early", check_source=False)
    first = train("first")
    shutil.rmtree(data)
    with pytest.raises(ValueError, match="is no folder"):
        train("second")
    second = train("second", check_source=False)
    assert losses(second) == losses(first)
    with pytest.raises(ValueError, match="no finished cache in .* was made from these data"):
        train("third", check_source=False, random_flip=True)
