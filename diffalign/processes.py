"""Several processes of one command: which one this is, and how they agree.

`accelerate launch` and `torch.distributed.run` start a command several times and tell every process its number. The
work is cut into a list that does not depend on how many there are, each process takes its share of the list and writes
files of its own, and the first one puts them together. So the work itself needs no communication; before and after it
a few small values go over gloo, whatever the device is.

A process that fails ends, and takes the others with it: the launcher stops them, and whoever waits for the lost one
gets `OtherProcessError` at once, since its connection is closed.
"""

from __future__ import annotations

import functools
import glob
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

PATIENCE = timedelta(days=2)
"""How long a process waits for one that is still at work; a lost one is noticed at once."""

_LOST = "another process of this command is gone; its own message says why"


class OtherProcessError(RuntimeError):
    """Another process of the same command failed, so that this one cannot go on."""


@dataclass(frozen=True)
class Processes:
    """The processes that share a command; without arguments this one is alone.

    The methods that talk, `gather`, `wait` and `on_first`, must be called by all processes in the same order.

    Attributes:
        rank: This process, 0 <= rank < count.
        count: How many there are.
        group: The process group they talk over.
    """

    rank: int = 0
    count: int = 1
    group: Any = field(default=None, repr=False)

    @property
    def is_first(self) -> bool:
        """Whether this process claims folders, puts results together and speaks to the user."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of a list: like cards that are dealt, so that each part goes through the whole list."""
        return list(items[self.rank :: self.count])

    def label(self, what: str) -> str:
        """What this process is doing, for its progress bar."""
        return what if self.count == 1 else f"{what}, process {self.rank + 1} of {self.count}"

    def own_file(self, path: Path) -> Path:
        """The file this process writes in place of `path`, beside it; `path` itself where it is alone."""
        if self.count == 1:
            return path
        return path.with_name(f"{path.stem}.{self.rank + 1:05d}-of-{self.count:05d}{path.suffix}")

    def gather(self, value: T) -> list[T]:
        """The values of all processes, which are pickled; waits for the last of them.

        Raises:
            OtherProcessError: If one of them is gone.
        """
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        try:
            dist.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:
            raise OtherProcessError(_LOST) from error
        return values

    def wait(self) -> None:
        """Returns when all processes have come here.

        Raises:
            OtherProcessError: If one of them is gone.
        """
        self.gather(None)

    def on_first(self, function: Callable[[], T]) -> T:
        """Calls the function in the first process, and gives its result, which is pickled, to all.

        Raises:
            OtherProcessError: In the other processes, if it failed; the first one raises the error itself.
        """
        if self.count == 1:
            return function()
        import torch.distributed as dist

        # a result or, for the others, what went wrong
        message: list[Any] = [None, None]
        failure: Exception | None = None
        if self.is_first:
            try:
                message[0] = function()
            except Exception as error:  # none is lost: it is raised below, when the others know
                failure = error
                message[1] = str(error) or type(error).__name__
        try:
            dist.broadcast_object_list(message, src=0, group=self.group)
        except RuntimeError as error:
            raise (failure or OtherProcessError(_LOST)) from error
        if failure is not None:
            raise failure
        if message[1] is not None:
            raise OtherProcessError(f"process 1 of {self.count} stopped: {message[1]}")
        result: T = message[0]
        return result


ALONE = Processes()
"""What functions of the library take if they are told nothing: a process that does all the work."""


def is_first() -> bool:
    """Whether the launcher started this process alone or as the first; needs no torch."""
    return os.environ.get("RANK", "0") == "0"


def own_files(path: Path) -> list[Path]:
    """The files beside `path` that `Processes.own_file` named, of any number of processes."""
    pattern = f"{glob.escape(path.stem)}.{'[0-9]' * 5}-of-{'[0-9]' * 5}{glob.escape(path.suffix)}"
    return sorted(path.parent.glob(pattern))


@functools.cache
def launched() -> Processes:
    """The processes that the launcher started, as its environment variables say; `ALONE` without a launcher.

    The first call connects them, so that all have to make it.

    Raises:
        ValueError: If accelerate does not see all of them.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started == 1:
        return ALONE
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    # The state is accelerate's, and training in the same process goes on with it.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
    if state.num_processes != started:
        raise ValueError(
            f"{started} processes were started but {state.num_processes} would work together; "
            "start them with `python -m torch.distributed.run --nproc_per_node N` or check `accelerate env`"
        )
    return Processes(state.process_index, state.num_processes, dist.new_group(backend="gloo", timeout=PATIENCE))


def leave() -> None:
    """Ends the talk between the processes, if there was any, at the end of a program that did not fail."""
    launched.cache_clear()
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
