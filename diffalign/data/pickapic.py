"""Pick-a-Pic rows: two images, a caption, and which of them a person preferred.

Kirstain et al. 2023, "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation"
(arXiv:2305.01569). `label_0` is 1 if the first image won, 0 if the second did and 0.5 for "no preference". Ties
carry no preference and are dropped, as the paper of Diffusion-DPO does (arXiv:2311.12908, section 5.1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign.data.chosen_rejected import parse_weight, present, row_id
from diffalign.data.config import DataConfig
from diffalign.data.images import ImageSource
from diffalign.data.pairs import Pair, Verdict


class PickAPic:
    """Reads rows with the columns of Pick-a-Pic.

    The pair's id is the row number unless `id_column` names a unique column: whether `ranking_id` is unique cannot be
    known from a stream, and a pair must have one name however it is read.
    """

    name = "pickapic"

    def __init__(
        self, config: DataConfig, columns: Sequence[str], base: Path | None = None, *, winners_only: bool = False
    ) -> None:
        self._base = base
        self._winners_only = winners_only
        self._caption = config.caption_column or "caption"
        self._images = (config.image_0_column, config.image_1_column)
        self._label = config.label_column
        self._weight = present(columns, config.weight_column, "weight")
        self._drop_identical = config.drop_identical
        self.id_column = config.id_column
        self.needed = tuple(
            c for c in (*self._images, self._label, self._caption, config.weight_column, config.id_column) if c
        )
        optional = [c for c in ("has_label", "are_different") if c in columns]
        self.small = tuple(c for c in (self._label, self._caption, self._weight, self.id_column, *optional) if c)
        self.columns = (*self._images, *self.small)

    def verdict(self, row: Mapping[str, Any], number: int) -> Verdict:
        """Whether to keep a row; looks at no image."""
        label, caption = row[self._label], row[self._caption]
        if row.get("has_label") is False or label is None or not isinstance(caption, str):
            return "unlabelled"
        if isinstance(label, float) and math.isnan(label):
            return "unlabelled"
        if label not in (0, 0.5, 1):
            raise ValueError(f"{self._label} of row {number} is {label!r}; expected 0, 0.5 or 1")
        if label == 0.5:
            return "tie"
        if self._drop_identical and row.get("are_different") is False:
            return "identical"
        return "keep"

    def pair_id(self, row: Mapping[str, Any], number: int) -> str:
        """The row's name."""
        return row_id(row, number, self.id_column)

    def pair(self, row: Mapping[str, Any], number: int) -> Pair:
        """The pair of a kept row, the preferred image first."""
        names = self._images if row[self._label] == 1 else self._images[::-1]
        images = [ImageSource.of(row[column], self._base) for column in (names[:1] if self._winners_only else names)]
        weight = parse_weight(row, number, self._weight)
        return Pair(self.pair_id(row, number), row[self._caption], images[0], images[-1], weight)
