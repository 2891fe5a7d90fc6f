"""Parameters that are spread over processes by FSDP2: whole tensors out of them, and whole tensors back into them.

Everything here is the identity for plain tensors. For sharded ones `whole` talks to the other processes, so that all of
them must call it, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to the module."""
    return isinstance(module, FSDPModule)


def refuse_sharded(module: nn.Module, what: str, instead: str) -> None:
    """Refuses to let each process by itself run weights that are spread over processes.

    Args:
        module: Whose weights are run.
        what: The setting, and what each process does: "trainer.x: each process computes y".
        instead: A value of the setting that needs no such run.

    Raises:
        ValueError: If `fully_shard` was applied to the module.
    """
    if is_sharded(module):
        raise ValueError(
            f"{what} by itself, which weights that are spread over processes cannot do; train with DDP "
            f"(configs/accelerate/ddp.yaml), or set it to {instead}"
        )


def blocks(model: nn.Module) -> list[str]:
    """Classes of the blocks that a diffusers model repeats and does not want split, as far as this one has them."""
    named = {*(getattr(model, "_no_split_modules", None) or ()), *(getattr(model, "_repeated_blocks", None) or ())}
    return sorted(named & {type(module).__name__ for module in model.modules()})


def whole(value: Tensor) -> Tensor:
    """The tensor of all processes together, detached."""
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def cut_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, the same on every process, cut as `parameter` is; as it is if their shapes differ."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def shard_like(module: nn.Module, model: nn.Module) -> None:
    """Shards `module`, a plain copy of `model`, in the same places and over the same processes."""
    mesh = next(p.device_mesh for p in model.parameters() if isinstance(p, DTensor))
    names = [name for name, part in model.named_modules() if is_sharded(part)]
    for name in reversed(names):  # inner modules first: what they take is no longer their parents'
        fully_shard(module.get_submodule(name), mesh=mesh)


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """`optimizer.state_dict()` with whole tensors, so that it fits any number of processes; sharded ones on the CPU."""

    def gathered(value: Any) -> Any:
        return whole(value).cpu() if isinstance(value, DTensor) else value

    state: dict[str, Any] = optimizer.state_dict()
    entries = {key: {name: gathered(value) for name, value in entry.items()} for key, entry in state["state"].items()}
    return {**state, "state": entries}


def load_optimizer_state(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Puts `optimizer_state` back."""
    parameters: Sequence[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    entries = {
        key: {
            name: cut_like(value, parameters[key]) if isinstance(value, Tensor) else value
            for name, value in entry.items()
        }
        for key, entry in state["state"].items()
    }
    # How a step is computed is this run's setting; the checkpoint's run, or machine, may have done it otherwise.
    ways = [{name: group[name] for name in ("fused", "foreach") if name in group} for group in optimizer.param_groups]
    groups = [{**group, **way} for group, way in zip(state["param_groups"], ways, strict=True)]
    optimizer.load_state_dict({**state, "state": entries, "param_groups": groups})


@contextmanager
def published(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block `module.state_dict()` shows `values` for the parameters that they name.

    So weights are saved that the module does not hold: those of all processes together, or a moving average.
    """

    def show(names: Mapping[str, str]) -> Callable[..., None]:
        def hook(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
            state.update({f"{prefix}{last}": values[name] for last, name in names.items()})

        return hook

    owners: dict[str, dict[str, str]] = {}
    for name in values:
        path, _, last = name.rpartition(".")
        owners.setdefault(path, {})[last] = name
    # at the modules that own them, so that a part saved by itself shows them too
    handles: list[Any] = []
    for path, names in owners.items():
        owner: Any = module.get_submodule(path)
        handles.append(owner.register_state_dict_post_hook(show(names)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
