"""Drawing with a compiled denoiser: the same pictures, one compilation, and last batches that are filled up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.backbones import inspect_model, load_policy
from diffalign.config import ModelConfig
from diffalign.configured import load_model
from diffalign.generation import SamplingConfig, fill_up, generate, make_requests
from diffalign.prompts import PromptRow
from diffalign.randomness import Draw
from diffalign.rollouts import StochasticSampler
from tests.backbones.families import sd3

PROMPTS = ["a red square", "a blue circle", "a green star"]
SAMPLING = SamplingConfig(guidance_scale=3.0, num_inference_steps=2, batch_size=2)
REQUESTS = make_requests([PromptRow(prompt) for prompt in PROMPTS], SAMPLING)  # a batch of 2 and one of 1


@pytest.mark.parametrize(("batch", "size", "filled"), [("ab", 2, "ab"), ("a", 3, "aaa"), ("abc", 4, "abcc")])
def test_filling_up(batch: str, size: int, filled: str) -> None:
    assert "".join(fill_up(batch, size)) == filled


def pictures(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("images/*.png"))}


def rows_seen(policy: Any) -> list[int]:
    """Rows of every call of the denoiser from now on."""
    seen: list[int] = []
    policy.denoiser.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[0])))
    return seen


def rollout(policy: Any) -> Any:
    sampler = StochasticSampler(policy, num_inference_steps=2, guidance_scale=3.0)
    return sampler.rollout(PROMPTS[:1], [Draw(0, 0, PROMPTS[0])], images_per_prompt=3, batch_size=2)


def test_last_batches_are_filled_up_for_compiled_denoisers_alone(tiny_pipeline: Path, tmp_path: Path) -> None:
    plain: Any = load_policy(str(tiny_pipeline))
    filled: Any = load_policy(str(tiny_pipeline))
    filled.compiled = "no backend, as the batches are the same"
    rows = rows_seen(plain), rows_seen(filled)
    generate(plain, REQUESTS, tmp_path / "plain", SAMPLING, settings={})
    generate(filled, REQUESTS, tmp_path / "filled", SAMPLING, settings={})
    assert rows == ([4, 4, 2, 2], [4, 4, 4, 4])  # guidance doubles them
    assert len(pictures(tmp_path / "plain")) == 3
    assert pictures(tmp_path / "filled") == pictures(tmp_path / "plain")
    said = [json.loads((tmp_path / name / "settings.json").read_text())["pipeline"] for name in ("plain", "filled")]
    assert "torch_compile" not in said[0]
    assert said[1]["torch_compile"] == filled.compiled
    for seen in rows:
        seen.clear()
    for policy, name in ((plain, "plain"), (filled, "filled")):  # nothing to be as long as: a batch that is alone
        generate(policy, REQUESTS[:1], tmp_path / f"{name} alone", SAMPLING, settings={})
    assert rows == ([2, 2], [2, 2])
    for seen in rows:
        seen.clear()
    expected, found = rollout(plain), rollout(filled)
    assert rows == ([4, 4, 2, 2], [4, 4, 4, 4])
    torch.testing.assert_close(found.path, expected.path, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_one_compilation_draws_the_same_pictures(tmp_path: Path) -> None:
    family = sd3.FAMILIES[1]
    family.save(tmp_path / "model")
    graphs: list[Any] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(inputs)
        return graph.forward

    def load(sampling: SamplingConfig) -> Any:
        section = ModelConfig(pretrained_model_name_or_path=str(tmp_path / "model"), torch_compile_backend="eager")
        return load_model(section, inspect_model(str(tmp_path / "model")), size=family.size, sampling=sampling)

    plain, compiled = load(SAMPLING), load(SAMPLING.model_copy(update={"torch_compile": True}))
    assert (plain.compiled, compiled.compiled) == ("", "eager")
    compiled.compile(counting)
    compiled.compiled = "counting"
    for policy, name in ((plain, "plain"), (compiled, "compiled")):
        generate(policy, REQUESTS, tmp_path / name, SAMPLING, settings={})
    assert graphs
    assert pictures(tmp_path / "compiled") == pictures(tmp_path / "plain")
    count = len(graphs)
    compiled.sample(PROMPTS[1:], [5, 6], guidance_scale=2.0, num_inference_steps=3)
    assert len(graphs) == count
