"""Hashes of weights are those of their bytes one after the other, whatever is prepared ahead."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from diffalign.backbones import load_policy
from diffalign.weight_hashes import hash_weights

NAMED = {
    "half": torch.linspace(-3, 3, 700).to(torch.bfloat16).reshape(7, 100).T,  # not contiguous
    "full": torch.arange(12.0).reshape(3, 4),
    "one number": torch.tensor(5.0, dtype=torch.float64),
    "whole": torch.arange(5),
    "flags": torch.tensor([True, False]),
    "nothing": torch.zeros(0, 3),
    **{f"more {number}": torch.full((100 * number,), float(number)) for number in range(20)},
}


@pytest.mark.parametrize("exact", [False, True])
def test_the_digest_is_that_of_the_bytes_in_their_order(exact: bool) -> None:
    digest, expected = (hashlib.blake2b(digest_size=16) for _ in range(2))
    hash_weights(digest, NAMED.items(), exact=exact)
    for name, tensor in NAMED.items():
        expected.update(name.encode())
        values = tensor.contiguous().reshape(-1)
        expected.update((values.view(torch.uint8) if exact else values.float()).numpy().tobytes())
    assert digest.hexdigest() == expected.hexdigest()
    other = hashlib.blake2b(digest_size=16)
    hash_weights(other, [*list(NAMED.items())[1:], next(iter(NAMED.items()))], exact=exact)
    assert other.hexdigest() != digest.hexdigest()


def test_precision_counts_where_values_are_taken_as_they_are() -> None:
    def hashed(tensor: torch.Tensor, exact: bool) -> str:
        digest = hashlib.blake2b()
        hash_weights(digest, [("weight", tensor)], exact=exact)
        return digest.hexdigest()

    half = torch.tensor([0.5, 2.0], dtype=torch.bfloat16)
    assert hashed(half, False) == hashed(half.float(), False)
    assert hashed(half, True) != hashed(half.float(), True)


def test_a_tensor_that_cannot_be_read_is_an_error() -> None:
    with pytest.raises(NotImplementedError, match="meta"):
        hash_weights(hashlib.blake2b(), [("nowhere", torch.zeros(3, device="meta"))])


@pytest.mark.slow
def test_the_embedded_models_encoders_keep_their_fingerprint(tmp_path: Path) -> None:
    """A reward model that ships was trained for them, and caches are named by it."""
    from diffalign.noisy_rewards import SHIPPED, read_card

    assert load_policy("diffalign://shapes_flow").encoder_fingerprint() == read_card(SHIPPED).encoder
