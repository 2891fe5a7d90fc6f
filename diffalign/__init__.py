"""diffalign: preference alignment for diffusion and flow models.

The names below are loaded when they are first used; importing the package loads none of the heavy libraries.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffalign import eval, reward_models, trainers
    from diffalign.backbones import LoRA, inspect_model, load_policy
    from diffalign.batches import Conditioning, Moments, NoisyStates, PairBatch
    from diffalign.config import RunConfig, TrainingConfig, load_config
    from diffalign.data import DataConfig, PairSource, encode_pairs, load_pairs
    from diffalign.loop import fit
    from diffalign.policy import Policy
    from diffalign.predictions import Prediction
    from diffalign.randomness import Draw, generator
    from diffalign.schedules import DiscreteSchedule, FlowSchedule, Schedule

__version__ = "0.1.0"

_HOMES = {
    "LoRA": "backbones",
    "inspect_model": "backbones",
    "load_policy": "backbones",
    "Conditioning": "batches",
    "Moments": "batches",
    "NoisyStates": "batches",
    "PairBatch": "batches",
    "RunConfig": "config",
    "TrainingConfig": "config",
    "load_config": "config",
    "DataConfig": "data",
    "PairSource": "data",
    "encode_pairs": "data",
    "load_pairs": "data",
    "fit": "loop",
    "Policy": "policy",
    "Prediction": "predictions",
    "Draw": "randomness",
    "generator": "randomness",
    "DiscreteSchedule": "schedules",
    "FlowSchedule": "schedules",
    "Schedule": "schedules",
}
_MODULES = ("eval", "reward_models", "trainers")

__all__ = [
    "Conditioning",
    "DataConfig",
    "DiscreteSchedule",
    "Draw",
    "FlowSchedule",
    "LoRA",
    "Moments",
    "NoisyStates",
    "PairBatch",
    "PairSource",
    "Policy",
    "Prediction",
    "RunConfig",
    "Schedule",
    "TrainingConfig",
    "encode_pairs",
    "eval",
    "fit",
    "generator",
    "inspect_model",
    "load_config",
    "load_pairs",
    "load_policy",
    "reward_models",
    "trainers",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"diffalign.{_HOMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"diffalign.{name}")
    raise AttributeError(f"module 'diffalign' has no attribute {name!r}")
