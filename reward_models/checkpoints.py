"""Single published weight files: found, read without executing anything, and loaded completely or not at all."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from diffalign.reward_models.base import RewardInfo, WeightsError, WeightSpec
from diffalign.reward_models.weights import expected, locate, one_line

__all__ = ["LoadReport", "find_file", "load_complete", "read_shards", "read_tensors"]


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors of a file.

    Attributes:
        consumed: Names in the model that got a value.
        missing: Names in the model that got none.
        unexpected: Names in the file that the model does not have.
    """

    consumed: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether every tensor of the file went to one of the model, and the other way round."""
        return not self.missing and not self.unexpected


def find_file(
    info: RewardInfo, path_or_id: str | Path | None, spec: WeightSpec | None = None,
    local_files_only: bool | None = None,
) -> Path:  # fmt: skip
    """The local path of one published file, downloaded if need be.

    Args:
        info: Which model it is for.
        path_or_id: The file itself, a folder with it, a Hub id, or None for the published one.
        spec: Which file; None is the first of `info`. One that is not on the Hub must be at hand.
        local_files_only: Never ask the Hub; None follows HF_HUB_OFFLINE.

    Raises:
        WeightsError: If it is not there.
    """
    wanted = expected(info, spec)
    spec = spec or info.weights[0]
    if path_or_id is None and not spec.repo:
        raise WeightsError(f"cannot load {info.name}: {spec.filename!r} is not on the Hub; {wanted}")
    source, local = locate(info, path_or_id if path_or_id is not None else spec.repo, local_files_only)
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        if (path / spec.filename).is_file():
            return path / spec.filename
        found = ", ".join(sorted(f.name for f in path.iterdir())) or "nothing"
        raise WeightsError(
            f"cannot load {info.name}: folder {source!r} has no {spec.filename!r}, only: {found[:200]}; {wanted}"
        )
    try:
        return Path(hf_hub_download(source, spec.filename, local_files_only=local))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise WeightsError(f"cannot load {info.name} from Hub id {source!r}: {one_line(error)}; {wanted}") from error


def read_tensors(info: RewardInfo, path: Path, inside: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a pickle that holds nothing but tensors; on the CPU.

    Args:
        info: For the messages.
        path: The file.
        inside: Key of a pickled dictionary under which the tensors are; None for the dictionary itself.

    Raises:
        WeightsError: If the file is damaged, holds anything else, or has no such key.
    """
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, SafetensorError, pickle.UnpicklingError) as error:
        raise WeightsError(
            f"cannot read {str(path)!r} as weights of {info.name}: {one_line(error)}; {expected(info)}"
        ) from error
    state = content.get(inside) if inside is not None and isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        keys = sorted(map(str, content))[:5] if isinstance(content, Mapping) else type(content).__name__
        wanted = f"a key {inside!r} with tensors" if inside is not None else "tensors by name"
        raise WeightsError(f"{str(path)!r} holds no weights of {info.name}: expected {wanted}, found {keys}")
    return dict(state)


def read_shards(
    info: RewardInfo, path_or_id: str | Path | None, repo: str, local_files_only: bool | None = None
) -> dict[str, Tensor]:
    """The tensors of a folder in the layout of transformers: model.safetensors, or the shards that its index names.

    Args:
        info: For the messages.
        path_or_id: The folder, or a Hub id; None for `repo`.
        repo: Where it is published.
        local_files_only: Never ask the Hub; None follows HF_HUB_OFFLINE.

    Raises:
        WeightsError: If a file is missing or damaged.
    """
    single = WeightSpec(repo, "model.safetensors")
    try:
        index = find_file(info, path_or_id, WeightSpec(repo, f"{single.filename}.index.json"), local_files_only)
    except WeightsError:
        return read_tensors(info, find_file(info, path_or_id, single, local_files_only))
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{str(index)!r} is no index of the shards of {info.name}: {one_line(error)}") from error
    state: dict[str, Tensor] = {}
    for shard in shards:
        state |= read_tensors(info, find_file(info, path_or_id, WeightSpec(repo, shard), local_files_only))
    return state


def load_complete(
    info: RewardInfo,
    module: nn.Module,
    state: Mapping[str, Tensor],
    source: str | Path,
    *,
    rename: Callable[[str], str | None] | None = None,
    may_lack: Collection[str] = (),
) -> LoadReport:
    """Puts tensors into a module, in the type that the module has.

    Args:
        info: For the messages.
        module: What to fill; one on the meta device takes the tensors themselves instead of copies.
        state: Tensors by published name.
        source: Where they come from, for the messages.
        rename: A published name to the module's, or None for a tensor that is known not to be needed.
        may_lack: Names of the module that need no value from the file.

    Raises:
        WeightsError: If a tensor is missing, not known, given twice or of another shape; with counts and an example.
    """
    own = module.state_dict()
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        target = rename(name) if rename is not None else name
        if target is None:
            continue
        if target in renamed:
            raise WeightsError(f"cannot load {info.name} from {str(source)!r}: {target!r} is there twice ({name!r})")
        renamed[target] = value
    report = LoadReport(
        consumed=tuple(name for name in own if name in renamed),
        missing=tuple(name for name in own if name not in renamed and name not in may_lack),
        unexpected=tuple(name for name in renamed if name not in own),
    )
    problems = [*_named("are missing", report.missing), *_named("are not of this model", report.unexpected)]
    shapes = [n for n in report.consumed if own[n].shape != renamed[n].shape]
    if shapes:
        first = shapes[0]
        problems.append(f"{first!r} is {list(renamed[first].shape)} instead of {list(own[first].shape)}")
    if problems:
        total = f"the model has {len(own)} tensors, the file {len(state)}"
        raise WeightsError(f"cannot load {info.name} from {str(source)!r}: {'; '.join(problems)} ({total})")
    on_meta = any(tensor.is_meta for tensor in own.values())
    if on_meta:
        renamed = {name: value.to(own[name].dtype) for name, value in renamed.items()}
    module.load_state_dict(renamed, strict=False, assign=on_meta)
    return report


def _named(what: str, names: Iterable[str]) -> list[str]:
    found = sorted(names)
    return [f"{len(found)} tensors {what}, such as {found[0]!r}"] if found else []
