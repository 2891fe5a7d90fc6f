"""Files that are either the old ones or the new ones, whatever kills the process, and a lock between processes."""

from __future__ import annotations

import contextlib
import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path

from diffalign.resumable import write_atomically

_log = logging.getLogger("diffalign")


def write_whole(path: Path, content: bytes) -> None:
    """Replaces a file as a whole: a reader sees the old one or the new one, never a part.

    Raises:
        OSError: If the disk is full or cannot be written; the old file, if any, is untouched.
    """
    with explained(path):
        write_atomically(path, content)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and holds its lock, which the system releases even when the process is killed."""
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.info("another process writes to %s; waiting for it", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Adds to an error of the disk what it means for a cache and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write the cache ({error.strerror}); finished files are kept: make room, or set "
            "data.encoded_dir to another disk, and run again",
            str(path),
        ) from error
