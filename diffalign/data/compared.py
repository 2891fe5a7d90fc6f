"""Comparisons of two pictures for the training of reward models, from the data sets that published ones learnt from.

Unlike training pairs of a diffusion model these keep ties and divided votes, and a ranking of several pictures becomes
all of its pairs. Formats, told apart by their columns:

| format | columns of a row | what becomes of it |
| --- | --- | --- |
| `pickapic` | caption, jpg_0, jpg_1, label_0 (0, 0.5, 1); perhaps has_label | one comparison |
| `hpdv2` | prompt, file_path [2], human_preference [2] | one comparison, by shares of the votes |
| `hpdv2_test` | prompt, image_path [n], rank [n], smaller is better | all pairs of different ranks |
| `imagerewarddb` | prompt, generations [n], ranking [n], smaller is better | all pairs of different ranks |
| `hpdv3` | prompt, path1 (the preferred), path2, perhaps confidence | one comparison |
| `chosen_rejected` | prompt, chosen, rejected, as `diffalign pairs` writes | one comparison |
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator

from diffalign.data.config import DataConfig
from diffalign.data.folder import find_index, read_index
from diffalign.data.images import ImageSource
from diffalign.data.pairs import refuse_duplicates
from diffalign.data.tables import DatasetTable, RowTable, open_dataset
from diffalign.reward_losses import ranking_pairs

FormatName = Literal["auto", "pickapic", "hpdv2", "hpdv2_test", "imagerewarddb", "hpdv3", "chosen_rejected"]

SCENES = "diffalign://shapes/"
"""Begins the names of sets that the renderer draws: `diffalign://shapes/train`, `mixed` and `held_out`."""


@dataclass(frozen=True)
class Comparison:
    """Two pictures of one prompt, and which of them was preferred; nothing is decoded yet.

    Attributes:
        pair_id: Its name; stable over runs, it seeds every random draw.
        prompt: What both were made for.
        first: One picture.
        second: The other.
        preference: Probability, or share of votes, with which the first is better: 1, 0, 0.5 for a tie, or between.
        person: Who decided, if that is known.
        condition: In which respect, if that is known; for models with several.
    """

    pair_id: str
    prompt: str
    first: ImageSource
    second: ImageSource
    preference: float
    person: str | None = None
    condition: str | None = None


class Comparisons(Protocol):
    """Comparisons in a fixed order, whose pictures may be read or drawn when they are asked for.

    Attributes:
        buckets: None: reward models take pictures of any size in one batch. `PairSource` asks.
    """

    buckets: ClassVar[None]

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Comparison: ...

    def pair_id(self, row: int) -> str:
        """The name of one of them, which needs no picture."""
        ...


class ComparisonsConfig(BaseModel):
    """Where comparisons are.

    Attributes:
        dataset_name: A data set of the Hub, a local file or folder, or `diffalign://shapes/train`, which is drawn.
        train_data_dir: A local folder instead, with an index.jsonl, index.parquet or the file named in `index`.
        dataset_config_name: Configuration of a Hub data set that has several.
        split: Split to read.
        index: Index file of `train_data_dir`.
        image_dir: Folder that file names are relative to; None is the index file's own.
        format: What the columns mean; "auto" decides by their names.
        person_column: Column that says who decided, for `pal`.
        condition_column: Column that says in which respect, for `mps`.
        min_confidence: Rows of `hpdv3` below this confidence are left out; its authors trained with 0.95.
        ties: Whether comparisons without a preference are kept.
        max_train_samples: Keep only the first so many comparisons; how many to draw, of scenes.
        cache_dir: Where downloaded data sets are kept; None is the folder of the `datasets` library.
        max_corrupt_fraction: More comparisons with a picture that cannot be read than this fraction stop the run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset_name: str | None = None
    train_data_dir: Path | None = None
    dataset_config_name: str | None = None
    split: str = "train"
    index: str | None = None
    image_dir: Path | None = None
    format: FormatName = "auto"
    person_column: str | None = None
    condition_column: str | None = None
    min_confidence: float = Field(default=0.0, ge=0, le=1)
    ties: bool = True
    max_train_samples: int | None = Field(default=None, ge=1)
    cache_dir: Path | None = None
    max_corrupt_fraction: float = Field(default=0.01, ge=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> ComparisonsConfig:
        if (self.dataset_name is None) == (self.train_data_dir is None):
            found = "neither" if self.dataset_name is None else "both"
            raise ValueError(f"data needs dataset_name or train_data_dir, found {found}; set exactly one")
        return self

    @property
    def drawn(self) -> str | None:
        """The split of the embedded world that is drawn; None for pictures that exist."""
        name = self.dataset_name or ""
        return name.removeprefix(SCENES) if name.startswith(SCENES) else None


class ComparisonList:
    """Comparisons of rows that are at hand; see `Comparisons`.

    Attributes:
        left_out: Why rows gave no comparison, with how many; "identical" and "unreadable" are added by
            `reward_models.comparison_checks`.
    """

    buckets: ClassVar[None] = None

    def __init__(self, items: Sequence[Comparison], name: str, left_out: Mapping[str, int] | None = None) -> None:
        refuse_duplicates([item.pair_id for item in items], name)
        self.items, self.name, self.left_out = tuple(items), name, dict(left_out or {})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> Comparison:
        return self.items[row]

    def pair_id(self, row: int) -> str:
        """See `Comparisons`."""
        return self.items[row].pair_id

    def without(self, reasons: Mapping[str, str]) -> ComparisonList:
        """The comparisons that are not named, with the reasons of those that are counted."""
        counts = dict(self.left_out)
        for reason in reasons.values():
            counts[reason] = counts.get(reason, 0) + 1
        return ComparisonList([item for item in self.items if item.pair_id not in reasons], self.name, counts)

    def split(self, count: int, seed: int) -> tuple[ComparisonList, ComparisonList]:
        """A training and a held-out part that share no prompt; at least `count` comparisons are held out.

        Prompts are held out whole, in the order of a hash of (seed, prompt); case and spacing make no other prompt.

        Raises:
            ValueError: If nothing is left to train on.
        """
        groups: dict[str, list[Comparison]] = {}
        for item in self.items:
            groups.setdefault(" ".join(item.prompt.split()).casefold(), []).append(item)
        held: set[str] = set()
        for key in sorted(groups, key=lambda p: hashlib.blake2b(f"{seed}\x1f{p}".encode()).digest()):
            if len(held) >= count:
                break
            held.update(item.pair_id for item in groups[key])
        if len(held) == len(self):
            raise ValueError(
                f"holding out {count} of {len(self)} comparisons ({len(groups)} prompts) leaves none to train on; "
                "hold out fewer, or add some"
            )
        rest = ComparisonList([item for item in self.items if item.pair_id not in held], self.name, self.left_out)
        return rest, ComparisonList([item for item in self.items if item.pair_id in held], f"{self.name}, held out")


def load_comparisons(config: ComparisonsConfig) -> ComparisonList:
    """The configured comparisons; no picture is decoded.

    Raises:
        ValueError: If the source cannot be opened, lacks columns, holds values that mean nothing, or nothing usable.
    """
    table = _open(config)
    name, needed = _format(config, table.columns)
    extra = [c for c in (config.person_column, config.condition_column) if c]
    for column in (*needed, *extra):
        if column not in table.columns:
            raise ValueError(
                f"{table.name} has no column {column!r} (found: {', '.join(table.columns)}); expected "
                f"{', '.join((*needed, *extra))} for format {name!r}"
            )
    read = _ROWS[name]
    base = config.image_dir or table.base
    items: list[Comparison] = []
    left_out: dict[str, int] = {}
    later: dict[str, DatasetTable] = {}
    if isinstance(table, DatasetTable):
        later = {column: table.select([column]) for column in _PICTURES.get(name, ())}
    for number, row in enumerate(_rows(table, later)):
        found = list(read(row, number, config)) if isinstance(row.get(needed[0]), str) else []
        undecided = sum(preference == 0.5 for _, _, preference in found)
        if not found or (undecided and not config.ties):
            reason = "ties" if undecided else "no preference"
            left_out[reason] = left_out.get(reason, 0) + 1
            continue
        person, condition = (
            None if column is None or row.get(column) is None else str(row[column])
            for column in (config.person_column, config.condition_column)
        )
        key = str(row["id"]) if isinstance(row.get("id"), str | int) else str(number)
        for i, (first, second, preference) in enumerate(found):
            pair_id = key if len(found) == 1 else f"{key}/{i}"
            one, other = (_source(cell, later, number, base) for cell in (first, second))
            items.append(Comparison(pair_id, row[needed[0]], one, other, preference, person, condition))
        if config.max_train_samples is not None and len(items) >= config.max_train_samples:
            items = items[: config.max_train_samples]
            break
    if not items:
        raise ValueError(f"no usable comparison in {table.name}: {left_out or 'no rows'}")
    return ComparisonList(items, table.name, left_out)


def _open(config: ComparisonsConfig) -> RowTable | DatasetTable:
    names = ("dataset_name", "train_data_dir", "dataset_config_name", "split", "index", "cache_dir")
    data = DataConfig(**{name: getattr(config, name) for name in names})
    index = find_index(data)
    if index is None:
        table = open_dataset(data, streaming=False)
        assert isinstance(table, DatasetTable)
        return table
    rows = read_index(index)
    return RowTable(str(index), "", tuple(dict.fromkeys(key for row in rows for key in row)), index.parent, rows)


@dataclass(frozen=True)
class _Later:
    """Stands for a cell with a picture, which is not read with the labels."""

    column: str


@dataclass(frozen=True, eq=False)
class _Cell(ImageSource):
    """A picture in a table on the disk, read when it is asked for: all of Pick-a-Pic fits into no memory."""

    table: DatasetTable
    row: int
    column: str
    base: Path | None

    def read(self) -> bytes:
        """See `ImageSource`."""
        return ImageSource.of(self.table[self.row][self.column], self.base).read()


def _rows(table: RowTable | DatasetTable, later: Mapping[str, DatasetTable]) -> Iterator[Mapping[str, Any]]:
    """The rows of a table; those of one on the disk without their pictures."""
    if isinstance(table, RowTable):
        yield from table.rows
        return
    for row in table.scan([column for column in table.columns if column not in later]):
        yield {**row, **{column: _Later(column) for column in later}}


def _source(cell: Any, later: Mapping[str, DatasetTable], number: int, base: Path | None) -> ImageSource:
    if isinstance(cell, _Later):
        return _Cell(None, later[cell.column], number, cell.column, base)
    return ImageSource.of(cell, base)


Found = tuple[Any, Any, float]


def _pickapic(row: Mapping[str, Any], number: int, _: ComparisonsConfig) -> Iterator[Found]:
    label = row["label_0"]
    if row.get("has_label") is False or label is None or (isinstance(label, float) and math.isnan(label)):
        return
    if label not in (0, 0.5, 1):
        raise ValueError(f"label_0 of row {number} is {label!r}; expected 0, 0.5 or 1")
    yield row["jpg_0"], row["jpg_1"], float(label)


def _hpdv2(row: Mapping[str, Any], number: int, _: ComparisonsConfig) -> Iterator[Found]:
    files, votes = row["file_path"], row["human_preference"]
    if len(files) != 2 or len(votes) != 2 or min(votes) < 0 or sum(votes) <= 0:
        raise ValueError(f"row {number} has {len(files)} files and votes {votes!r}; expected two of each, as 0 and 1")
    yield files[0], files[1], votes[0] / sum(votes)


def _ranked(files: str, ranks: str) -> Callable[[Mapping[str, Any], int, ComparisonsConfig], Iterator[Found]]:
    def read(row: Mapping[str, Any], number: int, _: ComparisonsConfig) -> Iterator[Found]:
        pictures, places = row[files], row[ranks]
        if len(pictures) != len(places):
            raise ValueError(f"row {number} has {len(pictures)} {files} and {len(places)} {ranks}; expected as many")
        for better, worse in ranking_pairs(places):
            yield pictures[better], pictures[worse], 1.0

    return read


def _hpdv3(row: Mapping[str, Any], number: int, config: ComparisonsConfig) -> Iterator[Found]:
    confidence = row.get("confidence")
    if confidence is None or confidence >= config.min_confidence:
        yield row["path1"], row["path2"], 1.0


def _chosen_rejected(row: Mapping[str, Any], number: int, _: ComparisonsConfig) -> Iterator[Found]:
    yield row["chosen"], row["rejected"], 1.0


_COLUMNS: dict[str, tuple[str, ...]] = {
    "pickapic": ("caption", "jpg_0", "jpg_1", "label_0"),
    "hpdv2": ("prompt", "file_path", "human_preference"),
    "hpdv2_test": ("prompt", "image_path", "rank"),
    "imagerewarddb": ("prompt", "generations", "ranking"),
    "hpdv3": ("prompt", "path1", "path2"),
    "chosen_rejected": ("prompt", "chosen", "rejected"),
}
_PICTURES = {name: _COLUMNS[name][1:3] for name in ("pickapic", "hpdv3", "chosen_rejected")}
"""Columns with one picture each; other formats name files in lists."""
_ROWS = {
    "pickapic": _pickapic,
    "hpdv2": _hpdv2,
    "hpdv2_test": _ranked("image_path", "rank"),
    "imagerewarddb": _ranked("generations", "ranking"),
    "hpdv3": _hpdv3,
    "chosen_rejected": _chosen_rejected,
}


def _format(config: ComparisonsConfig, columns: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """The name of the format and its columns, the prompt's first."""
    if config.format != "auto":
        return config.format, _COLUMNS[config.format]
    for name, needed in _COLUMNS.items():
        if set(needed) <= set(columns):
            return name, needed
    expected = "; ".join(f"{', '.join(needed)} ({name})" for name, needed in _COLUMNS.items())
    raise ValueError(f"the data have the columns {', '.join(columns) or 'none'}; expected one of: {expected}")
