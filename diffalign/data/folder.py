"""A folder with an index: one row per pair, image files named relative to the folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow.parquet

from diffalign.data.config import DataConfig

_log = logging.getLogger("diffalign")

INDEX_NAMES = ("index.jsonl", "index.parquet")


def find_index(config: DataConfig) -> Path | None:
    """The index file that is configured or lies in the configured folder, None if the source is of another kind.

    Raises:
        ValueError: If the folder, or an index that the config names or its format requires, is not there.
    """
    folder = config.train_data_dir
    if folder is None:
        file = Path(config.dataset_name or "")
        if file.suffix in (".jsonl", ".json") and file.is_file():  # JSON holds no images, so its rows name files
            return file
        if config.format == "folder":
            raise ValueError("format folder needs train_data_dir, found dataset_name; set train_data_dir instead")
        return None
    if not folder.is_dir():
        raise ValueError(f"train_data_dir {folder} is no folder; check the path")
    names = INDEX_NAMES if config.index is None else (config.index,)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    if config.index is not None or config.format == "folder":
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise ValueError(f"no {' or '.join(names)} in {folder} (found {found}); name the file in data.index")
    return None


def read_index(path: Path) -> list[dict[str, Any]]:
    """All rows of a JSONL, JSON (one list) or parquet index.

    The last line of a JSONL file may be torn, as a killed writer leaves it: it is left out with a warning.

    Raises:
        ValueError: If another line is no JSON object, or the file is of another kind.
    """
    if path.suffix == ".parquet":
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
        return rows
    if path.suffix not in (".jsonl", ".json"):
        raise ValueError(f"index {path} ends in {path.suffix!r}; expected .jsonl, .json or .parquet")
    content = path.read_bytes()
    if path.suffix == ".json" and content.lstrip().startswith(b"["):
        listed = json.loads(content)
        if not all(isinstance(row, dict) for row in listed):
            raise ValueError(f"{path} is a list of other things than objects; expected one object per pair")
        return list(listed)
    rows = []
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # no line break behind it
                _log.warning("%s: the last line (%d) is incomplete and left out", path, number)
                break
            raise ValueError(f"line {number} of {path} is no JSON ({error}); repair or remove it") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} of {path} is {type(row).__name__}; expected an object with prompt, ...")
        rows.append(row)
    return rows
