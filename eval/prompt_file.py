"""Any file of prompts under reward models."""

from __future__ import annotations

from pathlib import Path

from diffalign.eval.prompt_suites import read_file
from diffalign.eval.reward_suite import RewardSuite
from diffalign.prompts import PromptRow

__all__ = ["PromptFile"]


class PromptFile(RewardSuite):
    """The prompts of `data`, which `prompt_suites.read_file` reads: text, JSONL, JSON, CSV, TSV or parquet."""

    name = "prompt_file"

    def _prompts(self, data: str | Path | None, local_files_only: bool | None) -> list[PromptRow]:
        if data is None:
            raise ValueError("prompt_file needs the file with the prompts; pass it as `data`")
        return read_file(data)
