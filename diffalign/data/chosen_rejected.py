"""Rows that say which image was chosen: `prompt`, `chosen`, `rejected`, perhaps `weight`, `id` and rewards.

Where only winners are wanted, `rejected` is neither needed nor read. A row of `Scored` has one image and its rewards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from diffalign.data.config import DataConfig
from diffalign.data.images import ImageSource
from diffalign.data.pairs import Pair, Verdict


class PairFormat(Protocol):
    """How the rows of one kind of data set become pairs.

    Attributes:
        name: What a config calls the format.
        needed: Columns that must be there.
        columns: All columns that are read.
        small: Those of them that decide about a row; no images, so that a whole column can be read.
        id_column: Column of the rows' names, None for row numbers.
    """

    name: str
    needed: tuple[str, ...]
    columns: tuple[str, ...]
    small: tuple[str, ...]
    id_column: str | None

    def verdict(self, row: Mapping[str, Any], number: int) -> Verdict:
        """Whether to keep a row; looks at no image."""
        ...

    def pair_id(self, row: Mapping[str, Any], number: int) -> str:
        """The row's name."""
        ...

    def pair(self, row: Mapping[str, Any], number: int) -> Pair:
        """The pair of a kept row."""
        ...


class ChosenRejected:
    """Reads rows with a prompt, a chosen and a rejected image.

    Args:
        config: Column names.
        columns: The columns that exist.
        base: Folder that file names in the image columns are relative to.
        winners_only: Whether to leave the rejected images alone.
    """

    name = "chosen_rejected"

    def __init__(
        self, config: DataConfig, columns: Sequence[str], base: Path | None = None, *, winners_only: bool = False
    ) -> None:
        self._base = base
        self._prompt = config.caption_column or "prompt"
        self._images = (config.chosen_column,) if winners_only else (config.chosen_column, config.rejected_column)
        self._weight = present(columns, config.weight_column, "weight")
        self.id_column = present(columns, config.id_column, "id")
        self._rewards = config.reward_columns
        named = (config.weight_column, config.id_column, *self._rewards)
        self.needed = tuple(c for c in (self._prompt, *self._images, *named) if c)
        self.small = tuple(c for c in (self._prompt, self._weight, self.id_column, *self._rewards) if c)
        self.columns = (*self._images, *self.small)

    def verdict(self, row: Mapping[str, Any], number: int) -> Verdict:
        """A row counts as unlabelled if it has no prompt, or no finite reward; there are no ties in this format."""
        if not isinstance(row.get(self._prompt), str):
            return "unlabelled"
        return "keep" if all(_has_reward(row, number, column) for column in self._rewards) else "unlabelled"

    def pair_id(self, row: Mapping[str, Any], number: int) -> str:
        """The row's name."""
        return row_id(row, number, self.id_column)

    def pair(self, row: Mapping[str, Any], number: int) -> Pair:
        """The pair of a kept row."""
        images = [ImageSource.of(row.get(column), self._base) for column in self._images]
        weight = parse_weight(row, number, self._weight)
        rewards = tuple(float(row[column]) for column in self._rewards)
        return Pair(self.pair_id(row, number), row[self._prompt], images[0], images[-1], weight, rewards)


class Scored(ChosenRejected):
    """Reads rows with a prompt, an image or clip, and rewards; see `ChosenRejected`, whose `chosen` is the image."""

    name = "scored"

    def __init__(self, config: DataConfig, columns: Sequence[str], base: Path | None = None) -> None:
        other = "video" if "video" in columns and "image" not in columns else "image"
        single = {"chosen_column": config.image_column or other, "reward_columns": config.reward_columns or ("reward",)}
        super().__init__(config.model_copy(update=single), columns, base, winners_only=True)


def _has_reward(row: Mapping[str, Any], number: int, column: str) -> bool:
    """Whether there is a finite number; raises ValueError for what is neither a number nor an empty cell."""
    value = row.get(column)
    if value is None:
        return False
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{column} of row {number} is {value!r}; expected a number, larger for what is better")
    return math.isfinite(value)


def present(columns: Sequence[str], configured: str | None, default: str) -> str | None:
    """The configured column, or the default one if it exists."""
    return configured or (default if default in columns else None)


def row_id(row: Mapping[str, Any], number: int, column: str | None) -> str:
    """The text of the row's id column, or its number."""
    if column is None:
        return str(number)
    if row.get(column) is None:
        raise ValueError(f"row {number} has no {column!r}; expected a unique id in every row")
    return str(row[column])


def parse_weight(row: Mapping[str, Any], number: int, column: str | None) -> float:
    """The row's weight, 1 without such a column.

    Raises:
        ValueError: If it is missing in this row, negative or not finite.
    """
    if column is None:
        return 1.0
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{column} of row {number} is {value!r}; expected a finite number >= 0")
    return float(value)
