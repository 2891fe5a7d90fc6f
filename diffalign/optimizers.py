"""The optimizers a run can name."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from diffalign.config import TrainingConfig


def check_optimizer(config: TrainingConfig) -> None:
    """Refuses what `make_optimizer` could not make.

    Raises:
        ValueError: If the optimizer needs a package that is not installed, has no fused form, or must not be fused.
    """
    if config.fused_optimizer and config.optimizer != "adamw":
        raise ValueError(
            f"training.fused_optimizer is for optimizer 'adamw', found {config.optimizer!r}; leave one of them out"
        )
    if config.fused_optimizer and config.mixed_precision == "fp16":
        raise ValueError(
            "training.fused_optimizer hides which steps fp16's gradient scaler skips; leave it out, or use bf16"
        )
    if config.optimizer == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("optimizer 'adamw_8bit' needs bitsandbytes; run `pip install 'diffalign[quantization]'`")


def make_optimizer(parameters: list[torch.nn.Parameter], config: TrainingConfig, pairs_per_step: int) -> Any:
    """The optimizer that `config.optimizer` names.

    Raises:
        ValueError: See `check_optimizer`.
    """
    check_optimizer(config)
    lr = config.learning_rate * (pairs_per_step if config.scale_lr else 1)
    betas = (config.adam_beta1, config.adam_beta2)
    if config.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(
            parameters,
            lr=lr,
            weight_decay=config.adam_weight_decay,
            relative_step=False,
            scale_parameter=False,
            clip_threshold=1.0,
        )
    kwargs: dict[str, Any] = {
        "lr": lr,
        "betas": betas,
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if config.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found]

        return AdamW8bit(parameters, **kwargs)
    fused = config.fused_optimizer
    if fused is None:
        fused = parameters[0].device.type not in ("cpu", "meta") and config.mixed_precision != "fp16"
    return torch.optim.AdamW(parameters, fused=fused or None, **kwargs)
