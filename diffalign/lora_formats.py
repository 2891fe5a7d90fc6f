"""LoRA files of Stable Diffusion, SDXL and FLUX.1 in the key layouts of other programs, and back.

A layer's adapter adds (alpha / rank) * up @ down to its weight. The layouts spell the layer and the tensors in other
ways, and keep alpha in other places:

    layout     key of a layer's first matrix                                     alpha
    diffusers  unet.<diffusers name>.lora.down.weight, transformer.<...>.lora_A.weight    one for all, in the metadata
    kohya      lora_unet_<name with underscores>.lora_down.weight                a tensor beside each layer
    comfyui    diffusion_model.<original name>.lora_down.weight                  a tensor beside each layer

Who reads what, by their source code:

- diffusers' `load_lora_weights`: diffusers and kohya for all three families, comfyui for FLUX.1.
- kohya's sd-scripts and the web interfaces that follow it: kohya.
- ComfyUI: kohya and comfyui. Of the diffusers layout it reads FLUX.1 files too, but not their metadata: where alpha is
  not the rank, the adapter then has the wrong strength, which an exported file has not.

What is verified: diffusers' loader draws the same image from an exported file wherever it reads the layout, and its
single-file converters confirm the original names. The other programs have not been run.

In the kohya layout SD layers keep their diffusers names, SDXL and FLUX.1 layers have the original ones, as the files
of sd-scripts do. The original FLUX.1 has one layer for queries, keys and values: their adapters become one of three
(or, with the MLP of a single block, four) times the rank, the first matrices stacked, the second ones block-diagonal,
which is exact; reading splits it again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import safetensors.torch
import yaml
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffalign.backbones.loading import BUILTIN, LORA_FILE, inspect_model
from diffalign.lora_layouts import Adapter, Adapters, Family, Layout, read_adapters, write_adapters
from diffalign.resumable import write_atomically

__all__ = [
    "PIPELINES",
    "Adapter",
    "Adapters",
    "Family",
    "Layout",
    "export",
    "export_lora",
    "import_lora",
    "is_hub_id",
    "lora_file",
    "pipeline_class",
    "read_adapters",
    "write_adapters",
]

PIPELINES: Mapping[str, Family] = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLImg2ImgPipeline": "sdxl-refiner",
    "FluxPipeline": "flux",
}
"""Pipeline class -> family, of the families whose layers have names in other layouts."""


# --- files -----------------------------------------------------------------------------------------------------------


def export_lora(
    source: str | Path, output: str | Path, layout: Layout = "kohya", *, family: Family | None = None
) -> Path:
    """Writes a LoRA file in the key layout of another program.

    Args:
        source: A run's output folder, or a LoRA file in any of the layouts.
        output: The file to write, *.safetensors.
        layout: "kohya", "comfyui" or "diffusers"; see the module's description for who reads which.
        family: Of the model; None finds it by the run's configuration, else by the names of the layers.

    Returns:
        The file written.

    Raises:
        ValueError: If there is no LoRA file, it holds something else than LoRA matrices of the denoiser, the family
            cannot be told or has no such layout, or the output is not a new *.safetensors file.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"unknown layout {layout!r} (available: {', '.join(get_args(Layout))})")
    if family is not None and family not in get_args(Family):
        raise ValueError(f"unknown family {family!r} (available: {', '.join(get_args(Family))})")
    path, target = lora_file(source), Path(output)
    if target.suffix != ".safetensors" or target.is_dir():
        raise ValueError(f"output {str(output)!r} is no *.safetensors file name, for example lora.safetensors")
    if target.exists() and target.samefile(path):
        raise ValueError(f"output {str(output)!r} is the file that is read; choose another name")
    adapters = read_adapters(*_read(path))
    if layout != "diffusers":
        family = family or _family_of_run(path.parent) or _family_of_layers(adapters, path)
    tensors, metadata = write_adapters(adapters, layout, family)
    target.parent.mkdir(parents=True, exist_ok=True)
    content = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(target, safetensors.torch.save(content, metadata={"format": "pt", **metadata}))
    return target


