"""Files of long commands that may be killed at any moment and go on where they were.

A file is either there and complete (`write_atomically`) or an append-only JSONL whose last line may be torn
(`RowLog`). `claim_folder` keeps the results of two different settings from mixing in one folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from diffalign.processes import ALONE, Processes, own_files

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


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: If it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); make it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def to_line(row: Row) -> str:
    """A row as one line of JSON with its line break."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def claim_folder(
    folder: Path,
    settings: Mapping[str, Any],
    made_here: Sequence[str] = ("index.jsonl",),
    names: Collection[str] = (),
) -> None:
    """Makes `folder`, writes `settings` into it, or checks that the settings already there are the same.

    Args:
        folder: Where a command is about to write.
        settings: Everything its output depends on, as JSON values; written to `settings.json`.
        made_here: Names of the command's own output. If one is there without a `settings.json`, somebody else made
            it and it is not overwritten.
        names: Keys, at any depth, of what only names a thing that another setting identifies, such as the path of a
            model whose weights are hashed: written down and not compared.

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
        if key not in names and _without(found.get(key), names) != _without(wanted.get(key), names)
    ]
    if changes:
        raise ValueError(
            f"{folder} holds results of other settings ({'; '.join(changes)}); use another output folder, go back to "
            "those settings, or delete this folder to start over"
        )


def _without(value: Any, names: Collection[str]) -> Any:
    """A JSON value without the entries of these names."""
    if not isinstance(value, dict):
        return value
    return {key: _without(entry, names) for key, entry in value.items() if key not in names}


def _short(settings: Mapping[str, Any], key: str) -> str:
    return json.dumps(settings[key], ensure_ascii=False) if settings.get(key) is not None else "none"


class RowLog:
    """An append-only JSONL with one row per id, filled in chunks whose bounds depend on the list of ids only.

    A chunk of which a row is missing or stale is done again as a whole. Batches are then the same as in a run that
    was never interrupted, and so is the rounding of everything computed in them.

    Several processes deal the chunks among themselves, and each appends to a file of its own beside `path`. When all
    are done, the first one puts the rows together in `path`, in order, as one process would have written them. What a
    killed run left is taken over by any number of processes.

    Args:
        path: The file; it need not exist. Torn, unreadable and unknown lines are dropped.
        ids: All ids, in the order of the finished file; no two alike.
        chunk_size: Rows per chunk, >= 1.
        is_current: Whether a row read from the file still stands; asked in the first process only.
        processes: Who shares the work; all of them make the same log.
    """

    def __init__(
        self,
        path: Path,
        ids: Sequence[str],
        chunk_size: int,
        is_current: Callable[[Row], bool],
        processes: Processes = ALONE,
    ) -> None:
        self.path = path
        self.ids = list(ids)
        self.processes = processes
        self._own = processes.own_file(path)
        self._rows: dict[str, Row] = {}
        # One process says what is left, so that all deal out the same list whatever each of them sees on the disk.
        self.todo = processes.share(processes.on_first(lambda: self._take_up(chunk_size, is_current)))

    def progress(self, what: str, unit: str) -> tqdm[Any]:
        """A bar with the time that is left, over all rows; of several processes the first shows its own part."""
        left = sum(len(chunk) for chunk in self.todo)
        done = len(self._rows) if self.processes.count == 1 else 0
        label, hidden = self.processes.label(what), not self.processes.is_first
        return tqdm(total=done + left, initial=done, desc=label, unit=unit, dynamic_ncols=True, disable=hidden)

    def append(self, rows: Sequence[Row]) -> None:
        """Adds the finished rows of one chunk."""
        with self._own.open("ab") as file:
            file.write("".join(to_line(row) for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())
        self._rows.update((row["id"], row) for row in rows)

    def finish(self) -> list[Row]:
        """All rows in the order of the ids, as the file now holds them too; waits for the other processes.

        Raises:
            ValueError: If the first process cannot see what the others wrote.
        """
        self.processes.wait()
        return self.processes.on_first(self._put_together)

    def _take_up(self, chunk_size: int, is_current: Callable[[Row], bool]) -> list[range]:
        """Collects in `path` what earlier runs left, of any number of processes; gives the chunks still to do."""
        others = own_files(self.path)
        found = {key: row for path in (self.path, *others) for key, row in _read_rows(path).items()}
        todo: list[range] = []
        for start in range(0, len(self.ids), chunk_size):
            chunk = range(start, min(start + chunk_size, len(self.ids)))
            rows = [found.get(self.ids[i]) for i in chunk]
            kept = [row for row in rows if row is not None and is_current(row)]
            if len(kept) == len(chunk):
                self._rows.update((row["id"], row) for row in kept)
            else:
                todo.append(chunk)
        self._write_in_order()
        for path in others:
            path.unlink()
        return todo

    def _put_together(self) -> list[Row]:
        others = own_files(self.path)
        for path in others:
            self._rows.update(_read_rows(path))
        missing = [key for key in self.ids if key not in self._rows]
        assert not missing or self.processes.count > 1, f"rows were never written: {missing[:3]}"
        if missing:
            raise ValueError(
                f"{len(missing)} rows of other processes cannot be seen in {self.path.parent} ({missing[0]} first); "
                "expected all processes to write to one disk: choose an output folder that all machines share"
            )
        self._write_in_order()
        for path in others:
            path.unlink()
        return [self._rows[key] for key in self.ids]

    def _write_in_order(self) -> None:
        content = "".join(to_line(self._rows[key]) for key in self.ids if key in self._rows).encode()
        if content != (self.path.read_bytes() if self.path.exists() else b""):
            write_atomically(self.path, content)


def _read_rows(path: Path) -> dict[str, Row]:
    """The whole rows of a JSONL file by id; nothing if there is no such file."""
    rows: dict[str, Row] = {}
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # torn by a kill; its chunk is done again
        if isinstance(row, dict) and isinstance(row.get("id"), str):
            rows[row["id"]] = row
    return rows
