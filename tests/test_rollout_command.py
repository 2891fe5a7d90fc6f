"""The human path, command by command, and `train` on rounds with a reward model; what is refused before it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file

from diffalign import commands
from diffalign.backbones import LoRA, load_policy
from diffalign.cli import cli
from diffalign.config import ConfigError, load_config
from diffalign.rollout_command import draw_round
from diffalign.rollouts import StochasticSampler


@pytest.fixture(autouse=True)
def _own_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def config(tiny_pipeline: Path, tmp_path: Path) -> Any:
    """Writes a run of two rounds of two steps, with labels of people; returns its file."""
    (tmp_path / "prompts.txt").write_text("one circle\ntwo squares\nthree stars\n")

    def build(name: str = "run", **changed: Any) -> str:
        sections: dict[str, Any] = {
            "output_dir": str(tmp_path / name),
            "model": {"pretrained_model_name_or_path": str(tiny_pipeline), "lora": {"rank": 2}},
            "rollout": {
                "labels": "human",
                "prompts": str(tmp_path / "prompts.txt"),
                "prompts_per_round": 2,
                "num_images_per_prompt": 3,
                "batch_size": 4,
            },
            "trainer": {"name": "d3po", "num_inference_steps": 3, "ref_update": "every_round"},
            "training": {
                "max_train_steps": 4,
                "per_device_train_batch_size": 3,
                "gradient_accumulation_steps": 3,
                "learning_rate": 1e-2,
                "checkpointing_steps": 3,
                "resume_from_checkpoint": "latest",
            },
        }
        for section, values in changed.items():
            sections[section] = values if section not in sections or values is None else sections[section] | values
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in sections.items() if value is not None}))
        return str(path)

    return build


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rollout": None}, "trainer 'd3po' learns from the model's own images: config section 'rollout' is missing"),
        ({"data": {"train_data_dir": "x"}}, "config section 'data' is for trainers that learn from pairs"),
        ({"pairs": {"reward_model": "shapes"}}, "config section 'pairs' is for trainers that learn from pairs"),
        ({"training": {"num_validation_pairs": 4}}, "training.num_validation_pairs is 4, and d3po has no pairs"),
        ({"rollout": {"labels": "reward_model"}}, "rollout.reward_model is missing; name a reward model, or set"),
        ({"rollout": {"labels": "reward_model", "reward_model": "pickscor"}}, "did you mean 'pickscore'"),
        ({"rollout": {"reward_model": "shapes"}}, "labels: human takes no reward_model; leave it out"),
        ({"rollout": {"prompts": "nothing.txt"}}, "prompts file 'nothing.txt' does not exist"),
        ({"rollout": {"image_per_prompt": 3}}, "unknown config key 'rollout.image_per_prompt'; did you mean"),
        ({"training": {"resume_from_checkpoint": None}}, "set training.resume_from_checkpoint: latest"),
        ({"training": {"gradient_accumulation_steps": 4}}, "must be a multiple of the 3 sampling steps"),
        ({"training": {"per_device_train_batch_size": 4}}, "a round has 6 visits of pairs for each process"),
        ({"trainer": {"eta": 0.0}}, "eta must be above 0, or the sampler's steps have no probability"),
    ],
)
def test_what_cannot_be_is_refused_before_weights_load(
    changed: dict[str, Any], message: str, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    path = config(**changed)
    for command in ("train", "rollout"):
        with pytest.raises(ValueError, match="(?s).*") as error:
            getattr(commands, command)(path)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_rounds_belong_to_the_methods_that_draw(config: Any) -> None:
    path = config()
    with pytest.raises(ConfigError, match="'rollout' is for trainers that learn from the model's own images, such as"):
        commands.train(path, ["trainer={name: diffusion_dpo}"])
    with pytest.raises(ConfigError, match="`diffalign rollout` draws images for people to label"):
        commands.rollout(path, ["rollout.labels=reward_model", "rollout.reward_model=shapes"])


def test_a_run_without_images_says_what_to_do_and_loads_nothing(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    result = CliRunner().invoke(cli, ["train", config()])
    assert result.exit_code == 0
    assert result.output.startswith("round 0 has no images yet: run `diffalign rollout` with this config")


def _call(command: str, path: str, *overrides: str) -> str:
    AcceleratorState._reset_state(reset_partial_state=True)
    result = CliRunner().invoke(cli, ["--debug", command, path, *overrides], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout.strip().splitlines()[-1]


def _label(folder: Path, prompts: int = 2) -> None:
    """Says that a prompt's images come in the order of their names."""
    rows = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["prompt"] in ("one circle", "two squares", "three stars")
        with Image.open(folder / row["image"]) as image:
            assert image.size == (8, 8)
    names = [[row["id"] for row in rows if row["prompt_id"] == f"{rows[0]['id'][:2]}-{g:05d}"] for g in range(prompts)]
    (folder / "labels.jsonl").write_text("".join(json.dumps({"ranking": group}) + "\n" for group in names))


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_people_round_by_round(config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, run = config(), tmp_path / "run"
    first, second = run / "rollouts" / "round-000", run / "rollouts" / "round-001"
    assert _call("rollout", path).startswith(f"label the 6 images in {first} (open label.html there")
    assert len(list((first / "images").iterdir())) == 6
    before = _files(first)
    assert _call("rollout", path).startswith("label the 6 images")
    assert _call("train", path).startswith("label the 6 images")
    assert not list(run.glob("checkpoint-*"))
    assert _files(first) == before

    _label(first)
    assert _call("rollout", path) == f"round 0 in {first} is drawn and labelled; run `diffalign train`"
    assert _call("train", path).startswith("round 1 has no images yet: run `diffalign rollout`")
    assert [p.name for p in run.glob("checkpoint-*")] == ["checkpoint-2"]
    assert (run / "pytorch_lora_weights.safetensors").is_file()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["train/ratio_chosen"] == 1.0
    assert rows[1]["train/kl"] > 0
    assert rows[1]["train/round_left_out"] == 0.0

    assert _call("rollout", path).startswith(f"label the 6 images in {second}")
    settings = [json.loads((folder / "settings.json").read_text()) for folder in (first, second)]
    assert settings[0]["weights"] != settings[1]["weights"]
    _label(second, prompts=1)
    assert _call("train", path).endswith("metrics.jsonl")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/round_left_out"] for row in rows] == [0.0, 0.0, 0.5, 0.5]
    assert rows[2]["train/ratio_chosen"] == pytest.approx(1, abs=1e-6)  # the reference followed
    assert _call("rollout", path) == "training.max_train_steps, 4, are done; no round is left to draw"
    assert "drawn with other weights" not in caplog.text
    assert (run / "references" / "round-001.safetensors").is_file()


@pytest.mark.slow
def test_a_round_that_was_stopped_goes_on_and_gives_the_same_bytes(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _call("rollout", config("whole"))
    path, rollout = config("killed"), StochasticSampler.rollout
    calls: list[int] = []

    def breaking(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rollout(*args, **options)

    monkeypatch.setattr(StochasticSampler, "rollout", breaking)
    with pytest.raises(KeyboardInterrupt):
        draw_round(load_config(path))
    folder = tmp_path / "killed" / "rollouts" / "round-000"
    assert not (folder / "index.jsonl").exists()
    assert len(list((folder / "images").iterdir())) == 3
    _call("rollout", path)
    assert len(calls) == 3
    assert _files(folder) == _files(tmp_path / "whole" / "rollouts" / "round-000")


@pytest.mark.slow
def test_a_round_of_other_settings_is_not_mixed_in(config: Any, tmp_path: Path) -> None:
    path = config()
    _call("rollout", path)
    folder = tmp_path / "run" / "rollouts" / "round-000"
    _label(folder)
    with pytest.raises(ValueError, match=r"round 0, which cannot be had \(.* was drawn with other settings"):
        commands.train(path, ["trainer.guidance_scale=3"])
    (folder / "index.jsonl").unlink()
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match=r"holds results of other settings \(guidance_scale 5.0 -> 3.0\)"):
        commands.rollout(path, ["trainer.guidance_scale=3"])


@pytest.mark.slow
def test_labels_stay_as_they_are_within_a_round(config: Any, tmp_path: Path) -> None:
    path = config(training={"checkpointing_steps": 1})
    _call("rollout", path)
    folder = tmp_path / "run" / "rollouts" / "round-000"
    _label(folder)
    _call("train", path)
    run = tmp_path / "run"
    (run / "checkpoint-2" / "state.pt").rename(run / "checkpoint-2" / "gone")  # as if it were killed after step 1
    with pytest.raises(
        ConfigError, match="lies within round 0, which training has not finished; run `diffalign train`"
    ):
        commands.rollout(path)
    kept = (folder / "labels.jsonl").read_text()
    (folder / "labels.jsonl").write_text(kept.splitlines()[0] + "\n")
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="changed since training on them began; put them back"):
        commands.train(path)
    (folder / "labels.jsonl").write_text(kept)
    assert _call("train", path).startswith("round 1 has no images yet")


@pytest.mark.slow
def test_train_with_a_reward_model(config: Any, tmp_path: Path) -> None:
    """From a config alone, stopped in the middle of a round: the command repeats the uninterrupted run to the bit."""
    scored = {"labels": "reward_model", "reward_model": "shapes", "score_batch_size": 2}
    assert _call("train", config("whole", rollout=scored)).endswith("metrics.jsonl")
    path = config("again", rollout=scored)
    assert _call("train", path, "training.max_train_steps=4").endswith("metrics.jsonl")
    folder = tmp_path / "again"
    weights = folder / "pytorch_lora_weights.safetensors"
    weights.unlink()
    (folder / "checkpoint-4" / "state.pt").unlink()  # so that step 3, within round 1, is the last one
    _call("train", path)
    ours, theirs = load_file(weights), load_file(tmp_path / "whole" / weights.name)
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)
    facts = json.loads((folder / "run.json").read_text())
    assert (facts["prompts"], facts["steps_per_round"]) == (3, 2)
    assert "reference each round's start" in facts["method"]


@pytest.mark.slow
def test_the_latest_weights_draw(config: Any, tiny_pipeline: Path, tmp_path: Path) -> None:
    """What a checkpoint says about the weights is what the next round is drawn with, to the bit."""
    from diffalign.rollout_store import fingerprint

    path = config()
    _call("rollout", path)
    _label(tmp_path / "run" / "rollouts" / "round-000")
    _call("train", path)
    _call("rollout", path)
    policy: Any = load_policy(str(tiny_pipeline), lora=LoRA(rank=2), train=True)
    policy.load_trained(tmp_path / "run")
    settings = json.loads((tmp_path / "run" / "rollouts" / "round-001" / "settings.json").read_text())
    assert settings["weights"] == fingerprint(policy.trained_state())
