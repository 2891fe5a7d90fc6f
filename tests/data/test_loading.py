from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from diffalign.data import DataConfig, Pair, PairList, PairSet, check_source, load_pairs

LABELS = (0.0, 1.0, 0.5, None, 1.0, 0.5, 0.0)


def write_parquet(folder: Path, columns: dict[str, Any], files: int = 1) -> DataConfig:
    folder.mkdir(parents=True, exist_ok=True)
    data = datasets.Dataset.from_dict(columns)
    for number in range(files):
        data.shard(files, number, contiguous=True).to_parquet(folder / f"train-{number}.parquet")
    return DataConfig(dataset_name=str(folder))


def contents(pairs: PairSet) -> list[tuple[str, str, bytes, bytes, float]]:
    return [(p.pair_id, p.prompt, p.chosen.read(), p.rejected.read(), p.weight) for p in pairs]


def with_images(columns: dict[str, Any], names: Sequence[str]) -> datasets.Dataset:
    data = datasets.Dataset.from_dict(columns)
    for name in names:
        data = data.cast_column(name, datasets.Image())
    return data


@pytest.mark.parametrize("streaming", [False, True])
def test_pick_a_pic_keeps_labels_0_and_1_and_turns_them_the_right_way(
    helpers: Any, tmp_path: Path, streaming: bool
) -> None:
    columns = helpers.pickapic_rows([0, 1, 0.5])
    config = write_parquet(tmp_path / "data", columns).model_copy(update={"streaming": streaming})
    pairs = load_pairs(config)
    first, second = contents(pairs)
    assert first == ("0", "prompt 0", columns["jpg_1"][0], columns["jpg_0"][0], 1.0)
    assert second == ("1", "prompt 1", columns["jpg_0"][1], columns["jpg_1"][1], 1.0)
    assert (pairs.report.rows, pairs.report.ties, pairs.report.kept) == (3, 1, 2)


def test_swapped_labels_swap_the_pair(helpers: Any, tmp_path: Path) -> None:
    columns = helpers.pickapic_rows([0, 1])
    swapped = {**columns, "label_0": [1, 0]}
    plain, other = (load_pairs(write_parquet(tmp_path / n, c)) for n, c in (("a", columns), ("b", swapped)))
    for a, b in zip(contents(plain), contents(other), strict=True):
        assert (a[2], a[3]) == (b[3], b[2])


def test_rows_without_label_or_prompt_are_dropped_and_counted(helpers: Any, tmp_path: Path) -> None:
    columns = helpers.pickapic_rows([1, 1, None, float("nan"), 0, 1])
    columns["has_label"] = [True, False, True, True, True, True]
    columns["are_different"] = [True, True, True, True, False, True]
    columns["caption"][5] = None
    config = write_parquet(tmp_path / "data", columns)
    pairs = load_pairs(config)
    assert [pair.pair_id for pair in pairs] == ["0", "4"]
    assert (pairs.report.unlabelled, pairs.report.identical, pairs.report.rows) == (4, 0, 6)
    different = load_pairs(config.model_copy(update={"drop_identical": True}))
    assert [pair.pair_id for pair in different] == ["0"]
    assert different.report.identical == 1
    assert different.fingerprint != pairs.fingerprint


def test_the_image_feature_is_read_undecoded(helpers: Any, tmp_path: Path) -> None:
    columns = helpers.pickapic_rows([1, 0])
    columns["jpg_0"][1] = b"not an image: decoding it would fail"
    with_images(columns, ["jpg_0", "jpg_1"]).to_parquet(tmp_path / "rows.parquet")
    for streaming in (False, True):
        pairs = load_pairs(DataConfig(dataset_name=str(tmp_path / "rows.parquet"), streaming=streaming))
        assert [p.chosen.read() for p in pairs] == [columns["jpg_0"][0], columns["jpg_1"][1]]


@pytest.mark.parametrize("limit", [None, 2])
def test_a_stream_equals_the_whole_data_set(helpers: Any, tmp_path: Path, limit: int | None) -> None:
    config = write_parquet(tmp_path / "data", helpers.pickapic_rows(LABELS), files=3)
    config = config.model_copy(update={"max_train_samples": limit})
    whole, stream = load_pairs(config), load_pairs(config.model_copy(update={"streaming": True}))
    assert contents(whole) == contents(stream)
    assert len(contents(whole)) == (limit or 4)
    assert whole.report == stream.report
    assert whole.fingerprint == stream.fingerprint
    assert (whole.size, stream.size) == (limit or 4, None)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_reader_goes_on_from_any_state(helpers: Any, tmp_path: Path, streaming: bool) -> None:
    config = write_parquet(tmp_path / "data", helpers.pickapic_rows(LABELS), files=2)
    pairs = load_pairs(config.model_copy(update={"streaming": streaming}))
    expected = [pair.pair_id for pair in pairs]
    for taken in range(1, len(expected) + 1):
        reader = pairs.reader()
        read = [pair.pair_id for pair in itertools.islice(reader, taken)]
        state = json.loads(json.dumps(reader.state()))
        rest = pairs.reader(state)
        assert read + [pair.pair_id for pair in rest] == expected
        assert rest.report == load_pairs(config).report
    assert [pair.pair_id for pair in pairs] == expected


