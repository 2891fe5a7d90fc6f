"""Threads beside the model: they take one core each, and leave every other thread what it had."""

from __future__ import annotations

import threading

import pytest
import torch

from diffalign.helper_threads import helper_threads


@pytest.fixture(autouse=True)
def three_cores() -> object:
    """As on a machine with so many."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def cores_of_a_new_thread() -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_each_helper_computes_on_one_core_and_the_others_on_all() -> None:
    with helper_threads(4, "reading") as pool:
        names = [thread.name for thread in threading.enumerate() if thread.name.startswith("reading")]
        assert len(names) == 4
        assert list(pool.map(lambda _: torch.get_num_threads(), range(16))) == [1] * 16
        assert torch.get_num_threads() == 3
        assert cores_of_a_new_thread() == 3
    assert torch.get_num_threads() == 3
    assert cores_of_a_new_thread() == 3


def test_the_pool_gives_results_and_errors_as_any_other() -> None:
    with helper_threads(1, "reading") as pool:
        assert pool.submit(lambda: int(torch.arange(10).sum())).result() == 45
        with pytest.raises(ZeroDivisionError):
            pool.submit(lambda: 1 // 0).result()
