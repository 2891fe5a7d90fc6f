"""Threads in the place of processes, for quick tests of work that is shared out; no test by itself."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

from diffalign.processes import OtherProcessError, Processes


@dataclasses.dataclass(frozen=True)
class Thread(Processes):
    """A thread in the place of a process: all it has of its own is the way the values travel."""

    table: Any = None
    meeting: Any = None

    def gather(self, value: Any) -> list[Any]:
        self.table[self.rank] = value
        try:
            self.meeting.wait()
            values = list(self.table)
            self.meeting.wait()
        except threading.BrokenBarrierError as error:
            raise OtherProcessError("gone") from error
        return values

    def on_first(self, function: Callable[[], Any]) -> Any:
        return self.gather(function() if self.is_first else None)[0]


def together(count: int, function: Callable[[Processes], Any]) -> list[Any]:
    """The results, or the errors, of `count` threads that share a piece of work."""
    meeting, table = threading.Barrier(count, timeout=60), [None] * count
    results: list[Any] = [None] * count

    def run(rank: int) -> None:
        try:
            results[rank] = function(Thread(rank, count, table=table, meeting=meeting))
        except Exception as error:
            results[rank] = error
            meeting.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
