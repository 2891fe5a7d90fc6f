"""Deep caches: what they compute, that 1 and 0 change nothing, that nothing else is touched, and who is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from diffalign import benchmarking
from diffalign.backbones import LoRA, inspect_model, load_policy
from diffalign.backbones.deep_cache import DeepCache, deep_cache_of, reuse_deep_features
from diffalign.cli import cli
from diffalign.config import ModelConfig
from diffalign.configured import load_model
from diffalign.generation import SamplingConfig
from diffalign.randomness import Draw
from diffalign.rollouts import StochasticSampler
from tests.backbones.families import FAMILIES, PROMPTS, Family

HOW: dict[str, Any] = {"guidance_scale": 3.0, "num_inference_steps": 4}
SEEDS = list(range(len(PROMPTS)))


@pytest.fixture(scope="module")
def policy(tiny_pipeline: Path) -> Any:
    return load_policy(str(tiny_pipeline))


@pytest.fixture(scope="module")
def plain(policy: Any) -> Tensor:
    return torch.as_tensor(policy.sample(PROMPTS, SEEDS, **HOW))


def sample(policy: Any, cache: DeepCache | None, **how: Any) -> Tensor:
    policy.deep_cache = cache
    try:
        return torch.as_tensor(policy.sample(PROMPTS, SEEDS, **(HOW | how)))
    finally:
        policy.deep_cache = None


class Calls:
    """Counts calls of a module's forward, which parts that are reused do not reach."""

    def __init__(self, module: Any) -> None:
        self.count, self.module, self.forward = 0, module, module.forward
        module.forward = self

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.count += 1
        return self.forward(*arguments, **named)


@pytest.mark.parametrize(("interval", "whole"), [(1, 4), (2, 2), (3, 2), (9, 1)])
def test_every_nth_step_is_computed_whole(policy: Any, plain: Tensor, interval: int, whole: int) -> None:
    middle, first = Calls(policy.denoiser.mid_block), Calls(policy.denoiser.down_blocks[0])
    try:
        drawn = sample(policy, DeepCache(interval=interval))
        assert (middle.count, first.count) == (whole, whole)
        assert torch.equal(drawn, plain) == (interval == 1)
        assert float((drawn - plain).abs().max()) < 0.5
        assert torch.equal(sample(policy, DeepCache(interval=interval)), drawn)  # a batch starts with a whole step
        assert middle.forward.__self__ is middle.module
        assert policy.denoiser.mid_block.forward is middle  # what was there before is there again
    finally:
        for calls in (middle, first):
            del calls.module.forward
    assert not any("forward" in vars(module) for module in policy.denoiser.modules())
    assert torch.equal(sample(policy, None), plain)


