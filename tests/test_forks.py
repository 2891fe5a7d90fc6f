"""The tests' own processes: what they write, how they end, and what the launcher would have told them."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest


def speak(words: str, code: int | None = None) -> None:
    sys.stdout.write(f"{words} {os.environ.get('RANK')} {os.environ.get('WORLD_SIZE')} {Path.cwd().name}\n")
    sys.stderr.write("aside\n")
    if code is not None:
        raise SystemExit(code)


def fail() -> None:
    raise ValueError("no picture today")


def wait_for_ever(sign: Path) -> None:
    sign.touch()
    time.sleep(600)


def test_each_has_its_rank_its_output_and_its_folder(forks: Any, tmp_path: Path) -> None:
    ended = forks.run(speak, "here", processes=2, cwd=tmp_path)
    assert [one.out for one in ended] == [f"here {rank} 2 {tmp_path.name}\n" for rank in (0, 1)]
    assert {one.err for one in ended} == {"aside\n"}
    assert forks.run(speak, "alone")[0].out.startswith("alone None None ")


def test_exit_codes_and_errors_come_back(forks: Any) -> None:
    assert forks.start(speak, "bye", code=3).wait()[0].code == 3
    (failed,) = forks.start(fail).wait()
    assert failed.code == 1
    assert failed.err.endswith("ValueError: no picture today\n")
    with pytest.raises(AssertionError, match="no picture today"):
        forks.run(fail)
    with pytest.raises(AssertionError, match="it never happened:\n(.|\n)*no picture today"):
        forks.start(fail).until(lambda: False)


def test_they_can_be_killed(forks: Any, tmp_path: Path) -> None:
    started = forks.start(wait_for_ever, tmp_path / "sign")
    started.until((tmp_path / "sign").exists)
    started.kill()
    assert started.wait()[0].code == -signal.SIGKILL
