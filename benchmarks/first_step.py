"""A trainer that notes when it got how far, for `benchmarks.startup`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, ClassVar

import torch

from diffalign.batches import PairBatch
from diffalign.policy import Policy
from diffalign.trainers import DiffusionDPO
from diffalign.trainers.base import LossOutput, PairTrainerConfig, TrainerConfig

__all__ = ["FirstStep"]

IMPORTED = time.time()
"""When this file was read: trainers are looked up first of all, once the libraries are there."""


class FirstStepConfig(PairTrainerConfig):
    """Settings of Diffusion-DPO.

    Attributes:
        marks: File for the times, in seconds since the epoch, by what was reached.
    """

    marks: str


class FirstStep(DiffusionDPO):
    """Diffusion-DPO that keeps the time."""

    Config: ClassVar[type[TrainerConfig]] = FirstStepConfig

    def __init__(self, policy: Policy, config: TrainerConfig | None = None, **options: Any) -> None:
        self.marks = {"libraries": IMPORTED, "model and data": time.time()}
        super().__init__(policy, config, **options)

    def loss(self, batch: PairBatch) -> LossOutput:
        """Of Diffusion-DPO."""
        self.marks.setdefault("loop", time.time())
        return super().loss(batch)

    def update(self, step: int) -> None:
        """After the first step, writes the times."""
        super().update(step)
        if "first step" not in self.marks:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.marks["first step"] = time.time()
            Path(self.config.marks).write_text(json.dumps(self.marks), encoding="utf-8")
