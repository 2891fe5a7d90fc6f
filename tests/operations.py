"""What PyTorch is asked to compute, counted below autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

FLASH, FLASH_BACKWARD = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
)
PRODUCT = torch.ops.aten.bmm.default
"""What attention without a kernel of its own consists of."""


class Operations(TorchDispatchMode):
    """Counts the operations of a block by kind; those that are not asked for are 0."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Any, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func] = self.found.get(func, 0) + 1
        return func(*args, **(kwargs or {}))

    def __getitem__(self, operation: Any) -> int:
        return self.found.get(operation, 0)
