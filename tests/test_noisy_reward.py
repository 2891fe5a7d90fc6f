"""Reward models on noisy latents: the law of comparisons (7.6.7), the model, its files, and `train-reward`."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffalign import commands
from diffalign.backbones import load_policy
from diffalign.comparisons import comparison_loss, outcome_probabilities
from diffalign.config import RunConfig
from diffalign.noisy_rewards import NoisyReward, read_card
from diffalign.reward_training import RewardTrainer, train_reward
from tests.backbones.families.sd3 import save_tiny
from tests.tiny import random_batch
from tests.trainers.golden import double

# --- comparisons -----------------------------------------------------------------------------------------------------


def test_probabilities_with_ties() -> None:
    """Check 7.6.7, k = 5."""
    first, second = double([0.0, 1.0])[0], double([0.0, 0.0])[0]
    better, worse, tie = outcome_probabilities(first, second)
    assert [x.tolist()[0] for x in (better, worse, tie)] == pytest.approx([1 / 6, 1 / 6, 2 / 3])
    assert [x.tolist()[1] for x in (better, worse, tie)] == pytest.approx([0.352187, 0.068533, 0.579279], abs=1e-6)
    torch.testing.assert_close(better + worse + tie, torch.ones(2, dtype=torch.float64))
    better, worse, tie = outcome_probabilities(first, second, ties=1.0)
    torch.testing.assert_close(better, torch.sigmoid(first - second))
    assert torch.equal(tie, torch.zeros(2, dtype=torch.float64))


def test_the_loss_is_minus_the_log_probability() -> None:
    difference = torch.linspace(-4, 4, 9, dtype=torch.float64)
    outcomes = outcome_probabilities(difference, torch.zeros_like(difference))
    for preference, probability in zip((1.0, -1.0, 0.0), outcomes, strict=True):
        loss = comparison_loss(difference, torch.full_like(difference, preference), ties=5.0)
        torch.testing.assert_close(loss, -probability.log())
    plain = comparison_loss(difference, torch.ones_like(difference))
    torch.testing.assert_close(plain, torch.nn.functional.softplus(-difference))
    assert float(comparison_loss(difference, torch.zeros_like(difference)).abs().max()) == 0.0
    with pytest.raises(ValueError, match="ties must be a finite number of at least 1, got 0.5"):
        comparison_loss(difference, difference, ties=0.5)


# --- the model -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = save_tiny(tmp_path_factory.mktemp("reward") / "model", False)
    return folder


def _start(model: Path, **options: Any) -> NoisyReward:
    return NoisyReward.start(load_policy(str(model)), **{"layers": 1, **options})  # type: ignore[arg-type]


@pytest.mark.slow
def test_an_untrained_model_and_what_is_trained_of_it(model: Path) -> None:
    reward = _start(model, dimensions=("VQ", "TA"))
    batch = replace(random_batch(3, shape=(4, 8, 8)), conditioning=reward.policy.encode_prompts(["a", "b", "c"]))
    trainer = RewardTrainer(reward)
    output = trainer.loss(batch)
    assert output.losses.tolist() == pytest.approx([math.log(2)] * 3)  # every reward is 0
    torch.nn.init.ones_(reward.head[2].weight)
    trainer.loss(batch).loss.backward()
    named = trainer.policy.named_trainable()
    assert all(parameter.grad is not None for _, parameter in named)
    names = {name for name, _ in named}
    assert {"head.0.weight", "trunk.pos_embed.proj.weight", "trunk.transformer_blocks.0.attn.to_q.weight"} <= names
    assert not any(name.startswith(("trunk.proj_out", "trunk.transformer_blocks.1")) for name in names)
    frozen = {n for n, _ in RewardTrainer(_start(model, trained=False)).policy.named_trainable()}
    assert frozen == {f"head.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}


@pytest.mark.slow
def test_the_trunk_is_the_first_blocks_with_the_policys_weights(model: Path) -> None:
    """What enters the head is what the whole transformer computes up to that block, through its last norm."""
    policy: Any = load_policy(str(model))
    whole, tokens = policy.denoiser, {}
    latents, times = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([100.0, 900.0])
    prompts = policy.encode_prompts(["a star", "two moons"])
    whole.transformer_blocks[0].register_forward_hook(lambda *call: tokens.update(block=call[2][1]))
    whole.norm_out.register_forward_pre_hook(lambda _, arguments: tokens.update(time=arguments[1]))
    with torch.no_grad():
        policy.predict(latents, times, prompts)
        expected = whole.norm_out(tokens["block"], tokens["time"]).mean(dim=1)
        reward = _start(model)
        pooled: list[torch.Tensor] = []
        reward.head.register_forward_pre_hook(lambda _, arguments: pooled.append(arguments[0]))
        reward(latents, times, prompts)
    torch.testing.assert_close(pooled[0], expected)


@pytest.mark.slow
def test_saved_and_read_again(model: Path, tmp_path: Path) -> None:
    reward = _start(model, dimensions=("VQ",), ties=5.0)
    for name, parameter in reward.named_parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        parameter.data.add_(0.1 * noise)
    reward.save_pretrained(tmp_path)
    card = read_card(tmp_path)
    assert (card.layers, card.dimensions, card.ties, card.family) == (1, ("VQ",), 5.0, "StableDiffusion3Pipeline")
    policy: Any = load_policy(str(model))
    again = NoisyReward.from_pretrained(tmp_path, policy)
    latents, times, prompts = torch.ones(1, 4, 8, 8), torch.tensor([500.0]), policy.encode_prompts(["a star"])
    with torch.no_grad():
        torch.testing.assert_close(again(latents, times, prompts), reward(latents, times, prompts))
    assert not any(parameter.requires_grad for parameter in again.parameters())
    policy.sample(["a star"], [0], num_inference_steps=1)  # its own transformer is whole


# --- train-reward ----------------------------------------------------------------------------------------------------


def _pairs(folder: Path, **columns: Any) -> None:
    """Twelve pairs of a light chosen and a dark rejected picture."""
    folder.mkdir(parents=True)
    lines = []
    for i in range(12):
        Image.new("RGB", (16, 16), (200 + 4 * i,) * 3).save(folder / f"light-{i}.png")
        Image.new("RGB", (16, 16), (4 * i,) * 3).save(folder / f"dark-{i}.png")
        row = {"id": str(i), "prompt": f"prompt {i}", "chosen": f"light-{i}.png", "rejected": f"dark-{i}.png"}
        lines.append(json.dumps({**row, **{name: value(i) for name, value in columns.items()}}))
    (folder / "index.jsonl").write_text("\n".join(lines) + "\n")


def _config(folder: Path, run: Path, steps: int, **sections: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "output_dir": str(run),
        "model": {"pretrained_model_name_or_path": str(folder)},
        "pairs": {},
        "reward": {"layers": 1},
        "training": {
            "max_train_steps": steps,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "checkpointing_steps": 2,
            "num_validation_pairs": 4,
            "resume_from_checkpoint": "latest",
        },
    }
    return RunConfig.model_validate({**settings, **sections})


@pytest.mark.slow
def test_it_learns_and_goes_on_where_it_was(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out pairs come out right where there is little noise; a run that was killed ends with the same bytes."""
    for name in ("one", "two"):
        _pairs(tmp_path / name / "pairs")
    folder, accuracy = train_reward(_config(model, tmp_path / "one", 10))
    assert accuracy["overall"]["0.05"] == 1.0
    assert json.loads((folder / "accuracy.json").read_text()) == accuracy
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["train/loss"] == pytest.approx(math.log(2))
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    again = _config(model, tmp_path / "two", 10)

    def stop(_: RewardTrainer, step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RewardTrainer, "update", stop)
        with pytest.raises(KeyboardInterrupt):
            train_reward(again)
    train_reward(again)
    files = [(tmp_path / name / "reward" / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


@pytest.mark.slow
def test_dimensions_of_their_own_with_ties(model: Path, tmp_path: Path) -> None:
    """`data.reward_columns` say who is better in each dimension: VQ as chosen, TA the other way round or tied."""
    _pairs(tmp_path / "data", VQ=lambda i: 1, TA=lambda i: -0.5 if i % 2 else 0)
    data = {"train_data_dir": str(tmp_path / "data"), "reward_columns": ["VQ", "TA"]}
    config = _config(model, tmp_path / "run", 12, data=data, reward={"layers": 1, "ties": 5.0})
    folder, accuracy = train_reward(config)
    assert {name: row["0.05"] for name, row in accuracy.items()} == {"VQ": 1.0, "TA": 1.0}
    assert read_card(folder).dimensions == ("VQ", "TA")


@pytest.mark.slow
def test_what_cannot_be_trained_is_refused_before_weights_load(
    model: Path, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    for changes, message in (
        ({"reward": None}, "config has no section 'reward'"),
        ({"reward": {"layers": 9}}, "reward.layers is 9, and the transformer of .* has 2 blocks"),
        ({"model": {"pretrained_model_name_or_path": str(tiny_pipeline)}}, "are for flow models of .*'epsilon'"),
        (
            {"model": {"pretrained_model_name_or_path": str(model), "lora": {"rank": 2}}},
            "model.lora: a reward model starts from the base model's own weights; leave it out",
        ),
        ({}, "holds no pairs yet; run `diffalign pairs` with this config first"),
    ):
        with pytest.raises(ValueError, match=message):
            train_reward(_config(model, tmp_path / "run", 1, **changes))


@pytest.mark.slow
def test_the_command_prints_the_accuracy_of_every_level(model: Path, tmp_path: Path) -> None:
    _pairs(tmp_path / "run" / "pairs")
    path = tmp_path / "config.json"  # JSON is YAML
    path.write_text(_config(model, tmp_path / "run", 1).model_dump_json())
    lines = commands.train_reward(str(path)).splitlines()
    assert lines[0].split()[-5:] == ["0.05", "0.25", "0.5", "0.75", "0.95"]
    assert lines[1].split()[0] == "overall"
    assert len(lines[1].split()) == 6
    assert lines[2] == f"reward model: {tmp_path / 'run' / 'reward'}"
