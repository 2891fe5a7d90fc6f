"""Runs of `train-reward`: they learn, go on where they were, are shared out, and refuse what cannot be trained."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffalign import commands
from diffalign.config import ConfigError, dump_config
from diffalign.data.compared import ComparisonsConfig, load_comparisons
from diffalign.processes import Processes
from diffalign.reward_config import ScorerConfig, ScorerRun
from diffalign.reward_models import WeightsError, load_reward_model
from diffalign.reward_models.comparison_source import drop_bad
from diffalign.reward_models.starting import start_training
from diffalign.reward_models.training import ScorerTrainer, train_scorer
from tests.forks import Forks
from tests.reward_models.scorer_training import load, run_of, save_pairs, start


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pairs(tmp_path_factory.mktemp("data") / "pairs")


@pytest.mark.slow
def test_a_run_learns_and_goes_on_bit_for_bit(
    section: Callable[..., ScorerConfig], pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out pairs come out right in the end; an interrupted run ends with the same bytes."""
    config = section("shapes", loss="divergence", contrastive_weight=0.1)
    folder, found = train_scorer(run_of(tmp_path / "one", pairs, config))
    assert found["accuracy"] == 1.0
    assert found["best"] == 1.0
    assert json.loads((folder / "accuracy.json").read_text()) == found
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    validated = [row["validation/accuracy"] for row in rows if "validation/accuracy" in row]
    assert validated[0] == found["before"]
    assert len(validated) == 3
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses[-1] < losses[0]
    model = load_reward_model("shapes", path=folder)
    light, dark = (Image.open(pairs / f"{name}-0.png") for name in ("light", "dark"))
    assert float(model(light, "prompt 0")) > float(model(dark, "prompt 0"))

    def stop(trainer: ScorerTrainer, step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ScorerTrainer, "update", stop)
        with pytest.raises(KeyboardInterrupt):
            train_scorer(run_of(tmp_path / "two", pairs, config))
    _, again = train_scorer(run_of(tmp_path / "two", pairs, config))
    assert again == found
    for part in ("model.safetensors", "best/model.safetensors"):
        if (folder / part).exists():
            assert (folder / part).read_bytes() == (tmp_path / "two" / part).read_bytes()
    with pytest.raises(ValueError, match="seed"):
        train_scorer(run_of(tmp_path / "two", pairs, config).model_copy(update={"seed": 7}))


@pytest.mark.slow
def test_an_average_of_the_weights_is_saved_in_the_same_layout(
    section: Callable[..., ScorerConfig], pairs: Path, tmp_path: Path
) -> None:
    config = section("hpsv2.1", image_groups=1, text_groups=0)
    folder, _ = train_scorer(
        run_of(tmp_path, pairs, config, 2, use_ema=True, validation_steps=0, num_validation_pairs=0)
    )
    model, average = (load(config, path) for path in (folder, folder / "ema"))
    assert model.fingerprint() != average.fingerprint()


@pytest.mark.slow
def test_the_command_and_a_model_from_it(section: Callable[..., ScorerConfig], pairs: Path, tmp_path: Path) -> None:
    """A YAML file as the recipes are; its folder is a reward model for every other command."""
    config = section("pickscore", weighting="prompt", image_groups=1)
    run = run_of(tmp_path / "run", pairs, config, 2, validation_steps=0)
    (tmp_path / "run.yaml").write_text(dump_config(run))
    said = commands.train_reward(str(tmp_path / "run.yaml"), ["training.max_train_steps=1"])
    assert said.splitlines()[-2:] == [f"reward model: {run.output_dir}", f"metrics: {run.output_dir}/metrics.jsonl"]
    assert load_reward_model("pickscore", path=run.output_dir).info.name == "pickscore"
    assert not (tmp_path / "run" / "start").exists()  # it started from its own layout


def killed_after(run: ScorerRun, step: int) -> None:
    """Trains in a process that dies after an optimizer step."""

    def die(trainer: ScorerTrainer, at: int) -> None:
        if at == step:
            os.kill(os.getpid(), signal.SIGKILL)

    ScorerTrainer.update = die  # type: ignore[method-assign]
    train_scorer(run)


