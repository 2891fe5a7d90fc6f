from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.batches import PairBatch
from diffalign.data import DataConfig, EncodedPairs, PairList, PairSource, encode_pairs
from diffalign.randomness import Draw

COUNT = 10


@pytest.fixture(scope="module")
def encoded(tiny_encoder_class: Any, helpers: Any, tmp_path_factory: pytest.TempPathFactory) -> EncodedPairs:
    config = DataConfig(dataset_name="in memory")
    pairs = PairList(helpers.make_pairs(COUNT))
    return encode_pairs(pairs, tiny_encoder_class(), config, tmp_path_factory.mktemp("cache"), shard_size=4)


@pytest.fixture(scope="module")
def flipped(tiny_encoder_class: Any, helpers: Any, tmp_path_factory: pytest.TempPathFactory) -> EncodedPairs:
    config = DataConfig(dataset_name="in memory", random_flip=True)
    pairs = PairList(helpers.make_pairs(COUNT))
    return encode_pairs(pairs, tiny_encoder_class(), config, tmp_path_factory.mktemp("cache"))


def by_draw(batches: list[PairBatch]) -> dict[Draw, tuple[torch.Tensor, ...]]:
    """The tensors of each visit, by where its random numbers come from."""
    found: dict[Draw, tuple[torch.Tensor, ...]] = {}
    for batch in batches:
        for i, draw in enumerate(batch.draws):
            assert draw not in found
            text = batch.conditioning.tensors["embeddings"][i]
            found[draw] = (batch.chosen[i], batch.rejected[i], text, batch.weight[i])
    return found


def whole_step(encoded: EncodedPairs, step: int, batch: int, micro: int, processes: int) -> dict[Draw, Any]:
    sources = [
        PairSource(
            encoded,
            seed=3,
            batch_size=batch,
            gradient_accumulation_steps=micro,
            num_processes=processes,
            process_index=index,
            caption_dropout=0.3,
        )
        for index in range(processes)
    ]
    return by_draw([source.batch(step, m) for source in sources for m in range(micro)])


@pytest.mark.parametrize("step", [0, 2, 7])
def test_a_step_is_the_same_set_however_it_is_shared_out(encoded: EncodedPairs, step: int) -> None:
    expected = whole_step(encoded, step, batch=8, micro=1, processes=1)
    assert len(expected) == 8
    for batch, micro, processes in ((1, 8, 1), (2, 2, 2), (4, 1, 2), (1, 2, 4)):
        got = whole_step(encoded, step, batch, micro, processes)
        assert got.keys() == expected.keys()
        for draw, tensors in got.items():
            for a, b in zip(tensors, expected[draw], strict=True):
                assert torch.equal(a, b)


def test_every_pair_is_visited_once_per_epoch_though_steps_span_epochs(encoded: EncodedPairs) -> None:
    source = PairSource(encoded, seed=3, batch_size=4)
    draws = [draw for step in range(15) for draw in source.batch(step, 0).draws]
    epochs = [[d.pair_id for d in draws if d.epoch == epoch] for epoch in range(6)]
    assert all(sorted(visited) == sorted(encoded.ids) for visited in epochs)
    assert len({tuple(visited) for visited in epochs}) == 6
    assert [draw.epoch for draw in draws] == sorted(draw.epoch for draw in draws)
    assert {draw.epoch for draw in source.batch(2, 0).draws} == {0, 1}


def test_the_global_batch_may_be_larger_than_the_data_set(encoded: EncodedPairs) -> None:
    draws = PairSource(encoded, seed=3, batch_size=25).batch(0, 0).draws
    assert sorted(d.pair_id for d in draws[:20]) == sorted(encoded.ids * 2)
    assert len(set(draws)) == 25


def test_batches_are_a_pure_function_of_the_step(encoded: EncodedPairs) -> None:
    def make(prefetch: bool) -> PairSource:
        return PairSource(
            encoded, seed=3, batch_size=2, gradient_accumulation_steps=2, caption_dropout=0.5, prefetch=prefetch
        )

    forward, jumping = make(prefetch=True), make(prefetch=False)
    steps = [(step, micro) for step in range(6) for micro in range(2)]
    in_order = {key: forward.batch(*key) for key in steps}
    for key in [*steps[::-1], steps[3]]:
        jumping.update(key[0])
        again = by_draw([jumping.batch(*key)])
        for draw, tensors in by_draw([in_order[key]]).items():
            assert all(torch.equal(a, b) for a, b in zip(tensors, again[draw], strict=True))


def test_latents_are_drawn_from_the_posterior_of_the_visit(encoded: EncodedPairs) -> None:
    source = PairSource(encoded, seed=3, batch_size=COUNT)
    first, second = source.batch(0, 0), source.batch(1, 0)
    for batch in (first, second):
        for i, draw in enumerate(batch.draws):
            chosen, rejected = encoded.moments([encoded.ids.index(draw.pair_id)])
            for got, moments, name in ((batch.chosen, chosen, "chosen"), (batch.rejected, rejected, "rejected")):
                noise = draw.normal(f"posterior/{name}", moments.mean.shape[1:])
                assert torch.equal(got[i], moments.mean[0] + moments.std[0] * noise)
    order = [[d.pair_id for d in batch.draws].index("p0") for batch in (first, second)]
    assert not torch.equal(first.chosen[order[0]], second.chosen[order[1]])


