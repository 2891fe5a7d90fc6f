"""The benchmark of start-up: what it calls, what it takes apart, and that a real run goes through it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import startup


def test_the_table_says_what_the_record_does() -> None:
    parts = dict(zip(startup.PARTS, (8.0, 1.5, 0.125, 0.5), strict=True))
    record = {"commands": {"--help": {"whole": 0.126}, "train, again": {"whole": 10.125, **parts}}}
    assert startup.table(record).splitlines()[2:] == [
        "| --help | 0.13 |  |  |  |  |",
        "| train, again | 10.12 | 8.00 | 1.50 | 0.12 | 0.50 |",
    ]


def test_a_command_that_ends_otherwise_is_no_measurement() -> None:
    def fails(arguments: Sequence[str]) -> int:
        return startup.MISTAKE

    assert startup.seconds(fails, ["train"], startup.MISTAKE) < 1
    with pytest.raises(RuntimeError, match="diffalign report run ended with status 2, expected 0"):
        startup.seconds(fails, ["report", "run"])


@pytest.mark.slow
def test_a_run_is_taken_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "record.json"
    assert startup.main(["--quick", "--output", str(output)]) == 0
    record = json.loads(output.read_text(encoding="utf-8"))
    assert startup.table(record) in capsys.readouterr().out
    for name, times in record["commands"].items():
        parts = [times[part] for part in startup.PARTS if part in times]
        assert min([times["whole"], *parts]) >= 0, name
        assert bool(parts) == name.startswith("train")
        assert sum(parts) == pytest.approx(times["whole"] if parts else 0)
    assert set(record["commands"]) == {"--help", "mistake", "report", "train, first time", "train, again"}
