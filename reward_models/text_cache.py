"""Encoded texts, kept from one call to the next."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor

__all__ = ["TextCache"]

T = TypeVar("T")


class TextCache(Generic[T]):
    """What the encoder gave for batches of texts, up to so many texts; the batch used longest ago goes first.

    A batch is kept as a whole and found again only as a whole: an encoder's last float32 digits depend on what else is
    in its batch, and with a cache by single text a score would depend on the calls before it, so that a run that was
    killed and started again could differ from one that was not.

    Nothing is kept while a weight of the encoder is trained, and everything is forgotten when one has changed.
    """

    def __init__(self, size: int):
        self.size = size
        self._weights: tuple[Any, ...] = ()
        self._entries: OrderedDict[tuple[str, ...], T] = OrderedDict()

    def __len__(self) -> int:
        """How many texts are kept."""
        return sum(map(len, list(self._entries)))

    def get(self, texts: Sequence[str], weights: Iterable[Tensor], encode: Callable[[Sequence[str]], T]) -> T:
        """`encode(texts)`, or what it gave before; the result is shared, so nobody may write into it.

        Args:
            texts: The batch, as the encoder reads it.
            weights: What the result depends on beside the texts.
            encode: The encoder.
        """
        present = list(weights)
        if self.size < len(texts) or any(weight.requires_grad for weight in present):
            return encode(texts)
        state = tuple(map(_state, present))
        if state != self._weights:
            self._entries.clear()
            self._weights = state
        key = tuple(texts)
        # Taken out and put back as the newest; every step is a single one, for servers with several threads.
        found = self._entries.pop(key, None)
        if found is None:
            found = encode(texts)
        self._entries[key] = found
        while len(self) > self.size:
            self._entries.popitem(last=False)
        return found


def _state(weight: Tensor) -> tuple[Any, ...]:
    """Changes when the tensor is written to, replaced, moved or cast."""
    version = 0 if weight.is_inference() else weight._version
    return weight.data_ptr() if not weight.is_meta else 0, version, weight.dtype, weight.device
