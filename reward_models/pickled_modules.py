"""Tensors of a module that was pickled as a whole, read without running any of its code.

A pickle names classes and functions and asks for them to be called. Here the names of tensors' parts mean what they
say, and every other name becomes an empty shell that remembers what it is given; so neither the code of the original
package is needed, nor does anything in the file run.
"""

from __future__ import annotations

import collections
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from diffalign.reward_models.base import RewardInfo, WeightsError
from diffalign.reward_models.weights import expected, one_line

__all__ = ["read_pickled_module"]


def read_pickled_module(info: RewardInfo, path: Path) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, on the CPU, of a file that `torch.save(module, path)` wrote.

    Args:
        info: For the messages.
        path: The file.

    Raises:
        WeightsError: If the file is damaged or holds no module.
    """
    reader = ModuleType("inert_pickle")
    reader.Unpickler = _Unpickler  # type: ignore[attr-defined]  # torch looks these two up in a module
    reader.load = lambda file, **options: _Unpickler(file, **options).load()  # type: ignore[attr-defined]
    try:
        root = torch.load(path, map_location="cpu", pickle_module=reader, weights_only=False)
        state = dict(_tensors(root, ""))
    except (OSError, RuntimeError, EOFError, ValueError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        raise WeightsError(
            f"cannot read {str(path)!r} as a pickled module of {info.name}: {one_line(error)}; {expected(info)}"
        ) from error
    if not state:
        raise WeightsError(f"{str(path)!r} holds no pickled module of {info.name}: there are no parameters in it")
    return state


class _Shell:
    """Stands for any object of the file: keeps its attributes and does nothing."""

    def __init__(self, *args: object, **kwargs: object):
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def extend(self, values: object) -> None:
        """Drops what a list of another class would hold."""

    append = extend


_TRUSTED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
}
"""What a file may call; storages are named beside it, they only hold bytes."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The meaning of a name: one of tensors' own parts, or a shell."""
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return _TRUSTED.get((module, name)) or type(name, (_Shell,), {})


def _tensors(module: object, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """What `state_dict` of the pickled module would hold."""
    own = vars(module) if isinstance(module, _Shell) else {}
    hidden = own.get("_non_persistent_buffers_set") or ()
    for kind in ("_parameters", "_buffers"):
        for name, value in (own.get(kind) or {}).items():
            if isinstance(value, Tensor) and name not in hidden:
                yield prefix + name, value.detach()
    for name, child in (own.get("_modules") or {}).items():
        yield from _tensors(child, f"{prefix}{name}.")