@pytest.mark.slow
def test_killed_it_goes_on_bit_for_bit(
    section: Callable[..., ScorerConfig], pairs: Path, forks: Forks, tmp_path: Path
) -> None:
    """SIGKILL in the middle of a run, between two checkpoints."""
    config = section("shapes")
    whole, _ = train_scorer(run_of(tmp_path / "whole", pairs, config, 4))
    killed = run_of(tmp_path / "killed", pairs, config, 4)
    assert forks.start(killed_after, killed, 3).wait()[0].code == -signal.SIGKILL
    train_scorer(killed)
    for name in ("model.safetensors", "accuracy.json"):
        assert (whole / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


@pytest.mark.slow
def test_two_processes_are_one_with_a_batch_of_both(
    section: Callable[..., ScorerConfig], pairs: Path, forks: Forks, tmp_path: Path
) -> None:
    """The same pairs in every step: the same weights and held-out accuracy, up to rounding."""
    config = section("shapes")
    whole, _ = train_scorer(run_of(tmp_path / "whole", pairs, config, 3, learning_rate=1e-3))
    two = run_of(tmp_path / "two", pairs, config, 3, learning_rate=1e-3, per_device_train_batch_size=2)
    forks.run(train_scorer, two, processes=2)
    alone, shared = (load_reward_model("shapes", path=p).state_dict() for p in (whole, tmp_path / "two"))
    for name, value in alone.items():
        torch.testing.assert_close(shared[name], value, atol=5e-4, rtol=1e-3)
    found = [json.loads((p / "accuracy.json").read_text()) for p in (whole, tmp_path / "two")]
    assert found[1]["accuracy"] == pytest.approx(found[0]["accuracy"])
    assert found[1]["reward_mean"] == pytest.approx(found[0]["reward_mean"], rel=1e-2)


def test_bad_comparisons_are_left_out_and_counted(
    section: Callable[..., ScorerConfig], pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A truncated picture, a missing one, one twice; what was found is not looked for again."""
    data = tmp_path / "pairs"
    shutil.copytree(pairs, data)
    whole = (data / "light-0.png").read_bytes()
    (data / "light-0.png").write_bytes(whole[: len(whole) // 2])
    (data / "dark-1.png").unlink()
    shutil.copy(data / "light-2.png", data / "dark-2.png")
    trainable = start(section("shapes"), tmp_path)
    loaded = load_comparisons(ComparisonsConfig(train_data_dir=data))
    kept = drop_bad(loaded, trainable, tmp_path / "found.json", 0.2, 2, Processes())
    assert kept.left_out == {"unreadable": 2, "identical": 1}
    assert [kept.pair_id(row) for row in range(2)] == ["p3", "p4"]
    assert len(kept) == 13
    dropped = json.loads((tmp_path / "found.json").read_text())["dropped"]
    assert dropped["p1"].startswith("unreadable: second picture: no file")
    monkeypatch.setattr(type(trainable), "prepare", lambda *_: pytest.fail("looked again"))
    assert drop_bad(loaded, trainable, tmp_path / "found.json", 0.2, 2, Processes()).left_out == kept.left_out
    with pytest.raises(ValueError, match=r"2 of 16 comparisons of .* cannot be read, such as 'p0' \(unreadable: first"):
        drop_bad(loaded, trainable, tmp_path / "found.json", 0.1, 2, Processes())


def test_what_cannot_be_trained_is_refused(
    section: Callable[..., ScorerConfig], pairs: Path, tmp_path: Path, clip_folder: Path
) -> None:
    with pytest.raises(ValueError, match="'jpeg' cannot be trained; expected one on CLIP, BLIP or Qwen2-VL"):
        start_training(ScorerConfig(name="jpeg", start="x"), tmp_path)
    with pytest.raises(ValueError, match="unknown reward model 'pikscore'; did you mean 'pickscore'"):
        start_training(ScorerConfig(name="pikscore", start="x"), tmp_path)
    with pytest.raises(WeightsError, match="there is no folder or file '/nowhere'"):
        start_training(ScorerConfig(name="pickscore", start="/nowhere"), tmp_path)
    with pytest.raises(ValueError, match="pal needs people: name the column"):
        start_training(ScorerConfig(name="pal", start=str(clip_folder)), tmp_path)
    for changes, message in (
        ({"loss": "uncertainty"}, "needs a model that says how sure it is"),
        ({"loss": "none"}, "leaves nothing to train on"),
        ({"head": {"prototypes": 2}}, "reward.head is for pal"),
    ):
        with pytest.raises(ValueError, match=message):
            section("shapes", **changes)
    run = run_of(tmp_path / "run", pairs, section("shapes"), num_validation_pairs=0)
    with pytest.raises(ConfigError, match="validation_steps needs validation_data"):
        train_scorer(run)
    rates = ScorerTrainer(start(section("shapes"), tmp_path), section("shapes", learning_rates={"nothing": 1.0}))
    with pytest.raises(ConfigError, match="no trained weight has 'nothing' in its name"):
        rates.policy.trainable_parameters()


def test_rates_of_their_own(section: Callable[..., ScorerConfig], tmp_path: Path) -> None:
    config = section("pal", learning_rates={"user_logits": 5e-3, "logit_scale": 0.1})
    groups = ScorerTrainer(start(config, tmp_path), config).policy.trainable_parameters()
    sizes = {group.get("lr"): len(group["params"]) for group in groups}
    assert sizes[5e-3] == sizes[0.1] == 1
    assert sizes[None] > 5
