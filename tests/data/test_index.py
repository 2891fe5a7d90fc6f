from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from diffalign.data import DataConfig, EncodedPairs, ImageSource, Pair, PairList, PairSource, encode_pairs
from diffalign.data import encoded as encoded_module
from diffalign.data import index as index_module
from diffalign.data.index import INDEX, Texts, open_index, read_header, shard_path
from diffalign.randomness import generator

CONFIG = DataConfig(dataset_name="in memory", encode_batch_size=4, max_corrupt_fraction=0.5)
PROMPTS = ("a red circle", "A  red circle", "two stars", "a blue square", "drei Öfen")
COUNT = 11


@pytest.fixture(scope="module")
def cache(tiny_encoder_class: Any, helpers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of two pairs each, one short of a pair and one empty, since three cannot be read."""
    pairs = helpers.make_pairs(COUNT + 3, PROMPTS)
    for bad in (3, 6, 7):
        pairs[bad] = Pair(f"bad{bad}", pairs[bad].prompt, pairs[bad].chosen, ImageSource(b"broken"))
    root = tmp_path_factory.mktemp("index")
    return encode_pairs(PairList(pairs), tiny_encoder_class(), CONFIG, root, shard_size=2).folder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were opened."""
    names: list[str] = []

    def noting(path: Path, **options: Any) -> Any:
        names.append(Path(path).name)
        return safe_open(path, **options)

    for module in (index_module, encoded_module):
        monkeypatch.setattr(module, "safe_open", noting)
    return names


def headers(folder: Path) -> list[dict[str, Any]]:
    manifest = json.loads((folder / "manifest.json").read_text())
    found = [read_header(shard_path(folder, number)) for number in range(manifest["shards"])]
    return [header for header in found if header is not None]


def test_the_index_says_what_the_headers_say(cache: Path) -> None:
    encoded, shards = EncodedPairs.open(cache), headers(cache)
    assert [len(header["ids"]) for header in shards] == [2, 1, 2, 0, 2, 2, 2]
    assert encoded.ids == [name for header in shards for name in header["ids"]]
    assert encoded.prompts == [prompt for header in shards for prompt in header["prompts"]]
    weights = torch.tensor([weight for header in shards for weight in header["weights"]])
    torch.testing.assert_close(encoded.weights(range(COUNT)), weights, rtol=0, atol=0)
    assert encoded.rewards(range(COUNT)).shape == (COUNT, 0)
    places = [(number, row) for number, header in enumerate(shards) for row in range(len(header["ids"]))]
    rows = [7, 2, 3, 0, 10, 5]
    for read, name in zip(encoded.moments(rows), ("chosen", "rejected"), strict=True):
        for row, mean, std in zip(rows, *read, strict=True):
            with safe_open(shard_path(cache, places[row][0]), framework="pt") as file:
                assert torch.equal(mean, file.get_tensor(f"{name}.mean")[places[row][1], 0])
                assert torch.equal(std, file.get_tensor(f"{name}.std")[places[row][1], 0])


def test_opening_and_reading_take_as_many_files_for_any_number_of_pairs(cache: Path, opened: list[str]) -> None:
    encoded = EncodedPairs.open(cache, check_files=False)
    assert opened == [INDEX]
    source = PairSource(encoded, seed=0, batch_size=1, prefetch=False)
    assert opened == [INDEX]
    source.batch(0, 0)
    assert sorted(name.split("-")[0] for name in opened[1:]) == ["shard", "text"]
    del opened[:]
    EncodedPairs.open(cache)  # looks at the sizes of all files, and opens none of them
    encoded.split(3, seed=0)
    encoded.ids_digest()
    assert opened == [INDEX]


def test_few_files_stay_open(cache: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = EncodedPairs.open(cache).moments(range(COUNT))[0]
    assert len([name for name in opened if name.startswith("shard")]) == 6  # each once
    monkeypatch.setattr(encoded_module, "OPEN_FILES", 2)
    del opened[:]
    few = EncodedPairs.open(cache)
    rows = [0, 10, 4, 0, 10, 4, 0]
    torch.testing.assert_close(few.moments(rows)[0].mean, whole.mean[rows], rtol=0, atol=0)
    assert len(opened) > 1 + 7  # of three files two are open at a time


@pytest.mark.parametrize("loss", ["gone", "cut", "another version", "another cache"])
def test_an_index_that_is_lost_is_made_again(
    cache: Path, loss: str, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, ids = (cache / INDEX).read_bytes(), EncodedPairs.open(cache).ids
    if loss == "gone":  # as in caches that are older than that
        (cache / INDEX).unlink()
    if loss == "cut":
        (cache / INDEX).write_bytes(before[:-9])
    if loss == "another version":
        (cache / INDEX).write_bytes(before.replace(b'version\\": 1', b'version\\": 0'))
    if loss == "another cache":
        (cache / INDEX).write_bytes(before.replace(cache.name.encode(), cache.name[::-1].encode()))
    assert loss == "gone" or (cache / INDEX).read_bytes() != before
    assert EncodedPairs.open(cache).ids == ids
    assert (cache / INDEX).read_bytes() == before
    del opened[:]
    assert EncodedPairs.open(cache).ids == ids
    assert opened == [INDEX]


def test_a_cache_without_index_gets_one_from_the_encoding_too(
    helpers: Any, encoder: Any, tmp_path: Path, opened: list[str]
) -> None:
    pairs = PairList(helpers.make_pairs(3))
    folder = encode_pairs(pairs, encoder, CONFIG, tmp_path).folder
    before = (folder / INDEX).read_bytes()
    (folder / INDEX).unlink()
    assert encode_pairs(pairs, encoder, CONFIG, tmp_path).ids == ["p0", "p1", "p2"]
    assert (folder / INDEX).read_bytes() == before


def test_a_cache_that_cannot_be_written_opens_all_the_same(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before, whole = (cache / INDEX).read_bytes(), EncodedPairs.open(cache)

    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    (cache / INDEX).unlink()
    monkeypatch.setattr(index_module, "write_whole", refuse)
    again = EncodedPairs.open(cache)
    assert (again.ids, again.prompts) == (whole.ids, whole.prompts)
    assert "cannot be written (Read-only file system); all headers are read at every start" in caplog.text
    assert not (cache / INDEX).exists()
    (cache / INDEX).write_bytes(before)


def test_a_file_that_is_damaged_is_named_when_it_is_read(cache: Path) -> None:
    shard = shard_path(cache, 4)
    good = shard.read_bytes()
    for content in (good[:-4], None):
        shard.unlink()
        if content is not None:
            shard.write_bytes(content)
        encoded = EncodedPairs.open(cache, check_files=False)
        encoded.moments([0])
        for read in (lambda found=encoded: found.moments([5]), lambda: EncodedPairs.open(cache)):
            with pytest.raises(ValueError, match=r"shard-000004\.safetensors is missing or damaged; remove .*manifest"):
                read()
    (cache / INDEX).unlink()  # and when the index is made from the headers
    with pytest.raises(ValueError, match=r"shard-000004\.safetensors is missing or damaged"):
        EncodedPairs.open(cache)
    shard.write_bytes(good)
    assert len(EncodedPairs.open(cache)) == COUNT


def by_hand(encoded: EncodedPairs, rows: Sequence[int], holdout: int, seed: int) -> tuple[list[int], list[int]]:
    """The rule of `split`, in the plainest words."""
    groups: dict[str, list[int]] = {}
    for row in rows:
        groups.setdefault(" ".join(encoded.prompts[row].split()).casefold(), []).append(row)
    held: list[int] = []
    for key in sorted(groups, key=lambda p: hashlib.blake2b(f"{seed}\x1f{p}".encode()).digest()):
        if len(held) < holdout:
            held += groups[key]
    return [row for row in rows if row not in held], sorted(held)


def test_a_split_is_the_one_of_its_rule(cache: Path) -> None:
    encoded = EncodedPairs.open(cache)
    for holdout in (0, 1, 3, 5):
        for seed in range(4):
            train, held = by_hand(encoded, range(COUNT), holdout, seed)
            views = encoded.split(holdout, seed)
            assert [view.ids for view in views] == [[encoded.ids[r] for r in rows] for rows in (train, held)]
            if holdout == 1:  # of a view
                again = [encoded.ids[row] for row in by_hand(encoded, train, 2, seed)[1]]
                assert views[0].split(2, seed)[1].ids == again
    with pytest.raises(ValueError, match=r"holding out 11 of 11 pairs \(4 prompts\) leaves none"):
        encoded.split(COUNT, 0)
    with pytest.raises(ValueError, match="must be >= 0"):
        encoded.split(-1, 0)


def test_rows_of_views(cache: Path) -> None:
    encoded = EncodedPairs.open(cache)
    train, held = encoded.split(3, seed=1)
    for view in (encoded, train, held):
        assert [view.pair_id(row) for row in range(len(view))] == view.ids
        assert view.pair_id(-1) == view.ids[-1]
        rows = [len(view) - 1, 0]
        expected = [encoded.ids.index(view.ids[row]) for row in rows]
        torch.testing.assert_close(view.moments(rows)[1].mean, encoded.moments(expected)[1].mean, rtol=0, atol=0)
        torch.testing.assert_close(view.weights(rows), encoded.weights(expected), rtol=0, atol=0)
        assert torch.equal(view.moments([-1])[0].mean, view.moments([len(view) - 1])[0].mean)
        joined = hashlib.blake2b("\n".join(view.ids).encode(), digest_size=16).hexdigest()
        assert view.ids_digest() == joined
        with pytest.raises(IndexError, match=f"there are {len(view)} pairs"):
            view.weights([len(view)])
    assert train.split(0, 0)[1].ids_digest() == hashlib.blake2b(b"", digest_size=16).hexdigest()


@pytest.mark.parametrize("texts", [["ä", "", "two\nlines", "\ud800", "b" * 300], [""], []])
def test_texts_are_what_they_were(texts: list[str]) -> None:
    column = index_module._TextColumn()
    for text in texts:
        column.append(text)
    columns = column.columns("x")
    found = Texts(columns["x"], columns["x.ends"])
    assert [found[number] for number in range(len(found))] == texts
    assert found.span(0, len(texts)).tobytes() == b"".join(t.encode("utf-8", "surrogatepass") + b"\n" for t in texts)


def test_rewards_of_unequal_number_are_refused(helpers: Any, encoder: Any, tmp_path: Path) -> None:
    first, second = helpers.make_pairs(2)
    pairs = [replace(first, rewards=(1.0,)), replace(second, rewards=(1.0, 2.0))]
    with pytest.raises(ValueError, match=r"have 1 to 2 rewards; expected as many in all"):
        encode_pairs(PairList(pairs), encoder, CONFIG, tmp_path)


def test_an_epoch_is_the_permutation_of_its_generator(cache: Path) -> None:
    encoded = EncodedPairs.open(cache)
    source = PairSource(encoded, seed=7, batch_size=COUNT, prefetch=False)
    for epoch in range(2):
        expected = torch.randperm(COUNT, generator=generator(7, "permutation", epoch)).tolist()
        rows = [row for row, _ in source.visits(epoch)]
        assert rows == expected
        assert {type(row) for row in rows} == {int}


def test_columns_are_mapped_not_copied(cache: Path) -> None:
    index = open_index(cache, json.loads((cache / "manifest.json").read_text()))
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(cache / INDEX))]
    mapped = [range(*(int(end, 16) for end in line.split()[0].split("-"))) for line in lines]
    for name in ("weights", "prompt_of", "shard_ends", "group_of"):
        column: np.ndarray[Any, Any] = getattr(index, name)
        assert any(column.__array_interface__["data"][0] in part for part in mapped), name
