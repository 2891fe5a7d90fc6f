"""What `inspect_model` and `load_policy` refuse, in one line and before weights load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffalign.backbones import inspect_model, load_policy


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="model folder '.*nowhere' does not exist; give a diffusers folder or a Hub id"
    ):
        inspect_model(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="'./runs/x' does not exist"):
        inspect_model("./runs/x")


def test_a_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model_index.json in this folder; expected a pipeline saved by"):
        inspect_model(str(tmp_path))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_pickle_weights_are_refused(tiny_pipeline: Path, tmp_path: Path, part: str) -> None:
    folder = shutil.copytree(tiny_pipeline, tmp_path / "pickle")
    for file in (folder / part).glob("*.safetensors"):
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    with pytest.raises(ValueError, match=rf"{part} has pickle weights only, .* expected \*.safetensors") as error:
        load_policy(str(folder))
    assert "\n" not in str(error.value)
    for file in (folder / part).glob("*.bin"):
        file.unlink()
    with pytest.raises(ValueError, match=f"{part} has no weights"):
        inspect_model(str(folder))


def test_an_unknown_family(tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_pipeline, tmp_path / "other")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "KandinskyPipeline"}))
    with pytest.raises(ValueError, match=r"'KandinskyPipeline' is not supported \(supported: StableDiffusion"):
        inspect_model(str(folder))
    (folder / "model_index.json").write_text("{not json")
    with pytest.raises(ValueError, match="model_index.json is not valid JSON") as error:
        inspect_model(str(folder))
    assert "\n" not in str(error.value)


def test_an_unknown_prediction_type_and_a_missing_scheduler(tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_pipeline, tmp_path / "score")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "score"}))
    with pytest.raises(ValueError, match="unknown prediction type 'score'"):
        inspect_model(str(folder))
    path.unlink()
    with pytest.raises(ValueError, match="scheduler_config.json is missing"):
        inspect_model(str(folder))


def test_a_misspelt_embedded_model() -> None:
    with pytest.raises(ValueError, match=r"'diffalign://shape'; did you mean diffalign://shapes\? \(available: diff"):
        inspect_model("diffalign://shape")


def test_a_hub_id_that_cannot_be_reached() -> None:
    with pytest.raises(ValueError, match="'nobody/no-such-model' is neither a folder here nor to be had") as error:
        inspect_model("nobody/no-such-model")
    assert "\n" not in str(error.value)
