"""A device that is not there, on which the CPU is caught waiting; no test by itself.

Its tensors say that they are on `meta` and are computed on the CPU. While `Elsewhere` is in force, a tensor is moved
there by `.to(DEVICE)`, and whatever would make the CPU wait for a GPU is noted: values that are asked for, copies from
there, copies to there that `diffalign.devices.send` did not make, and indices or masks that are on the CPU or decide
shapes. As with a GPU, tensors of both places do not meet in one operation. Other than in
`tests.pretended_gpu`, tensors have values, and gradients are computed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
ATEN = torch.ops.aten
ASKING = {ATEN._local_scalar_dense, ATEN.nonzero, ATEN.masked_select, ATEN.equal, ATEN._unique2, ATEN.unique_dim}
"""Operations whose result, or its shape, the CPU needs to know."""
INDEXING = {ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_}
MATH = 0
"""Attention by plain operations, of `torch.nn.attention.SDPBackend`: others have kernels of their own by device."""


class There(Tensor):
    """A tensor on the device that is not there."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> There:
        made: There = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        return made

    def __init__(self, inner: Tensor) -> None:
        """Made by `__new__`."""

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"There({self.inner!r})"

    def tolist(self) -> Any:
        return self.to("cpu").tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on a tensor that is elsewhere, without Elsewhere in force")


class Elsewhere(TorchDispatchMode):
    """Computes with tensors that are there, and notes where the CPU would wait for them.

    Attributes:
        places: `file:function` of whoever waited, the innermost one of this project, or `library` without any.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, packet = dict(kwargs or {}), func.overloadpacket
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = any(isinstance(tensor, There) for tensor in tensors)
        if packet is ATEN._fused_sdp_choice and there:
            return MATH
        place = kwargs.get("device")
        to_there = there if place is None else torch.device(place) == DEVICE
        if place is not None and to_there:
            kwargs["device"] = torch.device("cpu")
        if not there and not to_there:
            return func(*args, **kwargs)
        self._watch(packet, args, tensors, there, to_there)
        wrappers = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, There)}
        found = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))

        def wrapped(value: Any) -> Any:  # an operation in place gives back the tensor that it was given
            if not isinstance(value, Tensor):
                return value
            return wrappers[id(value)] if id(value) in wrappers else There(value)

        return tree_map(wrapped, found) if to_there else found

    def _watch(self, packet: Any, args: Any, tensors: list[Tensor], there: bool, to_there: bool) -> None:
        mixed = [t for t in tensors if not isinstance(t, There) and t.ndim]
        if any(tensor.is_meta for tensor in mixed):
            raise AssertionError(f"{packet} met a tensor that was made elsewhere from Python's own numbers")
        if packet is ATEN._to_copy and there != to_there:
            self._note(unless_sent=to_there)
        elif packet is ATEN.copy_ and mixed:
            self._note(unless_sent=isinstance(args[0], There))
        elif packet in ASKING:
            self._note()
        elif packet in INDEXING:
            indices = [index for index in args[1] if index is not None]
            if any(not isinstance(index, There) or index.dtype in (torch.bool, torch.uint8) for index in indices):
                self._note()
        elif mixed and there:
            raise RuntimeError(f"{packet} was given tensors on the CPU and elsewhere, which no GPU takes")

    def _note(self, unless_sent: bool = False) -> None:
        frame, own = sys._getframe(1), []
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if {"diffalign", "trainers"} & set(path.parts) and "tests" not in path.parts:
                own.append(f"{path.name}:{frame.f_code.co_name}")
            frame = frame.f_back  # type: ignore[assignment]
        if not (unless_sent and own and own[0] == "devices.py:send"):
            self.places.append(own[0] if own else "library")


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, There) else value
