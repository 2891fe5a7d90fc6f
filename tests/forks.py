"""Processes of their own that start at once: forked from pytest's, which has imported everything; no test by itself.

A fresh interpreter needs some seconds of processor time for torch, diffusers and transformers, several times what a
test does with it. So as soon as the tests are collected, and before any has run, pytest's process is forked once into
one that waits. Whatever a test starts is forked from that: it has the modules, and nothing that another test left
behind, no threads above all.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PATIENCE = 300.0
"""Seconds after which processes that do not end are killed."""


@dataclass(frozen=True)
class Ended:
    """A process that is over: its exit code, the negative number of a signal included, and what it wrote."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Started:
    """Processes at work."""

    forks: Forks
    ids: tuple[int, ...]
    folder: Path

    def kill(self) -> None:
        """SIGKILL to all of them; `wait` then says what became of each."""
        for process in self.ids:
            os.kill(process, signal.SIGKILL)

    def is_over(self) -> bool:
        """Whether the first is no more than an exit code that nobody has asked for."""
        return Path(f"/proc/{self.ids[0]}/stat").read_text().rpartition(")")[2].split()[0] == "Z"

    def until(self, happened: Callable[[], bool]) -> None:
        """Returns when something has happened, by the work of these processes."""
        deadline = time.monotonic() + PATIENCE
        while not happened():
            if self.is_over() or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"it never happened:\n{self.wait()[0].err}")
            time.sleep(0.002)

    def wait(self) -> list[Ended]:
        """Returns when all have ended."""
        codes = self.forks._ask("wait", self.ids)
        texts = [[(self.folder / f"{i}.{kind}").read_text() for kind in ("out", "err")] for i in range(len(self.ids))]
        return [Ended(code, *text) for code, text in zip(codes, texts, strict=True)]


class Forks:
    """Starts functions in processes of their own; they and their arguments are pickled.

    Attributes:
        folder: Where the output of processes goes.
    """

    folder: Path

    def __init__(self) -> None:
        self._count = 0
        self._connection, other = Pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # xdist's thread, which holds nothing that is used here
            self._process = os.fork()
        if self._process == 0:
            self._connection.close()
            _serve(other)
        other.close()

    def close(self) -> None:
        """Ends the process that waits."""
        self._connection.close()
        os.waitpid(self._process, 0)

    def start(
        self, function: Callable[..., object], *arguments: Any, processes: int = 1, cwd: Path | None = None, **more: Any
    ) -> Started:
        """Calls a function in one process, or in several that know each other as the launcher's do."""
        folder = self.folder / str(self._count)
        folder.mkdir()
        self._count += 1
        places = launcher_environment(processes)
        work = pickle.dumps((function, arguments, more))
        return Started(self, tuple(self._ask("start", (work, str(folder), places, cwd and str(cwd)))), folder)

    def run(self, function: Callable[..., object], *arguments: Any, **more: Any) -> list[Ended]:
        """`start` and `wait`; it is an error if a process fails."""
        ended = self.start(function, *arguments, **more).wait()
        assert not any(one.code for one in ended), "\n".join(one.err[-4000:] for one in ended)
        return ended

    def command(self, *arguments: str | Path, **how: Any) -> list[Ended]:
        """`python -m diffalign ARGUMENTS`."""
        return self.start(_command, [str(argument) for argument in arguments], **how).wait()

    def _ask(self, kind: str, value: Any) -> Any:
        self._connection.send((kind, value))
        if not self._connection.poll(PATIENCE):
            for process in value if kind == "wait" else ():
                os.kill(process, signal.SIGKILL)
            self._connection.recv()
            raise AssertionError(f"processes did not end within {PATIENCE:g} seconds and were killed")
        return self._connection.recv()


def launcher_environment(processes: int) -> list[dict[str, str]]:
    """What `torch.distributed.run` tells every process of a command; nothing if there is one."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**shared, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(processes)]


def _command(arguments: Sequence[str]) -> None:
    from diffalign.cli import main

    sys.argv = ["diffalign", *arguments]
    main()


def _serve(connection: Connection) -> None:
    """The process that waits to be forked; ends with pytest's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            kind, value = connection.recv()
        except EOFError:
            os._exit(0)
        if kind == "wait":
            connection.send([os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in value])
            continue
        work, folder, places, cwd = value
        children = []
        for i, place in enumerate(places):
            child = os.fork()
            if child == 0:
                connection.close()
                _become(work, Path(folder) / str(i), place, cwd)
            children.append(child)
        connection.send(children)


def _become(work: bytes, name: Path, place: Mapping[str, str], cwd: str | None) -> None:
    """Calls the function as a program of its own would be run; never returns."""
    code = 1
    try:
        _streams(name)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        warnings.resetwarnings()
        warnings.simplefilter("ignore")
        os.environ.update(place)
        if cwd is not None:
            os.chdir(cwd)
        function, arguments, more = pickle.loads(work)
        function(*arguments, **more)
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _streams(name: Path) -> None:
    """Output goes to files of its own, that of handlers which remember pytest's stream included."""
    old = (sys.stdout, sys.stderr)
    for number, kind in ((1, "out"), (2, "err")):
        with name.with_suffix(f".{kind}").open("wb") as file:
            os.dup2(file.fileno(), number)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - for the life of the process
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and handler.stream in old:
                handler.setStream(sys.stderr)
