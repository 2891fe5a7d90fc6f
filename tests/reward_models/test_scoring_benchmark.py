"""The benchmark of the scorers runs, and writes what it prints."""

from __future__ import annotations

import json

import pytest

from benchmarks import scoring


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path, capsys):
    scoring.main(["--tiny", "--workers", "2", "--output", str(tmp_path)])
    (path,) = tmp_path.glob("scoring_tiny_*.json")
    record = json.loads(path.read_text())
    ways = [(r["way"], r["batch_size"]) for r in record["results"]]
    assert ways == [("tensors", 1), ("files", 1), ("tensors", 4), ("files", 4), ("one by one", 1), ("naive", 1)]
    assert all(r["images_per_second"] > 0 for r in record["results"])
    assert set(record["journal_rows_per_second"]) == {"first", "again"}
    assert "rows/s when all are known" in capsys.readouterr().out