def test_a_shallow_step_is_the_papers_first_branch(policy: Any) -> None:
    """Conv_in, then the last layer on the way up with the deep features of the step before, then conv_out."""
    unet, before, steps = policy.denoiser, torch.tensor([600, 600]), torch.tensor([400, 400])
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(2, *policy.latent_shape, generator=generator) for _ in range(2))
    text = policy.encode_prompts(PROMPTS[:2]).tensors["hidden"]
    last, seen = unet.up_blocks[-1], []
    with torch.no_grad():
        hook = last.resnets[-1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        with reuse_deep_features(unet, 2):
            unet(first, before, text)
            shallow = unet(second, steps, text).sample
        hook.remove()
        skip = unet.conv_in(second)
        deep = seen[0][:, : seen[0].shape[1] - skip.shape[1]]
        embedding = unet.time_embedding(unet.time_proj(steps))
        hidden = last.resnets[-1](torch.cat([deep, skip], 1), embedding)
        if hasattr(last, "attentions"):
            hidden = last.attentions[-1](hidden, encoder_hidden_states=text, return_dict=False)[0]
        expected = unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))
        whole = unet(second, steps, text).sample
    torch.testing.assert_close(shallow, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(shallow, whole, atol=1e-4)


def test_an_error_in_the_block_leaves_nothing_behind(policy: Any, plain: Tensor) -> None:
    with pytest.raises(KeyError), reuse_deep_features(policy.denoiser, 3):
        raise KeyError
    assert torch.equal(policy.sample(PROMPTS, SEEDS, **HOW), plain)


def test_predictions_and_rollouts_are_the_whole_networks(policy: Any) -> None:
    def steps() -> Any:
        sampler = StochasticSampler(policy, num_inference_steps=3, guidance_scale=3.0)
        return sampler.rollout(PROMPTS, [Draw(0, 0, prompt) for prompt in PROMPTS])

    expected = steps()
    policy.deep_cache = DeepCache(interval=3)
    try:
        found = steps()
    finally:
        policy.deep_cache = None
    assert torch.equal(found.path, expected.path)
    assert torch.equal(found.log_probs, expected.log_probs)


@pytest.mark.slow
def test_a_negative_model_and_a_reference_go_with_it(tiny_pipeline: Path, tmp_path: Path, policies: Any) -> None:
    policy: Any = load_policy(str(tiny_pipeline), lora=LoRA(rank=2, alpha=6.0), train=True)
    policies.move_away(policy)
    policy.save_trained(tmp_path)
    policy.put_negative(tmp_path, scale=0.5)
    for how in ({"negative": True}, {"reference": True}):
        expected = sample(policy, None, **how)
        assert torch.equal(sample(policy, DeepCache(interval=1), **how), expected)
        assert not torch.equal(sample(policy, DeepCache(interval=2), **how), expected)


UNETS = ("animatediff", "sdxl")
TRANSFORMERS = ("flux-dev", "wan-experts")
"""One for each way of a block to give its results, and of a pipeline to call the network."""


@pytest.fixture(params=[f for f in FAMILIES if f.name in (*UNETS, *TRANSFORMERS)], ids=str)
def other(request: pytest.FixtureRequest) -> Family:
    return request.param  # type: ignore[no-any-return]


@pytest.mark.slow
def test_other_families(other: Family, tmp_path: Path) -> None:
    other.save(tmp_path)
    frames = {"num_frames": other.num_frames} if other.num_frames > 1 else {}
    policy: Any = load_policy(str(tmp_path), size=other.size, options=other.options, **frames)
    unet = other.name in UNETS
    exact, coarse = (
        (DeepCache(interval=1), DeepCache(interval=2)) if unet else (DeepCache(threshold=0.0), DeepCache(threshold=9.0))
    )
    guidance = other.guidance_on or other.guidance_off
    how = {"guidance_scale": guidance, "num_inference_steps": 2}
    expected = sample(policy, None, **how)
    assert torch.equal(sample(policy, exact, **how), expected)
    moved = sample(policy, coarse, **how)
    assert not torch.equal(moved, expected)
    assert moved.isfinite().all()
    assert torch.equal(sample(policy, coarse, **how), moved)
    assert torch.equal(sample(policy, None, **how), expected)


SHAPES, FLOW = "diffalign://shapes", "diffalign://shapes_flow"


@pytest.mark.parametrize(
    ("model", "asked", "message"),
    [
        (SHAPES, {}, None),
        (SHAPES, {"deep_cache": 3}, DeepCache(interval=3)),
        (SHAPES, {"deep_cache": 1}, DeepCache(interval=1)),
        (SHAPES, {"first_block_cache": 0.1}, "first_block_cache is for transformers, and the denoiser .* is a UNet2D"),
        (SHAPES, {"deep_cache": 2, "torch_compile": True}, "torch_compile compiles the whole network"),
        (FLOW, {"deep_cache": 3}, "deep_cache is for UNets, and the denoiser of diffalign://shapes_flow is a SD3"),
        (FLOW, {"first_block_cache": 0.0}, "SD3Transformer2DModel, which diffusers has no such cache for"),
        (FLOW, {"torch_compile": True}, None),
    ],
)
def test_what_a_model_can_have(model: str, asked: dict[str, Any], message: Any) -> None:
    source, sampling = inspect_model(model), SamplingConfig(**asked)
    if isinstance(message, str):
        with pytest.raises(ValueError, match=message):
            deep_cache_of(source, sampling)
    else:
        assert deep_cache_of(source, sampling) == message


def test_flux2_is_refused_as_diffusers_fails_on_it(tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.name == "flux2-klein")
    family.save(tmp_path)
    with pytest.raises(ValueError, match="Flux2Transformer2DModel, which diffusers has no such cache for"):
        deep_cache_of(inspect_model(str(tmp_path)), SamplingConfig(first_block_cache=0.1))


def test_a_loaded_model_draws_with_it_and_says_so(tiny_pipeline: Path, plain: Tensor) -> None:
    section, source = ModelConfig(pretrained_model_name_or_path=str(tiny_pipeline)), inspect_model(str(tiny_pipeline))
    usual: Any = load_model(section, source, sampling=SamplingConfig())
    assert "deep_cache" not in usual.sampling_settings(3.0)
    assert torch.equal(usual.sample(PROMPTS, SEEDS, **HOW), plain)
    cached: Any = load_model(section, source, sampling=SamplingConfig(deep_cache=2))
    assert cached.sampling_settings(3.0)["deep_cache"] == {"interval": 2}
    assert not torch.equal(cached.sample(PROMPTS, SEEDS, **HOW), plain)


def test_the_command_line_has_it(tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    out = tmp_path / "out"
    steps = ["--num-inference-steps", "2", "--deep-cache", "2"]
    line = ["sample", str(tiny_pipeline), "--prompts", str(tmp_path / "prompts.txt"), "--output", str(out), *steps]
    done = CliRunner().invoke(cli, line)
    assert done.exit_code == 0, done.output
    said = json.loads((out / "settings.json").read_text(encoding="utf-8"))
    assert said["pipeline"]["deep_cache"] == {"interval": 2}
    refused = CliRunner().invoke(cli, [*line, "--first-block-cache", "0.1"])
    assert refused.exit_code == 2
    assert "first_block_cache is for transformers" in refused.output
    again = CliRunner().invoke(cli, line[:-2])  # without it these are other pictures, which this folder is not for
    assert again.exit_code == 2
    assert "deep_cache" in again.output

    asked: list[SamplingConfig] = []
    monkeypatch.setattr(benchmarking, "evaluate_model", lambda model, *rest, **more: asked.append(model.sampling) or "")
    line = ["evaluate", str(tiny_pipeline), "--benchmark", "shapes", "--output", str(out), *steps, "--torch-compile"]
    assert CliRunner().invoke(cli, line).exit_code == 0
    assert asked == [SamplingConfig(num_inference_steps=2, deep_cache=2, torch_compile=True)]
    assert asked[0].caches() == {"deep_cache": 2}
