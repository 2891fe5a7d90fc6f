"""Scores within a group: z-scores, ranks or majority votes among the media of one prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from diffalign.reward_models.base import OnInvalid, PairOutput, RewardInfo, RewardOutput, broadcast
from diffalign.reward_models.composition import Part, Weighted
from diffalign.reward_models.media import InvalidMediaError, MediaBatch, as_list
from diffalign.reward_models.preferences import majority_vote, ranks, vote_win_rates, zscores

__all__ = ["Grouped"]

Normalise = Literal["zscore", "rank", "vote"]
_NAMES = {"zscore": "group_zscore", "rank": "group_rank", "vote": "majority_vote"}


class Grouped(Weighted):
    """Several reward models whose scores are compared within each prompt's media before they are added up.

    "zscore" adds up weighted z-scores of each part, so that no scale dominates (Pref-GRPO and Flow-Factory's gdpo do
    the same to advantages); "rank" adds up weighted ranks, 1 for the worst; "vote" is the share of the others that a
    medium beats by (weighted) majority of the parts, from 0 to 1. The functions, with their sources, are in
    `preferences`.

    A group is all media of a call that have the same prompt; without prompts, the whole call. So a score depends on
    what else is in the call, though not on `batch_size`, and media that cannot be scored are left out of their groups;
    a medium that remains alone has no score. `dims` keeps the raw scores of every part. Transforms of parts come
    first; they matter to "rank" and "vote" only where they clip.
    """

    info = RewardInfo(
        name="grouped", license="those of its parts", weights=(), differentiable=False, groupwise=True
    )  # fmt: skip

    def __init__(
        self,
        path_or_id: str | Path | None = None,
        *,
        of: str | Sequence[Part | Mapping[str, Any]] = (),
        normalise: Normalise = "zscore",
        device: str | torch.device = "auto",
        dtype: torch.dtype | Literal["auto"] = "auto",
        local_files_only: bool | None = None,
    ):
        """Loads the parts; arguments and errors as in `Weighted`.

        Args:
            path_or_id: Must be None.
            of: The parts.
            normalise: "zscore", "rank" or "vote".
            device: As in `Weighted`.
            dtype: As in `Weighted`.
            local_files_only: As in `Weighted`.
        """
        if normalise not in get_args(Normalise):
            raise ValueError(f"normalise must be one of {', '.join(get_args(Normalise))}, got {normalise!r}")
        super().__init__(path_or_id, of=of, device=device, dtype=dtype, local_files_only=local_files_only)
        self.normalise = normalise
        self.info = _grouped_info(self.info, normalise)

    @classmethod
    def describe(cls, of: str = "", normalise: Normalise = "zscore") -> RewardInfo:
        """See `Weighted`."""
        return _grouped_info(super().describe(of), normalise) if of else cls.info

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
        _, rows = self._texts(prompts, len(items))
        parts = super().score(items, prompts, batch_size=batch_size, on_invalid=on_invalid)
        columns = self._columns(parts)
        valid = parts.valid.tolist()
        totals = torch.full((len(items),), float("nan"))
        errors = list(parts.errors)
        for row in dict.fromkeys(rows):
            members = [i for i, other in enumerate(rows) if other == row and valid[i]]
            if len(members) > 1:
                totals[members] = self._totals(columns[members]).float()
                continue
            for i in members:
                errors[i] = f"medium {i}: {self.info.name} needs at least two valid media of its prompt, got one"
                if on_invalid == "raise":
                    raise InvalidMediaError(errors[i])
        known = totals.isfinite()
        dims = {name: parts.dims[name].masked_fill(~known, float("nan")) for name in self.names}
        return RewardOutput(totals, {**dims, "overall": totals}, known, tuple(errors))

    def compare(
        self,
        a: MediaBatch,
        b: MediaBatch,
        prompts: str | Sequence[str],
        *,
        batch_size: int = 32,
        on_invalid: OnInvalid = "raise",
    ) -> PairOutput:
        """1 where the weighted majority of the parts prefers `a`, 0 where it prefers `b`, 0.5 where they are split.

        A pair is a group of two, in which z-scores and ranks say no more than which of the two is better: the three
        kinds agree.
        """
        first, second = as_list(a, self.item_ndim), as_list(b, self.item_ndim)
        if len(first) != len(second):
            raise ValueError(f"compare needs as many a as b, got {len(first)} and {len(second)}")
        texts = broadcast(prompts, len(first))
        both = super().score([*first, *second], [*texts, *texts], batch_size=batch_size, on_invalid=on_invalid)
        of_a, of_b = (
            torch.split(self._columns(both), len(first))[:2] if first else (torch.zeros(0, 1), torch.zeros(0, 1))
        )
        valid = both.valid[: len(first)] & both.valid[len(first) :]
        label = majority_vote(of_a, of_b, self._weights())
        p_a = ((1 + label) / 2).float().masked_fill(~valid, float("nan"))
        return PairOutput(p_a=p_a, tie=(label == 0) & valid, valid=valid)

    def settings(self) -> dict[str, str]:
        """See `Weighted`."""
        return {**super().settings(), "normalise": self.normalise}

    def _columns(self, output: RewardOutput) -> Tensor:
        """Transformed scores [N, K] of the parts."""
        return torch.stack(
            [part.transform(output.dims[name]) for part, name in zip(self.parts, self.names, strict=True)], dim=1
        )

    def _totals(self, columns: Tensor) -> Tensor:
        """Scores [G] of a group from those of the parts [G, K]."""
        if self.normalise == "vote":
            return vote_win_rates(columns, self._weights())
        return (zscores if self.normalise == "zscore" else ranks)(columns) @ self._weights()

    def _weights(self) -> Tensor:
        return torch.tensor([part.weight for part in self.parts], dtype=torch.float64)


def _grouped_info(info: RewardInfo, normalise: Normalise) -> RewardInfo:
    return replace(
        info,
        name=f"{_NAMES[normalise]}({info.name})",
        differentiable=False,
        groupwise=True,
        nominal_range=(0.0, 1.0) if normalise == "vote" else None,
    )
