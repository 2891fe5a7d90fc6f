from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffalign.batches import PairBatch
from diffalign.data import DataConfig, EncodedPairs, ImageSource, Pair, PairList, PairSource, encode_pairs
from diffalign.data.buckets import bucket_sizes, nearest_bucket
from diffalign.data.images import pixels, to_unit_range
from diffalign.data.index import INDEX
from diffalign.data.media import Preparation
from diffalign.data.order import ShuffledBuckets

SIZES = {"square": (40, 32), "wide": (70, 20), "tall": (18, 60), "wider": (90, 30)}
"""Width and height of pictures; 16x64, 32x32 and 64x16 are the buckets of 32x32 with a step of 16."""
BUCKETS = ((16, 64), (32, 32), (64, 16))
CONFIG = DataConfig(dataset_name="in memory", aspect_ratio_buckets=True, bucket_step=16, encode_batch_size=3)
KINDS = ("square", "wide", "square", "square", "wider", "tall", "square", "wide", "square", "wide", "square")


def make_pairs(helpers: Any, kinds: tuple[str, ...] = KINDS) -> list[Pair]:
    """Pairs whose chosen image has a kind's size; the rejected one is square."""
    return [
        Pair(
            pair_id=f"p{i}",
            prompt=f"prompt {i % 3}",
            chosen=ImageSource(helpers.encoded(helpers.picture(2 * i, SIZES[kind]))),
            rejected=ImageSource(helpers.encoded(helpers.picture(2 * i + 1))),
        )
        for i, kind in enumerate(kinds)
    ]


@pytest.fixture(scope="module")
def encoded(tiny_encoder_class: Any, helpers: Any, tmp_path_factory: pytest.TempPathFactory) -> EncodedPairs:
    root = tmp_path_factory.mktemp("buckets")
    return encode_pairs(PairList(make_pairs(helpers)), tiny_encoder_class(), CONFIG, root, shard_size=4)


def source_of(encoded: EncodedPairs, **options: Any) -> PairSource:
    return PairSource(encoded, **{"seed": 3, "batch_size": 2, "prefetch": False, **options})


# --- which sizes there are, and which one a picture gets -------------------------------------------------------------


def test_the_buckets_of_a_megapixel() -> None:
    """Among them those that SDXL is usually drawn at."""
    found = bucket_sizes((1024, 1024), 64)
    assert len(found) == 17
    assert {(1024, 1024), (896, 1152), (832, 1216), (768, 1344), (1216, 832), (512, 2048)} <= set(found)
    for height, width in found:
        assert height % 64 == width % 64 == 0
        assert 0.9 * 1024**2 < height * width <= 1024**2
        assert (width, height) in found


@pytest.mark.parametrize(
    ("size", "step"), [((512, 512), 64), ((480, 832), 32), ((48, 48), 16), ((64, 64), 64), ((520, 520), 16)]
)
def test_buckets_are_the_largest_sizes_of_the_area(size: tuple[int, int], step: int) -> None:
    """Every size on the grid within the area and the longest side fits into a bucket, and no bucket into another."""
    found, side = bucket_sizes(size, step), math.isqrt(size[0] * size[1])
    grid = range(step, 2 * side + 1, step)
    allowed = [(h, w) for h in grid for w in grid if h * w <= size[0] * size[1] and 2 * min(h, w) >= side]
    for one in allowed:
        assert any(one[0] <= h and one[1] <= w for h, w in found), one
    assert set(found) <= set(allowed)
    assert not [(a, b) for a in found for b in found if a != b and a[0] <= b[0] and a[1] <= b[1]]


def test_a_step_longer_than_the_picture_is_refused(encoder: Any) -> None:
    with pytest.raises(ValueError, match=r"bucket_step is 64, longer than the sides of 32x32 pixels"):
        Preparation(CONFIG.model_copy(update={"bucket_step": 64}), encoder)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (32, 40, (32, 32)),
        (20, 70, (16, 64)),
        (600, 180, (64, 16)),
        (1, 1000, (16, 64)),
        (16, 32, (16, 64)),
        (22, 10, (64, 16)),  # by the logarithm: 2.2 is nearer to 4 than to 1
        (5, 5, (32, 32)),
    ],
)
def test_a_picture_goes_where_its_proportions_are_nearest(height: int, width: int, expected: tuple[int, int]) -> None:
    assert BUCKETS[nearest_bucket(BUCKETS, height, width)] == expected


def test_clips_have_no_buckets(encoder: Any) -> None:
    encoder.is_video, encoder.num_frames = True, 5
    with pytest.raises(ValueError, match="aspect_ratio_buckets are for images"):
        Preparation(CONFIG, encoder)


# --- the cache -------------------------------------------------------------------------------------------------------


