"""The benchmark of training steps: what is compared does the same, and what is printed is what was found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import training_step

PLAIN = {"pairs_per_second": 10.0, "seconds": 1.6, "split_seconds": dict.fromkeys(training_step.PARTS, 0.2)}
PLAIN |= {"mfu": 0.1, "peak_gib": 1.5}
WAY = {"pairs_per_second": 12.5, "ratio": 1.25, "middle_half": [1.2, 1.31], "predicted_ratio": 1.333}
WAY |= {"largest_loss_difference": 2e-6, "ratio_of_sums": 1.24, "mfu": 0.125, "peak_gib": 1.25}
MODE = {"plain": PLAIN, "ways": {"live": WAY}, "encoding_seconds": 3.0, "first_pass_seconds": [1.25], "pairs": 96}


def test_the_table_says_what_the_record_does() -> None:
    lines = training_step.table({"modes": {"all weights": MODE}}).splitlines()
    assert lines[0].startswith("all weights; of a plain step: images 12%, text 12%, reference 12%")
    assert lines[-3] == "| live | 12.5 | 1.25 | 1.20 to 1.31 | 1.24 | 1.33 | 94% | 12% | 1.2 | 2.0e-06 |"
    assert lines[-1] == "Encoding 96 pairs 3.0 s, their reference 1.2 s."


def test_what_a_way_leaves_out() -> None:
    assert training_step.Way().leaves_out == ("images", "text")
    assert training_step.Way("cached").leaves_out == ("images", "text", "reference")


@pytest.mark.slow
def test_all_ways_train_the_same_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "record.json"
    assert training_step.main(["--quick", "--output", str(output)]) == 0
    record = json.loads(output.read_text(encoding="utf-8"))
    assert list(record["modes"]) == ["LoRA, rank 8"]
    for mode in record["modes"].values():
        assert set(mode["ways"]) == set(training_step.WAYS)
        assert len(mode["first_pass_seconds"]) == 1  # shared by all ways that read it
        for way in mode["ways"].values():
            assert way["largest_loss_difference"] < 1e-4  # at beta 2000
            assert way["predicted_ratio"] > 1
    assert training_step.table(record) in capsys.readouterr().out
