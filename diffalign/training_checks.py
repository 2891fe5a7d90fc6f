"""What a training run asks for and cannot have: found out before weights load or pairs are encoded."""

from __future__ import annotations

import importlib.util
from typing import Any

from diffalign.attention import check_attention
from diffalign.config import ConfigError, RunConfig
from diffalign.optimizers import check_optimizer
from diffalign.predictions import Prediction
from diffalign.timesteps import check_law

TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
"""The modules of which a tracker needs one."""


def check_training(config: RunConfig, prediction: Prediction, law: str) -> None:
    """Refuses packages that are missing, and settings that the model's kind has no use for.

    Args:
        config: The whole configuration.
        prediction: What the model predicts.
        law: The trainer's `timestep_sampling`.

    Raises:
        ConfigError: With one line that says what was found and what to do.
    """
    check_tracker(config.training.report_to)
    mode = config.model.torch_compile_mode
    if mode in ("reduce-overhead", "max-autotune") and config.training.gradient_accumulation_steps > 1:
        raise ConfigError(
            f"model.torch_compile_mode: {mode} records CUDA graphs, whose gradients the next micro-batch would "
            "overwrite; set training.gradient_accumulation_steps to 1, or use max-autotune-no-cudagraphs"
        )
    try:
        check_attention(config.model.attention)
        check_optimizer(config.training)
        check_law(law, flow=prediction is Prediction.VELOCITY)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_buckets(config: RunConfig, family: Any, family_name: str, trainer_class: Any, settings: Any) -> None:
    """Refuses what cannot go together with pictures of several sizes; nothing if there is one size.

    Args:
        config: The whole configuration.
        family: The class of the policy.
        family_name: What users call it.
        trainer_class: The method.
        settings: Of the method.

    Raises:
        ConfigError: With one line that says what does not.
    """
    if config.data is None or not config.data.aspect_ratio_buckets:
        return
    reason = None
    if family.is_video or not family.any_size:
        reason = f"{family_name} takes pictures of one size here"
    elif config.model.options.get("timestep_shift") == "dynamic":
        reason = "with model.options.timestep_shift: dynamic each size would have a law of timesteps of its own"
    elif not trainer_class.any_size:
        reason = f"{trainer_class.__name__} draws samples of one size beside them"
    elif getattr(settings, "reference", "live") == "cached":
        reason = "trainer.reference: cached measures pairs in batches of all sizes; set it to live"
    elif getattr(settings, "cache_inversion", False):
        reason = "trainer.cache_inversion inverts pairs in batches of all sizes; set it to false"
    if reason is not None:
        raise ConfigError(f"data.aspect_ratio_buckets: {reason}, or leave the buckets out")


def check_tracker(name: str | None) -> None:
    """Accelerate leaves out a tracker whose package is missing, without a word."""
    modules = TRACKERS.get(name or "")
    if modules and not any(importlib.util.find_spec(module) for module in modules):
        raise ConfigError(
            f"training.report_to: {name!r} needs {modules[0]}; run `pip install 'diffalign[{name}]'`, or set "
            "training.report_to=null (metrics.jsonl is written in any case)"
        )
