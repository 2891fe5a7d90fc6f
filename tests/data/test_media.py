"""Clips as training data: both halves of a pair alike, the readers, what is dropped, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffalign.batches import Moments
from diffalign.data import DataConfig, ImageSource, Pair, PairList, PairSource, check_media, encode_pairs, load_pairs
from diffalign.data.images import pixels
from diffalign.data.media import Preparation
from diffalign.randomness import Draw
from tests.clips import clip, counting, numbers

CONFIG = DataConfig(dataset_name="in memory")


@pytest.fixture
def encoder(tiny_encoder_class: Any) -> Any:
    """The tiny encoder as that of a video model: its autoencoder sees one frame at a time."""

    class TinyVideoEncoder(tiny_encoder_class):  # type: ignore[misc]
        size = (32, 48)
        is_video = True
        num_frames = 4
        frame_rate = 8.0

        def encode(self, videos: Tensor) -> Moments:
            assert videos.shape[1:] == (self.num_frames, 3, *self.size)
            mean, std = super().encode(videos.flatten(0, 1))
            shape = (len(videos), self.num_frames, *mean.shape[1:])
            return Moments(mean.reshape(shape).transpose(1, 2), std.reshape(shape).transpose(1, 2))

    return TinyVideoEncoder()


def make_pairs(count: int) -> list[Pair]:
    """Chosen clips begin with frame 0 of `counting`, rejected ones with frame 1."""
    frames = counting(9)
    chosen, rejected = ImageSource(clip(frames)), ImageSource(clip(frames[1:]))
    return [Pair(f"p{i}", f"prompt {i}", chosen, rejected) for i in range(count)]


def prepared(pair: Pair, encoder: Any, **settings: Any) -> tuple[Tensor, ...]:
    decoded = Preparation(CONFIG.model_copy(update=settings), encoder).decode(pair)
    assert decoded.reason == ""
    return decoded.images


def grey(video: Tensor) -> list[int]:
    return numbers([Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in video])


def test_both_halves_are_read_alike(encoder: Any) -> None:
    (pair,) = make_pairs(1)
    chosen, rejected = prepared(pair, encoder)
    assert chosen.shape == rejected.shape == (4, 3, 32, 48)
    assert chosen.dtype == torch.uint8
    assert (grey(chosen), grey(rejected)) == ([0, 1, 2, 3], [1, 2, 3, 4])
    chosen, rejected = prepared(pair, encoder, fps=4)
    assert (grey(chosen), grey(rejected)) == ([0, 2, 4, 6], [1, 3, 5, 7])


def gradient(width: int = 96, height: int = 32) -> list[Image.Image]:
    """Frames whose columns tell where they were."""
    row = np.linspace(0, 255, width).astype(np.uint8)
    return [Image.fromarray(np.broadcast_to(row[None, :, None], (height, width, 3)).copy())] * 5


def test_mirror_images_are_of_both_halves_and_all_frames(encoder: Any) -> None:
    pair = Pair("p", "", ImageSource(clip(gradient())), ImageSource(clip(gradient())))
    images = prepared(pair, encoder, random_flip=True)
    assert len(images) == 4
    for plain, mirrored in (images[:2], images[2:]):
        torch.testing.assert_close(mirrored, plain.flip(-1), rtol=0, atol=0)
        assert int(plain[-1, 0, 0, 0]) < int(mirrored[-1, 0, 0, 0])


@pytest.mark.slow
def test_random_crops_are_of_one_place_for_a_pair_and_stay(encoder: Any) -> None:
    wide = ImageSource(clip(gradient()))
    starts = []
    for name in ("a", "b", "c", "d", "e"):
        chosen, rejected = prepared(Pair(name, "", wide, wide), encoder, center_crop=False)
        torch.testing.assert_close(chosen, rejected, rtol=0, atol=0)
        left = chosen[:, 0, 0, 0].float()
        assert float(left.max() - left.min()) <= 2  # all frames at one place
        wanted = Draw(0, 0, name).uniform("crop/right") * 48 * 255 / 95
        assert float(left[0]) == pytest.approx(wanted, abs=6)
        starts.append(float(left[0]))
        again = prepared(Pair(name, "", wide, wide), encoder, center_crop=False)
        torch.testing.assert_close(again[0], chosen, rtol=0, atol=0)
    assert max(starts) - min(starts) > 20


@pytest.mark.parametrize(("full", "size"), [((60, 40), (32, 48)), ((40, 60), (32, 48)), ((96, 32), (48, 32))])
def test_pixels_cover_any_size(full: tuple[int, int], size: tuple[int, int]) -> None:
    width, height = full
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    scale = max(size[0] / height, size[1] / width)
    scaled = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BILINEAR)
    top, left = round((scaled.height - size[0]) / 2), round((scaled.width - size[1]) / 2)
    expected = np.asarray(scaled)[top : top + size[0], left : left + size[1]]
    np.testing.assert_array_equal(pixels(image, size).permute(1, 2, 0).numpy(), expected)
    for place in ((0.0, 0.0), (1.0, 1.0)):
        assert pixels(image, size, place).shape == (3, *size)
    corner = np.asarray(scaled)[-size[0] :, -size[1] :]
    np.testing.assert_array_equal(pixels(image, size, (1.0, 1.0)).permute(1, 2, 0).numpy(), corner)


def test_the_cache_holds_the_models_own_latents(encoder: Any, tmp_path: Path) -> None:
    pairs = make_pairs(3)
    encoded = encode_pairs(PairList(pairs), encoder, CONFIG, tmp_path)
    chosen, rejected = encoded.moments([2, 0])
    for got, video in zip((chosen, rejected), prepared(pairs[0], encoder), strict=True):
        with torch.no_grad():
            expected = encoder.encode(video[None] / 255)
        assert got.mean.shape == (2, *expected.mean.shape[1:])
        torch.testing.assert_close(got.mean[1:], expected.mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.std[1:], expected.std, rtol=1e-5, atol=1e-5)
    batch = PairSource(encoded, seed=0, batch_size=2).batch(0, 0)
    assert batch.chosen.shape == chosen.mean.shape


@pytest.mark.slow
def test_the_key_follows_frames_and_rate(encoder: Any, tmp_path: Path) -> None:
    pairs = PairList(make_pairs(1))
    keys = {encode_pairs(pairs, encoder, CONFIG, tmp_path).fingerprint}
    for change in ({"fps": 4}, {"center_crop": False}, {"resolution": (48, 32)}):
        encoder.size = change.get("resolution", (32, 48))
        keys.add(encode_pairs(pairs, encoder, CONFIG.model_copy(update=change), tmp_path).fingerprint)
    encoder.size, encoder.num_frames = (32, 48), 3
    keys.add(encode_pairs(pairs, encoder, CONFIG, tmp_path).fingerprint)
    assert len(keys) == 5
    encoder.num_frames = 4
    same = encode_pairs(pairs, encoder, CONFIG.model_copy(update={"fps": 8}), tmp_path)
    assert same.fingerprint == encode_pairs(pairs, encoder, CONFIG, tmp_path).fingerprint


def test_clips_that_are_damaged_or_too_short_drop_their_pair_and_are_named(encoder: Any, tmp_path: Path) -> None:
    pairs = make_pairs(4)
    whole = pairs[0].chosen.read()
    pairs[1] = Pair("torn", "x", ImageSource(whole[: len(whole) // 2]), pairs[1].rejected)
    pairs[2] = Pair("short", "y", pairs[2].chosen, ImageSource(clip(counting(2))))
    with pytest.raises(ValueError, match=r"2 of 4 pairs .* an unreadable clip \(first: torn, short\), for example "
                       r"chosen: no readable video"):  # fmt: skip
        encode_pairs(PairList(pairs), encoder, CONFIG, tmp_path)
    config = CONFIG.model_copy(update={"max_corrupt_fraction": 0.5})
    encoded = encode_pairs(PairList(pairs), encoder, config, tmp_path)
    assert encoded.ids == ["p0", "p3"]
    assert encoded.report.corrupt == ("torn", "short")
    (folder,) = tmp_path.iterdir()
    unreadable = json.loads((folder / "report.json").read_text())["unreadable"]
    assert unreadable[1]["reason"] == "rejected: 0.25 s of video, too short for 4 frames at 8 per second (0.38 s)"


def read_pixels(config: DataConfig, encoder: Any) -> list[list[int]]:
    """The greys of chosen and rejected, pair by pair."""
    images = [Preparation(config, encoder).decode(pair).images for pair in load_pairs(config)]
    return [grey(video) for pair in images for video in pair]


EXPECTED = [[0, 1, 2, 3], [1, 2, 3, 4]]


@pytest.mark.parametrize("index", ["index.jsonl", "index.parquet"])
def test_a_folder_of_clips(index: str, encoder: Any, tmp_path: Path) -> None:
    (pair,) = make_pairs(1)
    (tmp_path / "clips").mkdir()
    for name, source in (("a.mp4", pair.chosen), ("b.mp4", pair.rejected)):
        (tmp_path / "clips" / name).write_bytes(source.read())
    rows = [{"prompt": "x", "chosen": "clips/a.mp4", "rejected": "clips/b.mp4", "weight": 2.0}]
    if index.endswith("jsonl"):
        (tmp_path / index).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / index)
    config = DataConfig(train_data_dir=tmp_path)
    assert read_pixels(config, encoder) == EXPECTED
    before = load_pairs(config).fingerprint
    (tmp_path / "clips" / "a.mp4").write_bytes(pair.rejected.read())
    assert load_pairs(config).fingerprint != before
    (tmp_path / "clips" / "a.mp4").unlink()
    assert "chosen: no file" in Preparation(config, encoder).decode(next(iter(load_pairs(config)))).reason


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("feature", [None, "Video"])
def test_columns_of_a_data_set(feature: str | None, streaming: bool, encoder: Any, tmp_path: Path) -> None:
    (pair,) = make_pairs(1)
    columns = {"chosen": [pair.chosen.read()], "rejected": [pair.rejected.read()], "prompt": ["x"]}
    table = datasets.Dataset.from_dict(columns)
    if feature is not None:
        for column in ("chosen", "rejected"):
            table = table.cast_column(column, datasets.Video(decode=False))
    table.to_parquet(tmp_path / "train.parquet")
    assert read_pixels(DataConfig(dataset_name=str(tmp_path), streaming=streaming), encoder) == EXPECTED


def test_two_clips_and_a_label(encoder: Any, tmp_path: Path) -> None:
    (pair,) = make_pairs(1)
    columns = {"clip_a": [pair.rejected.read()], "clip_b": [pair.chosen.read()], "label_0": [0], "caption": ["x"]}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "train.parquet")
    config = DataConfig(dataset_name=str(tmp_path), image_0_column="clip_a", image_1_column="clip_b")
    assert read_pixels(config, encoder) == EXPECTED


def test_images_and_clips_are_told_apart_before_anything_is_encoded(helpers: Any, encoder: Any, tmp_path: Path) -> None:
    images, clips = PairList(helpers.make_pairs(2)), PairList(make_pairs(2))
    with pytest.raises(ValueError, match=r"pair 'p0' of .* is of still images, and the model draws videos"):
        encode_pairs(images, encoder, CONFIG, tmp_path)
    check_media(clips, encoder)
    encoder.is_video = False
    with pytest.raises(ValueError, match=r"pair 'p0' of .* is of clips, and the model draws images"):
        encode_pairs(clips, encoder, CONFIG, tmp_path)
    check_media(images, encoder)
    with pytest.raises(ValueError, match="data.center_crop is false: a random crop of images"):
        encode_pairs(images, encoder, CONFIG.model_copy(update={"center_crop": False}), tmp_path)
    assert encoder.calls == 0


@pytest.mark.parametrize("kind", ["mp4", "webm", "matroska", "avi"])
def test_clips_are_known_by_their_first_bytes(kind: str, encoder: Any) -> None:
    codec = {"webm": "libvpx", "avi": "mpeg4"}.get(kind, "libx264")
    source = ImageSource(clip(counting(2), kind=kind, codec=codec))
    encoder.is_video = False
    with pytest.raises(ValueError, match="is of clips"):
        check_media(PairList([Pair("p", "", source, source)]), encoder)


def animation(frames: Sequence[Image.Image], path: Path) -> ImageSource:
    frames[0].save(path, save_all=True, append_images=list(frames[1:]), duration=125)
    return ImageSource(path)


def test_animations_serve_both_kinds_and_damage_is_left_to_the_encoding(encoder: Any, tmp_path: Path) -> None:
    source = animation(counting(5), tmp_path / "a.gif")
    pair = Pair("p", "", source, ImageSource(b"broken"))
    for is_video in (True, False):
        encoder.is_video = is_video
        check_media(PairList([pair]), encoder)
    encoder.is_video = True
    assert grey(prepared(Pair("p", "", source, source), encoder)[0]) == [0, 1, 2, 3]
