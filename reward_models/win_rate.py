"""The win rate of a medium against the others of its prompt, by any model that compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.reward_models import load_reward_model, reward_model_info
from diffalign.reward_models.base import OnInvalid, PairOutput, RewardInfo, RewardModel, RewardOutput
from diffalign.reward_models.composition import shared_options
from diffalign.reward_models.media import InvalidMediaError, Media, MediaBatch, as_list
from diffalign.reward_models.preferences import win_rates

__all__ = ["WinRate"]


class WinRate(RewardModel):
    """The share of the other media of its prompt that a medium beats, a tie being half a win; from 0 to 1.

    Source: Wang et al. 2025, "Pref-GRPO: Pairwise Preference Reward-based GRPO for Stable Text-to-Image Reinforcement
    Learning" (arXiv:2508.20751); see `preferences.win_rates` for where we differ. It turns a judge of pairs into a
    reward: each of the G (G - 1) / 2 pairs of a group is judged once. A model that scores single media is asked for
    its G scores instead, which stay in `dims`.

    A group is all media of a call that have the same prompt. A comparison that fails is left out; a medium without
    any has no score.
    """

    info = RewardInfo(
        name="win_rate",
        license="that of the judge",
        weights=(),
        differentiable=False,
        groupwise=True,
        nominal_range=(0.0, 1.0),
    )

    def __init__(
        self,
        path_or_id: str | Path | None = None,
        *,
        of: str | RewardModel = "",
        soft: bool = False,
        options: Mapping[str, Any] | None = None,
        device: str | torch.device = "auto",
        dtype: torch.dtype | Literal["auto"] = "auto",
        local_files_only: bool | None = None,
    ):
        """Loads the judge.

        Args:
            path_or_id: Path of the judge's weights, as in `load_reward_model`.
            of: The judge: a reward model, or its name.
            soft: Count the probability of winning instead of 1, 0.5 or 0.
            options: Further arguments of `load_reward_model` for a judge given by name.
            device: Where such a judge runs.
            dtype: Its type; "auto" is its own default.
            local_files_only: As in `RewardModel.from_pretrained`.

        Raises:
            ValueError: If there is no judge, or it scores groups itself.
            WeightsError: If its weights cannot be loaded.
        """
        super().__init__()
        if of == "":
            raise ValueError("win_rate needs a judge: pass of='pickscore', or win_rate(pickscore) as name")
        info = reward_model_info(of) if isinstance(of, str) else of.info
        if info.groupwise:
            raise ValueError(f"{info.name} scores groups already, so win_rate has nothing to add")
        settings = shared_options(device, dtype, local_files_only) | dict(options or {})
        self.judge = load_reward_model(of, path=path_or_id, **settings) if isinstance(of, str) else of
        self.soft = soft
        self.info = _info(self.judge.info)
        self.item_ndim = self.judge.item_ndim
        self.train(False)

    @classmethod
    def describe(cls, of: str = "") -> RewardInfo:
        """The `info` for a judge of this name, without loading anything."""
        return _info(replace(reward_model_info(of), name=of)) if of else cls.info

    def preprocess(self, item: Media) -> Any:
        """See `RewardModel`: the judge's."""
        return self.judge.preprocess(item)

    def score_prepared(self, prepared: Sequence[Any], texts: Sequence[Any]) -> dict[str, Tensor]:
        """Not possible: a win rate needs whole groups.

        Raises:
            TypeError: Always.
        """
        raise TypeError(f"{self.info.name} scores whole groups of media only; call score()")

    @torch.no_grad()
    def score(
        self,
        media: MediaBatch,
        prompts: str | Sequence[str] | None = None,
        *,
        batch_size: int = 32,
        on_invalid: OnInvalid = "raise",
    ) -> RewardOutput:
        """See `RewardModel`; groups are the media of this call with equal prompts."""
        items = as_list(media, self.item_ndim)
        unique, rows = self._texts(prompts, len(items))
        texts = [unique[row] for row in rows]
        errors: list[str | None] = [None] * len(items)
        dims: dict[str, Tensor] = {}
        groups = [[i for i, other in enumerate(rows) if other == row] for row in range(len(unique))]
        pairs = [pair for group in groups for pair in combinations(group, 2)]
        if self.judge.info.pairwise_native:
            outcomes = self._judged(items, texts, pairs, batch_size)
        else:
            scored = self.judge.score(items, texts, batch_size=batch_size, on_invalid=on_invalid)
            errors = list(scored.errors)
            dims = {self.judge.info.name: scored.score}
            outcomes = self._from_scores(scored.score, pairs)
        rates = torch.full((len(items),), float("nan"), dtype=torch.float64)
        beats = {pair: outcome for pair, outcome in zip(pairs, outcomes.tolist(), strict=True)}
        for group in groups:
            matrix = torch.full((len(group), len(group)), float("nan"), dtype=torch.float64)
            for (x, i), (y, j) in combinations(enumerate(group), 2):
                matrix[x, y], matrix[y, x] = beats[i, j], 1 - beats[i, j]
            rates[group] = win_rates(matrix)
        for i, rate in enumerate(rates.tolist()):
            if rate == rate:
                continue
            if errors[i] is None:
                found = f"none of {rows.count(rows[i]) - 1} comparisons within its prompt could be judged"
                errors[i] = f"medium {i}: {self.info.name}: {found}"
            if on_invalid == "raise":
                raise InvalidMediaError(errors[i])
        total = rates.float()
        dims = {name: values.masked_fill(total.isnan(), float("nan")) for name, values in dims.items()}
        return RewardOutput(total, {**dims, "overall": total}, total.isfinite(), tuple(errors))

    def compare(
        self,
        a: MediaBatch,
        b: MediaBatch,
        prompts: str | Sequence[str],
        *,
        batch_size: int = 32,
        on_invalid: OnInvalid = "raise",
    ) -> PairOutput:
        """The judge's own comparison."""
        return self.judge.compare(a, b, prompts, batch_size=batch_size, on_invalid=on_invalid)

    def settings(self) -> dict[str, str]:
        """The judge's, and how comparisons count."""
        return {**{f"judge.{key}": value for key, value in self.judge.settings().items()}, "soft": str(self.soft)}

    def _judged(
        self, items: Sequence[Media], texts: Sequence[str], pairs: Sequence[tuple[int, int]], batch_size: int
    ) -> Tensor:
        """Outcomes of pairs for their first medium, by the judge's own comparison; NaN where it has none."""
        if not pairs:
            return torch.zeros(0)
        first, second = [items[i] for i, _ in pairs], [items[j] for _, j in pairs]
        words = [texts[i] for i, _ in pairs]
        output = self.judge.compare(first, second, words, batch_size=batch_size, on_invalid="nan")
        return self._outcomes(output.p_a, output.tie).masked_fill(~output.valid, float("nan"))

    def _from_scores(self, scores: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
        """Outcomes of pairs for their first medium, from scores [N]."""
        if not pairs:
            return torch.zeros(0)
        first, second = torch.tensor(pairs).unbind(1)
        sign = 1.0 if self.judge.info.higher_is_better else -1.0
        difference = sign * (scores[first].double() - scores[second].double())
        return self._outcomes(torch.sigmoid(difference / self.judge.info.tau), difference == 0)

    def _outcomes(self, probability: Tensor, tie: Tensor) -> Tensor:
        wide = probability.double()
        hard = (wide > 0.5).double().masked_fill(tie | (wide == 0.5), 0.5).masked_fill(wide.isnan(), float("nan"))
        return wide if self.soft else hard


def _info(judge: RewardInfo) -> RewardInfo:
    dims = ("overall",) if judge.pairwise_native else (judge.name, "overall")
    return replace(
        judge,
        name=f"win_rate({judge.name})",
        dims=dims,
        differentiable=False,
        pairwise_native=False,
        groupwise=True,
        higher_is_better=True,
        nominal_range=(0.0, 1.0),
        tau=1.0,
    )
