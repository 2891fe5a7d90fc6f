"""Finds a model, checks what can be checked before any weights load, and builds its policy."""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from diffalign.backbones.options import FamilyOptions
from diffalign.predictions import Prediction
from diffalign.validation import explain

if TYPE_CHECKING:
    import torch

    from diffalign.policy import Policy
    from diffalign.quantization import Quantization

BUILTIN = "diffalign://"
EMBEDDED = {
    "shapes": "assets/pipeline",
    "shapes_flow": "assets/flow_pipeline",
    "shapes_video": "assets/video_pipeline",
}
"""The pipelines that ship with the package, in the folder of `diffalign.shapes`."""
LORA_FILE = "pytorch_lora_weights.safetensors"
"""Name of a LoRA file in a run's folder, the one diffusers looks for."""
UNUSED_PARTS = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of published pipelines that nothing here uses; they are not loaded."""
FAMILIES = {
    "StableDiffusionPipeline": "sd:StableDiffusionPolicy",
    "StableDiffusionXLPipeline": "sdxl:StableDiffusionXLPolicy",
    "StableDiffusionXLImg2ImgPipeline": "sdxl:StableDiffusionXLRefinerPolicy",
    "StableDiffusion3Pipeline": "sd3:StableDiffusion3Policy",
    "FluxPipeline": "flux:FluxPolicy",
    "Flux2Pipeline": "flux2:Flux2Policy",
    "Flux2KleinPipeline": "flux2:Flux2KleinPolicy",
    "QwenImagePipeline": "qwen_image:QwenImagePolicy",
    "ZImagePipeline": "z_image:ZImagePolicy",
    "SanaPipeline": "sana:SanaPolicy",
    "AnimateDiffPipeline": "animatediff:AnimateDiffPolicy",
    "TextToVideoSDPipeline": "text_to_video:TextToVideoPolicy",
    "CogVideoXPipeline": "cogvideox:CogVideoXPolicy",
    "WanPipeline": "wan:WanPolicy",
    "LTXPipeline": "ltx:LTXPolicy",
    "HunyuanVideoPipeline": "hunyuan_video:HunyuanVideoPolicy",
    "MochiPipeline": "mochi:MochiPolicy",
}
"""Pipeline class in `model_index.json` -> module in this folder and class of its policy."""


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on the attention projections, through peft.

    Attributes:
        rank: Rank of every adapter.
        alpha: Scale; the adapter is multiplied by alpha / rank. None means alpha = rank.
        target_modules: Names of the layers that get one; None takes the family's, its attention projections.
        seed: Of the initial weights; the same seed gives the same run.
        use_dora: Decompose weights into size and direction (Liu et al. 2024, arXiv:2402.09353).
        use_rslora: Scale by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732).
    """

    rank: int = 8
    alpha: float | None = None
    target_modules: tuple[str, ...] | None = None
    seed: int = 0
    use_dora: bool = False
    use_rslora: bool = False

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
        parts: Parts of the pipeline by `model_index.json`: name -> class, or None where there is none.
    """

    name: str
    location: str
    family: str
    prediction: Prediction
    revision: str | None = None
    variant: str | None = None
    parts: Mapping[str, str | None] = field(default_factory=dict)


def inspect_model(name: str | Path, revision: str | None = None, variant: str | None = None) -> ModelSource:
    """Finds a pipeline and reads its small configuration files; loads no weights.

    Args:
        name: A folder in the diffusers layout, a Hub id, or an embedded pipeline: `diffalign://shapes` (UNet),
            `diffalign://shapes_flow` (flow transformer) or `diffalign://shapes_video` (clips).
        revision: Branch, tag or commit on the Hub.
        variant: Weight file variant such as "fp16".

    Raises:
        ValueError: If the model is missing, has pickle weights only, or is of an unknown family.
    """
    name = str(name)
    folder = _local_folder(name)
    location = str(folder) if folder is not None else name
    index = _read_json(folder, name, "model_index.json", revision)
    family = str(index.get("_class_name"))
    if family not in FAMILIES:
        raise ValueError(
            f"{name}: pipeline class {family!r} is not supported (supported: {', '.join(FAMILIES)}); "
            "docs/adding_a_model.md shows how to add a family"
        )
    parts = {key: value[1] for key, value in index.items() if isinstance(value, list) and len(value) == 2}
    if folder is not None:
        _refuse_pickle(folder, parts)
    scheduler = _read_json(folder, name, "scheduler/scheduler_config.json", revision)
    return ModelSource(name, location, family, _prediction(scheduler), revision, variant, parts)


def read_part(source: ModelSource, part: str) -> dict[str, Any]:
    """The configuration of a part of the pipeline, `<part>/config.json`.

    Raises:
        ValueError: If there is none.
    """
    return _read_json(_local_folder(source.name), source.name, f"{part}/config.json", source.revision)


def read_index(source: ModelSource) -> dict[str, Any]:
    """The pipeline's own configuration, `model_index.json`."""
    return _read_json(_local_folder(source.name), source.name, "model_index.json", source.revision)


