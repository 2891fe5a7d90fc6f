"""A GPU that is not there: tensors that say they are on "cuda" and compute on the CPU.

Code that was written for a GPU does there what it would do on one: whatever mixes a tensor on the GPU with one of the
CPU is refused, and so are random numbers for the GPU from a generator of the CPU, and NumPy's view of a tensor. What
would make the CPU wait for the GPU is noted: asking for a value or for the places where a mask is true, copies back,
and copies from memory that is not pinned. Everything else is real, gradients included. Autocast does nothing there.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["GPU", "OnGPU", "PretendedGPU"]

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
aten = torch.ops.aten
ASKS = {
    *(aten._local_scalar_dense.default, aten.nonzero.default, aten.is_nonzero.default, aten.equal.default),
    *(aten.masked_select.default, aten.bincount.default, aten._unique2.default, aten.unique_dim.default),
    *(aten.unique_consecutive.default, aten.repeat_interleave.Tensor, aten.repeat_interleave.self_Tensor),
}
"""Operators whose result the CPU must know."""
COPIES = {aten._to_copy.default, aten.copy_.default}
STRICT = {*COPIES, aten.cat.default, aten.stack.default}
"""Operators that take no single number of the CPU among the GPU's tensors, as others do."""
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
WHOLE = ("pad_sequence",)
"""Functions that make tensors in C++, where nobody asks what is pretended; they compute on the CPU as a whole."""
FROM_DATA = ("tensor", "as_tensor", "asarray", "new_tensor", "scalar_tensor")
"""Functions that copy what Python holds."""


def _means_gpu(place: Any) -> bool:
    return torch.device(place).type == "cuda" if isinstance(place, str | torch.device) else False


class OnGPU(Tensor):
    """A tensor on the pretended GPU; `inner` is the CPU's that holds its numbers."""

    inner: Tensor
    noted: list[str] = []  # noqa: RUF012 - of the GPU that is there, see `PretendedGPU.on`

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGPU:
        shape = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made: OnGPU = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=CPU, **shape)
        made.inner = inner.detach()
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnGPU({self.inner})"

    def to(self, *how: Any, **named: Any) -> Tensor:  # also for threads, which no mode reaches
        return _to(Tensor.to, self, *how, **named)

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        return _to(Tensor.to, self, CPU)

    def tolist(self) -> Any:
        note("tolist")
        return self.inner.tolist()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    storage = untyped_storage  # of which only the address is asked

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")

    __array__ = numpy  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        others = [one for one in tensors if not isinstance(one, OnGPU) and (one.ndim > 0 or func in STRICT)]
        if func in INDEXING:
            if others or any(one.dtype in (torch.bool, torch.uint8) for one in tree_leaves(args[1]) if one is not None):
                note("index")
        elif func in COPIES:
            if others and not (_asynchronous(func, args, kwargs) and is_pinned(others[0])):
                note("copy")
        elif others and not _in_backward():
            raise RuntimeError(f"{func}: expected all tensors on one device, found some on cuda:0 and some on cpu")
        if func in ASKS:
            note(func.overloadpacket.__name__)
        known = {id(one.inner): one for one in tensors if isinstance(one, OnGPU)}
        found = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if func is aten.copy_.default and not isinstance(args[0], OnGPU):
            return args[0]

        def outer(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return known[id(value)] if id(value) in known else OnGPU(value)

        return tree_map(outer, found)


def _in_backward() -> bool:
    """Whether PyTorch computes gradients: it makes zeros on the CPU then, which the tensors' C++ side is on."""
    return torch._C._current_graph_task_id() != -1  # type: ignore[attr-defined,no-any-return]


def _inner(value: Any) -> Any:
    if isinstance(value, OnGPU):
        return value.inner
    return CPU if isinstance(value, torch.device) and value.type == "cuda" else value


def _asynchronous(func: Any, args: Any, kwargs: Any) -> bool:
    return bool(kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2]))


def is_pinned(tensor: Tensor) -> bool:
    return getattr(tensor, "pinned_here", False)


def note(what: str) -> None:
    """The CPU waits here, for somebody outside of PyTorch."""
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
    OnGPU.noted.append(f"{Path(frames[-1].filename).name}, {frames[-1].name}: {what}")


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return OnGPU(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return _inner(gradient)


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Any) -> Tensor:
        return tensor.inner.detach().clone()  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return OnGPU(gradient)


GROUPED = torch._C._group_tensors_by_device_and_dtype  # type: ignore[attr-defined]


ALIKE = torch._has_compatible_shallow_copy_type  # type: ignore[attr-defined]


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether `Module.to` may put the other into the one's place instead of making a parameter anew."""
    return isinstance(one, OnGPU) == isinstance(other, OnGPU) and ALIKE(one, other)


