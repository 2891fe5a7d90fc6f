"""Threads that prepare tensors beside the model, without slowing it down.

A thread that runs torch operations on a CPU gets a team of workers of its own, one for each core. With two such teams
there are more workers than cores, and OpenMP's then sleep between any two operations instead of waiting awake: the
model's forward and backward pass take twice as long, for as long as the thread lives. One core for each helper leaves
the model its own team.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

__all__ = ["helper_threads"]


def helper_threads(count: int, name: str) -> ThreadPoolExecutor:
    """A pool of `count` threads, each of which computes on one core; other threads are as they were.

    Args:
        count: At least 1.
        name: The beginning of the threads' names.
    """
    cores = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, name, initializer=_take_one_core)
    meeting = threading.Barrier(count + 1)
    for _ in range(count):  # all of them now, because torch takes the latest number for every thread to come
        pool.submit(meeting.wait)
    meeting.wait()
    torch.set_num_threads(cores)
    return pool


def _take_one_core() -> None:
    torch.get_num_threads()  # a thread's first question sets its number to that of all threads, and only the first
    torch.set_num_threads(1)