def test_prompt_chosen_rejected_with_weight_and_id(helpers: Any, tmp_path: Path) -> None:
    a, b = (helpers.encoded(helpers.picture(i)) for i in (0, 1))
    columns = {"prompt": ["x", "y"], "chosen": [a, b], "rejected": [b, a], "weight": [0.5, 2], "id": [7, 9]}
    config = write_parquet(tmp_path / "data", columns)
    assert check_source(config) == "chosen_rejected"
    assert contents(load_pairs(config)) == [("7", "x", a, b, 0.5), ("9", "y", b, a, 2.0)]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_data_set_saved_to_disk(helpers: Any, tmp_path: Path, split: str) -> None:
    data = datasets.Dataset.from_dict(helpers.pickapic_rows([1, 0]))
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": data}).save_to_disk(tmp_path / "many")
    assert len(contents(load_pairs(DataConfig(train_data_dir=tmp_path / "one", split=split)))) == 2
    many = DataConfig(dataset_name=str(tmp_path / "many"), split=split, streaming=True)
    if split == "test":
        assert [p.pair_id for p in load_pairs(many)] == ["0", "1"]
    else:
        with pytest.raises(ValueError, match=r"no split 'train'.*it has test"):
            load_pairs(many)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_image_folder_with_metadata(helpers: Any, tmp_path: Path, streaming: bool) -> None:
    for i in range(3):
        helpers.picture(i).save(tmp_path / f"{i}.png")
    rows = [{"prompt": f"p{i}", "chosen_file_name": f"{i}.png", "rejected_file_name": f"{i + 1}.png"} for i in (0, 1)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = list(load_pairs(DataConfig(train_data_dir=tmp_path, streaming=streaming)))
    assert [p.prompt for p in pairs] == ["p0", "p1"]
    assert pairs[1].rejected.decode().tobytes() == helpers.picture(2).tobytes()


def write_folder(helpers: Any, folder: Path, rows: Sequence[dict[str, Any]], index: str = "index.jsonl") -> DataConfig:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(4):
        helpers.picture(i).save(folder / f"{i}.png")
    if index.endswith(".parquet"):
        datasets.Dataset.from_list(list(rows)).to_parquet(folder / index)
    elif index.endswith(".json"):
        (folder / index).write_text(json.dumps(rows))
    else:
        (folder / index).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(train_data_dir=folder)


ROWS = (
    {"prompt": "a", "chosen": "0.png", "rejected": "1.png", "id": "one", "weight": 3},
    {"prompt": "b", "chosen": "2.png", "rejected": "3.png", "id": "two", "weight": 1},
)


@pytest.mark.parametrize("index", ["index.jsonl", "index.parquet", "rows.jsonl", "rows.json"])
def test_a_folder_with_an_index(helpers: Any, tmp_path: Path, index: str) -> None:
    config = write_folder(helpers, tmp_path, ROWS, index)
    if not index.startswith("index"):
        config = config.model_copy(update={"index": index})
    pairs = load_pairs(config)
    assert [(p.pair_id, p.prompt, p.weight) for p in pairs] == [("one", "a", 3.0), ("two", "b", 1.0)]
    assert next(iter(pairs)).rejected.decode().tobytes() == helpers.picture(1).tobytes()
    if "json" in index:
        assert contents(load_pairs(DataConfig(dataset_name=str(tmp_path / index)))) == contents(pairs)


def test_the_folder_fingerprint_follows_content_not_place(helpers: Any, tmp_path: Path) -> None:
    here = load_pairs(write_folder(helpers, tmp_path / "here", ROWS))
    there = load_pairs(write_folder(helpers, tmp_path / "there", ROWS))
    assert here.fingerprint == there.fingerprint
    helpers.picture(9).save(tmp_path / "there" / "3.png")
    assert load_pairs(DataConfig(train_data_dir=tmp_path / "there")).fingerprint != here.fingerprint


def test_a_torn_last_line_is_left_out(helpers: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = write_folder(helpers, tmp_path, ROWS)
    index = tmp_path / "index.jsonl"
    index.write_bytes(index.read_bytes() + '{"prompt": "ü'.encode()[:-1])
    assert [p.pair_id for p in load_pairs(config)] == ["one", "two"]
    assert "line (3) is incomplete" in caplog.text
    index.write_text('{"prompt": \n' + json.dumps(ROWS[0]) + "\n")
    with pytest.raises(ValueError, match=r"line 1 of .* is no JSON"):
        load_pairs(config)


def test_an_index_cannot_name_files_outside(helpers: Any, tmp_path: Path) -> None:
    config = write_folder(helpers, tmp_path / "data", [{**ROWS[0], "chosen": "../secret.png"}])
    for function in (check_source, load_pairs):
        with pytest.raises(ValueError, match="outside of"):
            function(config)


@pytest.mark.parametrize("function", [check_source, load_pairs])
@pytest.mark.parametrize("streaming", [False, True])
class TestBadSources:
    def test_missing_columns(self, helpers: Any, tmp_path: Path, function: Any, streaming: bool) -> None:
        columns = helpers.pickapic_rows([1])
        columns["text"] = columns.pop("caption")
        config = write_parquet(tmp_path / "data", columns).model_copy(update={"streaming": streaming})
        with pytest.raises(ValueError, match=r"columns jpg_0, jpg_1, label_0, text; expected .* or .*caption_column"):
            function(config)
        function(config.model_copy(update={"caption_column": "text"}))
        with pytest.raises(ValueError, match=r"expected prompt, chosen, rejected \(chosen_rejected\); name"):
            function(config.model_copy(update={"format": "chosen_rejected"}))

    def test_all_ties(self, helpers: Any, tmp_path: Path, function: Any, streaming: bool) -> None:
        config = write_parquet(tmp_path / "data", helpers.pickapic_rows([0.5] * 3))
        with pytest.raises(ValueError, match=r"no usable pair in .*: every row is a tie"):
            function(config.model_copy(update={"streaming": streaming}))

    def test_a_label_that_means_nothing(self, helpers: Any, tmp_path: Path, function: Any, streaming: bool) -> None:
        config = write_parquet(tmp_path / "data", helpers.pickapic_rows([1, 0.3]))
        with pytest.raises(ValueError, match=r"label_0 of row 1 is 0\.3; expected 0, 0\.5 or 1"):
            function(config.model_copy(update={"streaming": streaming}))

    def test_no_such_data_set(self, tmp_path: Path, function: Any, streaming: bool) -> None:
        with pytest.raises(ValueError, match="cannot open data set 'nobody/nothing'"):
            function(DataConfig(dataset_name="nobody/nothing", streaming=streaming))
        with pytest.raises(ValueError, match="is no folder"):
            function(DataConfig(train_data_dir=tmp_path / "nothing", streaming=streaming))

    def test_no_such_split(self, helpers: Any, tmp_path: Path, function: Any, streaming: bool) -> None:
        config = write_parquet(tmp_path / "data", helpers.pickapic_rows([1]))
        with pytest.raises(ValueError, match="split 'validation'"):
            function(config.model_copy(update={"split": "validation", "streaming": streaming}))

    def test_file_names_where_images_belong(self, tmp_path: Path, function: Any, streaming: bool) -> None:
        columns = {"prompt": ["a"], "chosen": ["/etc/hostname"], "rejected": ["b.png"]}
        config = write_parquet(tmp_path / "data", columns)
        with pytest.raises(ValueError, match="set train_data_dir to their folder"):
            function(config.model_copy(update={"streaming": streaming}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": -1}, "weight of row 1 is -1; expected a finite number"),
        ({"weight": None}, "weight of row 1 is None"),
        ({"id": "one"}, "two pairs with the id 'one'"),
        ({"id": None}, "row 1 has no 'id'"),
    ],
)
def test_bad_rows_of_a_folder(helpers: Any, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    config = write_folder(helpers, tmp_path, [ROWS[0], {**ROWS[1], **change}])
    with pytest.raises(ValueError, match=message):
        list(load_pairs(config))


def test_the_fingerprint_of_a_data_set_changes_with_its_files(helpers: Any, tmp_path: Path) -> None:
    config = write_parquet(tmp_path / "data", helpers.pickapic_rows([1, 0]))
    before = load_pairs(config).fingerprint
    assert load_pairs(config).fingerprint == before
    write_parquet(tmp_path / "data", helpers.pickapic_rows([1, 0, 1]))
    assert load_pairs(config).fingerprint != before


def test_a_list_of_pairs(helpers: Any) -> None:
    pairs: list[Pair] = helpers.make_pairs(3)
    assert list(PairList(pairs)) == pairs
    assert PairList(pairs).fingerprint == PairList(helpers.make_pairs(3)).fingerprint
    assert PairList(pairs).fingerprint != PairList(pairs[::-1]).fingerprint
    with pytest.raises(ValueError, match="two pairs with the id 'p0'"):
        PairList([pairs[0], pairs[0]])
    with pytest.raises(ValueError, match="is empty"):
        PairList([])
