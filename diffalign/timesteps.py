"""Laws by which training draws its timesteps, one per pair and visit.

"uniform" is every published base model's. The other two belong to SDXL's siblings, as trained by the authors of
Diffusion-DPO: the refiner sees the lowest-noise fifth (t mod 200), SDXL-Turbo the four steps it samples with, on a
noise table rescaled to zero terminal SNR because it must learn from pure noise at t = 999. At that timestep both
halves of a pair coincide, so a quarter of Turbo's draws has z = 0, loss ln 2 and no gradient; "turbo_informative"
draws from the other three only.

"logit_normal" is the density of Stable Diffusion 3 (Esser et al. 2024, arXiv:2403.03206, section 3.1) for flow models,
as Flow-DPO's authors train with it: u = sigmoid(N(0, 1)) picks one of T equal steps of the sampler's own falling noise
table, which for SD3 is shifted (section 5.3.2), so that half of the draws have sigma above 0.75.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from diffalign.randomness import Draw
from diffalign.schedules import DiscreteSchedule, FlowSchedule, Schedule

TimestepLaw = Literal["uniform", "logit_normal", "refiner", "turbo", "turbo_informative"]

REFINER_SHARE = 5
"""The refiner is trained on the lowest 1/5 of the timesteps."""
TURBO_TIMESTEPS = (249, 499, 749, 999)


def check_law(law: str, *, flow: bool) -> None:
    """Refuses a law that a model's schedule has no meaning for.

    Args:
        law: Its name.
        flow: Whether the model is a flow; a discrete chain otherwise.

    Raises:
        ValueError: If the law is unknown or belongs to the other kind.
    """
    if law not in get_args(TimestepLaw):
        raise ValueError(f"unknown timestep_sampling {law!r} (available: {', '.join(get_args(TimestepLaw))})")
    if law != "uniform" and flow != (law == "logit_normal"):
        kinds = ("a flow", "a discrete chain of steps")
        needed, found = kinds if law == "logit_normal" else kinds[::-1]
        raise ValueError(f"timestep_sampling {law!r} is for {needed}, and this model is {found}; use 'uniform'")


def draw_timesteps(schedule: Schedule, draws: Sequence[Draw], law: TimestepLaw = "uniform") -> Tensor:
    """One timestep per draw, [B], in the schedule's units.

    Raises:
        ValueError: For an unknown law, or a law of one kind of schedule on another.
    """
    check_law(law, flow=isinstance(schedule, FlowSchedule))
    if isinstance(schedule, FlowSchedule) and law == "logit_normal":
        normal = torch.stack([draw.normal("timestep", (1,))[0] for draw in draws]).double()
        return schedule.timestep_of_index((schedule.steps * normal.sigmoid()).long().clamp(max=schedule.steps - 1))
    uniform = torch.tensor([draw.uniform("timestep") for draw in draws], dtype=torch.float64)
    timesteps = schedule.timesteps_at(uniform)
    if law == "uniform" or not isinstance(schedule, DiscreteSchedule):
        return timesteps
    if law == "refiner":
        return timesteps % (len(schedule) // REFINER_SHARE)
    table = torch.tensor(TURBO_TIMESTEPS if law == "turbo" else TURBO_TIMESTEPS[:-1])
    return table[(uniform * len(table)).long()]


def effective_schedule(schedule: Schedule, law: TimestepLaw) -> Schedule:
    """The noise table a law trains on: Turbo's is rescaled to zero terminal SNR, the others keep theirs."""
    if law in ("turbo", "turbo_informative") and isinstance(schedule, DiscreteSchedule):
        return schedule.zero_terminal_snr()
    return schedule
