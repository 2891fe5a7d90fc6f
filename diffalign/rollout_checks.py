"""What a run on the model's own images asks for and cannot have: found out before weights load."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from diffalign.checkpoints import CheckpointFolder
from diffalign.config import ConfigError, RunConfig
from diffalign.rollout_config import RoundPlan

__all__ = ["check_rollout", "round_plan", "steps_done"]


def check_rollout(config: RunConfig, trainer_class: Any, settings: Any) -> None:
    """Refuses sections that the trainer has no use for, and rounds that do not come out even.

    Args:
        config: The whole configuration.
        trainer_class: What the section `trainer` names.
        settings: Its checked settings.

    Raises:
        ConfigError: With one line that says what was found and what to do.
    """
    name, rollout = config.trainer["name"], config.rollout
    if trainer_class.learns_from != "rollouts":
        if rollout is not None:
            raise ConfigError(
                f"config section 'rollout' is for trainers that learn from the model's own images, such as d3po, and "
                f"{name} does not; leave it out"
            )
        return
    if rollout is None:
        raise ConfigError(
            f"trainer {name!r} learns from the model's own images: config section 'rollout' is missing, for example "
            "rollout: {prompts: FILE, reward_model: pickscore}"
        )
    for section in ("data", "pairs"):
        if getattr(config, section) is not None:
            raise ConfigError(
                f"config section {section!r} is for trainers that learn from pairs, and {name} draws its own images as "
                "section 'rollout' says; leave it out"
            )
    if config.training.num_validation_pairs:
        raise ConfigError(
            f"training.num_validation_pairs is {config.training.num_validation_pairs}, and {name} has no pairs to set "
            "aside; leave it out"
        )
    if rollout.labels == "reward_model" and rollout.reward_model is None:
        raise ConfigError("rollout.reward_model is missing; name a reward model, or set rollout.labels: human")
    if rollout.labels == "human" and config.training.resume_from_checkpoint is None:
        raise ConfigError(
            "rollout.labels: human trains one round at a time and goes on with the next one when it is labelled; set "
            "training.resume_from_checkpoint: latest"
        )
    try:
        round_plan(config, settings)
    except ValueError as error:
        raise ConfigError(f"trainer {name!r}: {error}") from error
    rollout.read_prompts(config.seed)


def round_plan(config: RunConfig, settings: Any) -> RoundPlan:
    """How the rounds of a run are cut into optimizer steps.

    Args:
        config: The run, with its section `rollout`.
        settings: Of its trainer, with the sampler's steps.

    Raises:
        ValueError: As `RoundPlan`.
    """
    assert config.rollout is not None
    return RoundPlan(
        config.rollout,
        settings.num_inference_steps,
        config.training.per_device_train_batch_size,
        config.training.gradient_accumulation_steps,
        int(os.environ.get("WORLD_SIZE", "1")),
    )


def steps_done(config: RunConfig) -> tuple[Path | None, int]:
    """The checkpoint that a run would go on from, and its optimizer steps."""
    wanted = config.training.resume_from_checkpoint
    path = CheckpointFolder(Path(config.output_dir)).find(wanted) if wanted else None
    return path, int(path.name.rpartition("-")[2]) if path is not None else 0
