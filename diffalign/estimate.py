"""What a training run holds in memory and computes, from configuration files alone: `diffalign train --dry-run`.

Networks are built on the meta device, which has shapes and no storage, so that the answer is quick for any size.
"""

from __future__ import annotations

import copy
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from diffalign.backbones import LoRA, ModelSource
from diffalign.backbones.loading import policy_class, read_part
from diffalign.backbones.precision import DTYPES, halve
from diffalign.backbones.starting import check_start
from diffalign.checkpoints import CheckpointFolder
from diffalign.config import ConfigError, RunConfig, TrainingConfig, trainer_settings
from diffalign.data import load_pairs
from diffalign.quantization import BYTES_PER_WEIGHT

SMALLEST_8BIT = 4096
"""bitsandbytes keeps the state of smaller tensors in 32 bits."""


@dataclass(frozen=True)
class Estimate:
    """A run's plan.

    Attributes:
        parameters: Of the denoiser, adapters left out.
        trainable: Parameters an optimizer changes.
        memory: Bytes of one process by part, in the order they are needed.
        encoders: Bytes of autoencoder and text encoders, which leave memory before the first step.
        forwards: Cost of a pair in forward passes of the denoiser, by part.
        pairs_per_step: Over all processes.
        processes: How many were started.
        steps: Optimizer steps of the whole run.
        steps_done: Of these, in the checkpoint that would be resumed.
        pairs: To train on; None where it is not known before they are read.
    """

    parameters: int
    trainable: int
    memory: dict[str, int]
    encoders: int
    forwards: dict[str, float]
    pairs_per_step: int
    processes: int
    steps: int
    steps_done: int
    pairs: int | None

    @property
    def total(self) -> int:
        """Bytes of a process while it trains, without activations."""
        return sum(self.memory.values())

    def __str__(self) -> str:
        each = sum(self.forwards.values())
        parts = ", ".join(f"{name} {count:g}" for name, count in self.forwards.items() if count)
        visits = self.steps * self.pairs_per_step
        epochs = f"{visits / self.pairs:.2f} epochs of {self.pairs:,} pairs" if self.pairs else "pairs not known yet"
        done = f", {self.steps_done:,} of them done" if self.steps_done else ""
        rows = [(name, _gib(size)) for name, size in self.memory.items() if size]
        rows += [("together", _gib(self.total)), ("encoders, until pairs are encoded", _gib(self.encoders))]
        width = max(len(name) for name, _ in rows)
        return "\n".join(
            [
                f"trainable: {self.trainable:,} parameters, {100 * self.trainable / self.parameters:.3g} % "
                f"of the denoiser's {self.parameters:,}",
                f"memory of each of {self.processes} process(es), activations and the allocator's slack not included:",
                *(f"  {name:<{width}}  {size}" for name, size in rows),
                f"cost: {each:g} forward passes per pair ({parts}), "
                f"{each * self.pairs_per_step:,.0f} per optimizer step of {self.pairs_per_step:,} pairs",
                f"steps: {self.steps:,}{done}; {visits:,} pairs seen, {epochs}",
                "dry run: nothing was written",
            ]
        )


def estimate_run(config: RunConfig, source: ModelSource) -> Estimate:
    """The plan of a run; reads configuration files and the list of pairs, loads no weights and writes nothing.

    Args:
        config: The run.
        source: Its model, looked at already.
    """
    training, model = config.training, config.model
    kind = policy_class(source)
    parts = _denoisers(kind, source)
    parameters = sum(_count(part) for part in parts)
    trained: list[Tensor]
    lora = LoRA(**model.lora.model_dump()) if model.lora is not None else None
    if model.adapter is not None:
        lora = check_start(source, Path(model.adapter), lora)
    if lora is not None:
        for part in parts:
            kind.add_adapter_to(part, lora)
        trained = [p for part in parts for name, p in part.named_parameters() if "lora_" in name]
    else:
        trained = [p for part in parts for p in part.parameters()]
    numbers = sum(p.numel() for p in trained)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    memory = _weights(config, parts, trained, lora is not None) | {
        "adapters of the reference": 4 * numbers * (lora is not None and model.adapter is not None),
        "gradients": 4 * numbers,
        f"optimizer ({training.optimizer})": optimizer_bytes(training, trained),
        "moving average": 4 * numbers * training.use_ema,
        "rounded copies for autocast": 0 if training.mixed_precision == "no" else _rounded(parts, trained),
    }
    trainer, settings = trainer_settings(config)
    passes: dict[str, float] = trainer.forwards(settings)
    per_pair = passes["policy"]
    forwards = {**passes, "backward": per_pair if lora is not None else 2 * per_pair}
    if model.gradient_checkpointing is True:  # "selective" recomputes a part, which only shapes could tell
        forwards["recomputed activations"] = per_pair
    return Estimate(
        parameters=parameters,
        trainable=numbers,
        memory=memory,
        encoders=sum(_bytes(_encoder(source, part)) for part in kind.encoder_parts if source.parts.get(part)),
        forwards=forwards,
        pairs_per_step=training.per_device_train_batch_size * training.gradient_accumulation_steps * processes,
        processes=processes,
        steps=training.max_train_steps,
        steps_done=_steps_done(config),
        pairs=_pairs(config),
    )


