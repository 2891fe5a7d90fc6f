"""DrawBench under reward models."""

from __future__ import annotations

from pathlib import Path

from diffalign.eval.prompt_suites import read_drawbench
from diffalign.eval.reward_suite import RewardSuite
from diffalign.prompts import PromptRow

__all__ = ["DrawBench"]


class DrawBench(RewardSuite):
    """The 200 prompts of Saharia et al. 2022 (arXiv:2205.11487), from a local file: `data` is needed.

    With `rewards=["hpsv2.1"]` the mean is HPSv2's DrawBench score, divided by 100.
    """

    name = "drawbench"

    def _prompts(self, data: str | Path | None, local_files_only: bool | None) -> list[PromptRow]:
        return read_drawbench(data)
