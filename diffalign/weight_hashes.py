"""Hashes of weights: tensor after tensor into one digest, those to come prepared while one is hashed.

A digest takes its bytes in one order, so one thread hashes. Bringing a tensor to the CPU and into its bytes takes as
long again; helpers do that, a few tensors ahead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from diffalign.helper_threads import helper_threads

__all__ = ["hash_weights"]

AHEAD = 2
"""Tensors that are prepared at once; a text encoder's largest take gigabytes in float32."""


class Digest(Protocol):
    """Of `hashlib`."""

    def update(self, data: Any, /) -> None:
        """Adds bytes."""
        ...


def hash_weights(digest: Digest, tensors: Iterable[tuple[str, Tensor]], *, exact: bool = False) -> None:
    """Adds labels and values of tensors to a digest, in their order.

    Args:
        digest: Takes them.
        tensors: What is said of each tensor, and the tensor, on any device.
        exact: Take the values as they are stored, bit by bit; otherwise in float32, in which numbers of any precision
            are hashed alike.
    """
    waiting: deque[Any] = deque()

    def take() -> None:
        label, values = waiting.popleft()
        digest.update(label.encode())
        digest.update(values.result())

    with helper_threads(AHEAD, "hash") as pool:
        for label, tensor in tensors:
            waiting.append((label, pool.submit(_values, tensor, exact)))
            if len(waiting) > AHEAD:
                take()
        while waiting:
            take()


def _values(tensor: Tensor, exact: bool) -> np.ndarray[Any, Any]:
    """A tensor's bytes."""
    tensor = tensor.detach().cpu() if exact else tensor.detach().cpu().float()
    values: np.ndarray[Any, Any] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return values
