"""The benchmark of how a step's cost grows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import step_growth

ROW = {"processes": 2, "threads": 1, "batch_size": 4, "latents": 16, "pairs_per_second": 8.0, "seconds_per_step": 1.0}


def test_one_thing_grows_at_a_time() -> None:
    assert step_growth.points((1, 16), (8, 32)) == [(1, 8), (16, 8), (4, 8), (4, 32)]


def test_the_table_says_what_the_record_does() -> None:
    assert step_growth.table({"rows": [ROW]}).splitlines()[-1] == "| 2 | 1 | 4 | 16x16 | 8.0 | 1.0000 |"


@pytest.mark.slow
def test_the_script_measures_every_point(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "growth.json"
    assert step_growth.main(["--quick", "--output", str(output)]) == 0
    rows = json.loads(output.read_text(encoding="utf-8"))["rows"]
    assert [(row["batch_size"], row["latents"]) for row in rows] == [(1, 8), (2, 8)]
    for row in rows:
        assert row["seconds_per_step"] == pytest.approx(row["batch_size"] / row["pairs_per_second"])
    assert step_growth.table({"rows": rows}) in capsys.readouterr().out
