"""Encoded texts kept between calls: found again, forgotten in time, and never a reason for other digits."""

from __future__ import annotations

import pytest
import torch

from diffalign.reward_models import HPSv2, PickScore
from diffalign.reward_models.text_cache import TextCache


class Encoder:
    def __init__(self):
        self.weight = torch.nn.Parameter(torch.ones(2), requires_grad=False)
        self.seen: list[tuple[str, ...]] = []

    def __call__(self, texts):
        self.seen.append(tuple(texts))
        return torch.stack([self.weight * len(text) for text in texts])


def test_a_batch_is_encoded_once():
    cache, encoder = TextCache[torch.Tensor](10), Encoder()
    for texts in (["a", "bb"], ["a", "bb"], ["bb"], ["a", "bb"], ["bb"]):
        found = cache.get(texts, [encoder.weight], encoder)
        assert found[:, 0].tolist() == [len(text) for text in texts]
    assert encoder.seen == [("a", "bb"), ("bb",)]


def test_the_oldest_goes_first_and_large_batches_are_not_kept():
    cache, encoder = TextCache[torch.Tensor](3), Encoder()
    for texts in ("ab", "c", "ab", "d", "ab", "c", "abcd", "abcd"):
        cache.get(list(texts), [encoder.weight], encoder)
    assert encoder.seen == [tuple(t) for t in ("ab", "c", "d", "c", "abcd", "abcd")]
    assert len(cache) == 3


def test_everything_is_forgotten_when_a_weight_changes():
    cache, encoder = TextCache[torch.Tensor](10), Encoder()

    def value() -> float:
        return float(cache.get(["a"], [encoder.weight], encoder)[0, 0].detach())

    assert value() == 1
    with torch.no_grad():
        encoder.weight.fill_(2)
    assert value() == 2
    encoder.weight.data = torch.full((2,), 3.0)
    assert value() == 3
    encoder.weight = torch.nn.Parameter(torch.full((2,), 4.0), requires_grad=False)
    assert value() == 4
    encoder.weight.requires_grad_(True)
    assert value() == value() == 4
    assert encoder.seen == [("a",)] * 6


@pytest.fixture(params=["open_clip", "transformers"])
def model(request, hps_folder, hps_config, clip_folder):
    if request.param == "open_clip":
        return HPSv2(hps_folder, model_config=hps_config, device="cpu")
    return PickScore(clip_folder, device="cpu")


def test_scores_are_the_same_to_the_last_bit(model, photos, monkeypatch):
    prompts = ["one", "two and more", "one"]
    calls: list[int] = []
    encode = model.towers.encode_texts
    monkeypatch.setattr(model.towers, "encode_texts", lambda texts: calls.append(len(texts)) or encode(texts))
    first = model(photos, prompts)
    assert torch.equal(model(photos, prompts), first)
    assert calls == [2]
    alone = model(photos[1], "two and more")
    assert calls == [2, 1]
    with monkeypatch.context() as patch:
        patch.setattr(model, "text_cache", TextCache(0))
        assert torch.equal(model(photos[1], "two and more"), alone)
        assert torch.equal(model(photos, prompts), first)
    with torch.no_grad():
        next(model.towers.text_weights()).mul_(-1)
    assert not torch.equal(model(photos, prompts), first)
