"""Several reward models that take turns on one device."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.devices import resolve_device
from diffalign.reward_models.base import OnInvalid, RewardModel, RewardOutput
from diffalign.reward_models.media import MediaBatch

__all__ = ["RewardPool"]


class RewardPool:
    """Reward models that score the same media one after another, as many of them on the device as fit there.

    Weights live in the CPU's memory (pinned, if the device is a CUDA GPU) and are copied to the device when a model's
    turn comes. What was used longest ago leaves first; since nothing is trained, leaving costs no copy. Models are
    loaded to the CPU and handed over: while the pool has them, call them through it.

        pool = RewardPool([load_reward_model(name, device="cpu") for name in ("hpsv3", "pickscore")], budget_gb=20)
        pool.score(images, prompts)["hpsv3"].score

    Attributes:
        models: By `info.name`, in the given order.
        device: Where they score.
        budget: Bytes of weights that may be on it; None for no limit.
    """

    def __init__(
        self, models: Sequence[RewardModel], budget_gb: float | None = None, device: str | torch.device = "auto"
    ):
        """Takes the models over, all of them off the device.

        Args:
            models: With different names; on the CPU.
            budget_gb: Memory for weights, in 10^9 bytes; activations come on top. None keeps all on the device.
            device: "auto" is the first accelerator, else the CPU.

        Raises:
            ValueError: If there is no model, two have one name, one is not on the CPU, or one is larger than the
                budget.
        """
        self.models = {model.info.name: model for model in models}
        if not models or len(self.models) != len(models):
            raise ValueError(f"expected models with different names, got {[model.info.name for model in models]}")
        if budget_gb is not None and not budget_gb > 0:
            raise ValueError(f"budget_gb must be positive, got {budget_gb}")
        self.device = resolve_device(device)
        self.budget = None if budget_gb is None else int(budget_gb * 1e9)
        self._resident: OrderedDict[str, None] = OrderedDict()
        self._in_use: Counter[str] = Counter()
        self._slots: dict[str, list[_Slot]] = {}
        for name, model in self.models.items():
            slots = self._slots[name] = _slots(model)
            if any(slot.home.device.type != "cpu" for slot in slots):
                raise ValueError(f"{name} is not on the CPU; load it with device='cpu', the pool moves it")
            if self.budget is not None and self.size(name) > self.budget:
                raise ValueError(
                    f"{name} has {self.size(name) / 1e9:.3g} GB of weights, more than budget_gb {budget_gb:g}"
                )
            if self.device.type == "cuda":  # copies from there need not be waited for
                pinned = {id(slot.home): _like(slot.home.detach().pin_memory(), slot.home) for slot in slots}
                self._slots[name] = [replace(slot, home=pinned[id(slot.home)]) for slot in slots]
            self.offload(name)

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of the models on the device, the one used longest ago first."""
        return tuple(self._resident)

    def size(self, name: str) -> int:
        """Bytes of a model's weights and buffers."""
        homes = {id(slot.home): slot.home for slot in self._slots[name]}
        return sum(home.numel() * home.element_size() for home in homes.values())

    @contextmanager
    def on_device(self, name: str) -> Iterator[RewardModel]:
        """The model, on the device as long as the block lasts and afterwards until its place is needed.

        Raises:
            KeyError: If the pool has no such model.
            ValueError: If it does not fit beside the models of other blocks that have not ended.
        """
        model = self.models[name]
        self._make_room(name)
        if name not in self._resident:
            self._put(name)
        self._resident[name] = None
        self._resident.move_to_end(name)
        self._in_use[name] += 1
        try:
            yield model
        finally:
            self._in_use[name] -= 1

    def score(
        self,
        media: MediaBatch,
        prompts: str | Sequence[str] | None = None,
        *,
        batch_size: int = 32,
        on_invalid: OnInvalid = "raise",
    ) -> dict[str, RewardOutput]:
        """What each model says of N media, by its name; arguments and errors as in `RewardModel.score`.

        Those on the device already are asked first, so that one budget's worth of models stays where it is.
        """
        waiting = [name for name in self.models if name not in self._resident]
        outputs = {}
        for name in (*self._resident, *waiting):
            with self.on_device(name) as model:
                outputs[name] = model.score(media, prompts, batch_size=batch_size, on_invalid=on_invalid)
        return {name: outputs[name] for name in self.models}

    def __call__(self, images: MediaBatch, prompts: str | Sequence[str]) -> dict[str, Tensor]:
        """Primary scores [B] by model; see `score`."""
        return {name: output.score for name, output in self.score(images, prompts).items()}

    def offload(self, name: str | None = None) -> None:
        """Takes a model, or all of them, off the device."""
        for each in self.resident if name is None else (name,):
            for slot in self._slots[each]:
                slot.holder[slot.name] = slot.home
            self._resident.pop(each, None)

    def _put(self, name: str) -> None:
        """Copies a model to the device; what is shared within it stays shared."""
        homes = {id(slot.home): slot.home for slot in self._slots[name]}
        copies = {key: _like(home.detach().to(self.device, non_blocking=True), home) for key, home in homes.items()}
        for slot in self._slots[name]:
            slot.holder[slot.name] = copies[id(slot.home)]

    def _make_room(self, name: str) -> None:
        """Offloads what was used longest ago until the model fits."""
        if self.budget is None:
            return
        for other in (None, *(each for each in self.resident if each != name and not self._in_use[each])):
            if other is not None:
                self.offload(other)
            if sum(map(self.size, {*self._resident, name})) <= self.budget:
                return
        used = ", ".join(each for each in self.resident if each != name)
        raise ValueError(f"{name} does not fit beside what is in use: {used}")


@dataclass(frozen=True)
class _Slot:
    """A place of a tensor in a model: a module's parameter or buffer, and the tensor in the CPU's memory."""

    holder: dict[str, Any]
    name: str
    home: Tensor


def _slots(model: nn.Module) -> list[_Slot]:
    """All places of parameters and buffers, those that no file holds included."""
    return [
        _Slot(holder, name, tensor)
        for module in model.modules()
        for holder in (module._parameters, module._buffers)
        for name, tensor in holder.items()
        if tensor is not None
    ]


def _like(tensor: Tensor, home: Tensor) -> Tensor:
    """The tensor as a frozen parameter, if `home` is a parameter."""
    return nn.Parameter(tensor, requires_grad=False) if isinstance(home, nn.Parameter) else tensor
