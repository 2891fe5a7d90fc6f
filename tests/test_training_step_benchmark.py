"""The benchmark of training steps: what is compared does the same, and what is printed is what was found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import embedded, training_step
from benchmarks.ways import Way

SPLIT = dict.fromkeys(training_step.PARTS, 0.0)
PLAIN = {"pairs_per_second": 10.0, "seconds": 1.6, "mfu": 0.1, "peak_gib": 1.5}
PLAIN |= {"split_seconds": SPLIT | dict.fromkeys(training_step.plain_step.PARTS, 0.2)}
WAY = {"pairs_per_second": 12.5, "seconds": 1.28, "ratio": 1.25, "middle_half": [1.2, 1.31], "predicted_ratio": 1.333}
WAY |= {"largest_loss_difference": 2e-6, "ratio_of_sums": 1.24, "mfu": 0.125, "peak_gib": 1.25}
WAY |= {"split_seconds": SPLIT | {"data": 0.0014, "policy": 0.64, "rest": 0.25}}
MODE = {"plain": PLAIN, "ways": {"live": WAY}, "encoding_seconds": 3.0, "first_pass_seconds": [1.25], "pairs": 96}
MODE |= {"batch_size": 16}


def test_the_table_says_what_the_record_does() -> None:
    lines = training_step.table({"models": {"unet": {"all weights": MODE}}}).splitlines()
    assert lines[0].startswith("**unet, all weights**, 16 pairs a step; of a plain step: images 12%, text 12%")
    assert lines[5] == "| live | 12.5 | 1.25 | 1.20 to 1.31 | 1.24 | 1.33 | 94% | 12% | 1.2 | 2.0e-06 |"
    head = [cell.strip() for cell in lines[7].strip("|").split("|")]
    cells = [cell.strip() for cell in lines[-3].strip("|").split("|")]
    found = dict(zip(head, cells, strict=True))
    assert found["milliseconds"] == "live"
    assert {name: text for name, text in found.items() if text and name != "milliseconds"} == {
        "data": "1",
        "policy": "640",
        "rest": "250",
        "step": "1280",
    }
    assert lines[-1] == "Encoding 96 pairs 3.0 s, their reference 1.2 s."


def test_what_a_way_leaves_out() -> None:
    assert training_step.leaves_out(Way.parse("live")) == ("images", "text")
    assert training_step.leaves_out(Way.parse("cached+fused")) == ("images", "text", "reference")


def test_transformers_have_no_convolutions_to_order() -> None:
    names = [*training_step.WAYS, *training_step.COMPILED]
    ways = {name: list(training_step.ways_for(model, names)) for name, model in embedded.MODELS.items()}
    assert ways["unet"] == [str(Way.parse(name)) for name in names]
    assert ways["flow"] == ways["video"] == ["live", "cached", "cached+fused", "cached+compile", "cached+compile+fused"]


def test_the_plain_step_is_no_way() -> None:
    with pytest.raises(SystemExit):
        training_step.main(["--ways", "live", "plain"])


@pytest.mark.slow
@pytest.mark.parametrize("model", embedded.MODELS)
def test_all_ways_train_the_same_model(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "record.json"
    ways = ["live", "cached+fused"]
    assert training_step.main(["--quick", "--models", model, "--ways", *ways, "--output", str(output)]) == 0
    record = json.loads(output.read_text(encoding="utf-8"))
    assert list(record["models"][model]) == ["LoRA, rank 8"]
    (found,) = record["models"][model].values()
    assert list(found["ways"]) == ways
    assert len(found["first_pass_seconds"]) == 1
    for name, way in found["ways"].items():
        assert way["largest_loss_difference"] < 1e-4, name  # at betas of 500 and 2000
        assert way["predicted_ratio"] > 1
        split = way["split_seconds"]
        assert (split["reference"] == 0) == (name == "cached+fused")
        assert all(split[part] > 0 for part in ("data", "noise", "policy", "backward", "optimizer"))
        assert sum(split.values()) == pytest.approx(way["seconds"], rel=0.05)
    assert training_step.table(record) in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [output]


def test_a_killed_benchmark_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []

    def measure(model: Any, *_: Any, lora: bool) -> dict[str, Any]:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append((model.path, lora))
        return MODE

    monkeypatch.setattr(training_step, "measure", measure)
    settings = training_step.Settings(1, 0, 4, None, True)
    arguments: tuple[Any, ...] = (["unet", "flow"], list(training_step.MODES), ["live"])
    with pytest.raises(KeyboardInterrupt):
        training_step.run(*arguments, settings, tmp_path / "partial.json")
    first, asked[:] = list(asked), []
    record = training_step.run(*arguments, settings, tmp_path / "partial.json")
    assert asked == [("diffalign://shapes_flow", False), ("diffalign://shapes_flow", True)]
    assert first == [("diffalign://shapes", False), ("diffalign://shapes", True)]
    assert [list(modes) for modes in record["models"].values()] == [list(training_step.MODES)] * 2
    only = training_step.run(["flow"], arguments[1][:1], ["live"], settings, tmp_path / "partial.json")
    assert {model: list(modes) for model, modes in only["models"].items()} == {"flow": ["all weights"]}
    other = training_step.Settings(2, 0, 4, None, True)
    asked[:] = []
    with pytest.raises(KeyboardInterrupt):
        training_step.run(*arguments, other, tmp_path / "partial.json")
    assert len(asked) == 2, "other settings are another record"
