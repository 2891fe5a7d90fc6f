"""Negative models as files: which kind they are, told before anything heavy loads, and their arithmetic.

Wang et al. 2025, "Diffusion-NPO" (arXiv:2505.11245): with theta the base, eta the offset of the model that is sampled
and delta the offset of the negative model, the unconditional branch of guidance has the weights

    theta_neg = theta + alpha * eta + b * delta,    alpha and b in [0, 1]

The released scripts speak of a merge weight m, with alpha = 1 - m and b = 1; all their command lines have m = 0. An eta
keeps the branches alike: were their errors independent with variance 1, guidance at omega = g - 1 would make
2 omega^2 + 2 omega + 1 of it (98.5 at g = 7.5) and burn the picture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from safetensors import SafetensorError, safe_open

from diffalign.backbones.loading import LORA_FILE, ModelSource, policy_class

if TYPE_CHECKING:
    from torch import Tensor

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
WEIGHTS = "diffusion_pytorch_model"
"""Name that diffusers gives to a denoiser's weights."""


@dataclass(frozen=True)
class NegativeModel:
    """Weights that people dislike, found and looked at, not loaded.

    Attributes:
        kind: "lora", an adapter; "whole", all weights of the denoiser.
        files: Of an adapter, the one file that diffusers' loader is pointed at. Of whole weights, all their files by
            the part of the pipeline that they are for.
        additive: Whether it is an adapter that adds to the weights; DoRA also scales them.
        started_from: What its training started from, if not from the base: its offset is counted from there.
    """

    kind: Literal["lora", "whole"]
    files: Mapping[str, tuple[Path, ...]]
    additive: bool
    started_from: NegativeModel | None = None

    @property
    def lora_file(self) -> Path:
        """The adapter's file."""
        return self.files["lora"][0]


def find_negative(source: ModelSource, name: str | Path) -> NegativeModel:
    """Looks at a negative model; reads names of tensors, no tensors.

    Args:
        source: The model that is sampled.
        name: Output folder of a run, a LoRA file, the denoiser's folder, or a file with the denoiser's whole weights.
            Which of them it is, its content says: published files of either kind are called LoRA.

    Raises:
        ValueError: If the model's family has no unconditional branch, or there are no such weights as safetensors.
    """
    policy_class(source).check_negative(source)
    path = Path(name).expanduser()
    if not path.exists():
        raise ValueError(
            f"negative model {str(name)!r} does not exist; give a run's output folder, a LoRA file, or the folder or "
            "file of a denoiser's weights"
        )
    if path.is_file():
        return _one_file(source, path)
    if (path / LORA_FILE).is_file():
        found = _one_file(source, path / LORA_FILE)
        return NegativeModel(found.kind, found.files, found.additive, _start(source, path))
    parts = _parts(source)
    files = {part: _weight_files(path / part) for part in parts}
    if all(files.values()):
        return NegativeModel("whole", files, False, _start(source, path))
    own = _weight_files(path)
    if len(own) == 1:
        return _one_file(source, own[0])
    if own and len(parts) == 1:
        return NegativeModel("whole", {parts[0]: own}, False)
    pickles = sorted(file.name for file in path.rglob("*") if file.suffix in PICKLES)
    if pickles and not own:
        raise _pickle(path / pickles[0])
    raise ValueError(
        f"negative model {path}: expected {LORA_FILE}, or safetensors of {' and '.join(parts)}, found neither"
    )


def _one_file(source: ModelSource, path: Path) -> NegativeModel:
    if path.suffix in PICKLES:
        raise _pickle(path)
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
    except SafetensorError as error:  # a pickle under this name, as some were published
        raise _pickle(path) from error
    if not any("lora" in key.lower() for key in keys):
        parts = _parts(source)
        if len(parts) > 1:
            raise ValueError(f"negative model {path}: one file for {' and '.join(parts)}; give their common folder")
        return NegativeModel("whole", {parts[0]: (path,)}, False)
    if any(key.startswith("text_encoder") or key.startswith("lora_te") for key in keys):
        raise ValueError(
            f"negative model {path}: its LoRA is for text encoders too, which both branches share; give one of the "
            "denoiser alone"
        )
    dora = any("dora_scale" in key or "lora_magnitude_vector" in key for key in keys)
    return NegativeModel("lora", {"lora": (path,)}, not dora)


def _pickle(path: Path) -> ValueError:
    return ValueError(
        f"negative model {path} is no safetensors file; pickles can run code when read: convert it elsewhere first"
    )


def _parts(source: ModelSource) -> list[str]:
    kind = policy_class(source)
    return [part for part in (kind.part, *kind.more_parts) if source.parts.get(part) is not None]


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """The files of one set of weights in a folder: of several variants the plain one, of a split one all."""
    plain, index = folder / f"{WEIGHTS}.safetensors", folder / f"{WEIGHTS}.safetensors.index.json"
    if plain.is_file():
        return (plain,)
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return tuple(folder / name for name in sorted(names))
    found = tuple(sorted(folder.glob("*.safetensors")))
    return found if len(found) == 1 else ()


def _start(source: ModelSource, run: Path) -> NegativeModel | None:
    """What the training of a run started from, by its `run.json`; None means the base."""
    facts = run / "run.json"
    start = json.loads(facts.read_text(encoding="utf-8")).get("started_from") if facts.is_file() else None
    if start is None:
        return None
    try:
        return find_negative(source, start)
    except ValueError as error:
        raise ValueError(f"{run} went on from {start!r}, from which its offset is counted: {error}") from error


# --- whole weights ---------------------------------------------------------------------------------------------------


def read_weights(files: Sequence[Path], names: Sequence[str]) -> dict[str, Tensor]:
    """Whole weights out of their files.

    Args:
        files: Safetensors.
        names: The tensors that must be there, and no others.

    Raises:
        ValueError: If other tensors are there: they are another network's.
    """
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    for file in files:
        state |= load_file(file)
    if state.keys() != set(names):
        odd = sorted(state.keys() ^ set(names))
        raise ValueError(
            f"negative model {files[0]}: expected the denoiser's {len(names)} tensors, found {len(state)}, of which "
            f"{len(odd)} differ, {odd[0]} for one; it belongs to another model"
        )
    return state


def mix(base: Mapping[str, Tensor], terms: Sequence[tuple[Mapping[str, Tensor], float]]) -> dict[str, Tensor]:
    """The base plus the sum of weight * (state - base), name by name, in float32; integers stay the base's.

    Args:
        base: Tensors by name.
        terms: Other states of the same names, with their weights.
    """
    mixed = {}
    for name, tensor in base.items():
        start = total = tensor.float() if tensor.is_floating_point() else tensor
        if tensor.is_floating_point():
            for state, weight in terms:
                total = total + weight * (state[name].to(start.device).float() - start)
        mixed[name] = total
    return mixed
