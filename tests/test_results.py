"""The table of results: one tiny cell through all its stages, resumed, and the table of what is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import results, results_table
from diffalign.config import load_config, trainer_settings


def test_every_cell_names_a_config_of_its_method() -> None:
    known = {
        "flow_dpo_time_weighted": "flow_dpo",
        "flow_dpo_rendered": "flow_dpo",
        "flow_nrg": "diffusion_dpo",
        "diffusion_dpo_rendered": "diffusion_dpo",
    }
    for model, methods in results.METHODS.items():
        for method, (file, overrides) in methods.items():
            config = load_config(f"configs/{file}", overrides)
            trainer_settings(config)
            assert config.trainer["name"] == known.get(method, method), (model, method)
            ours = config.model.pretrained_model_name_or_path
            assert ours == {"unet": "diffalign://shapes"}.get(model, f"diffalign://shapes_{model}")


def test_all_cells_of_a_seed_come_before_the_next_seed() -> None:
    found = list(results.cells(["unet/inpo", "video"], (0, 1)))
    assert [str(cell) for cell in found[:2]] == ["unet/inpo/seed0", "video/seppo/seed0"]
    assert [cell.seed for cell in found] == sorted(cell.seed for cell in found)
    with pytest.raises(ValueError, match="unknown cell 'unet/dpo'"):
        list(results.cells(["unet/dpo"], (0,)))


def cell(model: str, method: str, seed: int, right: str) -> dict[str, object]:
    """A finished cell of four prompts: `right` says of each whether the aligned picture is."""

    def rows(verdicts: str, score: float) -> list[list[object]]:
        return [[f"p{i}", i, "one", {"shapes": score}, v == "+", None] for i, v in enumerate(verdicts)]

    sampling = {"guidance_scale": 2.0, "num_inference_steps": 12}
    return {"model": model, "method": method, "seed": seed, "commands": [], "sampling": sampling, "forwards": 100,
            "seconds": 2.0, "steps": 1, "base": rows("+---", 1.0), "aligned": rows(right, 2.0)}  # fmt: skip


def test_the_table_pools_seeds_and_compares_methods(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    for one in (
        cell("unet", "seppo", 0, "++++"), cell("unet", "seppo", 1, "++++"),
        cell("unet", "sft", 0, "++--"), cell("unet", "sft", 1, "----"),
    ):  # fmt: skip
        path = tmp_path / "cells" / f"{one['method']}-{one['seed']}.json"
        path.write_text(json.dumps(one))
    results_table.write_document(tmp_path / "cells", tmp_path / "results.md")
    text = (tmp_path / "results.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| `seppo` | 0, 1"))
    assert "25.0 % to 100.0 %" in line
    assert "+75.0" in line
    assert "100.0 %" in line
    against = next(line for line in text.splitlines() if line.startswith("| SePPO against SFT"))
    assert "+75.0" in against  # 100 % against 50 % and 0 %
    (tmp_path / "cells" / "torn.json").write_text('{"model": "unet"')
    with pytest.raises(ValueError, match=r"torn\.json is no finished cell"):
        results_table.write_document(tmp_path / "cells", tmp_path / "results.md")


@pytest.mark.slow
def test_a_cell_runs_from_data_to_table_and_is_not_run_twice(tmp_path: Path) -> None:
    arguments = ["--quick", "--only", "unet/sft", "--seeds", "0", "--output", str(tmp_path / "runs")]
    arguments += ["--results", str(tmp_path / "cells"), "--document", str(tmp_path / "results.md")]
    assert results.main(arguments) == 0
    content = (tmp_path / "cells" / "unet-sft-seed0.json").read_bytes()
    found = json.loads(content)
    assert found["steps"] == 2
    assert found["forwards"] == 8  # two steps of two pictures, policy and reference
    assert len(found["base"]) == len(found["aligned"]) == 6
    assert "| `sft` | 0 |" in (tmp_path / "results.md").read_text(encoding="utf-8")
    run = tmp_path / "runs" / "unet" / "sft" / "seed0"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert results.main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before
    # Killed after the evaluation: what is there is used, and the same result comes out.
    (tmp_path / "cells" / "unet-sft-seed0.json").unlink()
    assert results.main(arguments) == 0
    assert (tmp_path / "cells" / "unet-sft-seed0.json").read_bytes() == content
