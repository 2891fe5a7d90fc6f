"""`model.options`: checked by the family before weights load, used by the policy, part of the fingerprint."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffalign.backbones import ModelSource, load_policy
from diffalign.backbones.loading import FAMILIES, check_options, policy_class
from diffalign.predictions import Prediction
from tests.backbones.families import flux, hunyuan_video, qwen_image, sana


def source(pipeline: str) -> ModelSource:
    return ModelSource("some/model", "some/model", pipeline, Prediction.VELOCITY)


@pytest.mark.parametrize(
    ("pipeline", "options", "message"),
    [
        (
            "FluxPipeline",
            {"embeded_guidance": 1},
            "'model.options.embeded_guidance'; did you mean 'embedded_guidance'?",
        ),
        ("FluxPipeline", {"embedded_guidance": -1}, "'model.options.embedded_guidance': .*; found -1"),
        (
            "StableDiffusionPipeline",
            {"embedded_guidance": 1},
            "'model.options.embedded_guidance' \\(available: none\\)",
        ),
        ("QwenImagePipeline", {"prompt_template": {"template": "no place", "crop_start": 1}}, "expected one {}"),
        ("QwenImagePipeline", {"prompt_template": {"template": "{}"}}, "model.options.prompt_template.crop_start"),
        ("LTXPipeline", {"timestep_shift": 0}, "model.options.timestep_shift"),
    ],
)
def test_what_a_family_does_not_know_is_refused(pipeline: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_options(source(pipeline), options)


@pytest.mark.parametrize("pipeline", FAMILIES)
def test_every_family_names_its_options(pipeline: str) -> None:
    found = check_options(source(pipeline), {})
    assert type(found) is policy_class(source(pipeline)).Options
    assert ("timestep_shift" in type(found).model_fields) == (
        pipeline not in ("CogVideoXPipeline", "AnimateDiffPipeline", "TextToVideoSDPipeline")
        and not pipeline.startswith(("StableDiffusionPipeline", "StableDiffusionXL"))
    )


@pytest.mark.slow
def test_the_network_is_told_the_guidance(tmp_path: Path) -> None:
    folder = flux.save_tiny(tmp_path / "pipeline", dev=True)
    told: Any = load_policy(str(folder), size=(16, 16), options={"embedded_guidance": 1.5, "max_sequence_length": 32})
    assert told.embedded_guidance == 1.5
    assert told.guidance_scale == 3.5
    assert told.encode_prompts(["a"]).tensors["hidden"].shape[1] == told.max_tokens == 32
    plain: Any = load_policy(str(folder), size=(16, 16))
    assert plain.encoder_fingerprint() != told.encoder_fingerprint()
    assert told.sampling_settings(3.5)["max_sequence_length"] == 32


@pytest.mark.slow
def test_templates_reach_the_embeddings_and_their_fingerprint(tmp_path: Path) -> None:
    template = {"template": "draw {}", "crop_start": 0}
    for name, module, kind in (("qwen", qwen_image, "Qwen"), ("hunyuan", hunyuan_video, "Hunyuan")):
        folder = module.save_tiny(tmp_path / name)
        frames = {"num_frames": 5} if kind == "Hunyuan" else {}
        policies: list[Any] = [
            load_policy(str(folder), size=(32, 32), **frames, options=options)  # type: ignore[arg-type]
            for options in ({"prompt_template": template}, {"prompt_template": {**template, "crop_start": 2}})
        ]
        first, second = (policy.encode_prompts(["a red circle"]).tensors["hidden"] for policy in policies)
        assert not torch.equal(first, second)
        assert policies[0].encoder_fingerprint() != policies[1].encoder_fingerprint()
        assert policies[0].token_counts(["a"])[0] == policies[1].token_counts(["a"])[0] + 2


@pytest.mark.slow
def test_an_instruction_can_be_left_out(tmp_path: Path) -> None:
    policy: Any = load_policy(
        str(sana.save_tiny(tmp_path / "sana", euler=False)), options={"complex_human_instruction": []}
    )
    assert policy.instruction == ()
    assert policy.sampling_settings(4.5)["complex_human_instruction"] == []


# --- the shift of the timesteps --------------------------------------------------------------------------------------


def schedule(kind: str, tokens: int, options: dict[str, Any], **config: Any) -> Any:
    """The family's rule on a scheduler's configuration alone."""
    policy = policy_class(source(kind)).__new__(policy_class(source(kind)))
    policy.source, policy.options = source(kind), check_options(source(kind), options)
    policy.num_inference_steps = 50
    values = {"num_train_timesteps": 1000, **config}

    class Config(dict[str, Any]):
        __getattr__ = dict.__getitem__

    policy.pipeline = SimpleNamespace(scheduler=SimpleNamespace(config=Config(values)))
    return policy._flow_schedule(tokens)


DYNAMIC = {
    "use_dynamic_shifting": True,
    "shift": 3.0,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
}


@pytest.mark.parametrize("kind", ["FluxPipeline", "QwenImagePipeline", "LTXPipeline", "Flux2Pipeline", "SanaPipeline"])
def test_one_rule_for_every_family(kind: str) -> None:
    assert schedule(kind, 4096, {}, shift=3.0).shift == 3.0
    assert schedule(kind, 4096, {}, flow_shift=5.0).shift == 5.0
    assert schedule(kind, 4096, {}, **DYNAMIC).shift == 1.0
    assert schedule(kind, 4096, {"timestep_shift": 2.5}, **DYNAMIC).shift == 2.5
    with pytest.raises(ValueError, match="the sampler of some/model has no dynamic shift; give a number"):
        schedule(kind, 4096, {"timestep_shift": "dynamic"}, shift=3.0)


def test_a_freshly_loaded_scheduler_has_the_same_table() -> None:
    """What diffusers' training scripts draw timesteps from."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    index = torch.tensor([0, 250, 500, 999])
    for config in ({"shift": 3.0}, DYNAMIC):
        table = FlowMatchEulerDiscreteScheduler(**config).timesteps[index]  # type: ignore[arg-type]
        ours = schedule("FluxPipeline", 4096, {}, **config).timestep_of_index(index)
        torch.testing.assert_close(ours.float(), table)


def test_dynamic_is_the_samplers_own_at_this_size() -> None:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    for tokens in (256, 1024, 4096):
        found = schedule("FluxPipeline", tokens, {"timestep_shift": "dynamic"}, **DYNAMIC).shift
        assert found == pytest.approx(math.exp(calculate_shift(tokens)))
        found = schedule("Flux2Pipeline", tokens, {"timestep_shift": "dynamic"}, **DYNAMIC).shift
        assert found == pytest.approx(math.exp(compute_empirical_mu(tokens, 50)))
