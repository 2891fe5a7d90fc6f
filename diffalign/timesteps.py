"""Laws by which training draws its timesteps, one per pair and visit.

"uniform" is every published base model's. The other two belong to SDXL's siblings, as trained by the authors of
Diffusion-DPO: the refiner sees the lowest-noise fifth (t mod 200), SDXL-Turbo the four steps it samples with, on a
noise table rescaled to zero terminal SNR because it must learn from pure noise at t = 999. At that timestep both
halves of a pair coincide, so a quarter of Turbo's draws has z = 0, loss ln 2 and no gradient; "turbo_informative"
draws from the other three only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from diffalign.randomness import Draw
from diffalign.schedules import DiscreteSchedule, Schedule

TimestepLaw = Literal["uniform", "refiner", "turbo", "turbo_informative"]

REFINER_SHARE = 5
"""The refiner is trained on the lowest 1/5 of the timesteps."""
TURBO_TIMESTEPS = (249, 499, 749, 999)


def draw_timesteps(schedule: Schedule, draws: Sequence[Draw], law: TimestepLaw = "uniform") -> Tensor:
    """One timestep per draw, [B], in the schedule's units.

    Raises:
        ValueError: For an unknown law, or a law of a discrete chain on another schedule.
    """
    uniform = torch.tensor([draw.uniform("timestep") for draw in draws], dtype=torch.float64)
    timesteps = schedule.timesteps_at(uniform)
    if law == "uniform":
        return timesteps
    if not isinstance(schedule, DiscreteSchedule):
        raise ValueError(f"timestep_sampling {law!r} needs a discrete schedule, got {type(schedule).__name__}")
    if law == "refiner":
        return timesteps % (len(schedule) // REFINER_SHARE)
    choices = {"turbo": TURBO_TIMESTEPS, "turbo_informative": TURBO_TIMESTEPS[:-1]}
    if law not in choices:
        raise ValueError(f"unknown timestep_sampling {law!r} (available: uniform, refiner, turbo, turbo_informative)")
    table = torch.tensor(choices[law])
    return table[(uniform * len(table)).long()]


def effective_schedule(schedule: Schedule, law: TimestepLaw) -> Schedule:
    """The noise table a law trains on: Turbo's is rescaled to zero terminal SNR, the others keep theirs."""
    if law in ("turbo", "turbo_informative") and isinstance(schedule, DiscreteSchedule):
        return schedule.zero_terminal_snr()
    return schedule
