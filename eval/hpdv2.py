"""HPDv2's benchmark: four styles of 800 prompts, scored by HPSv2 or HPSv2.1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from diffalign.eval.base import Case, Report, Row, Score
from diffalign.eval.case_rows import rows_of
from diffalign.eval.hpdv2_table import IRREPRODUCIBLE, PUBLISHED
from diffalign.eval.prompt_suites import HPDV2_STYLES, read_hpdv2
from diffalign.eval.reward_suite import RewardSuite
from diffalign.eval.statistics import Interval
from diffalign.prompts import PromptRow
from diffalign.reward_models.base import RewardModel

__all__ = ["HPDv2"]

Version = Literal["2.1", "2.0"]

CHUNK = 80
"""Consecutive prompts of a style whose mean is one of the ten numbers that the original takes mean and spread of."""


class HPDv2(RewardSuite):
    """100 times the mean HPS of 3200 pictures, and of each style.

    Source: Wu et al. 2023, "Human Preference Score v2: A Solid Benchmark for Evaluating Human Preferences of
    Text-to-Image Synthesis" (arXiv:2306.09341). A style's score is the mean over the means of chunks of 80 consecutive
    prompts, with the population's standard deviation of these means; the average is the mean over all pictures.

    Values of version 2.0 (about 27 to 29) and 2.1 (14 to 34) are not of one scale: a report says which it is, and rows
    of the other version are refused. The released package scores single pictures with 2.0 and the benchmark with 2.1.

    Args:
        num_prompts: How many prompts; None takes all 3200.
        samples: Pictures per prompt; the original has 1.
        seed: As in `RewardSuite`.
        version: Of HPS.
        weights: File, folder or Hub id of its weights; None is the published one.
        rewards: Further reward models beside it, by name or NAME=PATH; their means are in the report, too.
        models: Reward models that are loaded already, HPS among them, instead of `weights` and `rewards`.
        data: Folder with the four lists of prompts; None reads them from the cache, or fetches them once.
        device: As in `RewardSuite`.
        local_files_only: As in `RewardSuite`.

    Raises:
        ValueError: As in `RewardSuite`, or if the version is unknown or not among `models`.
        WeightsError: If the prompts are not at hand.
    """

    name = "hpdv2"

    def __init__(
        self,
        num_prompts: int | None = None,
        samples: int = 1,
        seed: int = 0,
        *,
        version: Version = "2.1",
        weights: str | Path | None = None,
        rewards: Sequence[str] = (),
        models: Sequence[RewardModel] | None = None,
        data: str | Path | None = None,
        device: str | torch.device = "auto",
        local_files_only: bool | None = None,
    ) -> None:
        if version not in ("2.0", "2.1"):
            raise ValueError(f"unknown version {version!r} of HPS (available: 2.0, 2.1)")
        self.hps = f"hpsv{version}"
        if models is not None and self.hps not in [model.info.name for model in models]:
            raise ValueError(f"expected {self.hps} among the models, got {[model.info.name for model in models]}")
        super().__init__(
            num_prompts,
            samples,
            seed,
            rewards=(self.hps if weights is None else f"{self.hps}={weights}", *rewards),
            models=models,
            data=data,
            device=device,
            local_files_only=local_files_only,
        )
        self.version_of_hps = version
        self.reference = tuple(row for row in PUBLISHED if row["version"] == version)  # type: ignore[misc]

    def _prompts(self, data: str | Path | None, local_files_only: bool | None) -> list[PromptRow]:
        return read_hpdv2(data, local_files_only)

    def place(self, number: int) -> str:
        """`<style>/<number in the style>`, as the original names its files."""
        extras = self.prompts[number].extras
        return f"{extras['category']}/{extras['index']:05d}"

    def protocol(self) -> dict[str, Any]:
        """See `RewardSuite`."""
        return super().protocol() | {"version": self.version_of_hps, "chunk": CHUNK, "scale": "100 x cosine"}

    def aggregate(self, rows: Sequence[Row]) -> Report:
        """The average and, in the groups, the "score" of each style; means of other rewards are under "mean/NAME".

        A missing picture counts as missing and leaves its chunk shorter; the original moves all later ones up instead.

        Raises:
            ValueError: If rows are no cases of this benchmark, or carry scores of the other version of HPS alone.
        """
        cases = self.cases()
        found = rows_of(cases, rows)
        scored = {name for row in found.values() for name in row.scores}
        if found and self.hps not in scored:
            raise ValueError(
                f"the rows carry no score of {self.hps}, found {', '.join(sorted(scored)) or 'none'}; HPS v2.0 and "
                "v2.1 are different scales: score the pictures again, or ask for the version they have"
            )
        report = super().aggregate(rows)
        own = f"mean/{self.hps}"
        average = _times_100(report.scores[own] if found else Score(None, None, 0, len(cases)))
        groups = {
            style: {
                "score": self._style(report.groups[style].get(own), [c for c in cases if c.task == style], found),
                **{name: score for name, score in report.groups[style].items() if name != own},
            }
            for style in HPDV2_STYLES
            if style in report.groups
        }
        others = {name: score for name, score in report.scores.items() if name != own}
        warnings = (*report.warnings, *([IRREPRODUCIBLE] if self.version_of_hps == "2.1" else []))
        return replace(
            report,
            scores={"average": average, **others},
            groups=groups,
            warnings=warnings,
            reference=self.reference,
        )

    def _style(self, plain: Score | None, cases: Sequence[Case], found: Mapping[tuple[str, int], Row]) -> Score:
        """The mean over the chunks' means; the interval is that of the plain mean."""
        score = _times_100(plain or Score(None, None, 0, len(cases)))
        size = CHUNK * self.samples
        means = []
        for start in range(0, len(cases), size):
            rows = [found.get((case.prompt, case.seed)) for case in cases[start : start + size]]
            values = [v for row in rows if row is not None and (v := row.scores.get(self.hps)) is not None]
            means += [float(np.mean(values))] if values else []
        if not means:
            return score
        chunks = {"chunk_sd": 100 * float(np.std(means)), "chunks": len(means)}
        return replace(score, value=100 * float(np.mean(means)), details={**score.details, **chunks})


def _times_100(score: Score) -> Score:
    """A score as tables print it; counts stay."""
    scaled = {name: 100 * score.details[name] for name in ("median", "sd") if name in score.details}
    return replace(
        score,
        value=None if score.value is None else 100 * score.value,
        ci95=None if score.ci95 is None else Interval(*(100 * end for end in score.ci95)),
        details={**score.details, **scaled},
    )
