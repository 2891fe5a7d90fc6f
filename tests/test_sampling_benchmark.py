"""The benchmark of sampling: every exact way draws the pipeline's pictures, and the table says what was found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import sampling

WAY = {"pictures_per_second": 6.25, "one by one": 1.5, "pipeline": 1.125, "largest_difference": 2e-6}


def test_the_table_says_what_the_record_does() -> None:
    ways = {"evaluation": WAY, "rollout": WAY | {"largest_difference": None}}
    assert sampling.table({"ways": ways}).splitlines()[2:] == [
        "| evaluation | 6.2 | 1.50 | 1.12 | 2.0e-06 |",
        "| rollout | 6.2 | 1.50 | 1.12 |  |",
    ]


def test_ratios_are_of_one_round_and_differences_the_largest() -> None:
    drawn = []

    def draw(name: str, value: float) -> sampling.Draw:
        def pictures(prompts: list[str]) -> torch.Tensor:
            drawn.append((name, prompts))
            return torch.full((len(prompts), 3, 2, 2), value * (2 if prompts == ["c", "d"] else 1))

        return pictures

    names = {"one by one": 0.25, "pipeline": 0.25, "deep cache": 0.0, "rollout": 1.0}
    found = sampling.measure({name: draw(name, value) for name, value in names.items()}, [["a", "b"], ["c", "d"]])
    assert drawn == [(name, prompts) for prompts in (["a", "b"], ["c", "d"]) for name in names]
    differences = {name: way["largest_difference"] for name, way in found.items()}
    assert differences == {"one by one": 0.0, "pipeline": 0.0, "deep cache": 0.5, "rollout": None}
    assert found["pipeline"]["pipeline"] == found["one by one"]["one by one"] == 1.0


@pytest.mark.slow
def test_all_exact_ways_draw_the_same_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "record.json"
    assert sampling.main(["--quick", "--output", str(output)]) == 0
    record = json.loads(output.read_text(encoding="utf-8"))
    assert sampling.table(record) in capsys.readouterr().out
    differences = {name: way["largest_difference"] for name, way in record["ways"].items()}
    assert differences.pop("rollout") is None
    assert differences.pop("deep cache") > 0.01
    assert set(differences) == {"one by one", "pipeline", "evaluation"}
    assert max(differences.values()) < 1e-4
    assert all(way["pictures_per_second"] > 0 for way in record["ways"].values())
