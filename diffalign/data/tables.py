"""Data sets as tables of undecoded rows: whole ones, streams, and rows in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.data.config import DataConfig

if TYPE_CHECKING:
    import datasets  # with pandas a second of importing, which folders of pictures need not wait for

_MODULES = {".parquet": "parquet", ".arrow": "arrow"}

Row = Mapping[str, Any]


@dataclass(frozen=True)
class RowTable:
    """Rows in memory.

    Attributes:
        name: For messages.
        identity: Changes whenever the rows could be others.
        columns: Names of the columns.
        base: Folder that file names in the rows are relative to.
        rows: The rows themselves.
    """

    name: str
    identity: str
    columns: tuple[str, ...]
    base: Path | None
    rows: Sequence[Row]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Row:
        return self.rows[number]

    def scan(self, columns: Sequence[str]) -> Iterator[Row]:
        """Some columns of all rows; a cell that a row lacks is None."""
        for row in self.rows:
            yield {column: row.get(column) for column in columns}

    def select(self, columns: Sequence[str]) -> RowTable:
        """Itself: nothing is gained by leaving columns out."""
        return self


@dataclass(frozen=True)
class DatasetTable:
    """A whole `datasets.Dataset`, images undecoded; attributes as in `RowTable`."""

    name: str
    identity: str
    columns: tuple[str, ...]
    base: Path | None
    dataset: datasets.Dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> Row:
        row: Row = self.dataset[number]
        return row

    def scan(self, columns: Sequence[str]) -> Iterator[Row]:
        """Some columns of all rows, read straight from the Arrow table: no image is touched."""
        small = self.dataset.select_columns(list(columns)).with_format("arrow")
        for batch in small.iter(batch_size=10_000):
            yield from batch.to_pylist()

    def select(self, columns: Sequence[str]) -> DatasetTable:
        """The table without its other columns."""
        kept = self.dataset.select_columns(list(columns))
        return DatasetTable(self.name, self.identity, tuple(columns), self.base, kept)


@dataclass(frozen=True)
class StreamTable:
    """A `datasets.IterableDataset`, images undecoded; attributes as in `RowTable`."""

    name: str
    identity: str
    columns: tuple[str, ...]
    base: Path | None
    dataset: datasets.IterableDataset

    def select(self, columns: Sequence[str]) -> StreamTable:
        """The table without its other columns."""
        kept = self.dataset.select_columns(list(columns))
        return StreamTable(self.name, self.identity, tuple(columns), self.base, kept)


def open_dataset(config: DataConfig, *, streaming: bool) -> DatasetTable | StreamTable:
    """The configured data set, whole or as a stream.

    Args:
        config: Names it.
        streaming: Whether to read row by row. A folder written by `save_to_disk` is never streamed: it is already
            here, and is read where it lies.

    Raises:
        ValueError: If there is no such data set, configuration or split, or it needs code of its own to be read.
    """
    from datasets.exceptions import DatasetsError

    name = str(config.train_data_dir or config.dataset_name)
    local = Path(name)
    if (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
        return _saved(local, config.split)
    try:
        builder = _builder(config, local)
        if streaming:
            stream = builder.as_streaming_dataset(split=config.split)
        else:
            builder.download_and_prepare()
            whole = builder.as_dataset(split=config.split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
            raise  # the disk, not the name
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot open data set {name!r}, split {config.split!r}: {reason}") from error
    identity = _identity(builder, config.split)
    if not streaming:
        whole = _undecoded(whole)
        return DatasetTable(name, identity, tuple(whole.column_names), None, whole)
    stream = _undecoded(stream)
    columns = stream.column_names or tuple(next(iter(stream), {}))
    return StreamTable(name, identity, tuple(columns), None, stream)


def _builder(config: DataConfig, local: Path) -> Any:
    from datasets import load_dataset_builder

    cache = None if config.cache_dir is None else str(config.cache_dir)
    if local.is_file():
        module = _MODULES.get(local.suffix)
        if module is None:
            raise ValueError(f"a file of type {local.suffix!r}; expected one of {', '.join(_MODULES)}")
        files = {config.split.partition("[")[0]: str(local)}
        return load_dataset_builder(module, config.dataset_config_name, data_files=files, cache_dir=cache)
    return load_dataset_builder(str(local), config.dataset_config_name, cache_dir=cache)


def _saved(folder: Path, split: str) -> DatasetTable:
    from datasets import DatasetDict, load_from_disk

    loaded = load_from_disk(str(folder))
    if isinstance(loaded, DatasetDict):
        if split not in loaded:
            raise ValueError(f"no split {split!r} in {folder}; it has {', '.join(loaded)}")
        loaded = loaded[split]
    identity = f"saved {loaded._fingerprint}"
    dataset = _undecoded(loaded)
    return DatasetTable(str(folder), identity, tuple(dataset.column_names), None, dataset)


def _undecoded(dataset: Any) -> Any:
    """The data set with its image and video columns as they are stored, so that reading a row decodes nothing."""
    from datasets import Image, Video

    for column, feature in (dataset.features or {}).items():
        if isinstance(feature, Image | Video):
            dataset = dataset.cast_column(column, type(feature)(decode=False))
    return dataset


def _identity(builder: Any, split: str) -> str:
    """The files of a data set and their versions: revision on the Hub, name, size and change time on a disk.

    Equal for a stream and for the whole data set, so that both find the same encoded cache.
    """
    files = builder.config.data_files or {}
    name = split.partition("[")[0]
    versions = []
    for group in [files[name]] if name in files else list(files.values()):
        for file, origin in zip(group, getattr(group, "origin_metadata", ()), strict=False):
            path = Path(file)
            local = [path.name, path.stat().st_size] if path.exists() else [file]
            versions.append([*local, *origin])
    parts = [builder.dataset_name, builder.config.name, split, versions or [builder.config_id, builder.hash]]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
