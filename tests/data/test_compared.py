"""Readers of comparisons: what becomes of a row in each published format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffalign.data.compared import Comparison, ComparisonList, ComparisonsConfig, load_comparisons
from diffalign.data.images import ImageSource


def write(folder: Path, rows: list[dict[str, Any]], name: str = "index.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(rows))
    return folder


def read(folder: Path, rows: list[dict[str, Any]], **options: Any) -> ComparisonList:
    return load_comparisons(ComparisonsConfig(train_data_dir=write(folder, rows), index="index.json", **options))


def brief(found: ComparisonList) -> list[tuple[str, str, str, str, float]]:
    return [
        (c.pair_id, c.prompt, Path(str(c.first.data)).name, Path(str(c.second.data)).name, c.preference)
        for c in found.items
    ]


def test_hpdv2(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "file_path": ["1.jpg", "2.jpg"], "human_preference": [0, 1]},
        {"prompt": "b", "file_path": ["3.jpg", "4.jpg"], "human_preference": [3, 1]},
    ]
    found = read(tmp_path, rows, image_dir=tmp_path / "train")
    assert brief(found) == [("0", "a", "1.jpg", "2.jpg", 0.0), ("1", "b", "3.jpg", "4.jpg", 0.75)]
    assert found[0].first.data == tmp_path / "train" / "1.jpg"
    with pytest.raises(ValueError, match=r"row 0 has 2 files and votes \[0, 0\]"):
        read(tmp_path, [{**rows[0], "human_preference": [0, 0]}])


@pytest.mark.parametrize(("files", "ranks"), [("image_path", "rank"), ("generations", "ranking")])
def test_rankings_become_all_pairs_of_different_ranks(files: str, ranks: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a", files: ["1.jpg", "2.jpg", "3.jpg"], ranks: [2, 1, 2]},
        {"prompt": "b", files: ["4.jpg", "5.jpg"], ranks: [1, 1]},
    ]
    found = read(tmp_path, rows)
    assert brief(found) == [("0/0", "a", "2.jpg", "1.jpg", 1.0), ("0/1", "a", "2.jpg", "3.jpg", 1.0)]
    assert found.left_out == {"no preference": 1}
    with pytest.raises(ValueError, match=f"row 0 has 3 {files} and 1 {ranks}"):
        read(tmp_path, [{**rows[0], ranks: [1]}])


def test_hpdv3_by_confidence_and_our_own_pairs(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "path1": "1.jpg", "path2": "2.jpg", "confidence": 0.99},
        {"prompt": "b", "path1": "3.jpg", "path2": "4.jpg", "confidence": 0.6},
    ]
    assert len(read(tmp_path / "all", rows)) == 2
    kept = read(tmp_path / "sure", rows, min_confidence=0.95)
    assert brief(kept) == [("0", "a", "1.jpg", "2.jpg", 1.0)]
    own = [{"id": "x", "prompt": "a", "chosen": "1.png", "rejected": "2.png", "who": "ann", "what": "aesthetics"}]
    found = read(tmp_path / "own", own, person_column="who", condition_column="what")
    assert brief(found) == [("x", "a", "1.png", "2.png", 1.0)]
    assert (found[0].person, found[0].condition) == ("ann", "aesthetics")


def test_pickapic_keeps_its_ties(tmp_path: Path) -> None:
    import datasets

    pictures = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(8)]
    table = {
        "caption": ["a", "b", "c", "d"], "jpg_0": pictures[:4], "jpg_1": pictures[4:], "label_0": [1.0, 0.5, 0.0, 1.0],
        "has_label": [True, True, True, False],
    }  # fmt: skip
    data = (
        datasets.Dataset.from_dict(table).cast_column("jpg_0", datasets.Image()).cast_column("jpg_1", datasets.Image())
    )
    data.to_parquet(str(tmp_path / "train.parquet"))
    config = ComparisonsConfig(dataset_name=str(tmp_path / "train.parquet"), cache_dir=tmp_path / "cache")
    found = load_comparisons(config)
    assert [(c.prompt, c.preference) for c in found.items] == [("a", 1.0), ("b", 0.5), ("c", 0.0)]
    assert found[2].first.data is None  # not read with the labels
    assert found[2].first.decode().getpixel((0, 0)) == (2, 0, 0)
    assert found[2].second.digest() != found[2].first.digest()
    assert found.left_out == {"no preference": 1}
    without = load_comparisons(config.model_copy(update={"ties": False}))
    assert without.left_out == {"ties": 1, "no preference": 1}


def test_what_cannot_be_read(tmp_path: Path) -> None:
    row = {"prompt": "a", "chosen": "1.png", "rejected": "2.png"}
    with pytest.raises(
        ValueError, match=r"columns prompt, picture; expected one of: caption, jpg_0, .*chosen, rejected"
    ):
        read(tmp_path, [{"prompt": "a", "picture": "1.png"}])
    with pytest.raises(ValueError, match="has no column 'who'"):
        read(tmp_path, [row], person_column="who")
    with pytest.raises(ValueError, match="outside of"):
        read(tmp_path, [{**row, "chosen": "../1.png"}])
    with pytest.raises(ValueError, match=r"no usable comparison in .*: \{'no preference': 1\}"):
        read(tmp_path, [{**row, "prompt": None}])
    with pytest.raises(ValueError, match="needs dataset_name or train_data_dir, found neither"):
        ComparisonsConfig()


def test_held_out_comparisons_share_no_prompt() -> None:
    source = ImageSource(None)
    items = [
        Comparison(str(i), f"Prompt  {i % 5}" if i % 2 else f"prompt {i % 5}", source, source, 1.0) for i in range(20)
    ]
    train, held_out = ComparisonList(items, "test").split(4, seed=1)
    prompts = [{" ".join(c.prompt.split()).casefold() for c in part.items} for part in (train, held_out)]
    assert not prompts[0] & prompts[1]
    assert len(held_out) == 4
    assert len(train) == 16
    with pytest.raises(ValueError, match="holding out 20 of 20 comparisons .* leaves none to train on"):
        ComparisonList(items, "test").split(20, seed=1)
