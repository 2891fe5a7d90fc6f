"""What travels between data, trainers and models: frozen dataclasses of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from diffalign.devices import pinned, send
from diffalign.randomness import Draw


@dataclass(frozen=True)
class Conditioning:
    """What a denoiser is told about the prompts: named tensors with the batch first. Opaque to trainers.

    Trainers may index it, repeat it and move it, nothing else.

    Attributes:
        tensors: By name.
        known_lengths: `lengths`, remembered from the time when the tensors were on the CPU.
    """

    tensors: Mapping[str, Tensor]
    known_lengths: tuple[int, ...] | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Real tokens of each row by its "mask", for networks that must know them before they compute.

        A device is asked, and waited for, only if the tensors were made there.
        """
        if self.known_lengths is not None:
            return self.known_lengths
        return tuple(self.tensors["mask"].sum(dim=1).tolist())

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def __getitem__(self, rows: Tensor | slice | Sequence[int]) -> Conditioning:
        index = rows if isinstance(rows, slice | Tensor) else torch.as_tensor(rows)
        known = None
        if self.known_lengths is not None and not (isinstance(rows, Tensor) and rows.device.type != "cpu"):
            known = tuple(torch.tensor(self.known_lengths)[rows].tolist())

        def taken(tensor: Tensor) -> Tensor:
            return tensor[index if isinstance(index, slice) else send(index, tensor.device)]

        return Conditioning({name: taken(tensor) for name, tensor in self.tensors.items()}, known)

    def repeat(self, times: int) -> Conditioning:
        """The whole batch `times` times over: rows 0..B-1, 0..B-1, ..."""
        known = None if self.known_lengths is None else self.known_lengths * times
        return Conditioning({n: t.repeat(times, *[1] * (t.ndim - 1)) for n, t in self.tensors.items()}, known)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        """Moved to a device; floating-point tensors also cast to `dtype` if one is given."""
        place = torch.device(device)
        sent = {name: send(tensor, place) for name, tensor in self.tensors.items()}
        known = self.known_lengths
        if known is None and "mask" in self.tensors and self.tensors["mask"].device.type == "cpu":
            known = self.lengths
        return Conditioning({n: t.to(dtype if t.is_floating_point() else None) for n, t in sent.items()}, known)

    @staticmethod
    def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
        """Several batches as one."""
        known = [part.known_lengths for part in parts]
        return Conditioning(
            {n: torch.cat([p.tensors[n] for p in parts]) for n in parts[0].tensors},
            None if None in known else tuple(n for lengths in known if lengths is not None for n in lengths),
        )


class Moments(NamedTuple):
    """Mean and standard deviation of the latents of images, both [B, C, ...], already shifted and scaled.

    A latent is drawn as `mean + std * normal`; see spec of the autoencoder in `Policy.encode`.
    """

    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class PairBatch:
    """A batch of preference pairs, ready for a trainer.

    Attributes:
        conditioning: The prompts, B rows; a dropped caption is already the empty prompt's row.
        chosen: Latents of the preferred images (x^w), [B, C, ...], scaled as the denoiser expects.
        rejected: Latents of the other images (x^l), [B, C, ...].
        weight: Weight of each pair in the loss, [B].
        draws: Where each pair's random numbers come from, B entries.
        stays_on_cpu: Names of tensors that no device needs.
    """

    stays_on_cpu: ClassVar[frozenset[str]] = frozenset()

    conditioning: Conditioning
    chosen: Tensor
    rejected: Tensor
    weight: Tensor
    draws: tuple[Draw, ...]

    def __len__(self) -> int:
        return self.chosen.shape[0]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Moved to a device, but for what `stays_on_cpu`; latents and conditioning also cast to `dtype` if given."""

        def moved(name: str, value: Any) -> Any:
            if name in self.stays_on_cpu or not isinstance(value, Tensor | Conditioning):
                return value
            if isinstance(value, Conditioning):
                return value.to(device, dtype)
            # One number for each pair, such as its weight, is no latent and keeps its precision.
            return send(value, torch.device(device)).to(dtype if value.ndim > 1 else None)

        return replace(self, **{f.name: moved(f.name, getattr(self, f.name)) for f in fields(self)})

    def pin_memory(self) -> Self:
        """The same batch in memory that a GPU copies from without waiting for the CPU; needs CUDA."""

        def moved(value: Any) -> Any:
            if isinstance(value, Conditioning):
                return Conditioning({name: pinned(tensor) for name, tensor in value.tensors.items()})
            return pinned(value) if isinstance(value, Tensor) else value

        return replace(self, **{f.name: moved(getattr(self, f.name)) for f in fields(self)})

    def exchanged(self) -> Self:
        """The same pairs with chosen and rejected exchanged."""
        return replace(self, chosen=self.rejected, rejected=self.chosen)

    def to_state(self) -> dict[str, Any]:
        """Every field as plain values and tensors on the CPU, for `torch.save`; `from_state` makes the batch again."""
        return {"kind": type(self).__name__, **{f.name: _packed(getattr(self, f.name)) for f in fields(self)}}

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> PairBatch:
        """The batch that `to_state` took apart, of its own kind.

        Raises:
            ValueError: If no kind of this name is loaded; a trainer's module loads the kind that it learns from.
        """
        kinds = {kind.__name__: kind for kind in _kinds(PairBatch)}
        if state["kind"] not in kinds:
            known = ", ".join(sorted(kinds))
            raise ValueError(f"unknown kind of batch {state['kind']!r} (loaded: {known}); import its module first")
        kind = kinds[state["kind"]]
        return kind(**{f.name: _unpacked(state[f.name]) for f in fields(kind)})


@dataclass(frozen=True)
class NoisyStates:
    """Pairs on the noise path: the two halves stacked, chosen first.

    Attributes:
        conditioning: 2B rows.
        latents: Clean latents, [2B, C, ...].
        noise: The Gaussian sample, [2B, C, ...].
        timesteps: In the network's units, [2B].
        noisy_latents: alpha * latents + sigma * noise, [2B, C, ...].
        target: What the network should predict, [2B, C, ...].
        alphas: Signal scales at the timesteps, [2B], float64, on the CPU.
    """

    conditioning: Conditioning
    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    noisy_latents: Tensor
    target: Tensor
    alphas: Tensor


def _kinds(kind: type[PairBatch]) -> list[type[PairBatch]]:
    """A class of batches and all classes below it."""
    return [kind, *(found for child in kind.__subclasses__() for found in _kinds(child))]


def _packed(value: Any) -> Any:
    """A field of a batch as what `torch.load` reads with `weights_only`."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Conditioning):
        return {"conditioning": {name: _packed(tensor) for name, tensor in value.tensors.items()}}
    if isinstance(value, tuple):
        return {"draws": [(draw.seed, draw.epoch, draw.pair_id) for draw in value]}
    return value


def _unpacked(value: Any) -> Any:
    """What `_packed` was given."""
    if isinstance(value, Mapping):
        return Conditioning(value["conditioning"]) if "conditioning" in value else tuple(map(_draw, value["draws"]))
    return value


def _draw(key: Sequence[Any]) -> Draw:
    return Draw(*key)
