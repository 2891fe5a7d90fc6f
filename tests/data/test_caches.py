from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from diffalign.data import (
    DataConfig,
    EncodedPairs,
    RunPairs,
    check_finished,
    encode_pairs,
    find_encoded,
    load_pairs,
)
from diffalign.data.caches import cache_key, fingerprint
from diffalign.data.media import Preparation


@pytest.fixture
def config(helpers: Any, tmp_path: Path) -> DataConfig:
    folder = tmp_path / "raw"
    folder.mkdir()
    for number in range(4):
        helpers.picture(number).save(folder / f"{number}.png")
    rows = [{"prompt": f"p{i}", "chosen": f"{2 * i}.png", "rejected": f"{2 * i + 1}.png"} for i in range(2)]
    (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(train_data_dir=folder)


def encode(config: DataConfig, encoder: Any, root: Path, **options: Any) -> EncodedPairs:
    return encode_pairs(load_pairs(config, **options), encoder, config, root)


def test_a_finished_cache_is_found_without_the_data(config: DataConfig, encoder: Any, tmp_path: Path) -> None:
    made = encode(config, encoder, tmp_path / "cache")
    shutil.rmtree(tmp_path / "raw")
    calls = encoder.calls
    trusting = config.model_copy(update={"check_source": False})
    found = find_encoded(encoder, trusting, tmp_path / "cache")
    assert (found.folder, found.ids, found.report) == (made.folder, made.ids, made.report)
    assert encoder.calls == calls
    # what leads to the same cache however it is set
    for change in ({"encode_batch_size": 2}, {"resolution": 32}, {"max_corrupt_fraction": 0.5}, {"streaming": True}):
        assert find_encoded(encoder, trusting.model_copy(update=change), tmp_path / "cache").folder == made.folder


@pytest.mark.parametrize(
    "change", [{"random_flip": True}, {"cache": "sample"}, {"max_train_samples": 1}, {"resolution": 16}, None]
)
def test_another_cache_is_not_taken(
    config: DataConfig, encoder: Any, tmp_path: Path, change: dict[str, Any] | None
) -> None:
    made = encode(config, encoder, tmp_path / "cache")
    if change is None:
        encoder.encoder_fingerprint = lambda: "another"
    other = config.model_copy(update=change or {})
    with pytest.raises(ValueError, match=r"check_source is false, and no finished cache in .* with this model"):
        find_encoded(encoder, other, tmp_path / "cache")
    if change is None:
        with pytest.raises(ValueError, match="no finished cache"):
            find_encoded(encoder, config, tmp_path / "cache", winners_only=True)
        del encoder.encoder_fingerprint
        (made.folder / "manifest.json").unlink()  # as while it is encoded again
        with pytest.raises(ValueError, match=r"no finished cache in .* was made from these data"):
            find_encoded(encoder, config, tmp_path / "cache")


def test_winners_have_a_cache_of_their_own(config: DataConfig, encoder: Any, tmp_path: Path) -> None:
    both, winners = (encode(config, encoder, tmp_path / "cache", winners_only=only) for only in (False, True))
    assert both.folder != winners.folder
    assert find_encoded(encoder, config, tmp_path / "cache").folder == both.folder
    assert find_encoded(encoder, config, tmp_path / "cache", winners_only=True).folder == winners.folder


def test_of_data_that_changed_the_latest_cache_is_found(
    config: DataConfig, helpers: Any, encoder: Any, tmp_path: Path
) -> None:
    old = encode(config, encoder, tmp_path / "cache")
    helpers.picture(9).save(tmp_path / "raw" / "3.png")
    new = encode(config, encoder, tmp_path / "cache")
    assert new.folder != old.folder
    assert find_encoded(encoder, config, tmp_path / "cache").folder == new.folder
    helpers.picture(3).save(tmp_path / "raw" / "3.png")
    assert encode(config, encoder, tmp_path / "cache").folder == old.folder
    assert find_encoded(encoder, config, tmp_path / "cache").folder == old.folder


def test_without_any_finished_cache_a_run_stops_before_its_model_loads(
    config: DataConfig, encoder: Any, tmp_path: Path
) -> None:
    for root in (tmp_path / "nothing", tmp_path):
        with pytest.raises(ValueError, match=r"check_source is false, and .* holds no finished cache; train once"):
            check_finished(root)
    encode(config, encoder, tmp_path / "cache")
    check_finished(tmp_path / "cache")


@pytest.mark.slow
def test_a_run_opens_its_pairs_step_by_step(config: DataConfig, encoder: Any, tmp_path: Path) -> None:
    """In the run's folder or in a named one; the second time without the data, if nobody wants to look at them."""
    with pytest.raises(ValueError, match="holds no finished cache"):
        RunPairs(config.model_copy(update={"check_source": False}), tmp_path / "run")
    with pytest.raises(ValueError, match="is no folder; check the path"):
        RunPairs(config.model_copy(update={"train_data_dir": tmp_path / "nowhere"}), tmp_path / "run")
    pairs = RunPairs(config, tmp_path / "run")
    with pytest.raises(ValueError, match="is of still images, and the model draws videos"):
        pairs.read(Clips())
    pairs.read(encoder)
    made = pairs.encoded(encoder)
    assert made.folder.parent == tmp_path / "run" / "cache"
    assert len(made) == 2
    winners = RunPairs(config, tmp_path / "run", winners_only=True)
    winners.read(encoder)
    assert winners.encoded(encoder).folder != made.folder
    shutil.rmtree(tmp_path / "raw")
    trusting = config.model_copy(update={"check_source": False, "encoded_dir": tmp_path / "run" / "cache"})
    for known, winners_only in ((made, False), (winners.encoded(encoder), True)):
        again = RunPairs(trusting, tmp_path / "elsewhere", winners_only=winners_only)
        again.read(encoder)
        assert again.encoded(encoder).folder == known.folder


class Clips:
    is_video = True


def test_caches_keep_their_names(encoder: Any) -> None:
    """The name that a cache of these settings has always had: another one would mean encoding it again."""
    config = DataConfig(dataset_name="in memory")
    key = {**cache_key(encoder, config, Preparation(config, encoder)), "data": "abc"}
    plain = (
        '{"cache": "moments", "cache_dtype": "float32", "crop": "center", "data": "abc", "encoder": "tiny", '
        '"shard_size": 256, "size": [32, 32], "transform": 1, "version": 2, "views": 1}'
    )
    assert fingerprint(key) == hashlib.blake2b(plain.encode(), digest_size=16).hexdigest()
