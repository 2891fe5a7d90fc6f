"""Files of long commands that may be killed at any moment and go on where they were.

A file is either there and complete (`write_atomically`) or an append-only JSONL whose last line may be torn
(`RowLog`). `claim_folder` keeps the results of two different settings from mixing in one folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

SETTINGS_FILE = "settings.json"

Row = Mapping[str, Any]


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file that is never seen half written: a temporary file beside it, then a rename.

    The temporary name is a function of `path`, so that what a killed process left is overwritten by the next one.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def to_line(row: Row) -> str:
    """A row as one line of JSON with its line break."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def claim_folder(folder: Path, settings: Mapping[str, Any], made_here: Sequence[str] = ("index.jsonl",)) -> None:
    """Makes `folder`, writes `settings` into it, or checks that the settings already there are the same.

    Args:
        folder: Where a command is about to write.
        settings: Everything its output depends on, as JSON values; written to `settings.json`.
        made_here: Names of the command's own output. If one is there without a `settings.json`, somebody else made
            it and it is not overwritten.

    Raises:
        ValueError: If the folder holds the output of other settings (the message names the differences), of
            something else, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; expected a folder to write into, or a name that is still free")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS_FILE
    wanted = json.loads(json.dumps(settings))
    if not path.exists():
        foreign = [name for name in made_here if (folder / name).exists()]
        if foreign:
            raise ValueError(f"{folder} holds {foreign[0]} but no {SETTINGS_FILE}: not made here; use another folder")
        write_atomically(path, (json.dumps(wanted, indent=2, ensure_ascii=False) + "\n").encode())
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); use another folder or delete this one") from error
    found = found if isinstance(found, dict) else {}
    changes = [
        f"{key} {_short(found, key)} -> {_short(wanted, key)}"
        for key in dict.fromkeys([*wanted, *found])
        if found.get(key) != wanted.get(key)
    ]
    if changes:
        raise ValueError(
            f"{folder} holds results of other settings ({'; '.join(changes)}); use another output folder, go back to "
            "those settings, or delete this folder to start over"
        )


def _short(settings: Mapping[str, Any], key: str) -> str:
    return json.dumps(settings[key], ensure_ascii=False) if settings.get(key) is not None else "none"


class RowLog:
    """An append-only JSONL with one row per id, filled in chunks whose bounds depend on the list of ids only.

    A chunk of which a row is missing or stale is done again as a whole. Batches are then the same as in a run that
    was never interrupted, and so is the rounding of everything computed in them.

    Args:
        path: The file; it need not exist. Torn, unreadable and unknown lines are dropped.
        ids: All ids, in the order of the finished file; no two alike.
        chunk_size: Rows per chunk, >= 1.
        is_current: Whether a row read from the file still stands.
    """

    def __init__(self, path: Path, ids: Sequence[str], chunk_size: int, is_current: Callable[[Row], bool]) -> None:
        self.path = path
        self.ids = list(ids)
        self._rows: dict[str, Row] = {}
        found = self._read()
        self.todo: list[range] = []
        for start in range(0, len(self.ids), chunk_size):
            chunk = range(start, min(start + chunk_size, len(self.ids)))
            rows = [found.get(self.ids[i]) for i in chunk]
            kept = [row for row in rows if row is not None and is_current(row)]
            if len(kept) == len(chunk):
                self._rows.update((row["id"], row) for row in kept)
            else:
                self.todo.append(chunk)
        self._write_in_order()

    @property
    def done(self) -> int:
        """How many rows are finished."""
        return len(self._rows)

    def append(self, rows: Sequence[Row]) -> None:
        """Adds the finished rows of one chunk."""
        with self.path.open("ab") as file:
            file.write("".join(to_line(row) for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())
        self._rows.update((row["id"], row) for row in rows)

    def finish(self) -> list[Row]:
        """All rows in the order of the ids, as the file now holds them too."""
        missing = [key for key in self.ids if key not in self._rows]
        assert not missing, f"rows were never written: {missing[:3]}"
        self._write_in_order()
        return [self._rows[key] for key in self.ids]

    def _read(self) -> dict[str, Row]:
        rows: dict[str, Row] = {}
        for line in self.path.read_bytes().split(b"\n") if self.path.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # torn by a kill; its chunk is done again
            if isinstance(row, dict) and isinstance(row.get("id"), str):
                rows[row["id"]] = row
        return rows

    def _write_in_order(self) -> None:
        content = "".join(to_line(self._rows[key]) for key in self.ids if key in self._rows).encode()
        if content != (self.path.read_bytes() if self.path.exists() else b""):
            write_atomically(self.path, content)
