"""A GPU that is not there: tensors without numbers, whose devices, shapes and dtypes are what a GPU's would be.

`FakeTensor` of PyTorch stands for every tensor "on cuda": an operator that mixes it with one of the CPU is refused as
on a GPU, and so is whatever asks for its value. Tensors of the CPU stay real, so that code which looks at random
numbers or tables there goes on as ever. Copies that make the CPU wait are noted. Only the forward direction works:
PyTorch's engine of the backward pass looks for the device's context.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["GPU", "PretendedGPU"]

GPU = torch.device("cuda")
COPIES = ("aten._to_copy", "aten.copy_")


class PretendedGPU(TorchDispatchMode):
    """See the module.

    Attributes:
        waits: Where a copy made the CPU wait, file and function: from memory that is not pinned, or back from the GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits: list[str] = []

    @contextmanager
    def on(self) -> Iterator[PretendedGPU]:
        """Device "cuda" means this GPU in the block."""
        with self.fake, self:
            yield self

    def put(self, module: nn.Module) -> None:
        """Moves a module there."""
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    moved = self._moved(parameter.detach())
                    part._parameters[name] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
            for name, buffer in part._buffers.items():
                part._buffers[name] = None if buffer is None else self._moved(buffer)

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        with self.fake:
            return self.fake.from_tensor(tensor).to(GPU)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        there = any(isinstance(leaf, FakeTensor) or leaf == GPU or leaf == torch.device("cuda", 0) for leaf in leaves)
        if there:
            found = func(*args, **kwargs)  # by the mode under this one
            if str(func).startswith(COPIES):
                self._note(str(func), args, kwargs, found)
            return found
        if func is torch.ops.aten.is_pinned.default:
            return getattr(args[0], "pinned_here", False)
        with unset_fake_temporarily():
            if func is torch.ops.aten._pin_memory.default:
                found = args[0].clone()
                found.pinned_here = True
                return found
            return func(*args, **kwargs)

    def _note(self, name: str, args: Any, kwargs: Any, found: Any) -> None:
        source = args[1] if name.startswith("aten.copy_") else args[0]
        waits = not kwargs.get("non_blocking", name.startswith("aten.copy_") and len(args) > 2 and args[2])
        if source.device.type == found.device.type:
            return
        if waits or found.device.type == "cpu" or not getattr(source, "pinned_here", False):
            frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
            self.waits.append(f"{Path(frames[-1].filename).name}, {frames[-1].name}")
