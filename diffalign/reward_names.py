"""The reward models that a command names: `--reward NAME[=PATH]... --option NAME.KEY=VALUE`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from diffalign.devices import pick_device
from diffalign.named_options import read_options

if TYPE_CHECKING:
    from diffalign.reward_models import RewardInfo, RewardModel

__all__ = ["check_rewards", "load_rewards"]


def check_rewards(names: Sequence[str], options: Sequence[str] = ()) -> list[RewardInfo]:
    """What is known about the reward models of these names; nothing is loaded.

    Args:
        names: NAME or NAME=PATH, see `load_reward_model`.
        options: "NAME.KEY=VALUE", see `named_options.read_options`.

    Raises:
        ValueError: If there is no such model, or an option is of none of them, unknown, or of another type.
    """
    from diffalign.reward_models import reward_model_arguments, reward_model_info

    found = []
    for name, _, given in _asked(names, options):
        arguments = reward_model_arguments(name)
        for option, value in given.items():
            arguments.check(name, option, value)
        found.append(reward_model_info(name, **given))
    return found


def load_rewards(names: Sequence[str], dtype: str = "float32", options: Sequence[str] = ()) -> list[RewardModel]:
    """The reward models of these names, on the device of this process.

    Args:
        names: As in `check_rewards`.
        dtype: Of their towers, where an option does not say otherwise.
        options: As in `check_rewards`.

    Raises:
        ValueError: As in `check_rewards`.
        WeightsError: If weights cannot be loaded.
    """
    from diffalign.reward_models import load_reward_model

    shared: dict[str, Any] = {"device": pick_device()}
    shared |= {} if dtype == "float32" else {"dtype": dtype}
    return [load_reward_model(name, path=path, **{**shared, **given}) for name, path, given in _asked(names, options)]


def _asked(names: Sequence[str], options: Sequence[str]) -> list[tuple[str, str | None, dict[str, Any]]]:
    """Name, path and options of each."""
    pairs = [name.partition("=") for name in names]
    given = read_options(
        options, [name for name, _, _ in pairs], kind="reward", example="vision_reward-video.texts=FOLDER"
    )
    return [(name, path or None, given[name]) for name, _, path in pairs]
