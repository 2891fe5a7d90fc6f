"""What is special to Sana: the instruction before a prompt, the mask, an autoencoder without a distribution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.backbones import inspect_model, load_policy
from diffalign.backbones.sana import SanaPolicy
from diffalign.predictions import Prediction
from tests.backbones.families import sana

pytestmark = pytest.mark.slow  # as those of all families but the first ones

SIZE = (32, 64)


class WithoutInstruction(SanaPolicy):
    """Prompts as they are."""

    instruction = ()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sana.save_tiny(tmp_path_factory.mktemp("sana") / "pipeline", euler=False)


@pytest.fixture(scope="module")
def policy(folder: Path) -> Any:
    return load_policy(str(folder), size=SIZE)


def test_the_instruction_is_the_pipelines_and_the_empty_prompt_has_none(folder: Path, policy: Any) -> None:
    plain: Any = WithoutInstruction.load(inspect_model(str(folder)), size=SIZE)
    assert len(policy.instruction) == 8
    assert policy.instruction[-1] == "User Prompt: "
    prompts = ["a red circle", "", "two stars", ""]
    ours, without = policy.encode_prompts(prompts).tensors, plain.encode_prompts(prompts).tensors
    assert ours["hidden"].shape == without["hidden"].shape == (4, 300, 16)
    assert not torch.allclose(ours["hidden"][0], without["hidden"][0])
    # Rows are encoded in two groups: empty ones must come back to their places.
    torch.testing.assert_close(ours["hidden"][[1, 3]], without["hidden"][[1, 3]])
    torch.testing.assert_close(ours["hidden"][2], policy.encode_prompts(["two stars"]).tensors["hidden"][0])
    assert policy.encoder_fingerprint() != plain.encoder_fingerprint()
    drawn = policy.sample(["a"], [0], num_inference_steps=2)
    assert not torch.allclose(drawn, plain.sample(["a"], [0], num_inference_steps=2), atol=1e-5)


def test_a_prompt_fills_the_limit_exactly(folder: Path) -> None:
    """`max_tokens` counts what the network really reads: one token less changes it, one more does not."""
    plain: Any = WithoutInstruction.load(inspect_model(str(folder)), size=SIZE)
    fits, over = "b" * 299, "b" * 299 + "a"
    assert plain.token_counts([fits, over]) == [plain.max_tokens, plain.max_tokens + 1]
    a, b, c = plain.encode_prompts([fits, over, fits[:-1]]).tensors["mask"].sum(1).tolist()
    assert (a, b, c) == (300, 300, 299)


def test_the_mask_hides_padding(policy: Any) -> None:
    conditioning = policy.encode_prompts(["a red circle"])
    mask = conditioning.tensors["mask"]
    assert not mask.is_floating_point()
    assert 0 < int(mask.sum()) < 300
    latents, timesteps = torch.randn(1, *policy.latent_shape), torch.tensor([500.0])
    with torch.no_grad():
        expected = policy.predict(latents, timesteps, conditioning)
        conditioning.tensors["hidden"][mask == 0] += 1.0
        torch.testing.assert_close(policy.predict(latents, timesteps, conditioning), expected)
        conditioning.tensors["hidden"][mask == 1] += 1.0
        assert not torch.allclose(policy.predict(latents, timesteps, conditioning), expected, atol=1e-5)


def test_latents_are_one_value(policy: Any) -> None:
    moments = policy.encode(torch.rand(1, 3, *SIZE))
    assert not moments.std.any()
    assert moments.mean.std() > 0


def test_both_samplers_give_a_flow_with_its_shift(policy: Any, tmp_path: Path) -> None:
    euler: Any = load_policy(str(sana.save_tiny(tmp_path / "euler", euler=True, timestep_scale=0.5)), size=SIZE)
    for each in (policy, euler):
        assert each.prediction is Prediction.VELOCITY
        assert each.schedule.steps == 1000
        assert each.schedule.shift == 3.0
    assert policy.size == SIZE
    assert (policy.guidance_scale, policy.num_inference_steps) == (4.5, 20)


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({"num_layers": 20}, 1_604_462_752),
        (
            {
                "num_layers": 28,
                "num_attention_heads": 36,
                "num_cross_attention_heads": 16,
                "cross_attention_head_dim": 72,
                "cross_attention_dim": 1152,
            },
            591_747_872,
        ),
    ],
    ids=["1.6B", "0.6B"],
)
def test_published_transformers_have_their_size(options: dict[str, Any], parameters: int) -> None:
    from diffusers import SanaTransformer2DModel

    published = {
        "in_channels": 32,
        "out_channels": 32,
        "num_attention_heads": 70,
        "attention_head_dim": 32,
        "num_cross_attention_heads": 20,
        "cross_attention_head_dim": 112,
        "cross_attention_dim": 2240,
        "caption_channels": 2304,
        "mlp_ratio": 2.5,
        "attention_bias": False,
        "sample_size": 32,
        "patch_size": 1,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
    }
    with torch.device("meta"):
        transformer = SanaTransformer2DModel(**published | options)
    assert sum(p.numel() for p in transformer.parameters()) == parameters
