from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffalign import checkpoints
from diffalign.checkpoints import CheckpointError, CheckpointFolder, compare_settings, load, write_text

SETTINGS = {
    "seed": 0,
    "training": {"learning_rate": 1e-5, "max_train_steps": 9, "output_dir": "a"},
    "trainer": {"beta": 1},
}


def state(step: int) -> dict[str, Any]:
    return {"step": step, "weights": {"w": torch.full((3,), float(step))}, "list": [1.5, None, "x"]}


def save_weights(folder: Path) -> None:
    save_file({"w": torch.ones(2)}, folder / "weights.safetensors")


def save(folder: CheckpointFolder, step: int, settings: Any = SETTINGS) -> Path:
    return folder.save(step, state(step), settings, save_weights)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    path = save(folder, 7)
    assert path == tmp_path / "checkpoint-7"
    assert names(path) == ["config.json", "state.pt", "weights.safetensors"]
    again = load(path, SETTINGS)
    assert again["step"] == 7
    assert torch.equal(again["weights"]["w"], torch.full((3,), 7.0))
    assert again["list"] == [1.5, None, "x"]
    assert json.loads((path / "config.json").read_text()) == SETTINGS
    assert names(tmp_path) == ["checkpoint-7"]


def test_only_the_newest_are_kept_and_counted_as_numbers(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, total_limit=2)
    (tmp_path / "checkpoint-best").mkdir()
    for step in (8, 9, 10, 100):
        save(folder, step)
    assert folder.steps() == [10, 100]
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-100", "checkpoint-best"]
    unlimited = CheckpointFolder(tmp_path)
    save(unlimited, 101)
    assert unlimited.steps() == [10, 100, 101]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    save(folder, 3)
    folder.save(3, {"step": 33}, SETTINGS, save_weights)
    assert load(folder.path(3), SETTINGS) == {"step": 33}
    assert names(tmp_path) == ["checkpoint-3"]


def test_latest_is_the_highest_finished_step(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    assert folder.find("latest") is None
    for step in (9, 10):
        save(folder, step)
    (tmp_path / "checkpoint-11.partial").mkdir()
    (tmp_path / "checkpoint-12").write_text("a file")
    assert folder.find("latest") == tmp_path / "checkpoint-10"
    assert folder.find("checkpoint-9") == tmp_path / "checkpoint-9"
    assert folder.find(str(tmp_path / "checkpoint-9")) == tmp_path / "checkpoint-9"
    with pytest.raises(
        CheckpointError, match=r"'checkpoint-8' is no checkpoint \(in .*: checkpoint-9, checkpoint-10\)"
    ):
        folder.find("checkpoint-8")


def test_what_a_killed_run_left_is_in_nobodys_way(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    partial = tmp_path / "checkpoint-5.partial"
    partial.mkdir()
    (partial / "state.pt").write_bytes(b"half")
    (partial / "stale.safetensors").write_bytes(b"from another time")
    save(folder, 5)
    assert names(tmp_path) == ["checkpoint-5"]
    assert names(folder.path(5)) == ["config.json", "state.pt", "weights.safetensors"]


@pytest.mark.parametrize("failing", ["state", "weights", "config", "rename"])
@pytest.mark.parametrize("earlier", [True, False])
def test_a_failed_save_leaves_the_earlier_ones_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, earlier: bool
) -> None:
    folder = CheckpointFolder(tmp_path, total_limit=1)
    if earlier:
        save(folder, 1)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    if failing == "state":
        monkeypatch.setattr(torch, "save", fail)
    if failing == "config":
        monkeypatch.setattr(checkpoints, "write_text", fail)
    if failing == "rename":
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(CheckpointError) as error:
        folder.save(2, state(2), SETTINGS, fail if failing == "weights" else save_weights)
    monkeypatch.undo()
    message = str(error.value)
    assert message.startswith(f"could not save {tmp_path / 'checkpoint-2'}: [Errno 28] No space left on device (")
    assert message.endswith(
        "MB free on this disk); "
        + (
            f"the last good checkpoint is {tmp_path / 'checkpoint-1'}; free some space and resume"
            if earlier
            else "there is no earlier checkpoint; free some space and resume"
        )
    )
    assert "\n" not in message
    assert names(tmp_path) == (["checkpoint-1"] if earlier else [])
    if earlier:
        assert load(folder.path(1), SETTINGS)["step"] == 1


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(*_: Any) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no"):
        write_text(path, "new")
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed: 0 in the checkpoint, 1 now"),
        ({"trainer": {"beta": 2}}, "trainer.beta: 1 in the checkpoint, 2 now"),
        ({"trainer": {"beta": 1, "loss_type": "ipo"}}, "trainer.loss_type: None in the checkpoint, 'ipo' now"),
        (
            {"training": {"learning_rate": 2e-5, "max_train_steps": 10, "output_dir": "a"}},
            "training.learning_rate: 1e-05 in the checkpoint, 2e-05 now; "
            "training.max_train_steps: 9 in the checkpoint, 10 now",
        ),
    ],
)
def test_another_configuration_is_refused_by_the_names_that_differ(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = save(CheckpointFolder(tmp_path), 1)
    with pytest.raises(CheckpointError) as error:
        load(path, {**SETTINGS, **change})
    assert str(error.value) == (
        f"{path} belongs to another configuration ({message}); use the same settings, or another output_dir"
    )


def test_settings_that_change_no_number_may_change(tmp_path: Path) -> None:
    path = save(CheckpointFolder(tmp_path), 1)
    training = {**SETTINGS["training"], "output_dir": "b", "logging_steps": 5, "checkpointing_steps": 7}  # type: ignore[dict-item]
    free = {"output_dir": "b", "model": {"attention": "xformers"}, "evaluation": {"seed": 3}, "training": training}
    compare_settings(path, {**SETTINGS, **free})


def test_a_setting_that_there_was_not_yet_has_its_usual_value(tmp_path: Path) -> None:
    """A checkpoint of an earlier version names fewer settings."""
    path = save(CheckpointFolder(tmp_path), 1)
    now = SETTINGS["training"] | {"allow_tf32": False, "adam_beta1": 0.9}  # type: ignore[operator]
    compare_settings(path, {**SETTINGS, "training": now})
    with pytest.raises(CheckpointError, match="training.allow_tf32: False in the checkpoint, True now"):
        compare_settings(path, {**SETTINGS, "training": now | {"allow_tf32": True}})


def test_tuples_and_numbers_survive_their_way_through_json(tmp_path: Path) -> None:
    settings = {"model": {"lora": {"target_modules": ("to_q", "to_k"), "alpha": 1e-5}}}
    path = save(CheckpointFolder(tmp_path), 1, settings)
    compare_settings(path, settings)


def test_loading_runs_no_code(tmp_path: Path) -> None:
    path = save(CheckpointFolder(tmp_path), 1)
    torch.save({"step": 1, "path": Path("x")}, path / "state.pt")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        load(path, SETTINGS)
