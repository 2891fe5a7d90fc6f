"""From a config to pairs: finds the format by the columns and drops what carries no preference."""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from diffalign.data.chosen_rejected import ChosenRejected, PairFormat, Scored
from diffalign.data.config import DataConfig
from diffalign.data.folder import find_index, read_index
from diffalign.data.pairs import (
    Pair,
    PairReader,
    PairSet,
    PositionReader,
    ReadReport,
    State,
    Verdict,
    content_fingerprint,
    refuse_duplicates,
)
from diffalign.data.pickapic import PickAPic
from diffalign.data.tables import DatasetTable, RowTable, StreamTable, open_dataset

_log = logging.getLogger("diffalign")

READER_VERSION = 1
"""Part of the data fingerprint: raise it whenever a reader could give other pairs."""

_PEEK = 16


def load_pairs(config: DataConfig, *, winners_only: bool = False) -> PairSet:
    """The configured preference pairs; no image is decoded.

    The labels of a whole data set are read here. Those of a stream are judged row by row, after a look at its first.

    Args:
        config: Where they are.
        winners_only: Read the chosen images alone, for methods that learn from them. Rejected ones need not be there,
            and are ignored where they are; each pair's `rejected` is its `chosen`. Ties have no winner and are dropped.
            Scored images are read in this way too.

    Raises:
        ValueError: If the source cannot be opened, lacks columns, holds values that mean nothing, or has no usable
            pair, for example because every row is a tie.
    """
    table = _open(config, streaming=config.streaming)
    winners_only = winners_only or config.format == "scored"
    layout = _format(config, table, winners_only)
    if isinstance(table, StreamTable):
        _look_at_first_rows(table, layout)
        return StreamedPairs(table.select(layout.columns), layout, config, winners_only)
    pairs = IndexedPairs(table.select(layout.columns), layout, config, winners_only)
    _log.info("%s: %s", pairs.name, pairs.report.summary())
    return pairs


def check_source(config: DataConfig, *, winners_only: bool = False) -> str:
    """Looks at the columns and the first rows only, without downloading a data set.

    Args:
        config: Where the pairs are.
        winners_only: See `load_pairs`.

    Returns:
        The name of the format.

    Raises:
        ValueError: As `load_pairs`, as far as the first rows show it.
    """
    table = _open(config, streaming=True)
    layout = _format(config, table, winners_only)
    _look_at_first_rows(table, layout)
    return layout.name


class IndexedPairs(PairSet):
    """The usable rows of a table that can be asked for by row number."""

    def __init__(
        self, table: DatasetTable | RowTable, layout: PairFormat, config: DataConfig, winners_only: bool
    ) -> None:
        self._table = table
        self._format = layout
        self.name = table.name
        self.winners_only = winners_only
        verdicts: Counter[Verdict] = Counter()
        numbers = array("q")
        pair_ids: list[str] = []
        for number, row in enumerate(table.scan(layout.small)):
            verdict = layout.verdict(row, number)
            verdicts[verdict] += 1
            if verdict == "keep":
                numbers.append(number)
                if layout.id_column is not None:  # row numbers are unique
                    pair_ids.append(layout.pair_id(row, number))
                if len(numbers) == config.max_train_samples:
                    break
        report = ReadReport.of(verdicts)
        if not numbers:
            raise no_usable_pair(table.name, report)
        refuse_duplicates(pair_ids, table.name)
        self._numbers = numbers
        self._report = report
        self.size = len(numbers)
        layout.pair(table[numbers[0]], numbers[0])  # raises if the image columns hold something else
        if isinstance(table, RowTable):  # the index names files, whose content counts
            self.fingerprint = content_fingerprint(self)
        else:
            self.fingerprint = _fingerprint(table.identity, layout, config, winners_only)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, position: int) -> Pair:
        number = self._numbers[position]
        return self._format.pair(self._table[number], number)

    @property
    def report(self) -> ReadReport:
        """What became of the rows."""
        return self._report

    def reader(self, state: State | None = None) -> PairReader:
        """See `PairSet.reader`."""
        return PositionReader(self, state)


class StreamedPairs(PairSet):
    """The usable rows of a stream."""

    def __init__(self, table: StreamTable, layout: PairFormat, config: DataConfig, winners_only: bool) -> None:
        self._table = table
        self._format = layout
        self._limit = config.max_train_samples
        self._latest: _StreamReader | None = None
        self.name = table.name
        self.size = None
        self.winners_only = winners_only
        self.fingerprint = _fingerprint(table.identity, layout, config, winners_only)

    @property
    def report(self) -> ReadReport:
        """What became of the rows of the latest pass."""
        return ReadReport() if self._latest is None else self._latest.report

    def reader(self, state: State | None = None) -> PairReader:
        """See `PairSet.reader`; goes on without reading the stream's beginning again."""
        self._latest = _StreamReader(self._table, self._format, self._limit, state)
        return self._latest


