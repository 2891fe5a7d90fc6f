"""Flow-NRG: the corrected velocity against exact Gaussian models, and real pipelines under guidance; 7.6.5, 7.6.6."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign import commands
from diffalign.backbones import LoRA, load_policy
from diffalign.backbones.reward_guidance import RewardGuidance, guided_velocity, load_guidance
from diffalign.generation import SamplingConfig
from diffalign.noisy_rewards import NoisyReward, read_card
from tests.backbones.families import hunyuan_video, sana, sd3, wan
from tests.trainers.golden import double

A, W = 0.7, 1.3
"""The reward is A x0, the scale W; the tilted law of N(0, 1) data is then N(W A, 1)."""
OFF: dict[str, Any] = {"max_factor": None, "max_share": None}


def exact_velocity(x: Tensor, t: Tensor, mean: float = 0.0) -> Tensor:
    """E[noise - x0 | x_t] of N(mean, 1) data."""
    return (2 * t - 1) / ((1 - t) ** 2 + t**2) * (x - (1 - t) * mean) - mean


def exact_gradient(t: Tensor) -> Tensor:
    """By x_t, of ln E[exp(W A x0) | x_t] / W, but for a constant."""
    return A * (1 - t) / ((1 - t) ** 2 + t**2)


def test_one_velocity_of_the_gaussian_oracle() -> None:
    """Check 7.6.5."""
    x, t = double([0.9]), double([0.4])[0]
    velocity = exact_velocity(x, t)
    assert velocity.item() == pytest.approx(-0.346154, abs=1e-6)
    guided = guided_velocity(velocity, exact_gradient(t).reshape(1, 1), t, W, **OFF)
    assert guided.item() == pytest.approx(-1.046154, abs=1e-6)


@pytest.mark.parametrize("t", [0.01, 0.3, 0.5, 0.77, 0.99])
def test_the_guided_velocity_is_that_of_the_tilted_law(t: float) -> None:
    x, time = torch.linspace(-3, 3, 7, dtype=torch.float64).reshape(-1, 1), torch.full((7,), t, dtype=torch.float64)
    column = time[:, None]
    guided = guided_velocity(exact_velocity(x, column), exact_gradient(column), time, W, **OFF)
    torch.testing.assert_close(guided, exact_velocity(x, column, W * A))


def test_200_euler_steps_sample_the_tilted_law() -> None:
    """Check 7.6.5: mean 0.91, deviation about 0.995 (Euler's own error)."""
    x = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for step in range(200):
        t = torch.full((len(x),), 1 - step / 200, dtype=torch.float64)
        velocity = exact_velocity(x, t[:, None])
        guided = guided_velocity(velocity, exact_gradient(t[:, None]), t, W, **OFF)
        if step == 0:  # t / (1 - t) is infinite and the gradient 0: their product is A
            guided = velocity - W * A
        x = x - guided / 200
    assert x.mean().item() == pytest.approx(W * A, abs=4 / math.sqrt(len(x)))
    assert x.std().item() == pytest.approx(0.995, abs=0.015)


def test_a_step_with_guidance_raises_the_reward_and_without_is_the_base_sampler() -> None:
    """Check 7.6.6."""
    generator = torch.Generator().manual_seed(1)
    velocity, gradient = (torch.randn(3, 4, 2, 2, generator=generator) for _ in range(2))
    t = torch.tensor([0.2, 0.6, 1.0], dtype=torch.float64)
    assert torch.equal(guided_velocity(velocity, gradient, t, 0.0), velocity)
    for limits in ({}, {"max_share": None}):
        moved = (guided_velocity(velocity, gradient, t, 0.5, **limits) - velocity) * -0.05  # dt < 0
        assert bool(((moved * gradient).flatten(1).sum(1) > 0).all())


def test_both_limits() -> None:
    """t / (1 - t) stops at 5, and a sample's correction at a fifth of its velocity's norm over all its elements."""
    velocity, gradient = torch.ones(3, 2, 2), torch.ones(3, 2, 2) * torch.tensor([1e-3, 1.0, 100.0])[:, None, None]
    t = torch.tensor([0.5, 0.99, 0.5], dtype=torch.float64)
    correction = velocity - guided_velocity(velocity, gradient, t, 1.0)
    assert correction[:, 0, 0].tolist() == pytest.approx([1e-3, 0.2, 0.2], rel=1e-3)
    by_factor = velocity - guided_velocity(velocity, gradient, t, 1.0, max_share=None)
    assert by_factor[:, 0, 0].tolist() == pytest.approx([1e-3, 5.0, 100.0], rel=1e-3)
    still = guided_velocity(torch.zeros(1, 4), torch.zeros(1, 4), t[:1], 1.0)
    assert torch.equal(still, torch.zeros(1, 4))


# --- in pipelines ----------------------------------------------------------------------------------------------------

Drawn = tuple[Tensor, list[tuple[Tensor, Any, Tensor]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny SD3 and a reward model of it with a head that answers."""
    root = tmp_path_factory.mktemp("guidance")
    model = sd3.save_tiny(root / "model", False)
    answering(model, ("VQ", "TA")).save_pretrained(root / "reward")
    return {"model": model, "reward": root / "reward"}


def answering(model: Path, dimensions: tuple[str, ...] = ("overall",), **size: Any) -> NoisyReward:
    policy: Any = load_policy(str(model), **size)
    reward = NoisyReward.start(policy, 1, dimensions)
    torch.nn.init.normal_(reward.head[2].weight, generator=torch.Generator().manual_seed(0))
    return reward


def draw(policy: Any, guidance: RewardGuidance | None, **arguments: Any) -> Drawn:
    """Two pictures, and what the scheduler was given at each step."""
    scheduler, seen = policy.pipeline.scheduler, []
    step = scheduler.step

    def watch(output: Tensor, t: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append((output.clone(), t, sample.clone()))
        return step(output, t, sample, *args, **kwargs)

    scheduler.step = watch
    policy.reward_guidance = guidance
    try:
        pictures = policy.sample(["a red circle", "a star"], [3, 4], num_inference_steps=3, **arguments)
        assert scheduler.step is watch  # put back
    finally:
        scheduler.__dict__.pop("step", None)
        policy.reward_guidance = None
    return pictures, seen


def check_first_step(policy: Any, guidance: RewardGuidance, **arguments: Any) -> None:
    """The first step's velocity is the base's, guided or not, minus the correction; later ones follow from it."""
    plain, before = draw(policy, None, **arguments)
    guided, after = draw(policy, guidance, **arguments)
    (velocity, t, latents), (corrected, same_t, same_latents) = before[0], after[0]
    assert torch.equal(latents, same_latents)
    assert t == same_t
    times = torch.full((2,), float(t))
    prompts = policy.encode_prompts(["a red circle", "a star"])
    gradient = guidance.gradient(latents, times, prompts)
    assert gradient.shape == (2, *policy.latent_shape)
    sigma = policy.schedule.scales(times)[1]
    expected = guided_velocity(velocity, gradient, sigma, guidance.scale)
    torch.testing.assert_close(corrected, expected)
    assert not torch.allclose(corrected, velocity)
    assert not torch.equal(plain, guided)
    assert torch.equal(
        draw(policy, RewardGuidance(guidance.reward, guidance.weights, scale=0.0), **arguments)[0], plain
    )
    alone = policy.encode_prompts(["a star"])
    torch.testing.assert_close(guidance.gradient(latents[1:], times[1:], alone), gradient[1:], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_pipelines_guided_velocity_is_corrected(folder: dict[str, Path], scale: float) -> None:
    policy: Any = load_policy(str(folder["model"]))
    settings = SamplingConfig(reward_guidance=str(folder["reward"]), reward_weights={"TA": 2.0}, reward_scale=0.5)
    guidance = load_guidance(policy, settings)
    assert guidance is not None
    assert guidance.weights == (0.0, 2.0)
    check_first_step(policy, guidance, guidance_scale=scale)


FAMILIES: list[tuple[str, Callable[[Path], Any], tuple[int, int], int | None]] = [
    ("wan", wan.save_tiny, (32, 48), 5),
    ("hunyuan-video", hunyuan_video.save_tiny, (16, 32), 5),
    ("sana-euler", lambda path: sana.save_tiny(path, euler=True), (32, 64), None),
    ("sana-solver", lambda path: sana.save_tiny(path, euler=False), (32, 64), None),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "save", "size", "frames"), FAMILIES, ids=[case[0] for case in FAMILIES])
def test_other_families(
    tmp_path: Path, name: str, save: Callable[[Path], Any], size: tuple[int, int], frames: int | None
) -> None:
    model = save(tmp_path / "model")
    answering(model, size=size, num_frames=frames).save_pretrained(tmp_path / "reward")
    policy: Any = load_policy(str(model), size=size, num_frames=frames)
    guidance = load_guidance(policy, SamplingConfig(reward_guidance=str(tmp_path / "reward")))
    assert guidance is not None
    check_first_step(policy, guidance)


@pytest.mark.slow
def test_an_adapter_changes_the_model_and_not_its_reward(folder: dict[str, Path], policies: Any) -> None:
    plain: Any = load_policy(str(folder["model"]))
    adapted: Any = load_policy(str(folder["model"]), lora=LoRA(rank=2), train=True)
    policies.move_away(adapted)
    latents, times = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([300.0])
    rewards = [
        NoisyReward.from_pretrained(folder["reward"], policy)(latents, times, policy.encode_prompts(["a star"]))
        for policy in (plain, adapted)
    ]
    assert torch.equal(*rewards)


@pytest.mark.slow
def test_sample_with_guidance_and_what_its_folder_remembers(folder: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n")

    def sample(name: str, **sampling: Any) -> bytes:
        out = tmp_path / name
        settings = {"num_inference_steps": 2, **sampling}
        commands.sample(str(folder["model"]), str(tmp_path / "prompts.txt"), str(out), None, None, settings)
        return (out / "images" / "00000-00.png").read_bytes()

    guided = {"reward_guidance": str(folder["reward"]), "reward_weights": {"VQ": 1.0}, "reward_scale": 50.0}
    plain = sample("plain")
    assert sample("guided", **guided) != plain
    assert sample("guided", **guided)  # goes on: everything is there
    remembered = json.loads((tmp_path / "guided" / "settings.json").read_text())["pipeline"]["reward_guidance"]
    assert remembered["weights"] == {"VQ": 1.0, "TA": 0.0}
    with pytest.raises(ValueError, match="holds results of other settings"):
        sample("guided", **{**guided, "reward_scale": 2.0})


@pytest.mark.slow
def test_what_cannot_guide_is_refused_before_weights_load(
    folder: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = wan.save_tiny(tmp_path / "wan")
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    reward, model = str(folder["reward"]), str(folder["model"])
    for name, sampling, message in (
        (model, {"reward_guidance": str(tmp_path)}, "holds no reward model on noisy latents"),
        (model, {"reward_guidance": reward, "reward_weights": {"MQ": 1.0}}, r"no dimension 'MQ' .* \(it has VQ, TA\)"),
        (model, {"reward_weights": {"VQ": 1.0}}, "reward_weights without reward_guidance"),
        (str(other), {"reward_guidance": reward}, "was trained for .*StableDiffusion3Pipeline.*is a WanPipeline"),
    ):
        with pytest.raises(ValueError, match=message):
            commands.sample(name, "diffalign://shapes/held_out", str(tmp_path / "out"), None, 1, sampling)


@pytest.mark.slow
def test_a_reward_model_of_other_encoders_or_another_transformer_is_refused(
    folder: dict[str, Path], tmp_path: Path
) -> None:
    policy: Any = load_policy(str(folder["model"]))
    config = json.loads((folder["reward"] / "reward.json").read_text())
    for key, value, message in (
        ("encoder", "another", "whose autoencoder or text encoders are not those of"),
        ("denoiser_config", {**config["denoiser_config"], "num_layers": 9}, "whose transformer has num_layers 9"),
    ):
        changed = tmp_path / key
        changed.mkdir()
        (changed / "reward.json").write_text(json.dumps({**config, key: value}))
        (changed / "model.safetensors").write_bytes((folder["reward"] / "model.safetensors").read_bytes())
        with pytest.raises(ValueError, match=message):
            load_guidance(policy, SamplingConfig(reward_guidance=str(changed)))
    assert read_card(folder["reward"]).dimensions == ("VQ", "TA")
