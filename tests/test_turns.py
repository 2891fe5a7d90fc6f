"""Programs of a benchmark that take turns: nobody computes while another one does, and what fails says so."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.turns import Stopwatch, Turn, take_turns


def note(turn: Turn, name: str, path: Path, steps: int) -> str:
    """Writes down when each of its steps begins and ends."""
    for step in range(steps):
        turn.next()
        with path.open("a") as file:
            file.write(f"{name} {step} begins\n")
        time.sleep(0.01)
        with path.open("a") as file:
            file.write(f"{name} {step} ends\n")
    return f"{name} is done"


def fail(turn: Turn, step: int) -> None:
    for number in range(5):
        turn.next()
        if number == step:
            raise ZeroDivisionError("nothing to divide by")


@pytest.mark.slow
def test_steps_alternate_and_each_has_its_time(tmp_path: Path) -> None:
    path = tmp_path / "steps.txt"
    jobs: dict[str, Any] = {name: (note, (name, path, 4)) for name in ("one", "two")}
    found = take_turns(jobs, 3)
    assert {name: result for name, (_, result) in found.items()} == {"one": "one is done", "two": "two is done"}
    assert all(len(seconds) == 3 and min(seconds) >= 0.01 for seconds, _ in found.values())
    expected = [f"{name} {step} {what}" for step in range(4) for name in jobs for what in ("begins", "ends")]
    assert path.read_text().splitlines() == expected


@pytest.mark.slow
def test_a_program_that_fails_ends_all_of_them(tmp_path: Path) -> None:
    path = tmp_path / "steps.txt"
    with pytest.raises(RuntimeError, match="bad: ZeroDivisionError: nothing to divide by"):
        take_turns({"good": (note, ("good", path, 4)), "bad": (fail, (1,))}, 3)
    with pytest.raises(RuntimeError, match="short: it took fewer steps than there are rounds"):
        take_turns({"short": (note, ("short", path, 2))}, 3)
    with pytest.raises(RuntimeError, match="long: it took more steps than there are rounds"):
        take_turns({"long": (note, ("long", path, 9))}, 3)


def test_the_stopwatch_times_what_lies_between_two_calls() -> None:
    watch = Stopwatch()
    assert note(watch, "alone", Path("/dev/null"), 3) == "alone is done"
    assert len(watch.seconds) == 2
    assert min(watch.seconds) >= 0.01