def test_weights_follow_their_pairs(encoded: EncodedPairs) -> None:
    batch = PairSource(encoded, seed=3, batch_size=6).batch(0, 0)
    assert batch.weight.tolist() == [1.0 + int(d.pair_id[1:]) for d in batch.draws]


def test_captions_are_dropped_at_the_rate_asked_for(encoded: EncodedPairs) -> None:
    source = PairSource(encoded, seed=3, batch_size=200, caption_dropout=0.2)
    empty = encoded.empty_conditioning().tensors["embeddings"][0]
    full = {i: encoded.conditioning([r]).tensors["embeddings"][0] for r, i in enumerate(encoded.ids)}
    dropped = visits = 0
    for step in range(5):
        batch = source.batch(step, 0)
        assert len(batch.conditioning) == len(batch)  # one row per pair: both halves share it
        for row, draw in zip(batch.conditioning.tensors["embeddings"], batch.draws, strict=True):
            is_empty = torch.equal(row, empty)
            assert is_empty == (draw.uniform("caption") < 0.2)
            assert is_empty or torch.equal(row, full[draw.pair_id])
            dropped += is_empty
            visits += 1
    assert abs(dropped / visits - 0.2) < 3 * math.sqrt(0.2 * 0.8 / visits)


@pytest.mark.parametrize(("rate", "expected"), [(0.0, 0), (1.0, COUNT)])
def test_dropout_of_none_and_of_all(encoded: EncodedPairs, rate: float, expected: int) -> None:
    batch = PairSource(encoded, seed=3, batch_size=COUNT, caption_dropout=rate).batch(0, 0)
    empty = encoded.empty_conditioning().tensors["embeddings"][0]
    assert sum(torch.equal(row, empty) for row in batch.conditioning.tensors["embeddings"]) == expected


def test_flips_are_drawn_once_for_both_images(flipped: EncodedPairs) -> None:
    source = PairSource(flipped, seed=3, batch_size=COUNT)
    mirrored = visits = 0
    for step in range(20):
        batch = source.batch(step, 0)
        for i, draw in enumerate(batch.draws):
            flip = draw.uniform("flip") < 0.5
            moments = flipped.moments([flipped.ids.index(draw.pair_id)], [flip])
            for got, member, name in zip((batch.chosen, batch.rejected), moments, ("chosen", "rejected"), strict=True):
                noise = draw.normal(f"posterior/{name}", member.mean.shape[1:])
                assert torch.equal(got[i], member.mean[0] + member.std[0] * noise)
            mirrored += flip
            visits += 1
    assert abs(mirrored / visits - 0.5) < 3 * 0.5 / math.sqrt(visits)


def test_a_sample_cache_gives_the_same_latent_at_every_visit(
    tiny_encoder_class: Any, helpers: Any, tmp_path: Path
) -> None:
    config = DataConfig(dataset_name="in memory", cache="sample")
    encoded = encode_pairs(PairList(helpers.make_pairs(1)), tiny_encoder_class(), config, tmp_path)
    batch = PairSource(encoded, seed=3, batch_size=2).batch(0, 0)
    assert torch.equal(batch.chosen[0], batch.chosen[1])
    assert batch.draws[0] != batch.draws[1]


def test_validation_sees_the_same_triples_every_time(flipped: EncodedPairs) -> None:
    def make(index: int) -> PairSource:
        return PairSource(flipped, seed=3, batch_size=4, num_processes=2, process_index=index, caption_dropout=1.0)

    first = make(0)
    before = first.fixed_batches(7)
    first.batch(5, 0)
    assert [len(batch) for batch in before] == [4, 3]
    for again in (first.fixed_batches(7), make(1).fixed_batches(7, batch_size=2)):
        a, b = by_draw(before), by_draw(again)
        assert a.keys() == b.keys()
        assert all(torch.equal(x, y) for draw in a for x, y in zip(a[draw], b[draw], strict=True))
    assert {draw.epoch for batch in before for draw in batch.draws} == {-1}
    for batch in before:
        rows = [flipped.ids.index(draw.pair_id) for draw in batch.draws]
        expected = flipped.conditioning(rows).tensors["embeddings"]
        assert torch.equal(batch.conditioning.tensors["embeddings"], expected)
    assert sum(len(batch) for batch in first.fixed_batches(100)) == COUNT
    other = PairSource(flipped, seed=4, batch_size=4).fixed_batches(4)[0]
    assert {d.pair_id for d in other.draws} != {d.pair_id for d in first.fixed_batches(4)[0].draws}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "at least 1"),
        ({"num_processes": 2, "process_index": 2}, r"in 0\.\.1, got 2"),
        ({"caption_dropout": 1.2}, r"in \[0, 1\], got 1.2"),
    ],
)
def test_bad_numbers_are_refused(encoded: EncodedPairs, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairSource(encoded, **{"seed": 0, "batch_size": 1, **change})
    with pytest.raises(ValueError, match="no pair"):
        PairSource(encoded.split(0, seed=0)[1], seed=0, batch_size=1)


def test_there_is_no_micro_step_beyond_the_last(encoded: EncodedPairs) -> None:
    with pytest.raises(ValueError, match="no micro step 2 of step 0"):
        PairSource(encoded, seed=0, batch_size=1, gradient_accumulation_steps=2).batch(0, 2)
