"""What earlier runs of `diffalign score` found: the journal of unfinished work, and the scores of a finished output.

A journal is JSONL that is only ever appended to: id, prompt, content of the file, model and its fingerprint, and the
score. Whatever is found there or in an output counts as known if all five agree.
"""

from __future__ import annotations

import io
import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeAlias

from diffalign.processes import own_files
from diffalign.reward_models.score_files import read_lines, read_rows

__all__ = ["Key", "Known", "Value", "appending", "open_known"]

Value: TypeAlias = dict[str, Any]
"""What a model says of a row, as it is journalled: "score", and where it has them "dims", "uncertainty", "raw"."""


class Key(NamedTuple):
    """What a score belongs to."""

    id: str
    prompt: str
    sha256: str
    model: str
    fingerprint: str

    def digest(self) -> bytes:
        """16 bytes that stand for it."""
        return blake2b("\0".join(self).encode("utf-8", "surrogatepass"), digest_size=16).digest()


class Known:
    """What earlier runs found, by key, in SQLite's kind of temporary file, which grows on the disk and has no name."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("PRAGMA cache_size = -65536")  # KiB
        self._database.execute("CREATE TABLE found (key BLOB PRIMARY KEY, value TEXT) WITHOUT ROWID")

    def add(self, found: Iterable[tuple[Key, Value]]) -> None:
        """Later values take the place of earlier ones."""
        rows = ((key.digest(), json.dumps(value, ensure_ascii=False)) for key, value in found)
        self._database.execute("BEGIN")
        self._database.executemany("INSERT OR REPLACE INTO found VALUES (?, ?)", rows)
        self._database.execute("COMMIT")

    def get(self, key: Key) -> Value | None:
        """What was found, or None."""
        row = self._database.execute("SELECT value FROM found WHERE key = ?", (key.digest(),)).fetchone()
        return None if row is None else dict(json.loads(row[0]))

    def close(self) -> None:
        """Gives the space on the disk back."""
        self._database.close()


@contextmanager
def open_known(out: Path, journal: Path) -> Iterator[Known]:
    """The scores of an earlier output and of all journals."""
    known = Known()
    try:
        known.add(_finished(out))
        for path in (journal, *own_files(journal)):
            known.add(_journalled(path))
        yield known
    finally:
        known.close()


def _journalled(path: Path) -> Iterator[tuple[Key, Value]]:
    """The scores of a journal."""
    for content in read_lines(path):
        key = {name: content.pop(name, None) for name in Key._fields}
        if all(isinstance(text, str) for text in key.values()) and isinstance(content.get("score"), float):
            yield Key(**key), content


@contextmanager
def appending(journal: Path) -> Iterator[TextIO]:
    """The journal, open for more lines; if a kill tore its last one, that is cut off first."""
    if journal.exists():
        with journal.open("rb+") as file:
            end = file.seek(0, io.SEEK_END)
            while end > 0:
                start = max(0, end - 65536)
                file.seek(start)
                found = file.read(end - start).rfind(b"\n")
                end = start if found < 0 else start + found + 1
                if found >= 0:
                    break
            file.truncate(end)
    with journal.open("a", encoding="utf-8") as stream:
        yield stream


def _finished(path: Path) -> Iterator[tuple[Key, Value]]:
    """The scores of an earlier output."""
    for row in read_rows(path):
        for model, score in row.get("scores", {}).items():
            print_of = row.get("models", {}).get(model)
            if isinstance(score, float) and print_of and row.get("sha256"):
                value: Value = {"score": score}
                for extra in ("dims", "uncertainty", "raw"):
                    value |= {extra: row[extra][model]} if model in row.get(extra, {}) else {}
                yield Key(row["id"], row["prompt"] or "", row["sha256"], model, print_of), value
