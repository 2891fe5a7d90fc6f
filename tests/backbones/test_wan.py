"""What is special to Wan: two experts and their boundary, text without a mask, normalised latents, sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor

from diffalign.backbones import LoRA, load_policy
from diffalign.backbones.base import LORA_FILE
from diffalign.backbones.wan import Experts
from tests.backbones.families.wan import STATISTICS, save_tiny

pytestmark = pytest.mark.slow  # as those of all families but the first ones

SIZE = {"size": (32, 48), "num_frames": 5}
BOUNDARY = 700.0
SECOND_FILE = "pytorch_lora_weights_transformer_2.safetensors"
PUBLISHED_14B = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
}
PUBLISHED = {
    "Wan2.1-T2V-1.3B": ({**PUBLISHED_14B, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, 1.419e9),
    "Wan2.1-T2V-14B, Wan2.2-T2V-A14B": (PUBLISHED_14B, 14.289e9),
    "Wan2.2-TI2V-5B": (
        {
            **PUBLISHED_14B,
            "num_attention_heads": 24,
            "ffn_dim": 14336,
            "num_layers": 30,
            "in_channels": 48,
            "out_channels": 48,
        },
        5.000e9,
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("wan") / "experts", ("transformer", "transformer_2"))


@pytest.fixture(scope="module")
def base(folder: Path) -> Any:
    """The plain model of two experts; no test may change it."""
    return load_policy(str(folder), **SIZE)


@pytest.fixture
def load(folder: Path) -> Callable[..., Any]:
    return lambda **options: load_policy(str(folder), **SIZE, **options)


def inputs(policy: Any, *timesteps: float) -> tuple[Tensor, Tensor, Any]:
    """Latents, timesteps and conditioning, a row for each timestep."""
    noisy = torch.randn((len(timesteps), *policy.latent_shape), generator=torch.Generator().manual_seed(5))
    conditioning = policy.encode_prompts(["a red circle", "blue", "two stars", ""][: len(timesteps)])
    return noisy, torch.tensor(timesteps), conditioning


def test_every_row_goes_to_the_expert_of_its_timestep(base: Any) -> None:
    noisy, timesteps, conditioning = inputs(base, 200.0, 900.0, BOUNDARY, BOUNDARY - 1)
    with torch.no_grad():
        output = base.predict(noisy, timesteps, conditioning)
        for row, expert in enumerate(("transformer_2", "transformer", "transformer", "transformer_2")):
            one = slice(row, row + 1)
            alone = base._forward(base.denoiser.parts()[expert], noisy[one], timesteps[one], conditioning[one])
            torch.testing.assert_close(output[one], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lora", [LoRA(rank=2), None], ids=["lora", "full"])
@pytest.mark.parametrize("high", [False, True], ids=["low-noise", "high-noise"])
def test_an_expert_without_rows_gets_a_gradient_of_zero(load: Any, lora: LoRA | None, high: bool) -> None:
    policy = load(lora=lora, train=True)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.1)
    policy.predict(*inputs(policy, *([950.0, 800.0] if high else [50.0, 600.0]))).square().mean().backward()
    for name, parameter in policy.named_trainable():
        assert parameter.grad is not None, name
        busy = name.startswith("transformer." if high else "transformer_2.")
        if not busy:
            assert not parameter.grad.any(), name
        elif lora is not None or name.endswith("proj_out.weight"):
            assert parameter.grad.any(), name


def test_gradient_checkpointing_and_attention_reach_both_experts(load: Any) -> None:
    policy = load(lora=LoRA(rank=2), train=True, attention="_native_math")
    for expert in policy.denoiser.parts().values():
        assert all(hasattr(block.attn1.processor, "stock") for block in expert.blocks), "held to a kernel"
    arguments = inputs(policy, 100.0, 900.0)
    expected = policy.predict(*arguments)
    policy.denoiser.enable_gradient_checkpointing()
    assert all(expert.gradient_checkpointing for expert in policy.denoiser.parts().values())
    output = policy.predict(*arguments)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    output.mean().backward()
    assert all(parameter.grad is not None for parameter in policy.trainable_parameters())


def test_the_two_adapters_are_different_and_lie_in_two_files(load: Any, folder: Path, tmp_path: Path) -> None:
    policy = load(lora=LoRA(rank=2, alpha=6.0), train=True)
    with torch.no_grad():
        for index, parameter in enumerate(policy.trainable_parameters()):
            parameter.add_(0.01 * (index + 1))
    policy.save_trained(tmp_path)
    first, second = load_file(tmp_path / LORA_FILE), load_file(tmp_path / SECOND_FILE)
    assert first.keys() == second.keys()
    assert not any(torch.equal(first[name], second[name]) for name in first)
    fresh = load(adapter=tmp_path)
    assert fresh.lora is not None
    assert (fresh.lora.rank, fresh.lora.alpha) == (2, 6.0)
    with torch.no_grad():
        arguments = inputs(policy, 100.0, 900.0)
        torch.testing.assert_close(fresh.predict(*arguments), policy.predict(*arguments), rtol=0, atol=1e-5)
    (tmp_path / SECOND_FILE).unlink()
    with pytest.raises(ValueError, match=r"expected .* and .*transformer_2.*, found neither"):
        load(adapter=tmp_path)


def test_full_weights_of_both_experts_become_a_diffusers_folder(load: Any, folder: Path, tmp_path: Path) -> None:
    policy = load(train=True)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.01)
    policy.save_trained(tmp_path)
    trained = {
        part: WanTransformer3DModel.from_pretrained(tmp_path / part) for part in ("transformer", "transformer_2")
    }
    pipeline = WanPipeline.from_pretrained(folder, dtype=torch.float32, **trained)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        "blue",
        height=32,
        width=48,
        num_frames=5,
        generator=[torch.Generator().manual_seed(3)],
        num_inference_steps=3,
        guidance_scale=1.0,
        output_type="pt",
    ).frames
    ours = policy.sample(["blue"], [3], guidance_scale=1.0, num_inference_steps=3)
    torch.testing.assert_close(ours, drawn, rtol=0, atol=1e-4)


@pytest.mark.parametrize("part", ["transformer", "transformer_2"])
def test_an_index_with_one_expert_is_a_model_of_one(part: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "pipeline", (part,))
    index = json.loads((source / "model_index.json").read_text())
    assert [index[p][0] for p in ("transformer", "transformer_2") if p != part] == [None]
    policy: Any = load_policy(str(source), **SIZE, lora=LoRA(rank=2), train=True)
    assert not isinstance(policy.denoiser, Experts)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.1)
    drawn = policy.sample(["blue"], [0], num_inference_steps=2)
    assert drawn.shape == (1, 5, 3, 32, 48)
    assert not torch.allclose(policy.sample(["blue"], [0], num_inference_steps=2, reference=True), drawn, atol=1e-4)
    policy.save_trained(tmp_path / "trained")
    fresh = load_policy(str(source), **SIZE, adapter=tmp_path / "trained")
    torch.testing.assert_close(fresh.sample(["blue"], [0], num_inference_steps=2), drawn, rtol=0, atol=1e-5)


def test_each_expert_has_its_own_guidance_by_default(base: Any) -> None:
    assert (base.guidance_scale, base.guidance_scale_2, base.num_inference_steps) == (4.0, 3.0, 40)
    own = base.sample(["blue"], [0], num_inference_steps=3)
    pipeline = base.pipeline
    with torch.no_grad():
        drawn = pipeline(
            ["blue"],
            height=32,
            width=48,
            num_frames=5,
            generator=[torch.Generator().manual_seed(0)],
            num_inference_steps=3,
            guidance_scale=4.0,
            guidance_scale_2=3.0,
            output_type="pt",
        ).frames
    torch.testing.assert_close(own, drawn, rtol=0, atol=1e-5)
    assert "guidance_scale_2" not in base._sampling_arguments(5.0)


def test_text_after_the_last_token_is_zero_and_fills_512(base: Any) -> None:
    hidden = base.encode_prompts(["ab", "abcd"]).tensors["hidden"]
    assert hidden.shape[1] == base.max_tokens == 512
    used = hidden.abs().sum(-1) > 0
    assert used.sum(1).tolist() == base.token_counts(["ab", "abcd"])


def test_latents_are_normalised_by_channel(base: Any) -> None:
    videos = torch.rand(1, 5, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    posterior = base.pipeline.vae.encode(videos.transpose(1, 2) * 2 - 1).latent_dist
    moments = base.encode(videos)
    for channel, (mean, std) in enumerate(zip(*STATISTICS.values(), strict=True)):
        expected = (posterior.mean[:, channel] - mean) / std
        torch.testing.assert_close(moments.mean[:, channel], expected)
        torch.testing.assert_close(moments.std[:, channel], posterior.std[:, channel] / std)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # PyTorch: norms under autocast
def test_a_reference_in_bfloat16_predicts_and_draws_with_both_experts(load: Any, base: Any) -> None:
    policy = load(train=True, dtype=torch.bfloat16)
    assert {p.dtype for p in policy.trainable_parameters()} == {torch.float32}
    for expert in policy._frozen.parts().values():
        assert expert.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
        assert expert.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
        assert expert.rope.freqs_cos.dtype == torch.float32
    arguments = inputs(policy, 100.0, 900.0)
    with torch.no_grad():
        expected = base.predict(*arguments)
        with torch.autocast("cpu", torch.bfloat16):
            policy_output = policy.predict(*arguments)
    reference = policy.frozen().predict(*arguments)
    torch.testing.assert_close(reference.float(), expected, rtol=0.1, atol=0.1)
    torch.testing.assert_close(reference.float(), policy_output.float(), rtol=0, atol=1e-6)
    drawn = policy.sample(["blue"], [0], num_inference_steps=2, reference=True)
    torch.testing.assert_close(drawn, base.sample(["blue"], [0], num_inference_steps=2), rtol=0, atol=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (40, 48)}, "size: expected multiples of 16 for Wan, got 40x48 pixels"),
        ({"num_frames": 6}, "num_frames: expected a multiple of 4 plus one for Wan, got 6; use 5"),
    ],
)
def test_sizes_the_pipeline_would_change_are_refused(folder: Path, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_policy(str(folder), **{**SIZE, **options})


def test_default_sizes_are_the_published_ones(folder: Path, tmp_path: Path) -> None:
    def defaults(source: Path) -> tuple[Any, ...]:
        policy = load_policy(str(source))
        return policy.size, policy.num_frames, policy.guidance_scale, policy.num_inference_steps

    assert defaults(folder) == ((720, 1280), 81, 4.0, 40)
    assert defaults(save_tiny(tmp_path / "one")) == ((480, 832), 81, 5.0, 50)
    assert defaults(save_tiny(tmp_path / "5b", per_token=True)) == ((704, 1280), 121, 5.0, 50)


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_transformers_have_the_published_number_of_parameters(name: str) -> None:
    config, count = PUBLISHED[name]
    with torch.device("meta"):
        model = WanTransformer3DModel(**config)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(count, rel=1e-3)


def test_the_full_size_autoencoder_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        vae = AutoencoderKLWan()
    assert sum(parameter.numel() for parameter in vae.parameters()) == pytest.approx(126.9e6, rel=1e-3)
