"""Winners alone: no rejected image is needed, read, encoded or kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor

from diffalign.batches import Moments
from diffalign.data import DataConfig, PairSource, check_source, encode_pairs, load_pairs


@pytest.fixture
def folder(helpers: Any, tmp_path: Path) -> Path:
    """Five chosen images with an index that knows of no others."""
    folder = tmp_path / "winners"
    folder.mkdir()
    rows = []
    for number in range(5):
        helpers.picture(number).save(folder / f"{number}.png")
        rows.append({"id": f"w{number}", "prompt": f"a star {number % 2}", "chosen": f"{number}.png", "weight": number})
    (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def parquet(path: Path, columns: dict[str, Any]) -> DataConfig:
    path.mkdir()
    datasets.Dataset.from_dict(columns).to_parquet(path / "train.parquet")
    return DataConfig(dataset_name=str(path))


def test_a_folder_of_winners(folder: Path) -> None:
    config = DataConfig(train_data_dir=folder)
    assert check_source(config, winners_only=True) == "chosen_rejected"
    pairs = load_pairs(config, winners_only=True)
    assert pairs.winners_only
    assert [(p.pair_id, p.prompt, p.weight) for p in pairs][:2] == [("w0", "a star 0", 0.0), ("w1", "a star 1", 1.0)]
    assert all(pair.rejected is pair.chosen for pair in pairs)
    for function in (check_source, load_pairs):
        with pytest.raises(ValueError, match=r"columns id, prompt, chosen, weight; expected prompt, chosen, rejected"):
            function(config)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_of_winners_and_one_without(helpers: Any, tmp_path: Path, streaming: bool) -> None:
    columns = {"prompt": ["a", "b"], "chosen": [helpers.encoded(helpers.picture(i)) for i in (0, 1)]}
    config = parquet(tmp_path / "winners", columns).model_copy(update={"streaming": streaming})
    pairs = load_pairs(config, winners_only=True)
    assert [pair.chosen.read() for pair in pairs] == columns["chosen"]
    assert not load_pairs(parquet(tmp_path / "pairs", {**columns, "rejected": columns["chosen"]})).winners_only

    losers = parquet(tmp_path / "losers", {"prompt": ["a", "b"], "rejected": columns["chosen"]})
    for function in (check_source, load_pairs):
        with pytest.raises(
            ValueError, match=r"columns prompt, rejected; expected .*prompt, chosen \(chosen_rej"
        ) as error:
            function(losers.model_copy(update={"streaming": streaming}), winners_only=True)
        assert "\n" not in str(error.value)
        assert "rejected_column" not in str(error.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_pick_a_pic_gives_its_winners_and_drops_ties(helpers: Any, tmp_path: Path, streaming: bool) -> None:
    columns = helpers.pickapic_rows([0, 1, 0.5])
    config = parquet(tmp_path / "data", columns).model_copy(update={"streaming": streaming})
    pairs = load_pairs(config, winners_only=True)
    assert [pair.chosen.read() for pair in pairs] == [columns["jpg_1"][0], columns["jpg_0"][1]]
    assert all(pair.rejected is pair.chosen for pair in pairs)
    assert pairs.report.ties == 1
    assert pairs.fingerprint != load_pairs(config).fingerprint


def test_a_winner_is_encoded_once_and_the_rejected_image_never(
    helpers: Any, encoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rejected ones are damaged: whoever reads them notices."""
    columns = helpers.pickapic_rows([1, 1, 1])
    config = parquet(tmp_path / "data", {**columns, "jpg_1": [b"damaged"] * 3})
    seen: list[int] = []
    encode = encoder.encode

    def counting(images: Tensor) -> Moments:
        seen.append(len(images))
        moments: Moments = encode(images)
        return moments

    monkeypatch.setattr(encoder, "encode", counting)
    winners = encode_pairs(load_pairs(config, winners_only=True), encoder, config, tmp_path / "cache")
    assert sum(seen) == 3
    assert winners.winners_only
    assert winners.report.corrupt == ()
    chosen, rejected = winners.moments([2, 0])
    assert rejected is chosen
    with pytest.raises(ValueError, match="3 of 3 pairs of .* have an unreadable image"):
        encode_pairs(load_pairs(config), encoder, config, tmp_path / "cache")


@pytest.mark.parametrize("options", [{}, {"random_flip": True}, {"cache": "sample"}])
def test_winners_have_a_cache_of_their_own(helpers: Any, encoder: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    """The same numbers as the chosen half of the pairs, under another key, in half of the space."""
    config = parquet(tmp_path / "data", helpers.pickapic_rows([1, 0, 1])).model_copy(update=options)
    both = encode_pairs(load_pairs(config), encoder, config, tmp_path / "cache")
    winners = encode_pairs(load_pairs(config, winners_only=True), encoder, config, tmp_path / "cache")
    assert winners.fingerprint != both.fingerprint
    assert not both.winners_only
    rows, mirrored = [0, 1, 2], [bool(options.get("random_flip"))] * 3
    for ours, theirs in zip(winners.moments(rows, mirrored)[0], both.moments(rows, mirrored)[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # other batches of the autoencoder

    def size(name: str) -> int:
        return sum(path.stat().st_size for path in (tmp_path / "cache" / name).glob("shard-*"))

    assert size(winners.fingerprint) < 0.6 * size(both.fingerprint)


def test_batches_of_winners_have_them_in_both_halves(encoder: Any, folder: Path, tmp_path: Path) -> None:
    config = DataConfig(train_data_dir=folder)
    encoded = encode_pairs(load_pairs(config, winners_only=True), encoder, config, tmp_path / "cache")
    source = PairSource(encoded, seed=0, batch_size=2, prefetch=False)
    batch: Any = source.batch(0, 0)
    chosen: Tensor = batch.chosen
    assert torch.equal(batch.rejected, chosen)
    row = encoded.ids.index(batch.draws[0].pair_id)
    moments = encoded.moments([row])[0]
    assert torch.equal(
        chosen[0], (moments.mean + moments.std * batch.draws[0].normal("posterior/chosen", chosen.shape[1:]))[0]
    )
