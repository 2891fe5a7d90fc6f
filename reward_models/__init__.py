"""Reward models: one file per model, loaded when first asked for.

`load_reward_model("hpsv2.1")` finds a model by name; `PickScore()`, `HPSv2()` and so on are the classes themselves.
Called with images and prompts, a model gives scores [B]; see `diffalign.reward_models.base` for the rest.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign import plugins

if TYPE_CHECKING:
    from diffalign.reward_models.base import (
        PairOutput,
        RewardInfo,
        RewardModel,
        RewardOutput,
        WeightsError,
        WeightSpec,
    )
    from diffalign.reward_models.clipscore import CLIPScore
    from diffalign.reward_models.hpsv2 import HPSv2
    from diffalign.reward_models.media import InvalidMediaError
    from diffalign.reward_models.pickscore import PickScore
    from diffalign.reward_models.scoring import ScoreSummary, score_index
    from diffalign.reward_models.shapes import ShapesScore

__all__ = [
    "CLIPScore",
    "HPSv2",
    "InvalidMediaError",
    "PairOutput",
    "PickScore",
    "RewardInfo",
    "RewardModel",
    "RewardOutput",
    "ScoreSummary",
    "ShapesScore",
    "WeightSpec",
    "WeightsError",
    "load_reward_model",
    "reward_model_info",
    "score_index",
]

_HOMES = {
    "CLIPScore": "clipscore",
    "HPSv2": "hpsv2",
    "InvalidMediaError": "media",
    "PickScore": "pickscore",
    "ShapesScore": "shapes",
    "ScoreSummary": "scoring",
    "score_index": "scoring",
    **dict.fromkeys(
        ("PairOutput", "RewardInfo", "RewardModel", "RewardOutput", "WeightSpec", "WeightsError"),
        "base",
    ),
}

_ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "hpsv2.0": ("hpsv2", {"version": "2.0"}),
    "hpsv2.1": ("hpsv2", {"version": "2.1"}),
    "clipscore-torchmetrics": ("clipscore", {"variant": "torchmetrics"}),
    "clipscore-logit": ("clipscore", {"variant": "logit"}),
}
"""Names of versions and variants, the same as in `info.name`."""


def load_reward_model(name: str, *, path: str | Path | None = None, **options: Any) -> RewardModel:
    """The reward model called `name`, with its weights.

    Args:
        name: File name of a model here ("pickscore"), a version ("hpsv2.1", "clipscore-logit"), in any case, or
            "module:Class" for outside code. "hpsv2" alone is version 2.1.
        path: Local folder in the published layout, or another Hub id; None for the original's.
        options: Arguments of the model's constructor, such as `device`, `dtype`, `local_files_only`.

    Raises:
        ValueError: If there is no such model or option; the message suggests the nearest.
        WeightsError: If the weights cannot be loaded.
    """
    model_class, fixed = _find(name)
    for option, value in fixed.items():
        if options.get(option, value) != value:
            raise ValueError(f"{name!r} means {option}={value!r}, but {option}={options[option]!r} was passed as well")
    parameters = inspect.signature(model_class).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        known = sorted(set(parameters) - {"path_or_id"})
        for option in options:
            if option not in known:
                near = difflib.get_close_matches(option, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"reward model {name!r} has no option {option!r}{hint} (available: {', '.join(known)})"
                )
    model: RewardModel = model_class.from_pretrained(path, **{**options, **fixed})
    return model


def reward_model_info(name: str) -> RewardInfo:
    """What is known about the reward model called `name` without its weights; of versions, about the default one.

    Raises:
        ValueError: If there is no such model; the message suggests the nearest.
    """
    info: RewardInfo = _find(name)[0].info
    return info


def _find(name: str) -> tuple[type[RewardModel], dict[str, Any]]:
    """The class of a reward model, and the options that its name stands for."""
    key = name if ":" in name else name.lower()
    module, fixed = _ALIASES.get(key, (key, {}))
    return plugins.find("reward_models", module), fixed


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