class _StreamReader(Iterator[Pair]):
    def __init__(self, table: StreamTable, layout: PairFormat, limit: int | None, state: State | None) -> None:
        self._format = layout
        self._limit = limit
        self._dataset = table.select(table.columns).dataset  # its own, because it remembers where it stands
        self._verdicts: Counter[Verdict] = Counter()
        if state is not None:
            self._verdicts.update(ReadReport.from_json(state["report"]).verdicts())
            self._dataset.load_state_dict(state["stream"])
        self._rows = iter(self._dataset)

    def __next__(self) -> Pair:
        while self._limit is None or self._verdicts["keep"] < self._limit:
            row = next(self._rows)
            number = self._verdicts.total()
            verdict = self._format.verdict(row, number)
            self._verdicts[verdict] += 1
            if verdict == "keep":
                return self._format.pair(row, number)
        raise StopIteration

    @property
    def report(self) -> ReadReport:
        return ReadReport.of(self._verdicts)

    def skip(self, count: int) -> int:
        return sum(1 for _ in islice(self, count))  # which rows are pairs, and how many, only reading them tells

    def state(self) -> State:
        return {"report": self.report.to_json(), "stream": self._dataset.state_dict()}


def no_usable_pair(name: str, report: ReadReport) -> ValueError:
    """The error for a data set in which no row says what is better."""
    reason = "every row is a tie" if report.ties == report.rows > 0 else report.summary()
    return ValueError(f"no usable pair in {name}: {reason}; expected rows that prefer one image over the other")


def _open(config: DataConfig, *, streaming: bool) -> DatasetTable | StreamTable | RowTable:
    index = find_index(config)
    if index is None:
        return open_dataset(config, streaming=streaming)
    rows = read_index(index)
    if not rows:
        raise ValueError(f"index {index} has no rows; expected one per pair")
    columns = tuple(dict.fromkeys(key for row in rows for key in row))
    return RowTable(str(index), "", columns, index.parent, rows)


def _format(config: DataConfig, table: DatasetTable | StreamTable | RowTable, winners_only: bool) -> PairFormat:
    """The format that the config names, or the one whose columns are all there."""
    kinds: dict[str, type[ChosenRejected] | type[PickAPic]] = {"pickapic": PickAPic, "chosen_rejected": ChosenRejected}
    if config.format in ("chosen_rejected", "folder") or (config.format == "auto" and isinstance(table, RowTable)):
        kinds.pop("pickapic")
    elif config.format == "pickapic":
        kinds.pop("chosen_rejected")
    options = ["caption_column", "chosen_column", *([] if winners_only else ["rejected_column"]), "label_column"]
    formats: list[PairFormat]
    if config.format == "scored":
        formats = [Scored(config, table.columns, table.base)]
        options = ["caption_column", "image_column", "reward_columns"]
    else:
        formats = [kind(config, table.columns, table.base, winners_only=winners_only) for kind in kinds.values()]
    for candidate in formats:
        if set(candidate.needed) <= set(table.columns):
            return candidate
    expected = " or ".join(f"{', '.join(f.needed)} ({f.name})" for f in formats)
    raise ValueError(
        f"{table.name} has the columns {', '.join(table.columns) or 'none'}; expected {expected}; "
        f"name yours with {', '.join(options)}, ..."
    )


def _look_at_first_rows(table: DatasetTable | StreamTable | RowTable, layout: PairFormat) -> None:
    """Raises ValueError if the first rows cannot be read, or if they are all there are and none is usable."""
    rows: Iterator[Mapping[str, Any]]
    if isinstance(table, StreamTable):
        rows = iter(table.select(layout.columns).dataset)
    else:
        rows = (table[number] for number in range(len(table)))
    verdicts: Counter[Verdict] = Counter()
    for number, row in enumerate(islice(rows, _PEEK)):
        verdict = layout.verdict({**dict.fromkeys(layout.small), **row}, number)
        verdicts[verdict] += 1
        if verdict == "keep":
            layout.pair(row, number)
    report = ReadReport.of(verdicts)
    if report.rows < _PEEK and not report.kept:
        raise no_usable_pair(table.name, report)


def _fingerprint(identity: str, layout: PairFormat, config: DataConfig, winners_only: bool) -> str:
    limits = [config.drop_identical, config.max_train_samples]
    parts = [READER_VERSION, identity, layout.name, layout.columns, *limits, *(["winners"] if winners_only else [])]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