def test_each_pair_is_encoded_at_the_size_of_its_chosen_image(
    helpers: Any, encoder: Any, encoded: EncodedPairs
) -> None:
    pairs = make_pairs(helpers)
    for row, (pair, kind) in enumerate(zip(pairs, KINDS, strict=True)):
        size = {"square": (32, 32), "tall": (64, 16)}.get(kind, (16, 64))
        for moments, image in zip(encoded.moments([row]), (pair.chosen, pair.rejected), strict=True):
            with torch.no_grad():
                expected = encoder.encode(to_unit_range(pixels(image.decode(), size)).unsqueeze(0))
            torch.testing.assert_close(moments.mean, expected.mean, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(moments.std, expected.std, rtol=1e-5, atol=1e-5)
    assert encoded.buckets is not None
    names = {"square": 1, "tall": 2, "wide": 0, "wider": 0}
    assert encoded.buckets.tolist() == [names[kind] for kind in KINDS]
    wide = [row for row, kind in enumerate(KINDS) if "wide" in kind]
    alone = torch.cat([encoded.moments([row])[1].mean for row in wide])
    torch.testing.assert_close(encoded.moments(wide)[1].mean, alone, rtol=0, atol=0)
    with pytest.raises(ValueError, match="3 pairs of 2 sizes cannot be one batch"):
        encoded.moments([0, 1, 2])


def test_views_know_the_buckets_of_their_rows(encoded: EncodedPairs) -> None:
    for view in encoded.split(3, seed=0):
        assert encoded.buckets is not None
        assert view.buckets is not None
        rows = [encoded.ids.index(name) for name in view.ids]
        assert view.buckets.tolist() == encoded.buckets[rows].tolist()


def test_mirrored_images_and_an_index_made_anew(helpers: Any, encoder: Any, tmp_path: Path) -> None:
    pairs = make_pairs(helpers, ("square", "wide", "tall"))
    config = CONFIG.model_copy(update={"random_flip": True})
    encoded = encode_pairs(PairList(pairs), encoder, config, tmp_path, shard_size=3)
    image = to_unit_range(pixels(pairs[1].chosen.decode(), (16, 64)).flip(-1)).unsqueeze(0)
    with torch.no_grad():
        expected = encoder.encode(image).mean
    torch.testing.assert_close(encoded.moments([1], [True])[0].mean, expected, rtol=1e-5, atol=1e-5)
    before = (encoded.folder / INDEX).read_bytes()
    (encoded.folder / INDEX).unlink()
    again = EncodedPairs.open(encoded.folder)
    assert (encoded.folder / INDEX).read_bytes() == before
    torch.testing.assert_close(again.moments([1], [True])[0].mean, expected, rtol=1e-5, atol=1e-5)


def test_an_unreadable_pair_moves_no_other(helpers: Any, encoder: Any, tmp_path: Path, encoded: EncodedPairs) -> None:
    pairs = make_pairs(helpers)
    pairs[4] = Pair("bad", pairs[4].prompt, ImageSource(b"broken"), pairs[4].rejected)
    config = CONFIG.model_copy(update={"max_corrupt_fraction": 0.5})
    left = encode_pairs(PairList(pairs), encoder, config, tmp_path, shard_size=4)
    assert left.ids == [name for name in encoded.ids if name != "p4"]
    for row, name in enumerate(left.ids):
        mean = encoded.moments([encoded.ids.index(name)])[0].mean
        torch.testing.assert_close(left.moments([row])[0].mean, mean, rtol=1e-5, atol=1e-5)


def test_buckets_are_part_of_the_key_and_nothing_is_without_them(helpers: Any, encoder: Any, tmp_path: Path) -> None:
    pairs = PairList(make_pairs(helpers, ("square", "wide")))
    plain = CONFIG.model_copy(update={"aspect_ratio_buckets": False})
    names = {
        encode_pairs(pairs, encoder, config, tmp_path).fingerprint
        for config in (
            plain,
            plain.model_copy(update={"bucket_step": 32}),
            CONFIG,
            CONFIG.model_copy(update={"bucket_step": 32}),
        )
    }
    assert len(names) == 3  # the step means nothing without buckets
    one_size = encode_pairs(pairs, encoder, plain, tmp_path)
    assert one_size.buckets is None
    assert "buckets" not in json.loads((one_size.folder / "manifest.json").read_text())
    assert one_size.moments([0, 1])[0].mean.shape[0] == 2


# --- the order of visits ---------------------------------------------------------------------------------------------


def test_every_batch_has_one_size(encoded: EncodedPairs) -> None:
    source = source_of(encoded)
    batches = [source.batch(step, 0) for step in range(24)]
    assert {len(batch) for batch in batches} == {2}
    shapes = {tuple(batch.chosen.shape[1:]) for batch in batches}
    assert len(shapes) == 3
    for batch in batches:
        assert batch.chosen.shape == batch.rejected.shape
        for latents, draw in zip(batch.chosen, batch.draws, strict=True):
            moments = encoded.moments([encoded.ids.index(draw.pair_id)])[0]
            noise = draw.normal("posterior/chosen", moments.mean.shape[1:])
            assert torch.equal(latents, moments.mean[0] + moments.std[0] * noise)


@pytest.mark.parametrize(
    ("counts", "batch_size"), [((6, 4, 1), 2), ((7, 5, 3), 4), ((1, 1), 3), ((9,), 4), ((3, 50), 8), ((2, 2, 2), 1)]
)
def test_no_pair_is_lost_and_none_comes_twice(counts: tuple[int, ...], batch_size: int) -> None:
    """Any stretch of batches holds the beginning of every bucket's own sequence of epochs, each a permutation."""
    buckets = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    order, total = ShuffledBuckets(buckets, 5, batch_size), sum(counts)
    epochs = 4 * batch_size  # after which every bucket is at the end of a batch
    batches = epochs * total // batch_size
    visits = [order.at(position) for position in range(batches * batch_size)]
    assert Counter(visits) == Counter((row, epoch) for row in range(total) for epoch in range(epochs))
    for start in range(0, len(visits), batch_size):
        assert len({int(buckets[row]) for row, _ in visits[start : start + batch_size]}) == 1
    for bucket in range(len(counts)):
        own = [epoch for row, epoch in visits if buckets[row] == bucket]
        ahead = max(abs(epoch - position // counts[bucket]) for position, epoch in enumerate(own))
        assert ahead <= max(1, -(-batch_size // counts[bucket]))  # batches of one epoch are shuffled, epochs are not
    halfway = [row for row, _ in visits[: len(visits) // 2]]
    for bucket, count in enumerate(counts):  # and none is left for the end
        share = sum(buckets[row] == bucket for row in halfway) / (len(halfway) * count / total)
        assert abs(share - 1) < 0.35


def test_batches_of_all_buckets_are_mixed_anew_in_every_epoch() -> None:
    buckets = np.repeat([0, 1], 32)
    order = ShuffledBuckets(buckets, 0, 4)
    epochs = [[int(buckets[order.at(64 * epoch + 4 * batch)[0]]) for batch in range(16)] for epoch in range(4)]
    assert len({tuple(kinds) for kinds in epochs}) == 4
    assert all(kinds.count(1) == 8 and kinds != sorted(kinds) for kinds in epochs)
    rows = [[order.at(64 * epoch + place)[0] for place in range(64)] for epoch in range(2)]
    assert sorted(rows[0]) == sorted(rows[1]) == list(range(64))
    other = ShuffledBuckets(buckets, 1, 4)
    assert [other.at(place) for place in range(64)] != [order.at(place) for place in range(64)]


def by_draw(batches: list[PairBatch]) -> dict[Any, torch.Tensor]:
    return {draw: batch.chosen[i] for batch in batches for i, draw in enumerate(batch.draws)}


@pytest.mark.parametrize("step", [0, 5])
def test_processes_and_accumulation_share_the_same_batches(encoded: EncodedPairs, step: int) -> None:
    expected = [source_of(encoded, gradient_accumulation_steps=4).batch(step, micro) for micro in range(4)]
    for micro_steps, processes in ((2, 2), (1, 4)):
        shares = {"gradient_accumulation_steps": micro_steps, "num_processes": processes}
        sources = [source_of(encoded, process_index=index, **shares) for index in range(processes)]
        got = [source.batch(step, micro) for micro in range(micro_steps) for source in sources]
        assert [batch.draws for batch in got] == [batch.draws for batch in expected]
        for draw, latents in by_draw(got).items():
            assert torch.equal(latents, by_draw(expected)[draw])


def test_a_resumed_run_goes_on_with_the_same_batches(encoded: EncodedPairs) -> None:
    forward, jumping = source_of(encoded, prefetch=True), source_of(encoded)
    in_order = [forward.batch(step, 0) for step in range(12)]
    for step in (11, 0, 7, 7):
        again = jumping.batch(step, 0)
        assert again.draws == in_order[step].draws
        assert torch.equal(again.rejected, in_order[step].rejected)
    jumping.update(3)
    assert [draw for _, draw in jumping.own_visits(4, 0)] == list(in_order[4].draws)


def test_draws_repeat_after_as_many_visits_of_a_pair(encoded: EncodedPairs) -> None:
    fresh, repeating = (source_of(encoded, draws_per_pair=draws) for draws in (None, 2))
    for step in range(30):
        pairs = zip(fresh.visits(step), repeating.visits(step), strict=True)
        assert all((a[0], a[1].epoch % 2) == (b[0], b[1].epoch) for a, b in pairs)


def test_validation_batches_have_one_size_each_and_leave_none_out(encoded: EncodedPairs) -> None:
    batches = source_of(encoded).fixed_batches(100, 4)
    names = [draw.pair_id for batch in batches for draw in batch.draws]
    assert sorted(names) == sorted(encoded.ids)
    assert sorted(len(batch) for batch in batches) == [1, 2, 4, 4]
    again = source_of(encoded, batch_size=1).fixed_batches(100, 4)
    assert all(torch.equal(a.chosen, b.chosen) for a, b in zip(batches, again, strict=True))
