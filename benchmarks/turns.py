"""Programs that take turns, step by step, so that a machine whose speed drifts is as fast for one as for the other.

Each has a process of its own, loaded once, and sleeps while the others compute. Nothing is shared, neither threads nor
memory that one program leaves in a worse state for the next.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from tqdm import tqdm

__all__ = ["Job", "Stopwatch", "Turn", "take_turns"]


class Turn(Protocol):
    """What a program is given."""

    def next(self) -> None:
        """Called before each step: the last one is done, and this one may begin when the call comes back."""
        ...


Job = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function of a module, whose first argument is its `Turn`, and its further arguments; what it returns is kept."""


class Stopwatch:
    """A turn for a program that is alone.

    Attributes:
        seconds: Of each finished step.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begun: float | None = None

    def next(self) -> None:
        """See `Turn`."""
        now = time.perf_counter()
        if self._begun is not None:
            self.seconds.append(now - self._begun)
        self._begun = time.perf_counter()


class _Waiting:
    """A turn that the parent gives."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def next(self) -> None:
        self._connection.send(("ready", None))
        self._connection.recv()


def _child(connection: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        result = function(_Waiting(connection), *arguments)
    except BaseException as error:
        connection.send(("failed", f"{type(error).__name__}: {error}"))
        return
    connection.send(("result", result))


def take_turns(jobs: Mapping[str, Job], rounds: int, title: str = "rounds") -> dict[str, tuple[list[float], Any]]:
    """Name -> seconds of each of `rounds` steps, and what the function returned.

    A bar with the title shows how far it is. Every function must call `next` once more than there are rounds; what it
    does after the last call is not timed.

    Raises:
        RuntimeError: If a function fails; the message says which one and how.
    """
    context = multiprocessing.get_context("spawn")
    connections: dict[str, Any] = {}
    processes = []
    try:
        for name, (function, arguments) in jobs.items():
            connections[name], theirs = context.Pipe()
            processes.append(context.Process(target=_child, args=(theirs, function, arguments), daemon=True))
            processes[-1].start()
            theirs.close()
            _receive(connections[name], name, "ready")  # one after another, also while they load
        seconds: dict[str, list[float]] = {name: [] for name in jobs}
        for _ in tqdm(range(rounds), desc=title, unit="round"):
            for name, connection in connections.items():
                started = time.perf_counter()
                connection.send("go")
                _receive(connection, name, "ready")
                seconds[name].append(time.perf_counter() - started)
        results = {}
        for name, connection in connections.items():
            connection.send("go")
            results[name] = _receive(connection, name, "result")
        return {name: (seconds[name], results[name]) for name in jobs}
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _receive(connection: Any, name: str, expected: str) -> Any:
    try:
        kind, value = connection.recv()
    except (EOFError, ConnectionError) as error:
        raise RuntimeError(f"{name}: its process is gone") from error
    if kind == "failed":
        raise RuntimeError(f"{name}: {value}")
    if kind != expected:
        raise RuntimeError(f"{name}: it took {'fewer' if kind == 'result' else 'more'} steps than there are rounds")
    return value