def _prediction(scheduler: Mapping[str, Any]) -> Prediction:
    """A scheduler's configuration names what the denoiser predicts; flow-matching ones only by their class."""
    if str(scheduler.get("_class_name", "")).startswith("FlowMatch"):
        return Prediction.VELOCITY
    return Prediction.from_diffusers(str(scheduler.get("prediction_type", "epsilon")))


def _local_folder(name: str) -> Path | None:
    if name.startswith(BUILTIN):
        key = name.removeprefix(BUILTIN)
        if key not in EMBEDDED:
            near = difflib.get_close_matches(key, EMBEDDED, n=1)
            hint = f"; did you mean {BUILTIN}{near[0]}?" if near else ""
            known = ", ".join(BUILTIN + name for name in EMBEDDED)
            raise ValueError(f"unknown embedded model {name!r}{hint} (available: {known})")
        folder = Path(str(resources.files("diffalign.shapes").joinpath(EMBEDDED[key])))
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


def _refuse_pickle(folder: Path, parts: Mapping[str, str | None]) -> None:
    """Every part that is a model (it has a config.json) must have its weights as safetensors."""
    for part, kind in parts.items():
        here = folder / part
        is_model = here.is_dir() and ((here / "config.json").is_file() or any(here.glob("*.bin")))
        if kind is None or part in UNUSED_PARTS or (here.is_dir() and not is_model):
            continue
        if any(here.glob("*.safetensors")):
            continue
        if any(f.suffix in (".bin", ".pt", ".ckpt") for f in here.glob("*")):
            raise ValueError(
                f"{folder}: {part} has pickle weights only, which can run code when read; expected *.safetensors "
                "(load it once elsewhere and save it with save_pretrained)"
            )
        raise ValueError(f"{folder}: {part} has no weights; expected *.safetensors in {here}")


def load_tokenizers(source: ModelSource) -> dict[str, Any]:
    """All tokenizers of a pipeline by their parts, read and checked before any weights are.

    Raises:
        ValueError: If one of them has no vocabulary.
    """
    import transformers

    found = {}
    for part, kind in source.parts.items():
        if part.startswith("tokenizer") and kind is not None and "Tokenizer" in kind:
            tokenizer = getattr(transformers, kind).from_pretrained(
                source.location, subfolder=part, revision=source.revision
            )
            check_tokenizer(source, part, tokenizer)
            found[part] = tokenizer
    return found


def check_tokenizer(source: ModelSource, part: str, tokenizer: Any) -> None:
    """Refuses a tokenizer without vocabulary, which transformers 5 makes silently where its files are missing.

    Args:
        source: The model.
        part: The tokenizer's folder, such as "tokenizer_2".
        tokenizer: As it was read.

    Raises:
        ValueError: If the tokenizer knows its special tokens only.
    """
    vocabulary = tokenizer.get_vocab()
    if set(vocabulary) <= {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}:
        here = Path(source.location) / part
        files = f", only {', '.join(sorted(f.name for f in here.iterdir()))}" if here.is_dir() else ""
        raise ValueError(
            f"{source.name}: the {type(tokenizer).__name__} in the folder {part} has no vocabulary, only "
            f"{len(vocabulary)} special tokens; its files (tokenizer.json, or vocab.json and merges.txt, or "
            f"spiece.model) are missing there{files}: download the model again"
        )


