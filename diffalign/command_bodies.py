"""The bodies of commands, imported when one runs: some need no diffusion model, and do not wait for its libraries."""

from __future__ import annotations

import gc
import importlib
from types import ModuleType

__all__ = ["heavy", "light"]


def light() -> ModuleType:
    """The bodies of commands that load no diffusion model."""
    return importlib.import_module("diffalign.light_commands")


def heavy(config: str | None = None, overrides: tuple[str, ...] = ()) -> ModuleType:
    """The heavy half, with the libraries' own bars and hints switched off.

    Args:
        config: A run's configuration that the command will read: a mistake in it is told before seconds of importing.
        overrides: Of it.
    """
    if config is not None:
        from diffalign.config import load_config

        load_config(config, overrides)
    looks_for_garbage = gc.isenabled()
    gc.disable()  # nothing of what is imported is garbage, and looking for it takes a tenth of the time
    try:
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        commands = importlib.import_module("diffalign.commands")
    finally:
        if looks_for_garbage:
            gc.enable()
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    return commands
