"""`diffalign train`: everything that can be refused first, then data, policy, trainer and loop."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from diffalign import checkpoints
from diffalign.attention import check_kernel
from diffalign.backbones import LoRA, ModelSource, inspect_model
from diffalign.backbones.loading import check_gradient_checkpointing, check_options, check_repeated_blocks, policy_class
from diffalign.backbones.precision import DTYPES
from diffalign.backbones.starting import check_start
from diffalign.checkpointing import recompute_activations
from diffalign.checkpoints import CheckpointFolder, write_text
from diffalign.config import ConfigError, RunConfig, TrainingConfig, dump_config, trainer_settings
from diffalign.configured import data_config, load_model, picture_size
from diffalign.data import PairSource, RunPairs
from diffalign.devices import pick_device
from diffalign.loop import Waiting, fit, make_accelerator
from diffalign.media_checks import check_media_settings, check_scorers
from diffalign.policy import Policy
from diffalign.processes import launched
from diffalign.quantization import check_quantization
from diffalign.rollout_checks import check_rollout, round_plan, steps_done
from diffalign.rollout_labels import to_do
from diffalign.rollout_source import RolloutSource
from diffalign.rollout_store import FOLDER, RoundFolder
from diffalign.training_checks import check_buckets, check_training
from diffalign.validating import Validation

logger = logging.getLogger("diffalign")


def train_config(config: RunConfig, say: Callable[[str], None] | None = None) -> Path:
    """Trains as `config` says and returns the output folder.

    Args:
        config: The run.
        say: Where the method's line with kappa goes; the log if None.

    Raises:
        ValueError: If the configuration, model, data or checkpoint cannot be used; before any weights are loaded.
        Waiting: If the images that the run would learn from next have to be drawn or labelled first.
    """
    source = checked(config)
    trainer_class, settings = trainer_settings(config)
    training = config.training.model_copy(update={"output_dir": config.output_dir})
    if trainer_class.learns_from == "rollouts":
        return _train_on_rollouts(config, training, source, say)
    data = data_config(config, scored=trainer_class.learns_from == "scored")
    pairs = RunPairs(data, config.output_dir, winners_only=trainer_class.learns_from == "winners")
    whole = config.model_dump(mode="json")
    check_resume(training, whole)
    accelerator = make_accelerator(training)
    pairs.read(policy_class(source))
    policy = training_policy(config, source, accelerator.device)
    encoded = pairs.encoded(policy, launched())
    policy.free_encoders()
    train_view, validation_view = encoded, None
    if training.num_validation_pairs:
        train_view, validation_view = encoded.split(training.num_validation_pairs, config.seed)
    trainer = trainer_class(policy, settings)
    if accelerator.is_main_process:
        _write_facts(config, trainer, say, {"pairs": len(train_view), "cache": encoded.fingerprint})
    pair_source = PairSource(
        train_view,
        seed=config.seed,
        batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        caption_dropout=settings.caption_dropout,
        draws_per_pair=getattr(settings, "draws_per_pair", None),
    )
    validate = Validation(trainer, config, validation_view, accelerator.device, accelerator.is_main_process)
    # Without `end_training`, so that `evaluate` can follow in the same processes; the command line ends their talk.
    batches = trainer.source(pair_source, config.seed)
    return fit(trainer, batches, training, settings=whole, accelerator=accelerator, validate=validate)


def _train_on_rollouts(
    config: RunConfig, training: TrainingConfig, source: ModelSource, say: Callable[[str], None] | None
) -> Path:
    """`train_config` for methods that learn from what the model draws."""
    rollout, (trainer_class, settings) = config.rollout, trainer_settings(config)
    assert rollout is not None  # as `checked` found
    whole = config.model_dump(mode="json")
    check_resume(training, whole)
    folder, (_, step) = Path(config.output_dir) / FOLDER, steps_done(config)
    if rollout.labels == "human" and step < training.max_train_steps:
        number = step // round_plan(config, settings).steps_per_round
        reason = to_do(RoundFolder(folder, number, {}), rollout)
        if reason is not None:
            raise Waiting(reason)
    prompts = [row.prompt for row in rollout.read_prompts(config.seed)]
    accelerator = make_accelerator(training)
    scorer = None
    if rollout.reward_model is not None:
        from diffalign.reward_models import load_reward_model

        scorer = load_reward_model(rollout.reward_model, **{"device": pick_device(), **rollout.reward_options})
    policy = training_policy(config, source, accelerator.device)
    trainer = trainer_class(policy, settings)
    rollouts = RolloutSource(
        trainer.sampler,
        scorer,
        prompts,
        rollout,
        seed=config.seed,
        batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        processes=launched(),
        folder=folder,
    )
    if accelerator.is_main_process:
        facts = {"prompts": len(prompts), "steps_per_round": rollouts.steps_per_round}
        _write_facts(config, trainer, say, facts)
    validate = Validation(trainer, config, None, accelerator.device, accelerator.is_main_process)
    batches = trainer.source(rollouts, config.seed)
    return fit(trainer, batches, training, settings=whole, accelerator=accelerator, validate=validate)


def _write_facts(config: RunConfig, trainer: Any, say: Callable[[str], None] | None, facts: Mapping[str, Any]) -> None:
    """The method's line on the terminal; `config.yaml` and `run.json` in the run's folder."""
    method, folder = trainer.describe(), Path(config.output_dir)
    (say or logger.info)(method)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", dump_config(config))
    everything = {"method": method, **trainer.facts(), **facts, "started_from": config.model.adapter}
    write_text(folder / "run.json", json.dumps(everything, indent=2))


def checked(config: RunConfig) -> ModelSource:
    """The model of a training run, if method, model and settings fit together; loads no weights."""
    trainer_class, settings = trainer_settings(config)
    check_rollout(config, trainer_class, settings)
    model = config.model
    source = inspect_model(model.pretrained_model_name_or_path, model.revision, model.variant)
    check_options(source, model.options)
    lora = LoRA(**model.lora.model_dump()) if model.lora is not None else None
    if model.adapter is not None:
        lora = check_start(source, Path(model.adapter), lora)
    if model.gradient_checkpointing:
        check_gradient_checkpointing(source)
    if model.torch_compile == "blocks":
        check_repeated_blocks(source)
    if config.training.validation_steps and config.training.validation_prompts:
        policy_class(source).check_sampling(source)
    if model.quantization is not None:
        if lora is None:
            raise ConfigError("model.quantization: quantized weights cannot be trained; add adapters with model.lora")
        check_quantization(model.quantization, pick_device())
    check_buckets(config, policy_class(source), source.family, trainer_class, settings)
    law = getattr(trainer_settings(config)[1], "timestep_sampling", "uniform")
    check_training(config, source.prediction, law)
    picture_size(config)
    check_media_settings(
        source, num_frames=model.num_frames, options=model.options, data=config.data, sampling=config.sampling
    )
    if config.training.validation_prompts and config.training.reward_model is not None:
        from diffalign.reward_models import reward_model_info

        check_scorers(source, [reward_model_info(config.training.reward_model)])
    if config.rollout is not None:
        policy_class(source).check_sampling(source)
        if config.rollout.reward_model is not None:
            from diffalign.reward_models import reward_model_info

            check_scorers(source, [reward_model_info(config.rollout.reward_model)], in_groups=True)
    trainer_class.check_prediction(source.prediction)
    return source


def training_policy(config: RunConfig, source: ModelSource, device: torch.device) -> Policy:
    """The policy of a run, ready to be trained.

    Raises:
        ValueError: If something that `config.model` asks for cannot be had; of attention before any weights load.
    """
    model = config.model
    check_kernel(model.attention, device, DTYPES[config.training.mixed_precision])
    policy: Any = load_model(
        model,
        source,
        train=True,
        start=model.adapter,
        size=picture_size(config),
        dtype=DTYPES[config.training.mixed_precision],
        device=device,
    )
    recompute_activations(policy.denoiser, model.gradient_checkpointing)
    if model.torch_compile:
        policy.compile(model.torch_compile_backend, model.torch_compile_mode, blocks=model.torch_compile == "blocks")
    return cast(Policy, policy)


def check_resume(training: Any, whole: Mapping[str, Any]) -> None:
    """Refuses a folder with checkpoints that the run would neither go on from nor may overwrite; loads no weights.

    Raises:
        checkpoints.CheckpointError: If it has some, of other settings or of a run that is not to be resumed.
    """
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