def import_lora(source: str | Path, folder: str | Path) -> Path:
    """Writes a LoRA file of any layout as `pytorch_lora_weights.safetensors`, as this project and diffusers read it.

    Args:
        source: The file.
        folder: Where to write; `load_policy(..., adapter=folder)` and `pipe.load_lora_weights(folder)` read it.

    Returns:
        The file written.

    Raises:
        ValueError: As `export_lora`.
    """
    return export_lora(source, Path(folder) / LORA_FILE, "diffusers")


def lora_file(source: str | Path) -> Path:
    """The LoRA file of a run's folder, or the file itself.

    Raises:
        ValueError: If there is none.
    """
    path = Path(source)
    if path.is_dir():
        path = path / LORA_FILE
        if not path.is_file():
            raise ValueError(
                f"{source} holds no {LORA_FILE}: training has not finished, or it was full fine-tuning, whose weights "
                "have the diffusers layout and no LoRA"
            )
    if not path.is_file():
        raise ValueError(f"{str(source)!r} does not exist; give a run's folder or a LoRA file (*.safetensors)")
    if path.suffix != ".safetensors":
        raise ValueError(f"{str(source)!r} is no *.safetensors file; pickle files can run code and are not read")
    return path


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); make it again") from error


def _family_of_run(folder: Path) -> Family | None:
    """The family by the run's `config.yaml`; None where there is none or its model is out of reach."""
    config = folder / "config.yaml"
    if not config.is_file():
        return None
    try:
        model = yaml.safe_load(config.read_text(encoding="utf-8"))["model"]
        pipeline = pipeline_class(model["pretrained_model_name_or_path"], model.get("revision"))
    except (KeyError, TypeError, yaml.YAMLError):
        return None
    if pipeline is not None and pipeline not in PIPELINES:
        known = ", ".join(PIPELINES)
        raise ValueError(f"the layers of a {pipeline} have names in the diffusers layout only (others: {known})")
    return PIPELINES[pipeline] if pipeline else None


def pipeline_class(name: str, revision: str | None = None) -> str | None:
    """A model's pipeline class, as far as this machine knows it: nothing is asked of the Hub, None if it is unknown.

    Args:
        name: As `inspect_model` takes it; of a model on the Hub the files are read that training left in the cache.
        revision: Branch, tag or commit on the Hub.
    """
    if not is_hub_id(name):
        try:
            return inspect_model(name).family
        except ValueError:
            return None
    index = try_to_load_from_cache(name, "model_index.json", revision=revision)
    if not isinstance(index, str):
        return None
    found = json.loads(Path(index).read_text(encoding="utf-8")).get("_class_name")
    return None if found is None else str(found)


def is_hub_id(name: str) -> bool:
    """Whether a name is one of the Hub, not a folder here nor the embedded model."""
    return name.count("/") == 1 and not name.startswith((BUILTIN, ".", "/", "~")) and not Path(name).exists()


def _family_of_layers(adapters: Adapters, path: Path) -> Family:
    """SD and SDXL differ in the number of blocks per transformer; transformers look too much alike."""
    if all(name.startswith("unet.") for name in adapters):
        return "sdxl" if any(re.search(r"\.transformer_blocks\.[1-9]", name) for name in adapters) else "sd"
    raise ValueError(f"{path}: the layers do not tell of which model they are; say it with family, such as flux")


# --- the command -----------------------------------------------------------------------------------------------------


def export(source: str, layout: str, output: str, family: str | None = None) -> str:
    """Body of `diffalign export`: to another program's key layout, or back with the layout "diffusers"."""
    if layout == "diffusers" and not output.endswith(".safetensors"):
        return f"LoRA in the diffusers layout: {import_lora(source, output)}"
    path = export_lora(source, output, layout, family=family)  # type: ignore[arg-type]  # checked there
    return f"LoRA in the {layout} layout: {path}"
