"""Batches: what travels with the tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from diffalign.batches import Conditioning

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
LENGTHS = (3, 1, 2)


def conditioning() -> Conditioning:
    return Conditioning({"hidden": torch.zeros(3, 4, 2), "mask": MASK})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda known: known, LENGTHS),
        (lambda known: known.repeat(2), LENGTHS * 2),
        (lambda known: known[1:], LENGTHS[1:]),
        (lambda known: known[[2, 0]], (2, 3)),
        (lambda known: known[torch.tensor([True, False, True])], (3, 2)),
        (lambda known: Conditioning.concatenate([known, known[:1]]), (*LENGTHS, 3)),
        (lambda known: Conditioning.concatenate([known, conditioning()]), LENGTHS * 2),
        (lambda known: known.to("cpu", torch.bfloat16), LENGTHS),
    ],
    ids=["as it is", "repeated", "slice", "rows", "mask", "joined", "joined with unknown", "moved twice"],
)
def test_lengths_travel_with_the_rows(
    change: Callable[[Conditioning], Conditioning], expected: tuple[int, ...]
) -> None:
    sent = conditioning().to("cpu")
    assert sent.known_lengths == LENGTHS
    changed = change(sent)
    assert changed.lengths == expected
    assert changed.lengths == tuple(changed.tensors["mask"].sum(1).tolist())


def test_without_a_mask_there_are_no_lengths() -> None:
    assert Conditioning({"hidden": torch.zeros(3, 4, 2)}).to("cpu").known_lengths is None