def _denoisers(kind: Any, source: ModelSource) -> list[Any]:
    """The denoiser without storage; two where a model has two experts."""
    names = [part for part in (kind.part, *kind.more_parts) if source.parts.get(part) is not None]
    with torch.device("meta"):
        found = [getattr(diffusers, str(source.parts[part])).from_config(read_part(source, part)) for part in names]
        if source.parts.get("motion_adapter") and source.parts.get("unet") == "UNet2DConditionModel":
            motion = diffusers.MotionAdapter.from_config(read_part(source, "motion_adapter"))
            found = [diffusers.UNetMotionModel.from_unet2d(found[0], motion)]
    return found


def _encoder(source: ModelSource, part: str) -> nn.Module:
    name, settings = str(source.parts[part]), read_part(source, part)
    with torch.device("meta"):
        if hasattr(diffusers, name):
            module: nn.Module = getattr(diffusers, name).from_config(settings)
        else:
            encoder = getattr(transformers, name)
            module = encoder(encoder.config_class.from_dict(settings))
    return module


def _weights(config: RunConfig, parts: list[Any], trained: list[Tensor], adapters: bool) -> dict[str, int]:
    """Bytes of denoiser, reference copy and adapters."""
    dtype = DTYPES[config.training.mixed_precision]
    if not adapters:
        copies = [copy.deepcopy(part) for part in parts]
        if dtype != torch.float32:
            for part in copies:
                halve(part, dtype)
        return {"denoiser": sum(map(_bytes, parts)), "reference copy": sum(map(_bytes, copies))}
    own = {id(p) for p in trained}
    quantized = {id(layer.weight) for part in parts for layer in part.modules() if isinstance(layer, nn.Linear)}
    size = 0.0
    for parameter in (p for part in parts for p in part.parameters() if id(p) not in own):
        packed = config.model.quantization is not None and id(parameter) in quantized
        size += parameter.numel() * (BYTES_PER_WEIGHT[str(config.model.quantization)] if packed else dtype.itemsize)
    return {"denoiser": math.ceil(size), "adapters": 4 * sum(p.numel() for p in trained)}


def optimizer_bytes(training: TrainingConfig, trained: list[Tensor]) -> int:
    """Bytes of the optimizer's moments."""
    if training.optimizer == "adamw":
        return sum(8 * p.numel() for p in trained)
    if training.optimizer == "adamw_8bit":
        return sum((2 if p.numel() >= SMALLEST_8BIT else 8) * p.numel() for p in trained)
    # Adafactor keeps row and column means of matrices and whole moments of vectors
    return sum(4 * (p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.ndim > 1 else p.numel()) for p in trained)


def _rounded(parts: list[Any], trained: list[Tensor]) -> int:
    """Autocast keeps its 16-bit copies of float32 weights that are trained until the end of the forward pass."""
    own = {id(p) for p in trained}
    layers = (layer for part in parts for layer in part.modules())
    weights = (layer.weight for layer in layers if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d))
    return sum(2 * weight.numel() for weight in weights if id(weight) in own)


def _steps_done(config: RunConfig) -> int:
    wanted = config.training.resume_from_checkpoint
    path = CheckpointFolder(Path(config.output_dir)).find(wanted) if wanted else None
    return int(path.name.rpartition("-")[2]) if path is not None and path.name.rpartition("-")[2].isdecimal() else 0


def _pairs(config: RunConfig) -> int | None:
    """Pairs to train on where a file on this disk says so; nothing is fetched to find out."""
    from diffalign.configured import data_config

    learns_from = trainer_settings(config)[0].learns_from
    try:
        data = data_config(config, scored=learns_from == "scored")
    except ConfigError:
        return None  # `diffalign pairs` has not run yet
    if not data.check_source or (data.train_data_dir is None and not Path(str(data.dataset_name)).exists()):
        return None
    size = load_pairs(data, winners_only=learns_from == "winners").size
    return size - config.training.num_validation_pairs if size is not None else None


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _gib(size: int) -> str:
    return f"{size / 2**30:8.3f} GiB"
