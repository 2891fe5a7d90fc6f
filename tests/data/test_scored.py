"""Single images with rewards, and pairs with a verdict for each dimension: from rows to the encoded cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffalign.config import ConfigError, RunConfig
from diffalign.configured import data_config
from diffalign.data import DataConfig, check_source, encode_pairs, load_pairs


def write(folder: Path, rows: list[dict[str, Any]], **config: Any) -> DataConfig:
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (32, 32), (60 * i, 0, 0)).save(folder / f"{i}.png")
    (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(train_data_dir=folder, resolution=32, **config)


def samples(*rewards: Any) -> list[dict[str, Any]]:
    return [{"prompt": "a star", "image": f"{i}.png", "VQ": r, "TA": -1} for i, r in enumerate(rewards)]


def test_rows_without_a_finite_reward_are_dropped_and_counted(tmp_path: Path) -> None:
    config = write(tmp_path / "a", samples(1.5, None, float("nan"), 2), format="scored", reward_columns=("VQ", "TA"))
    assert check_source(config) == "scored"
    found = load_pairs(config)
    assert [(pair.pair_id, pair.rewards) for pair in found] == [("0", (1.5, -1.0)), ("3", (2.0, -1.0))]
    assert found.winners_only
    assert all(pair.rejected is pair.chosen for pair in found)
    assert (found.report.kept, found.report.unlabelled) == (2, 2)


def test_defaults_and_clips(tmp_path: Path) -> None:
    rows = [{"prompt": "a star", "video": "0.png", "reward": 3}]
    config = write(tmp_path / "a", rows, format="scored")
    assert [pair.rewards for pair in load_pairs(config)] == [(3.0,)]
    assert next(iter(load_pairs(config))).chosen.data == tmp_path / "a" / "0.png"


@pytest.mark.parametrize(
    ("config", "rewards", "message"),
    [
        ({"format": "scored"}, (1.0,), "expected prompt, image, reward .scored.; name yours with caption_column"),
        ({"format": "scored", "reward_columns": ("VQ",)}, ("good",), "VQ of row 0 is 'good'; expected a number"),
        ({"format": "scored", "reward_columns": ("VQ",)}, (None,), "no usable pair in .*without label or prompt"),
    ],
)
def test_what_is_no_reward(tmp_path: Path, config: dict[str, Any], rewards: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_pairs(write(tmp_path / "a", samples(*rewards), **config))


def test_the_cache_keeps_rewards_and_each_image_once(tmp_path: Path, encoder: Any) -> None:
    config = write(tmp_path / "a", samples(1.5, 0.1, 2, 7), format="scored", reward_columns=("VQ", "TA"))
    encoded = encode_pairs(load_pairs(config), encoder, config, tmp_path / "cache")
    assert encoded.winners_only
    assert encoded.rewards([3, 0]).tolist() == [[7.0, -1.0], [1.5, -1.0]]
    chosen, rejected = encoded.moments([0, 1])
    assert torch.equal(chosen.mean, rejected.mean)
    other = write(tmp_path / "b", samples(1.5, 0.1, 2, 8), format="scored", reward_columns=("VQ", "TA"))
    assert load_pairs(other).fingerprint != load_pairs(config).fingerprint


def test_pairs_with_a_verdict_for_each_dimension(tmp_path: Path, encoder: Any) -> None:
    rows = [{"prompt": "a star", "chosen": "0.png", "rejected": "1.png", "VQ": 1, "TA": ta} for ta in (0, -2.5)]
    config = write(tmp_path / "a", rows, reward_columns=("VQ", "TA"))
    encoded = encode_pairs(load_pairs(config), encoder, config, tmp_path / "cache")
    assert encoded.rewards(range(2)).tolist() == [[1.0, 0.0], [1.0, -2.5]]
    plain = config.model_copy(update={"reward_columns": ()})
    without = encode_pairs(load_pairs(plain), encoder, plain, tmp_path / "cache")
    assert without.rewards(range(2)).shape == (2, 0)


def test_methods_get_the_kind_of_data_they_learn_from(tmp_path: Path) -> None:
    def run(**data: Any) -> RunConfig:
        section = {"train_data_dir": str(tmp_path), **data}
        model = {"pretrained_model_name_or_path": "somewhere"}
        return RunConfig.model_validate({"output_dir": str(tmp_path), "model": model, "data": section})

    assert data_config(run(), scored=True).format == "scored"
    assert data_config(run()).format == "auto"
    with pytest.raises(ConfigError, match=r"data\.format is 'scored', and this method learns from pairs"):
        data_config(run(format="scored"))
    with pytest.raises(ConfigError, match=r"data\.format is 'folder', and this method learns from single images"):
        data_config(run(format="folder"), scored=True)
