"""What the backward pass of a denoiser needs of its forward pass, in bytes, counted without a GPU and without storage.

A forward pass runs on fake tensors, which have shapes, dtypes and a device but no numbers; autograd's own hooks say
what it keeps for the backward pass. Every storage counts once, however often it is kept. Weights do not count, nor do
the rounded copies that autocast makes of trained ones (`rounded` says how large those are).

On a fake "cuda" device, autocast is the one of CUDA, norms and softmax in float32 included, and attention is taken to
be fused (flash or cuDNN). Not in these numbers: what an operation needs while it runs, the allocator's slack, and what
cuDNN and compilation ask for or save. Needs a build of PyTorch that knows CUDA, but no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.architectures import Architecture
from benchmarks.building import build
from diffalign.batches import Conditioning
from diffalign.checkpointing import Recompute, is_kept


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward pass leaves behind.

    Attributes:
        kept: For the backward pass.
        largest_block: Of those that checkpointing throws away and computes again, the most that one block needs at
            once; 0 without checkpointing.
        rounded: 16-bit copies of trained weights, which autocast keeps until the forward pass ends, and autograd after.
        recomputed: Share of the forward pass's multiplications that the backward pass makes again, in 0..1.
    """

    kept: int
    largest_block: int
    rounded: int
    recomputed: float = field(default=0.0, compare=False)

    @property
    def peak(self) -> int:
        """The most that activations hold at any time of the backward pass."""
        return self.kept + self.largest_block


class Keeping:
    """Counts what autograd keeps inside the block, each storage once.

    Args:
        weights: Tensors that live anyway, and whose copies in another dtype are counted by themselves.
        inputs: Others that live anyway.

    Attributes:
        sizes: Storage -> bytes, of what is kept.
        rounded: Likewise of copies of weights in another dtype.
    """

    def __init__(self, weights: Iterable[Tensor], inputs: Iterable[Tensor] = ()) -> None:
        self.weights = {_storage(tensor) for tensor in weights}
        self.inputs = {_storage(tensor) for tensor in inputs}
        self.sizes: dict[int, int] = {}
        self.rounded: dict[int, int] = {}
        self._alive: list[Tensor] = []  # a storage that is freed could give its address to another one

    def note(self, tensor: Tensor) -> Tensor:
        """Counts one tensor; gives it back."""
        key = _storage(tensor)
        if not (key in self.weights or key in self.inputs or key in self.rounded):
            self.sizes[key] = tensor.untyped_storage().nbytes()
            self._alive.append(tensor)
        return tensor

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Counts until the block ends."""
        with saved_tensors_hooks(self.note, lambda tensor: tensor), _Copies(self):
            yield


class _Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells copies of weights in another dtype from activations."""

    def __init__(self, keeping: Keeping) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keeping = keeping

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and _storage(args[0]) in self.keeping.weights:
            self.keeping.rounded[_storage(result)] = result.untyped_storage().nbytes()
            self.keeping._alive.append(result)
        return result


class _Outputs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps what selective checkpointing does."""

    def __init__(self, keeping: Keeping) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keeping = keeping

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if is_kept(func, args):
            for output in result if isinstance(result, tuple) else (result,):
                if isinstance(output, Tensor):
                    self.keeping.note(output)
        return result


class _Work(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts multiplications, and those that a block computes again.

    Args:
        recompute: What blocks compute again.

    Attributes:
        inside: Whether a block is running.
        total: So far.
        again: Of these, to be computed a second time.
    """

    def __init__(self, recompute: Recompute) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recompute, self.inside = recompute, False
        self.total = self.again = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            work = formula(*args, **(kwargs or {}), out_val=result)
            self.total += work
            if self.inside and not (self.recompute == "selective" and is_kept(func, args)):
                self.again += work
        return result


class _Fused(TorchFunctionMode):
    """Attention without a mask through the flash kernel, which PyTorch would choose if there were a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and kwargs.get("attn_mask") is None and len(args) <= 3:
            given = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))  # diffusers: by name
            tensors = [tensor.to(torch.bfloat16) for tensor in given]  # autocast does not know the kernel by this name
            scale = kwargs.get("scale")
            return torch.ops.aten._scaled_dot_product_flash_attention(*tensors, scale=scale)[0]
        return func(*args, **kwargs)


def count(
    architecture: Architecture,
    *,
    lora: bool,
    samples: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    recompute: Recompute = False,
) -> Activations:
    """Activations of one forward pass of the policy.

    Args:
        architecture: Of the denoiser.
        lora: Adapters on weights in `dtype`, or all weights in float32 under autocast.
        samples: In the batch; a pair has two.
        dtype: Of autocast; float32 for none.
        device: "cuda" or "cpu": whose autocast and attention.
        recompute: As `diffalign.checkpointing.recompute_activations` takes it.
    """
    policy = build(architecture, lora=lora, dtype=dtype, device="meta")
    with FakeTensorMode():
        policy.denoiser._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
        latents = torch.empty((samples, *architecture.latents), device=device)
        embedded = {n: torch.empty((samples, *s), device=device) for n, s in architecture.conditioning.items()}
        timesteps = torch.empty(samples, device=device)
        with _Fused() if device == "cuda" and dtype != torch.float32 else nullcontext():
            return count_of(
                policy.denoiser,
                lambda: policy.predict(latents, timesteps, Conditioning(embedded)),
                dtype=dtype,
                device=device,
                recompute=recompute,
            )


def count_of(
    denoiser: Any, forward: Callable[[], Tensor], *, dtype: torch.dtype, device: str, recompute: Recompute = False
) -> Activations:
    """Activations of a call of a denoiser, with real tensors or with fake ones.

    Args:
        denoiser: Whose weights do not count.
        forward: The call; its result is an output of the denoiser.
        dtype: Of autocast; float32 for none.
        device: Whose autocast.
        recompute: Throw away what the denoiser's blocks keep, as checkpointing does, and note the largest; "selective"
            keeps what its dearer operations gave.
    """
    weights = (*denoiser.parameters(), *denoiser.buffers())
    blocks = [0]
    keeping, work = Keeping(weights), _Work(recompute)

    def apart(block: Callable[..., Any], *inputs: Any) -> Any:
        given = [keeping.note(tensor) for tensor in inputs if isinstance(tensor, Tensor)]
        inside = Keeping(weights, given)
        with inside.watching(), _Outputs(keeping) if recompute == "selective" else nullcontext():
            work.inside = True
            outputs = block(*inputs)
            work.inside = False
        keeping.rounded |= inside.rounded
        blocks.append(sum(size for key, size in inside.sizes.items() if key not in keeping.sizes))
        return outputs

    if recompute:
        denoiser.enable_gradient_checkpointing(gradient_checkpointing_func=apart)
    try:
        with _autocast(device, dtype), keeping.watching(), work:
            output = forward()
    finally:
        if recompute:
            denoiser.disable_gradient_checkpointing()
    assert output.requires_grad
    share = work.again / work.total if work.total else 0.0
    return Activations(sum(keeping.sizes.values()), max(blocks), sum(keeping.rounded.values()), share)


def _storage(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


@contextmanager
def _autocast(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Autocast by its switches: `torch.autocast("cuda")` switches itself off where there is no GPU."""
    if dtype == torch.float32:
        yield
        return
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])
        torch.clear_autocast_cache()
