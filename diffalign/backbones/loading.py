"""Finds a model, checks what can be checked before any weights load, and builds its policy."""

from __future__ import annotations

import difflib
import importlib
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.predictions import Prediction

if TYPE_CHECKING:
    import torch

    from diffalign.policy import Policy

BUILTIN = "diffalign://"
FAMILIES = {"StableDiffusionPipeline": ("diffalign.backbones.sd", "StableDiffusionPolicy")}
"""Pipeline class in `model_index.json` -> module and class of its policy."""


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on the attention projections, through peft.

    Attributes:
        rank: Rank of every adapter.
        alpha: Scale; the adapter is multiplied by alpha / rank. None means alpha = rank.
        target_modules: Names of the layers that get one.
        seed: Of the initial weights; the same seed gives the same run.
    """

    rank: int = 8
    alpha: float | None = None
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank must be at least 1, got {self.rank}")


@dataclass(frozen=True)
class ModelSource:
    """A model that was found and looked at, not loaded.

    Attributes:
        name: What the user wrote.
        location: Local folder, or the Hub id.
        family: Pipeline class of `model_index.json`.
        prediction: What its denoiser predicts, by its scheduler's configuration.
    """

    name: str
    location: str
    family: str
    prediction: Prediction
    revision: str | None = None
    variant: str | None = None


def inspect_model(name: str, revision: str | None = None, variant: str | None = None) -> ModelSource:
    """Finds a pipeline and reads its small configuration files; loads no weights.

    Args:
        name: A folder in the diffusers layout, a Hub id, or `diffalign://shapes` for the embedded pipeline.
        revision: Branch, tag or commit on the Hub.
        variant: Weight file variant such as "fp16".

    Raises:
        ValueError: If the model is missing, has pickle weights only, or is of an unknown family.
    """
    folder = _local_folder(name)
    location = str(folder) if folder is not None else name
    index = _read_json(folder, name, "model_index.json", revision)
    family = str(index.get("_class_name"))
    if family not in FAMILIES:
        raise ValueError(f"{name}: pipeline class {family!r} is not supported yet (supported: {', '.join(FAMILIES)})")
    if folder is not None:
        _refuse_pickle(folder, index)
    scheduler = _read_json(folder, name, "scheduler/scheduler_config.json", revision)
    prediction = Prediction.from_diffusers(str(scheduler.get("prediction_type", "epsilon")))
    return ModelSource(name, location, family, prediction, revision, variant)


def _local_folder(name: str) -> Path | None:
    if name.startswith(BUILTIN):
        known = {"shapes": "assets/pipeline"}
        key = name.removeprefix(BUILTIN)
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {BUILTIN}{near[0]}?" if near else ""
            raise ValueError(f"unknown embedded model {name!r}{hint} (available: {BUILTIN}shapes)")
        folder = Path(str(resources.files("diffalign.shapes").joinpath(known[key])))
    else:
        folder = Path(name).expanduser()
        is_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
        if not folder.exists() and is_hub_id:
            return None
    if not folder.is_dir():
        raise ValueError(f"model folder {name!r} does not exist; give a diffusers folder or a Hub id (owner/name)")
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{name}: no model_index.json in this folder; expected a pipeline saved by save_pretrained")
    return folder


def _read_json(folder: Path | None, name: str, file: str, revision: str | None) -> dict[str, Any]:
    if folder is not None:
        path = folder / file
        if not path.is_file():
            raise ValueError(f"{name}: {file} is missing; expected a pipeline saved by save_pretrained")
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            path = Path(hf_hub_download(name, file, revision=revision))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            raise ValueError(
                f"model {name!r} is neither a folder here nor to be had from the Hub "
                f"({type(error).__name__} for {file}); check the spelling, the connection and `hf auth login`"
            ) from error
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{name}: {file} is not valid JSON ({error}); save the pipeline again") from error
    return content


def _refuse_pickle(folder: Path, index: dict[str, Any]) -> None:
    for part in ("unet", "vae", "text_encoder"):
        if not index.get(part) or index[part][0] is None:
            continue
        here = folder / part
        if any(here.glob("*.safetensors")):
            continue
        if any(f.suffix in (".bin", ".pt", ".ckpt") for f in here.glob("*")):
            raise ValueError(
                f"{folder}: {part} has pickle weights only, which can run code when read; expected *.safetensors "
                "(load it once elsewhere and save it with save_pretrained)"
            )
        raise ValueError(f"{folder}: {part} has no weights; expected *.safetensors in {here}")


def load_policy(
    name: str | ModelSource,
    *,
    lora: LoRA | None = None,
    train: bool = False,
    adapter: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    attention: str = "native",
    revision: str | None = None,
    variant: str | None = None,
) -> Policy:
    """Loads a pipeline as a policy.

    Args:
        name: Folder, Hub id or `diffalign://shapes`, or the result of `inspect_model`.
        lora: Train these adapters; None with `train` means full fine-tuning.
        train: Whether weights will be trained; keeps a frozen reference.
        adapter: Trained weights to put on top, as `Policy.save_trained` wrote them.
        dtype: Of the denoiser's frozen weights; trained weights are always float32. None means float32.
        device: Where to run.
        attention: See `diffalign.attention.set_attention`.
        revision: Branch, tag or commit on the Hub.
        variant: Weight file variant such as "fp16".

    Raises:
        ValueError: If the model cannot be used; see `inspect_model`.
    """
    source = name if isinstance(name, ModelSource) else inspect_model(name, revision, variant)
    module, attribute = FAMILIES[source.family]
    policy_class = getattr(importlib.import_module(module), attribute)
    policy: Policy = policy_class.load(source, lora=lora, train=train, dtype=dtype, device=device, attention=attention)
    if adapter is not None:
        policy.load_trained(Path(adapter))
    return policy