def inner_tokenizer(component: Any) -> Any:
    """The tokenizer inside a multimodal processor, which some pipelines call their tokenizer; others unchanged."""
    return getattr(component, "tokenizer", component)


def check_options(source: ModelSource, options: Mapping[str, Any]) -> FamilyOptions:
    """The settings of `model.options`, checked by the model's family.

    Raises:
        ValueError: If a key or a value is not the family's; one line for each.
    """
    kind: type[FamilyOptions] = policy_class(source).Options
    try:
        return kind(**options)
    except ValidationError as error:
        raise ValueError(explain(error, "model.options", kind.model_fields)) from error


def check_gradient_checkpointing(source: ModelSource) -> None:
    """Refuses denoisers that cannot recompute their activations, which diffusers would say after loading them.

    Raises:
        ValueError: If it cannot.
    """
    import diffusers

    kind = policy_class(source)
    for part in (kind.part, *kind.more_parts):
        name = source.parts.get(part)
        if name is not None and not getattr(diffusers, name)._supports_gradient_checkpointing:
            raise ValueError(f"model.gradient_checkpointing: {name} of {source.name} cannot do it; leave it out")


def check_repeated_blocks(source: ModelSource) -> None:
    """Refuses denoisers that name no blocks to be compiled by themselves, which diffusers would say after loading them.

    Raises:
        ValueError: If it names none.
    """
    import diffusers

    kind = policy_class(source)
    for part in (kind.part, *kind.more_parts):
        name = source.parts.get(part)
        if name is not None and not getattr(diffusers, name)._repeated_blocks:
            raise ValueError(f"model.torch_compile: {name} of {source.name} names no blocks; set it to true")


def policy_class(source: ModelSource) -> Any:
    """The class of a model's family, a subclass of `diffalign.backbones.base.PipelinePolicy`."""
    module, _, attribute = FAMILIES[source.family].partition(":")
    return getattr(importlib.import_module(f"diffalign.backbones.{module}"), attribute)


def load_policy(
    name: str | Path | ModelSource,
    *,
    lora: LoRA | None = None,
    train: bool = False,
    adapter: str | Path | None = None,
    start: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    attention: str = "native",
    size: tuple[int, int] | None = None,
    num_frames: int | None = None,
    quantization: Quantization | None = None,
    options: Mapping[str, Any] | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> Policy:
    """Loads a pipeline as a policy.

    Args:
        name: Folder, Hub id or `diffalign://shapes`, or the result of `inspect_model`.
        lora: Train these adapters; None with `train` means full fine-tuning.
        train: Whether weights will be trained; keeps a frozen reference.
        adapter: Trained weights to put on top, as `Policy.save_trained` wrote them; the reference is the base model.
        start: Trained weights that policy and reference both start from: training goes on from an earlier run, and with
            `adapter` the two are compared. If it is a LoRA, that one is trained further, and `lora` may say no other.
        dtype: Of the denoiser's frozen weights; trained weights are always float32. None means float32.
        device: Where to run.
        attention: See `diffalign.attention.set_attention`.
        size: Height and width in pixels of what is encoded and drawn; None takes the model's own.
        num_frames: Frames of a video; None takes the model's own.
        quantization: "nf4" or "int8" for the denoiser's frozen weights; see `diffalign.quantization`.
        options: What the family can be told, by the names of its `Options`.
        revision: Branch, tag or commit on the Hub.
        variant: Weight file variant such as "fp16".

    Raises:
        ValueError: If the model cannot be used; see `inspect_model`.
    """
    from diffalign.backbones.starting import check_start

    source = name if isinstance(name, ModelSource) else inspect_model(name, revision, variant)
    chosen = check_options(source, options or {})
    first = check_start(source, Path(start), lora) if start is not None else None
    if quantization is not None and train and lora is None and first is None:
        raise ValueError("model.quantization: quantized weights cannot be trained; add adapters with model.lora")
    policy: Policy = policy_class(source).load(
        source,
        lora=None if first is not None else lora,
        train=train,
        start=Path(start) if start is not None else None,
        dtype=dtype,
        device=device,
        attention=attention,
        size=size,
        num_frames=num_frames,
        quantization=quantization,
        options=chosen,
    )
    if adapter is not None:
        policy.load_trained(Path(adapter))
    return policy
