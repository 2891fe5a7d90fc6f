"""Every family of the contract test, one file each; a new file is found by itself."""

from __future__ import annotations

import importlib
import pkgutil

from tests.backbones.families.base import PROMPTS, Family

FAMILIES: list[Family] = [
    family
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name)
    if info.name != "base"
    for family in importlib.import_module(f"{__name__}.{info.name}").FAMILIES
]

__all__ = ["FAMILIES", "PROMPTS", "Family"]
