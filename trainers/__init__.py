"""Trainers: one file per method. `diffalign.plugins.find("trainers", name)` gives a class by its file's name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffalign.trainers.base import LossOutput, PairTrainer
    from diffalign.trainers.d3po import D3PO
    from diffalign.trainers.diffusion_dpo import DiffusionDPO
    from diffalign.trainers.flow_dpo import FlowDPO
    from diffalign.trainers.flow_rwr import FlowRWR
    from diffalign.trainers.inpo import InPO
    from diffalign.trainers.npo import NPO
    from diffalign.trainers.self_npo import SelfNPO
    from diffalign.trainers.seppo import SePPO
    from diffalign.trainers.sft import SFT

__all__ = [
    "D3PO",
    "NPO",
    "SFT",
    "DiffusionDPO",
    "FlowDPO",
    "FlowRWR",
    "InPO",
    "LossOutput",
    "PairTrainer",
    "SePPO",
    "SelfNPO",
]

_HOMES = {
    "D3PO": "d3po",
    "DiffusionDPO": "diffusion_dpo",
    "FlowDPO": "flow_dpo",
    "FlowRWR": "flow_rwr",
    "InPO": "inpo",
    "LossOutput": "base",
    "NPO": "npo",
    "PairTrainer": "base",
    "SFT": "sft",
    "SePPO": "seppo",
    "SelfNPO": "self_npo",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"diffalign.trainers.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