def _grouped(tensors: Any, with_indices: bool = False) -> Any:
    """How optimizers take tensors together; PyTorch's own function sees where they are in C++."""
    groups = {}
    for (_, dtype), (lists, indices) in GROUPED(tensors, with_indices).items():
        for device in (CPU, GPU):
            places = [place for place, one in enumerate(lists[0]) if (one.device.type == "cuda") == (device is GPU)]
            if places:
                own = [[one[place] for place in places] if one else [] for one in lists]
                groups[device, dtype] = (own, [indices[place] for place in places] if with_indices else [])
    return groups


class PretendedGPU(TorchFunctionMode):
    """See the module.

    Attributes:
        waits: Where the CPU would have waited so far: file, function and what it did.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    @contextmanager
    def on(self) -> Iterator[PretendedGPU]:
        """Device "cuda" means this GPU in the block."""
        replaced = (
            (OnGPU, "noted", self.waits),
            (torch.cuda, "default_generators", (torch.default_generator,)),
            (torch._C, "_group_tensors_by_device_and_dtype", _grouped),
            (torch, "_has_compatible_shallow_copy_type", _alike),
        )
        with ExitStack() as before:
            for owner, name, value in replaced:
                before.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, value)
            with self:
                yield self

    def put(self, *modules: nn.Module | None) -> None:
        """Moves modules there."""
        for part in (part for module in modules if module is not None for part in module.modules()):
            for name, parameter in part._parameters.items():
                if parameter is not None and not isinstance(parameter, OnGPU):
                    moved = OnGPU(parameter.detach().clone())
                    part._parameters[name] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
            for name, buffer in part._buffers.items():
                if buffer is not None and not isinstance(buffer, OnGPU):
                    part._buffers[name] = OnGPU(buffer.clone())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        own = args[0] if args and isinstance(args[0], Tensor) else None
        if own is not None and name in METHODS:
            return METHODS[name](func, own, *args[1:], **kwargs)
        if name in WHOLE and any(isinstance(one, OnGPU) for one in tree_leaves(args)):
            args = tree_map(lambda one: _Down.apply(one) if isinstance(one, OnGPU) else one, args)  # type: ignore[no-untyped-call]
            return _Up.apply(func(*args, **kwargs))  # type: ignore[no-untyped-call]
        if not _means_gpu(kwargs.get("device")):
            return func(*args, **kwargs)
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type == "cpu":
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if name in FROM_DATA and not any(isinstance(one, OnGPU) for one in tree_leaves(args)):
            note(name)
        made = func(*args, **{**kwargs, "device": CPU})
        if not isinstance(made, Tensor) or isinstance(made, OnGPU):
            return made
        return OnGPU(made.detach()).requires_grad_(made.requires_grad)


def _to(func: Any, tensor: Tensor, *how: Any, **named: Any) -> Tensor:
    """`Tensor.to`: first another dtype where the tensor is, then the way."""
    like = named.pop("other", None) or (how[0] if how and isinstance(how[0], Tensor) else None)
    if like is not None:
        there, dtype = isinstance(like, OnGPU), like.dtype
    else:
        places = [one for one in (*how, named.get("device")) if isinstance(one, str | torch.device)]
        there = _means_gpu(places[0]) if places else isinstance(tensor, OnGPU)
        dtype = next((one for one in (*how, named.get("dtype")) if isinstance(one, torch.dtype)), tensor.dtype)
    layout = {"memory_format": named["memory_format"]} if named.get("memory_format") is not None else {}
    if there == isinstance(tensor, OnGPU):
        return func(tensor, dtype=dtype, copy=bool(named.get("copy")), **layout)  # type: ignore[no-any-return]
    booleans = [one for one in how if isinstance(one, bool)]
    asynchronous = named.get("non_blocking") or (booleans and booleans[0])
    if not (asynchronous and there and is_pinned(tensor)):
        note("to")
    return (_Up if there else _Down).apply(tensor).to(dtype, **layout)  # type: ignore[no-untyped-call]


def _pin(func: Any, tensor: Tensor, *_: Any) -> Tensor:
    if isinstance(tensor, OnGPU):
        raise RuntimeError("cannot pin a tensor on cuda:0; only dense tensors of the CPU can be pinned")
    pinned = tensor.clone()
    pinned.pinned_here = True  # type: ignore[attr-defined]
    return pinned


METHODS: dict[str, Callable[..., Any]] = {
    "to": _to,
    "cuda": lambda func, tensor, *_, **how: _to(Tensor.to, tensor, GPU, **how),
    "cpu": lambda func, tensor, *_, **__: _to(Tensor.to, tensor, CPU),
    "pin_memory": _pin,
    "is_pinned": lambda func, tensor, *_: is_pinned(tensor),
    "storage": lambda func, tensor: tensor.storage() if isinstance(tensor, OnGPU) else func(tensor),
    "tolist": lambda func, tensor: tensor.tolist() if isinstance(tensor, OnGPU) else func(tensor),
    "numpy": lambda func, tensor, **how: tensor.numpy() if isinstance(tensor, OnGPU) else func(tensor, **how),
}
"""Methods of tensors that say where something is."""
