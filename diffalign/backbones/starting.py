"""Trained weights that training goes on from: what their files say, checked before any weights load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffalign.backbones.loading import LORA_FILE, LoRA, ModelSource, policy_class

METADATA = "lora_adapter_metadata"
"""Under this key of a LoRA file diffusers keeps the adapter's settings, as JSON."""


def check_start(source: ModelSource, folder: Path, lora: LoRA | None) -> LoRA | None:
    """The adapter that training goes on with, by its file; None where the folder holds whole weights.

    Args:
        source: The model.
        folder: As `Policy.save_trained` wrote it.
        lora: What the configuration says, if anything: with an adapter, its rank, alpha and kind must be the file's.

    Raises:
        ValueError: If the folder holds nothing to start from, or something other than `lora` says.
    """
    path = folder / LORA_FILE
    if not path.is_file():
        kind = policy_class(source)
        names = [part for part in (kind.part, *kind.more_parts) if source.parts.get(part) is not None]
        if not all(any((folder / part).glob("*.safetensors")) for part in names):
            raise ValueError(
                f"model.adapter: {folder} holds neither {LORA_FILE} nor safetensors in {' and '.join(names)}; "
                "give the output folder of a finished run"
            )
        if lora is not None:
            raise ValueError(
                f"model.adapter: {folder} holds whole weights, on which a new LoRA would fit no published model; leave "
                "out model.lora, or save a pipeline with these weights and name it as pretrained_model_name_or_path"
            )
        return None
    found = read_lora(path)
    if lora is None:
        return found
    for name in ("rank", "alpha", "use_dora", "use_rslora"):
        said, there = getattr(lora, name), getattr(found, name)
        if name == "alpha":
            said = lora.rank if said is None else said
        if said != there:
            raise ValueError(
                f"model.lora.{name} is {said} and the adapter that training goes on from has {there} ({path}); "
                "leave out model.lora"
            )
    return found


def read_lora(path: Path) -> LoRA:
    """Rank, alpha and layers of an adapter, by its file's metadata.

    Raises:
        ValueError: If the file does not say: it was not written by this project or a new diffusers.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            packed: dict[str, Any] = json.loads((file.metadata() or {}).get(METADATA, "{}"))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); make it again") from error
    settings = {key.partition(".")[2]: value for key, value in packed.items()}
    if "r" not in settings:
        raise ValueError(
            f"{path}: expected rank and layers in the file's metadata; `diffalign export --layout diffusers` adds them"
        )
    return LoRA(
        rank=int(settings["r"]),
        alpha=float(settings.get("lora_alpha", settings["r"])),
        target_modules=tuple(settings.get("target_modules") or ()) or None,
        use_dora=bool(settings.get("use_dora")),
        use_rslora=bool(settings.get("use_rslora")),
    )
