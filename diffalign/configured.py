"""What a configuration stands for: the device, the size, the policy and the data of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch

from diffalign.backbones import LoRA, ModelSource, load_policy
from diffalign.backbones.deep_cache import deep_cache_of
from diffalign.backbones.negative_files import NegativeModel, find_negative
from diffalign.config import ConfigError, ModelConfig, RunConfig
from diffalign.data import DataConfig
from diffalign.devices import pick_device
from diffalign.generation import INDEX_FILE, SamplingConfig
from diffalign.mining import SAMPLES_FILE
from diffalign.policy import Policy


def picture_size(config: RunConfig) -> tuple[int, int] | None:
    """Height and width of what a run encodes and draws, as the sections `model` and `data` say; None: the model's own.

    Raises:
        ConfigError: If they contradict each other.
    """
    wanted, data = config.model.resolution, config.data.size if config.data is not None else None
    size = (wanted, wanted) if isinstance(wanted, int) else wanted
    if config.data is not None and data is not None and size is not None and size != data:
        found = f"model.resolution is {wanted} and data.resolution is {config.data.resolution}"
        raise ConfigError(f"{found}; leave out data.resolution")
    return size or data


def load_model(
    model: ModelConfig,
    source: ModelSource,
    *,
    train: bool = False,
    adapter: str | None = None,
    start: str | None = None,
    size: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    sampling: SamplingConfig | None = None,
) -> Policy:
    """The policy of a configuration: how `train`, `pairs`, `sample` and `evaluate` all load it.

    Args:
        model: The section `model`.
        source: The model it names, looked at already.
        train: Whether to train it: with the adapters of `model.lora`, or whole.
        adapter: Trained weights to put on top.
        start: Trained weights that policy and reference both start from.
        size: Height and width in pixels; None takes the model's own.
        dtype: Of the denoiser's frozen weights; None means float32.
        device: None picks the accelerator that is there, or the CPU.
        sampling: What is drawn with it: compilation and deep caches; training asks for neither here.

    Raises:
        ValueError: If the model cannot be used, or cannot draw as `sampling` says; before weights are loaded.
    """
    deep_cache = None if sampling is None else deep_cache_of(source, sampling)
    policy: Any = load_policy(
        source,
        lora=LoRA(**model.lora.model_dump()) if train and model.lora is not None else None,
        train=train,
        adapter=adapter,
        start=start,
        dtype=dtype,
        device=device or pick_device(),
        attention=model.attention,
        size=size,
        num_frames=model.num_frames,
        quantization=model.quantization,
        options=model.options,
    )
    if model.vae_slicing or model.vae_tiling:
        policy.divide_vae(slicing=model.vae_slicing, tiling=model.vae_tiling)
    if model.channels_last:
        policy.to_channels_last()
    policy.deep_cache = deep_cache
    if sampling is not None and sampling.torch_compile:
        blocks = sampling.torch_compile == "blocks"
        policy.compile(model.torch_compile_backend, model.torch_compile_mode, blocks=blocks)
    return cast(Policy, policy)


def find_negative_model(source: ModelSource, sampling: SamplingConfig) -> NegativeModel | None:
    """The negative model that a section `sampling` names, looked at but not loaded.

    Raises:
        ValueError: If it cannot be used with this model.
    """
    return None if sampling.negative_model is None else find_negative(source, sampling.negative_model)


def pairs_folder(config: RunConfig) -> Path:
    """Where `diffalign pairs` writes, and where `train` reads if no other data are named."""
    return Path(config.output_dir) / "pairs"


def data_config(config: RunConfig, *, scored: bool = False) -> DataConfig:
    """The run's data: the section `data`, or what `diffalign pairs` made.

    Args:
        config: The run.
        scored: Single images with their rewards, for methods that learn from those; pairs otherwise.
    """
    if config.data is not None:
        if scored and config.data.format == "auto":
            return config.data.model_copy(update={"format": "scored"})
        if scored != (config.data.format == "scored"):
            wanted = "single images with rewards, format scored" if scored else "pairs"
            raise ConfigError(f"data.format is {config.data.format!r}, and this method learns from {wanted}")
        return config.data
    if config.pairs is None:
        raise ConfigError("config has neither a section 'data' nor 'pairs'; name the preference pairs to train on")
    folder = pairs_folder(config)
    name = SAMPLES_FILE if scored else INDEX_FILE
    if not (folder / name).is_file():
        what = f"scored images ({name})" if scored else "pairs"
        raise ConfigError(f"{folder} holds no {what} yet; run `diffalign pairs` with this config first")
    if scored:
        return DataConfig(train_data_dir=folder, index=name, format="scored", fps=config.sampling.fps)
    return DataConfig(train_data_dir=folder, fps=config.sampling.fps)
