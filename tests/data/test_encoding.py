from __future__ import annotations

import json
import os
import re
import runpy
import signal
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from diffalign.batches import Moments
from diffalign.data import DataConfig, EncodedPairs, ImageSource, Pair, PairList, encode_pairs, load_pairs
from diffalign.data.disk import write_whole
from diffalign.data.images import pixels, to_unit_range
from diffalign.processes import Processes
from diffalign.randomness import Draw
from tests.forks import Forks
from tests.threads import together

CONFIG = DataConfig(dataset_name="in memory", encode_batch_size=3)


def files(root: Path) -> dict[str, bytes]:
    """Everything in the one cache below `root`, by name."""
    (folder,) = root.iterdir()
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def direct(encoder: Any, source: ImageSource, flip: bool = False) -> Moments:
    image = to_unit_range(pixels(source.decode(), encoder.size)).unsqueeze(0)
    with torch.no_grad():
        return encoder.encode(image.flip(-1) if flip else image)


def test_the_cache_equals_encoding_on_the_fly(helpers: Any, encoder: Any, tmp_path: Path) -> None:
    pairs = helpers.make_pairs(7)
    encoded = encode_pairs(PairList(pairs), encoder, CONFIG, tmp_path, shard_size=3)
    assert encoded.ids == [p.pair_id for p in pairs]
    assert encoded.prompts == [p.prompt for p in pairs]
    rows = [6, 0, 4]
    chosen, rejected = encoded.moments(rows)
    conditioning = encoded.conditioning(rows)
    assert chosen.mean.shape == (3, *direct(encoder, pairs[0].chosen).mean.shape[1:])
    torch.testing.assert_close(encoded.weights(rows), torch.tensor([7.0, 1.0, 5.0]))
    for i, row in enumerate(rows):
        for got, source in ((chosen, pairs[row].chosen), (rejected, pairs[row].rejected)):
            expected = direct(encoder, source)
            torch.testing.assert_close(got.mean[i : i + 1], expected.mean, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(got.std[i : i + 1], expected.std, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            text = encoder.encode_prompts([pairs[row].prompt])
        torch.testing.assert_close(conditioning[[i]].tensors["embeddings"], text.tensors["embeddings"])
    with torch.no_grad():
        empty = encoder.encode_prompts([""])
    torch.testing.assert_close(encoded.empty_conditioning().tensors["embeddings"], empty.tensors["embeddings"])
    dropped = encoded.conditioning(rows, [False, True, False]).tensors["embeddings"]
    torch.testing.assert_close(dropped[1:2], encoded.empty_conditioning().tensors["embeddings"], rtol=0, atol=0)
    torch.testing.assert_close(dropped[[0, 2]], conditioning.tensors["embeddings"][[0, 2]], rtol=0, atol=0)


def test_each_prompt_is_stored_once(helpers: Any, encoder: Any, tmp_path: Path) -> None:
    pairs = helpers.make_pairs(7, ["a red circle", "", "two stars"])
    encoded = encode_pairs(PairList(pairs), encoder, CONFIG, tmp_path, shard_size=3)
    manifest = json.loads(files(tmp_path)["manifest.json"])
    assert (manifest["prompts"], manifest["pairs"], manifest["shards"]) == (3, 7, 3)
    same = encoded.conditioning([1, 4]).tensors["embeddings"]
    torch.testing.assert_close(same[:1], encoded.empty_conditioning().tensors["embeddings"], rtol=0, atol=0)
    torch.testing.assert_close(same[0], same[1], rtol=0, atol=0)


def test_a_second_call_does_not_touch_the_encoder(helpers: Any, encoder: Any, tmp_path: Path) -> None:
    first = encode_pairs(PairList(helpers.make_pairs(4)), encoder, CONFIG, tmp_path)
    calls = encoder.calls
    again = encode_pairs(PairList(helpers.make_pairs(4)), encoder, CONFIG, tmp_path)
    assert encoder.calls == calls > 0
    assert again.fingerprint == first.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [{"resolution": 64}, {"random_flip": True}, {"cache": "sample"}, {"cache_dtype": "bfloat16"}],
)
def test_the_key_follows_preprocessing(helpers: Any, encoder: Any, tmp_path: Path, change: dict[str, Any]) -> None:
    pairs = PairList(helpers.make_pairs(2))
    first = encode_pairs(pairs, encoder, CONFIG, tmp_path)
    assert encode_pairs(pairs, encoder, CONFIG.model_copy(update=change), tmp_path).fingerprint != first.fingerprint


def test_the_key_follows_model_and_data(helpers: Any, encoder: Any, tmp_path: Path) -> None:
    pairs = helpers.make_pairs(2)
    keys = {encode_pairs(PairList(pairs), encoder, CONFIG, tmp_path).fingerprint}
    swapped = Pair("p0", pairs[0].prompt, pairs[0].rejected, pairs[0].chosen, pairs[0].weight)
    keys.add(encode_pairs(PairList([swapped, pairs[1]]), encoder, CONFIG, tmp_path).fingerprint)
    encoder.encoder_fingerprint = lambda: "another"
    keys.add(encode_pairs(PairList(pairs), encoder, CONFIG, tmp_path).fingerprint)
    assert len(keys) == 3


def test_flips_are_encoded_not_mirrored_latents(helpers: Any, encoder: Any, tmp_path: Path) -> None:
    pairs = helpers.make_pairs(3)
    config = CONFIG.model_copy(update={"random_flip": True})
    encoded = encode_pairs(PairList(pairs), encoder, config, tmp_path, shard_size=2)
    chosen, rejected = encoded.moments([0, 2], [True, False])
    for got, source, flip in (
        (chosen.mean[0], pairs[0].chosen, True),
        (rejected.mean[0], pairs[0].rejected, True),
        (chosen.mean[1], pairs[2].chosen, False),
    ):
        torch.testing.assert_close(got, direct(encoder, source, flip).mean[0], rtol=1e-5, atol=1e-5)
    plain, _ = encoded.moments([0])
    assert not torch.allclose(chosen.mean[0], plain.mean[0].flip(-1), atol=1e-3)
    without = encode_pairs(PairList(pairs), encoder, CONFIG, tmp_path)
    with pytest.raises(ValueError, match="random_flip: true"):
        without.moments([0], [True])


def test_bfloat16_halves_the_files_and_reads_as_float32(helpers: Any, encoder: Any, tmp_path: Path) -> None:
    pairs = PairList(helpers.make_pairs(8))
    full = encode_pairs(pairs, encoder, CONFIG, tmp_path / "full").moments(range(8))[0]
    config = CONFIG.model_copy(update={"cache_dtype": "bfloat16"})
    half = encode_pairs(pairs, encoder, config, tmp_path / "half").moments(range(8))[0]
    assert half.mean.dtype == torch.float32
    torch.testing.assert_close(half.mean, full.mean.bfloat16().float(), rtol=0, atol=0)
    sizes = [len(files(tmp_path / n)["shard-000000.safetensors"]) for n in ("full", "half")]
    assert sizes[1] < 0.6 * sizes[0]


def test_a_sample_cache_holds_one_frozen_draw(helpers: Any, encoder: Any, tmp_path: Path) -> None:
    pairs = PairList(helpers.make_pairs(2))
    moments = encode_pairs(pairs, encoder, CONFIG, tmp_path).moments([1])[1]
    config = CONFIG.model_copy(update={"cache": "sample"})
    sampled = encode_pairs(pairs, encoder, config, tmp_path).moments([1])[1]
    noise = Draw(0, 0, "p1").normal("posterior/rejected", moments.mean.shape[1:])
    torch.testing.assert_close(sampled.mean[0], moments.mean[0] + moments.std[0] * noise)
    assert sampled.std.count_nonzero() == 0


def spoil(pairs: list[Pair], number: int, helpers: Any) -> None:
    whole = helpers.encoded(helpers.picture(5), "JPEG")
    pairs[number] = Pair(f"bad{number}", "only bad", pairs[number].chosen, ImageSource(whole[: len(whole) // 2]))


def test_a_corrupt_image_drops_its_pair_and_is_named(
    helpers: Any, encoder: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = helpers.make_pairs(6)
    spoil(pairs, 4, helpers)
    config = CONFIG.model_copy(update={"max_corrupt_fraction": 0.2})
    encoded = encode_pairs(PairList(pairs), encoder, config, tmp_path, shard_size=4)
    assert encoded.ids == ["p0", "p1", "p2", "p3", "p5"]
    assert (encoded.report.rows, encoded.report.kept, encoded.report.corrupt) == (6, 5, ("bad4",))
    assert "only bad" not in encoded.prompts
    report = json.loads(files(tmp_path)["report.json"])
    assert report["unreadable"][0]["id"] == "bad4"
    assert re.match(r"rejected: \d+ bytes that are no readable image", report["unreadable"][0]["reason"])
    assert "1 with an unreadable image" in caplog.text
    expected = direct(encoder, pairs[5].chosen).mean
    torch.testing.assert_close(encoded.moments([4])[0].mean, expected, rtol=1e-5, atol=1e-5)


def test_more_corrupt_pairs_than_allowed_stop_the_run(helpers: Any, encoder: Any, tmp_path: Path) -> None:
    pairs = helpers.make_pairs(6)
    spoil(pairs, 1, helpers)
    with pytest.raises(ValueError, match=r"1 of 2 pairs .* unreadable image \(first: bad1\).*0\.01 allows"):
        encode_pairs(PairList(pairs), encoder, CONFIG, tmp_path, shard_size=2)
    assert json.loads(files(tmp_path)["report.json"])["corrupt"] == ["bad1"]
    assert "manifest.json" not in files(tmp_path)
    config = CONFIG.model_copy(update={"max_corrupt_fraction": 0.5})
    assert len(encode_pairs(PairList(pairs), encoder, config, tmp_path, shard_size=2)) == 5


def test_exactly_the_allowed_fraction_goes_on(helpers: Any, encoder: Any, tmp_path: Path) -> None:
    pairs = helpers.make_pairs(4)
    spoil(pairs, 0, helpers)
    config = CONFIG.model_copy(update={"max_corrupt_fraction": 0.25})
    assert len(encode_pairs(PairList(pairs), encoder, config, tmp_path)) == 3


def write_stream(helpers: Any, folder: Path, count: int, bad: set[int]) -> DataConfig:
    columns = helpers.pickapic_rows([1.0, 0.5, 0.0] * (count // 3))
    for row in bad:
        columns["jpg_1"][row] = b"broken"
    folder.mkdir()
    datasets.Dataset.from_dict(columns).to_parquet(folder / "train.parquet")
    return CONFIG.model_copy(update={"dataset_name": str(folder), "streaming": True})


@pytest.mark.slow
def test_a_stream_is_judged_at_its_end(helpers: Any, encoder: Any, tmp_path: Path) -> None:
    config = write_stream(helpers, tmp_path / "data", 12, bad={0})
    with pytest.raises(ValueError, match="1 of 8 pairs"):
        encode_pairs(load_pairs(config), encoder, config, tmp_path / "cache", shard_size=3)
    assert "shard-000002.safetensors" in files(tmp_path / "cache")  # it did not stop before the end


def test_a_long_stream_is_stopped_early(
    helpers: Any, encoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffalign.data.encoding._EARLY_VERDICT", 4)
    config = write_stream(helpers, tmp_path / "data", 24, bad={3})
    with pytest.raises(ValueError, match="1 of 4 pairs"):
        encode_pairs(load_pairs(config), encoder, config, tmp_path / "cache", shard_size=2)


@pytest.mark.slow
def test_a_stream_gives_the_cache_of_the_whole_data_set(helpers: Any, encoder: Any, tmp_path: Path) -> None:
    config = write_stream(helpers, tmp_path / "data", 12, bad={3}).model_copy(update={"max_corrupt_fraction": 0.5})
    whole = config.model_copy(update={"streaming": False})
    a = encode_pairs(load_pairs(config), encoder, config, tmp_path / "a", shard_size=3)
    b = encode_pairs(load_pairs(whole), encoder, whole, tmp_path / "b", shard_size=3)
    assert a.fingerprint == b.fingerprint
    assert a.ids == b.ids
    assert a.report == b.report
    assert (a.report.rows, a.report.ties, a.report.kept, a.report.corrupt) == (12, 4, 7, ("3",))
    for x, y in zip(a.moments(range(7)), b.moments(range(7)), strict=True):
        torch.testing.assert_close(x.mean, y.mean, rtol=0, atol=0)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("stop_at", [*(pytest.param(i, marks=pytest.mark.slow) for i in (1, 5, 6)), 3])
def test_an_interrupted_cache_goes_on_to_the_same_bytes(
    helpers: Any, encoder: Any, tmp_path: Path, streaming: bool, stop_at: int
) -> None:
    config = write_stream(helpers, tmp_path / "data", 12, bad={6})
    config = config.model_copy(update={"streaming": streaming, "max_corrupt_fraction": 0.5})
    encode_pairs(load_pairs(config), encoder, config, tmp_path / "whole", shard_size=3)
    count = 0

    def interrupt() -> None:
        nonlocal count
        count += 1
        if count == stop_at:
            raise KeyboardInterrupt

    encoder.before_encode = interrupt
    with pytest.raises(KeyboardInterrupt):
        encode_pairs(load_pairs(config), encoder, config, tmp_path / "cut", shard_size=3)
    finished = [name for name in files(tmp_path / "cut") if name.startswith("shard")]
    encode_pairs(load_pairs(config), encoder, config, tmp_path / "cut", shard_size=3)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert count - stop_at == 6 - 2 * len(finished)  # two batches a shard, finished ones are not encoded again


@pytest.mark.parametrize("streaming", [False, True])
def test_readers_pass_over_pairs(helpers: Any, tmp_path: Path, streaming: bool) -> None:
    config = write_stream(helpers, tmp_path / "data", 12, bad=set()).model_copy(update={"streaming": streaming})
    pairs = load_pairs(config)
    ids = [pair.pair_id for pair in pairs]
    reader = pairs.reader()
    assert reader.skip(3) == 3
    assert next(reader).pair_id == ids[3]
    reader = pairs.reader(reader.state())
    assert next(reader).pair_id == ids[4]
    assert reader.skip(100) == len(ids) - 5
    assert reader.skip(1) == 0
    assert reader.report == pairs.report
    assert reader.report.rows == 12


@pytest.mark.slow
def test_several_share_a_stream_and_one_goes_on(helpers: Any, encoder: Any, tmp_path: Path) -> None:
    """The bookmark stands where all shards before it are finished, so that none is missed."""
    config = write_stream(helpers, tmp_path / "data", 24, bad={6})
    config = config.model_copy(update={"max_corrupt_fraction": 0.5})
    encode_pairs(load_pairs(config), encoder, config, tmp_path / "whole", shard_size=2)
    calls = []

    def stop() -> None:
        calls.append(1)
        if len(calls) > 11:
            raise KeyError("stopped")

    encoder.before_encode = stop

    def share(processes: Processes) -> None:
        encode_pairs(load_pairs(config), encoder, config, tmp_path / "cut", shard_size=2, processes=processes)

    together(3, share)
    left = files(tmp_path / "cut")
    finished = {int(name[6:12]) for name in left if name.startswith("shard-") and name.endswith("s")}
    assert 0 < len(finished) < 8
    bookmark = json.loads(left.get("bookmark.json", b'{"shards": 0}'))
    assert finished.issuperset(range(bookmark["shards"]))
    encoder.before_encode = lambda: None
    encode_pairs(load_pairs(config), encoder, config, tmp_path / "cut", shard_size=2)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def encode_and_die(tools_file: Path, root: Path, stage: str = "", number: int = 0) -> None:
    """Encodes in a process that dies at the `number`-th call of a stage."""
    tools, left = runpy.run_path(str(tools_file)), number
    encoder = tools["TinyEncoder"]()

    def maybe_die(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    if stage == "encode":
        encoder.before_encode = maybe_die
    if stage == "write":
        os.fsync = maybe_die
    config = DataConfig(dataset_name="in memory", encode_batch_size=3)
    encode_pairs(PairList(tools["make_pairs"](12)), encoder, config, root, shard_size=3)


@pytest.mark.slow
def test_killed_at_any_moment_the_cache_ends_with_the_same_bytes(helpers: Any, forks: Forks, tmp_path: Path) -> None:
    def encode(root: str, *death: Any) -> int:
        started = forks.start(encode_and_die, helpers.conftest, tmp_path / root, *death)
        return started.wait()[0].code

    codes = [encode("whole")]
    codes += [encode("cut", *death) for death in (("encode", 4), ("write", 2), ("write", 3), ("encode", 2))]
    assert [*codes, encode("cut")] == [0, -9, -9, -9, -9, 0]
    whole, cut = files(tmp_path / "whole"), files(tmp_path / "cut")
    assert whole == cut
    assert len([name for name in whole if name.startswith("shard")]) == 4


def test_long_prompts_are_counted_in_one_warning(
    helpers: Any, encoder: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = PairList(helpers.make_pairs(9, ["a red circle", "a red circle " * 20, "two stars " * 20]))
    for _ in range(2):
        caplog.clear()
        encode_pairs(pairs, encoder, CONFIG, tmp_path, shard_size=2)
        warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert len(warnings) == 1
        assert warnings[0].startswith("2 of 3 prompts are longer than the 20 tokens the text encoder reads")


def test_a_full_disk_keeps_the_finished_shards(
    helpers: Any, encoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = PairList(helpers.make_pairs(6))
    encode_pairs(pairs, encoder, CONFIG, tmp_path / "whole", shard_size=2)
    real = os.fsync
    count = 0

    def full(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == 3:  # a shard, the bookmark, then the second shard
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*finished files are kept: make room") as raised:
        encode_pairs(pairs, encoder, CONFIG, tmp_path / "cut", shard_size=2)
    assert raised.value.errno == 28
    assert "\n" not in str(raised.value)
    assert [n for n in files(tmp_path / "cut") if "shard" in n] == ["shard-000000.safetensors"]
    encode_pairs(pairs, encoder, CONFIG, tmp_path / "cut", shard_size=2)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_damaged_shard_is_encoded_again(helpers: Any, encoder: Any, tmp_path: Path) -> None:
    pairs = PairList(helpers.make_pairs(6))
    encode_pairs(pairs, encoder, CONFIG, tmp_path, shard_size=2)
    good = files(tmp_path)
    (folder,) = tmp_path.iterdir()
    shard = folder / "shard-000001.safetensors"
    shard.write_bytes(good[shard.name][:-10])
    with pytest.raises(ValueError, match=r"shard-000001\.safetensors is missing or damaged; remove"):
        EncodedPairs.open(folder)
    (folder / "manifest.json").unlink()
    encode_pairs(pairs, encoder, CONFIG, tmp_path, shard_size=2)
    assert files(tmp_path) == good


def test_an_unfinished_cache_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no finished cache"):
        EncodedPairs.open(tmp_path)


def test_values_that_are_not_finite_stop_the_run(helpers: Any, encoder: Any, tmp_path: Path) -> None:
    encoder.vae.encoder.conv_in.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite for pair 'p0'"):
        encode_pairs(PairList(helpers.make_pairs(2)), encoder, CONFIG, tmp_path)


def test_reading_a_row_does_not_read_its_file(helpers: Any, encoder: Any, tmp_path: Path) -> None:
    encoded = encode_pairs(PairList(helpers.make_pairs(8)), encoder, CONFIG, tmp_path)
    (folder,) = tmp_path.iterdir()
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    assert maps  # mapped, not copied
    row = encoded.moments([3])[0].mean
    assert row.untyped_storage().nbytes() == row.numel() * 4
    handles = [link.resolve().name for link in Path("/proc/self/fd").iterdir()]
    assert not any("safetensors" in name for name in handles)  # thousands of shards need no file handles


def test_prompts_are_never_on_both_sides_of_a_split(helpers: Any, encoder: Any, tmp_path: Path) -> None:
    prompts = ["a red circle", "A  red circle", "two stars", "a blue square", "three hearts"]
    encoded = encode_pairs(PairList(helpers.make_pairs(20, prompts)), encoder, CONFIG, tmp_path)
    train, validation = encoded.split(5, seed=1)
    assert len(train) + len(validation) == 20
    assert set(train.ids) | set(validation.ids) == set(encoded.ids)
    assert 5 <= len(validation) <= 8
    together = [{" ".join(p.lower().split()) for p in view.prompts} for view in (train, validation)]
    assert not together[0] & together[1]
    assert validation.ids == encoded.split(5, seed=1)[1].ids
    assert len({tuple(encoded.split(5, seed=seed)[1].ids) for seed in range(8)}) > 1
    number = encoded.ids.index(validation.ids[2])
    torch.testing.assert_close(validation.moments([2])[0].mean, encoded.moments([number])[0].mean, rtol=0, atol=0)
    assert len(encoded.split(0, seed=1)[1]) == 0
    with pytest.raises(ValueError, match="leaves none to train on"):
        encoded.split(20, seed=1)


def test_write_whole_leaves_no_temporary_file(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", b"1")
    write_whole(tmp_path / "a", b"2")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"2")]
