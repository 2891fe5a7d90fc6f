"""`diffalign rewards`: every model file and every further name, with what is known without weights."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from diffalign import plugins
from diffalign.cli import cli
from diffalign.reward_models import _ALIASES, reward_model_info, reward_model_names


def test_every_model_and_further_name_is_known():
    names = reward_model_names()
    assert list(names) == plugins.available("reward_models")
    assert names["hpsv2"] == ["hpsv2.0", "hpsv2.1"]
    assert sorted(alias for aliases in names.values() for alias in aliases) == sorted(_ALIASES)


@pytest.mark.slow
def test_rewards_lists_all_of_them():
    result = CliRunner().invoke(cli, ["rewards", "--json"])
    assert result.exit_code == 0, result.output
    entries = {entry["name"]: entry for entry in json.loads(result.output)}
    assert list(entries) == plugins.available("reward_models")
    for name, entry in entries.items():
        info = reward_model_info(name)
        assert entry["dims"] == list(info.dims)
        assert entry["kind"] == sorted(info.kind)
        assert entry["differentiable"] is info.differentiable
        assert entry["license"] == info.license != ""
        assert [spec["filename"] for spec in entry["weights"]] == [spec.filename for spec in info.weights]
    lines = CliRunner().invoke(cli, ["rewards"]).output.splitlines()
    assert lines[0].split() == ["name", "kind", "dimensions", "licence", "memory", "differentiable", "generative"]
    pickscore = next(line for line in lines if line.startswith("pickscore "))
    assert pickscore.split() == ["pickscore", "image", "overall", "MIT", "4.5", "GB", "yes", "no"]
    assert any("yuvalkirstain/PickScore_v1: model.safetensors" in line for line in lines)
    assert any("hpsv2.0, hpsv2.1" in line for line in lines)
    assert all(any(line.startswith(name) for line in lines) for name in entries)
