from __future__ import annotations

from pathlib import Path

import pytest

from diffalign import plugins
from diffalign.trainers.base import PairTrainer
from diffalign.trainers.diffusion_dpo import DiffusionDPO


def test_the_file_name_is_the_public_name() -> None:
    assert plugins.find("trainers", "diffusion_dpo") is DiffusionDPO


@pytest.mark.parametrize("kind", ["trainers", "reward_models", "eval"])
def test_every_listed_plugin_loads_and_is_a_class(kind: plugins.Kind) -> None:
    names = plugins.available(kind)
    assert names == sorted(names)
    assert names
    for name in names:
        assert isinstance(plugins.find(kind, name), type)


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("trainers", "difusion_dpo", r"unknown trainer 'difusion_dpo'; did you mean 'diffusion_dpo'\? \(available: "),
        ("trainers", "zzz", r"unknown trainer 'zzz' \(available: .*diffusion_dpo"),
        ("trainers", "base", "unknown trainer 'base'"),
        ("reward_models", "pickscor", "unknown reward model 'pickscor'; did you mean 'pickscore'"),
        ("eval", "shape", "unknown benchmark 'shape'; did you mean 'shapes'"),
    ],
)
def test_unknown_names_get_a_suggestion(kind: plugins.Kind, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plugins.find(kind, name)


def test_a_method_can_live_outside_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_methods_for_a_test.py").write_text(
        "from diffalign.trainers.base import PairTrainer\nclass Mine(PairTrainer):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = plugins.find("trainers", "my_methods_for_a_test:Mine")
    assert issubclass(mine, PairTrainer)
    with pytest.raises(ValueError, match="cannot load trainer 'my_methods_for_a_test:Yours'"):
        plugins.find("trainers", "my_methods_for_a_test:Yours")
    with pytest.raises(ValueError, match="cannot load trainer 'no_such_module:Mine': No module named"):
        plugins.find("trainers", "no_such_module:Mine")
