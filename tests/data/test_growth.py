from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import data_growth
from diffalign.data import EncodedPairs


def test_a_simulated_cache_is_a_cache(tmp_path: Path) -> None:
    folder = tmp_path / "pairs-600"
    data_growth.simulate(folder, 600, pairs_per_prompt=10)
    encoded = EncodedPairs.open(folder)
    assert (len(encoded), encoded.pair_id(599), encoded.prompts[10]) == (600, "pair-599", encoded.prompts[19])
    assert encoded.moments([0, 300, 599])[1].std.shape == (3, *data_growth.LATENT)
    assert encoded.conditioning([0, 599]).tensors["hidden"].shape == (2, *data_growth.EMBEDDING)
    found = data_growth.measure(folder, 16)
    assert tuple(found) == data_growth.STAGES
    assert all(one["seconds"] > 0 and min(one.values()) >= 0 for one in found.values())


def test_the_table_says_what_the_record_does() -> None:
    stages: dict[str, Any] = {
        name: {"seconds": 0.001 * i, "own": float(i), "mapped": 0.5}
        for i, name in enumerate(data_growth.STAGES, start=1)
    }
    record = {"sizes": [{"pairs": 1000, "index_seconds": 0.25, "stages": stages}]}
    lines = data_growth.table(record).splitlines()
    assert lines[0].startswith("| pairs | open | first batch |")
    assert lines[-1].startswith("| 1,000 | 1.0 ms, 1.0 + 0.5 MiB | 2.0 ms, 2.0 + 0.5 MiB |")
    assert lines[-1].endswith("| 0.25 s |")
    assert len({line.count("|") for line in lines}) == 1


def test_every_size_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(folder: Path, batch_size: int) -> Any:
        capsys.readouterr()
        assert data_growth.main(["--measure", str(folder), "--batch-size", str(batch_size)]) == 0
        return json.loads(capsys.readouterr().out)

    monkeypatch.setattr(data_growth, "_in_fresh_process", here)  # whose start takes seconds
    output = tmp_path / "record.json"
    options = ["--pairs", "20", "40", "--rounds", "2", "--batch-size", "2", "--output", str(output)]
    assert data_growth.main(options) == 0
    record = json.loads(output.read_text())
    assert [size["pairs"] for size in record["sizes"]] == [20, 40]
    assert data_growth.table(record) in capsys.readouterr().out
