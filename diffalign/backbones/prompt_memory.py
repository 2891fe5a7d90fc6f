"""Embeddings of prompts that were encoded before: text encoders run once for what is drawn again and again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["PromptMemory"]

LIMIT = 256 * 2**20
"""Bytes; about a thousand rows of Stable Diffusion 1.5, or a hundred of FLUX.1 dev."""


class PromptMemory:
    """Embeddings of lists of prompts, up to so many bytes; where they were made they stay.

    A list is encoded as a whole and found again as a whole: its last digits, which depend on the rows that are
    multiplied together, are then the same whether it was remembered or not, and a run that was interrupted draws what
    an uninterrupted one does.

    Full, it takes nothing more and forgets nothing. Prompts come in cycles, those of base and aligned model or of one
    validation after the other, and in a cycle longer than the memory, dropping the oldest would never find anything.

    Args:
        limit: Bytes.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit, self.held = limit, 0
        self._rows: dict[tuple[str, ...], Mapping[str, Tensor]] = {}

    def recall(
        self, prompts: Sequence[str], embed: Callable[[list[str]], Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """Embeddings of B prompts, named tensors of B rows; a prompt that stands in the list twice is encoded once.

        Args:
            prompts: At least one.
            embed: Encodes those that are not known.
        """
        distinct = tuple(dict.fromkeys(prompts))
        rows = self._rows.get(distinct)
        if rows is None:
            rows = embed(list(distinct))
            size = sum(tensor.numel() * tensor.element_size() for tensor in rows.values())
            if self.held + size <= self.limit:
                self._rows[distinct] = rows
                self.held += size
        if len(distinct) == len(prompts):
            return rows
        index = torch.tensor([distinct.index(prompt) for prompt in prompts])
        return {name: tensor[index.to(tensor.device)] for name, tensor in rows.items()}

    def clear(self) -> None:
        """Forgets everything: the encoders are others now, or their device's memory is wanted."""
        self._rows.clear()
        self.held = 0
