"""`diffalign train`: everything that can be refused first, then data, policy, trainer and loop."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from diffalign import checkpoints
from diffalign.backbones import LoRA, ModelSource, inspect_model
from diffalign.backbones.loading import check_gradient_checkpointing, check_options, policy_class
from diffalign.backbones.precision import DTYPES
from diffalign.backbones.starting import check_start
from diffalign.checkpoints import CheckpointFolder, write_text
from diffalign.config import ConfigError, RunConfig, dump_config, trainer_settings
from diffalign.configured import data_config, load_model, pick_device, picture_size
from diffalign.data import PairSource, check_media, check_source, encode_pairs, load_pairs
from diffalign.loop import fit, make_accelerator
from diffalign.media_checks import check_media_settings, check_scorers
from diffalign.policy import Policy
from diffalign.processes import launched
from diffalign.quantization import check_quantization
from diffalign.training_checks import check_training
from diffalign.validating import Validation

logger = logging.getLogger("diffalign")


def train_config(config: RunConfig, say: Callable[[str], None] | None = None) -> Path:
    """Trains as `config` says and returns the output folder.

    Args:
        config: The run.
        say: Where the method's line with kappa goes; the log if None.

    Raises:
        ValueError: If the configuration, model, data or checkpoint cannot be used; before any weights are loaded.
    """
    source = checked(config)
    trainer_class, settings = trainer_settings(config)
    training = config.training.model_copy(update={"output_dir": config.output_dir})
    data = data_config(config)
    check_source(data)
    whole = config.model_dump(mode="json")
    _check_resume(training, whole)
    accelerator = make_accelerator(training)
    pair_set = load_pairs(data)
    check_media(pair_set, policy_class(source))
    policy = training_policy(config, source, accelerator.device)
    cache = Path(data.encoded_dir or Path(config.output_dir) / "cache")
    encoded = encode_pairs(pair_set, policy, data, cache, processes=launched())
    policy.free_encoders()
    train_view, validation_view = encoded, None
    if training.num_validation_pairs:
        train_view, validation_view = encoded.split(training.num_validation_pairs, config.seed)
    trainer = trainer_class(policy, settings)
    if accelerator.is_main_process:
        (say or logger.info)(trainer.describe())
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
        write_text(Path(config.output_dir) / "config.yaml", dump_config(config))
        write_text(
            Path(config.output_dir) / "run.json",
            json.dumps(
                {
                    "method": trainer.describe(),
                    **trainer.facts(),
                    "pairs": len(train_view),
                    "cache": encoded.fingerprint,
                    "started_from": config.model.adapter,
                },
                indent=2,
            ),
        )
    pair_source = PairSource(
        train_view,
        seed=config.seed,
        batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        caption_dropout=settings.caption_dropout,
    )
    validate = Validation(trainer, config, validation_view, accelerator.device, accelerator.is_main_process)
    # Without `end_training`, so that `evaluate` can follow in the same processes; the command line ends their talk.
    batches = trainer.source(pair_source, config.seed)
    return fit(trainer, batches, training, settings=whole, accelerator=accelerator, validate=validate)


def checked(config: RunConfig) -> ModelSource:
    """The model of a training run, if method, model and settings fit together; loads no weights."""
    trainer_class, _ = trainer_settings(config)
    if trainer_class.learns_from == "rollouts":
        raise ConfigError(
            f"trainer {config.trainer['name']!r} learns from rollouts, which `diffalign train` does not make yet; call "
            "diffalign.fit with a diffalign.rollout_source.RolloutSource from Python"
        )
    model = config.model
    source = inspect_model(model.pretrained_model_name_or_path, model.revision, model.variant)
    check_options(source, model.options)
    lora = LoRA(**model.lora.model_dump()) if model.lora is not None else None
    if model.adapter is not None:
        lora = check_start(source, Path(model.adapter), lora)
    if model.gradient_checkpointing:
        check_gradient_checkpointing(source)
    if config.training.validation_steps and config.training.validation_prompts:
        policy_class(source).check_sampling(source)
    if model.quantization is not None:
        if lora is None:
            raise ConfigError("model.quantization: quantized weights cannot be trained; add adapters with model.lora")
        check_quantization(model.quantization, pick_device())
    law = getattr(trainer_settings(config)[1], "timestep_sampling", "uniform")
    check_training(config, source.prediction, law)
    picture_size(config)
    check_media_settings(
        source, num_frames=model.num_frames, options=model.options, data=config.data, sampling=config.sampling
    )
    if config.training.validation_prompts and config.training.reward_model is not None:
        from diffalign.reward_models import reward_model_info

        check_scorers(source, [reward_model_info(config.training.reward_model)])
    trainer_class.check_prediction(source.prediction)
    return source


def training_policy(config: RunConfig, source: ModelSource, device: torch.device) -> Policy:
    """The policy of a run, ready to be trained."""
    model = config.model
    policy: Any = load_model(
        model,
        source,
        train=True,
        start=model.adapter,
        size=picture_size(config),
        dtype=DTYPES[config.training.mixed_precision],
        device=device,
    )
    if model.gradient_checkpointing:
        policy.denoiser.enable_gradient_checkpointing()
    if model.torch_compile:
        policy.compile(model.torch_compile_backend)
    return cast(Policy, policy)


def _check_resume(training: Any, whole: Mapping[str, Any]) -> None:
    folder = CheckpointFolder(Path(training.output_dir))
    if training.resume_from_checkpoint:
        path = folder.find(training.resume_from_checkpoint)
        if path is not None:
            checkpoints.compare_settings(path, whole)
    elif folder.steps():
        raise checkpoints.CheckpointError(
            f"{training.output_dir} already holds checkpoints of a run; resume it with "
            "training.resume_from_checkpoint=latest, or choose another output_dir"
        )
