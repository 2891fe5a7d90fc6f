"""`sample`, `pairs` and `evaluate` with a negative model: what is drawn, what is compared, what is written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from diffalign import commands, model_card
from diffalign.backbones import LoRA, inspect_model, load_policy
from diffalign.cli import cli
from diffalign.config import RunConfig
from diffalign.eval import read_rows
from diffalign.generation import SamplingConfig, generate, make_requests, to_png, weights_fingerprint
from diffalign.prompts import PromptRow

PROMPTS = [PromptRow("a red circle"), PromptRow("two blue squares")]


@pytest.fixture(scope="module")
def negative(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory, policies: Any) -> Path:
    folder = tmp_path_factory.mktemp("negative")
    policy: Any = load_policy(str(tiny_pipeline), lora=LoRA(rank=2), train=True)
    policies.move_away(policy, 0.3)
    policy.save_trained(folder)
    return folder


@pytest.mark.slow
def test_what_is_drawn_is_written_down_and_not_mixed(tiny_pipeline: Path, negative: Path, tmp_path: Path) -> None:
    policy: Any = load_policy(str(tiny_pipeline))
    policy.put_negative(negative, alpha=0.5, scale=0.8)
    usual = SamplingConfig(guidance_scale=4.0, num_inference_steps=2)
    against = usual.model_copy(update={"negative_model": "n", "negative_alpha": 0.5, "negative_scale": 0.8})
    requests = make_requests(PROMPTS, usual)
    generate(policy, requests, tmp_path / "usual", usual, settings={"model": "tiny"})
    index = generate(policy, requests, tmp_path / "against", against, settings={"model": "tiny"})
    said = [json.loads((tmp_path / name / "settings.json").read_text()) for name in ("usual", "against")]
    assert "negative" not in said[0]
    assert said[1]["negative"] == {"model": "n", "alpha": 0.5, "scale": 0.8, "weights": policy.negative_fingerprint()}
    assert said[0]["weights"] == weights_fingerprint(policy) == weights_fingerprint(load_policy(str(tiny_pipeline)))
    assert said[1]["weights"] == weights_fingerprint(policy, negative=True) != said[0]["weights"]
    pictures = [(tmp_path / name / requests[0].file).read_bytes() for name in ("usual", "against")]
    assert pictures[0] != pictures[1]
    prompts, seeds = [r.prompt for r in requests], [r.seed for r in requests]
    drawn = policy.sample(prompts, seeds, guidance_scale=4.0, num_inference_steps=2, negative=True)
    assert pictures[1] == to_png(drawn[0])
    before = index.read_bytes()
    with pytest.raises(ValueError, match="negative"):
        generate(policy, requests, tmp_path / "usual", against, settings={"model": "tiny"})
    policy.put_negative(negative, alpha=0.5, scale=0.7)
    with pytest.raises(ValueError, match="negative"):
        generate(policy, requests, tmp_path / "against", against, settings={"model": "tiny"})
    assert index.read_bytes() == before


def test_a_run_that_trains_a_negative_model_is_compared_at_equal_guidance(
    tiny_pipeline: Path, negative: Path, tmp_path: Path
) -> None:
    """Both sides have the base's weights, or `model.adapter`'s; other trainers' runs stay the aligned side."""
    source = inspect_model(str(tiny_pipeline))

    def compared(trainer: str, adapter: str | None = None, **sampling: Any) -> Any:
        settings = {
            "output_dir": str(negative),
            "model": {"pretrained_model_name_or_path": str(tiny_pipeline), "adapter": adapter},
            "trainer": {"name": trainer},
            "sampling": sampling,
        }
        return commands.compared_weights(RunConfig.model_validate(settings), source)

    for trainer in ("npo", "self_npo"):
        assert compared(trainer) == ({}, str(negative))
        assert compared(trainer, "runs/dpo") == ({"adapter": "runs/dpo"}, str(negative))
        assert compared(trainer, negative_model="other") == ({}, "other")
    assert compared("diffusion_dpo") == ({"adapter": str(negative)}, None)
    assert compared("diffusion_dpo", negative_model="other") == ({"adapter": str(negative)}, "other")


def test_a_negative_model_that_is_not_there_is_refused_before_weights_load(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    arguments = ["sample", str(tiny_pipeline), "--prompts", str(tmp_path / "prompts.txt")]
    arguments += ["--output", str(tmp_path / "out"), "--negative-model", "nowhere"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert "error: negative model 'nowhere' does not exist" in result.output
    assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(cli, [*arguments, "--negative-scale", "1.5"])
    assert result.exit_code != 0


@pytest.mark.slow
def test_sample_from_the_command_line(tiny_pipeline: Path, negative: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\n")

    def sample(name: str, *options: str) -> bytes:
        arguments = ["sample", str(tiny_pipeline), "--prompts", str(tmp_path / "prompts.txt"), *options]
        arguments += ["--output", str(tmp_path / name), "--guidance-scale", "4", "--num-inference-steps", "2"]
        result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return (tmp_path / name / "images" / "00000-00.png").read_bytes()

    usual = sample("usual")
    against = sample("against", "--negative-model", str(negative))
    assert against != usual
    assert sample("against", "--negative-model", str(negative)) == against
    sample("none", "--negative-model", str(negative), "--negative-scale", "0")
    images = (Image.open(tmp_path / name / "images" / "00000-00.png") for name in ("usual", "none"))
    pixels = [torch.tensor(list(image.tobytes())) for image in images]
    assert int((pixels[0] - pixels[1]).abs().max()) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["npo", "self_npo"])
def test_train_and_evaluate_on_the_embedded_model(trainer: str, tmp_path: Path) -> None:
    """Pairs, training and comparison of the packaged configuration, a few steps of each."""
    config = f"configs/shapes_{trainer}.yaml"
    overrides = [
        f"output_dir={tmp_path / 'run'}",
        "pairs.num_prompts=6",
        "pairs.num_images_per_prompt=2",
        "sampling.num_inference_steps=2",
        "training.max_train_steps=2",
        "training.per_device_train_batch_size=2",
        "training.num_validation_pairs=0",
        "training.validation_steps=0",
        "evaluation.num_prompts=3",
        "evaluation.num_images_per_prompt=2",
    ]
    commands.pairs(config, overrides)
    commands.train(config, overrides)
    commands.evaluate(config, overrides)
    folder = tmp_path / "run" / "evaluation"
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["base"]["sampling"] == settings["aligned"]["sampling"]
    assert settings["base"]["model"]["adapter"] is settings["aligned"]["model"]["adapter"] is None
    assert settings["aligned"]["model"]["negative_model"] == str(tmp_path / "run")
    rows = read_rows(folder / "aligned.jsonl")
    assert len({row.prompt for row in rows}) == 3
    assert len({row.key for row in rows}) == len(rows) == 6
    drawn = {name: next(folder.glob(f"{name}-*")) for name in ("base", "aligned")}
    assert "negative" not in json.loads((drawn["base"] / "settings.json").read_text())
    assert json.loads((drawn["aligned"] / "settings.json").read_text())["negative"]["scale"] == 1.0
    commands.evaluate(config, overrides)  # goes on with what is there
    assert {name: next(folder.glob(f"{name}-*")) for name in drawn} == drawn
    model_card.card(str(tmp_path / "run"), None, None)
    assert "\npolicy.put_negative('path/to/this/folder')\n" in (tmp_path / "run" / "README.md").read_text()
