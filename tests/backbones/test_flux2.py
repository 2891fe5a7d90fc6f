"""What is special to FLUX.2: normalised patches, fused projections, chat templates, distilled and guided klein."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from diffalign.backbones import LoRA, load_policy
from tests.backbones.families.base import PROMPTS
from tests.backbones.families.flux2 import FAMILIES, WIDTH, unpack

pytestmark = pytest.mark.slow  # as those of all families but the first ones

SIZE = (16, 24)
DEV = {
    "in_channels": 128,
    "num_layers": 8,
    "num_single_layers": 48,
    "attention_head_dim": 128,
    "num_attention_heads": 48,
    "joint_attention_dim": 15360,
    "timestep_guidance_channels": 256,
    "mlp_ratio": 3.0,
    "axes_dims_rope": (32, 32, 32, 32),
    "rope_theta": 2000,
    "guidance_embeds": True,
}
KLEIN_4B = DEV | {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
KLEIN_9B = DEV | {
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
    "guidance_embeds": False,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family.name: family.save(tmp_path_factory.mktemp(family.name)) for family in FAMILIES}


@pytest.fixture(scope="module")
def klein(folders: dict[str, Path]) -> Any:
    return load_policy(str(folders["flux2-klein"]), size=SIZE)


@pytest.fixture
def dev(folders: dict[str, Path]) -> Any:
    return load_policy(str(folders["flux2-dev"]), size=SIZE)


def inputs(denoiser: Any) -> list[dict[str, Any]]:
    """The keyword arguments of every coming call of a denoiser."""
    seen: list[dict[str, Any]] = []
    denoiser.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    return seen


def test_the_network_is_given_what_the_pipeline_gives_it(dev: Any, folders: dict[str, Path]) -> None:
    """Tokens, times, guidance and positions one by one, with a guidance that is not the default."""
    pipeline = diffusers.Flux2Pipeline.from_pretrained(folders["flux2-dev"], dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    theirs, ours = inputs(pipeline.transformer), inputs(dev.denoiser)
    pipeline(prompt=list(PROMPTS), height=16, width=24, num_inference_steps=2, guidance_scale=1.7, output_type="latent")
    dev.embedded_guidance = 1.7
    for expected, timestep in zip(theirs, pipeline.scheduler.timesteps, strict=True):
        dev.predict(unpack(dev, expected["hidden_states"]), timestep.expand(2), dev.encode_prompts(PROMPTS))
        for name in ("hidden_states", "encoder_hidden_states", "timestep", "guidance"):
            torch.testing.assert_close(ours[-1][name], expected[name], rtol=0, atol=1e-6)
        for name in ("img_ids", "txt_ids"):
            assert all(torch.equal(ours[-1][name], rows) for rows in expected[name])


def test_latents_are_the_patches_that_the_pipeline_normalises(klein: Any) -> None:
    """The pipeline encodes reference images: the mean of our moments is what it makes of the same pixels."""
    images = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    moments = klein.encode(images)
    with torch.no_grad():
        expected = klein.pipeline._encode_vae_image(images * 2 - 1, generator=None)
        raw = klein.pipeline.vae.encode(images * 2 - 1).latent_dist.std
    torch.testing.assert_close(moments.mean, expected, rtol=0, atol=1e-5)
    bn, eps = klein.pipeline.vae.bn, klein.pipeline.vae.config.batch_norm_eps
    deviation = klein.pipeline._patchify_latents(raw) / (bn.running_var + eps).sqrt().reshape(1, -1, 1, 1)
    torch.testing.assert_close(moments.std, deviation, rtol=1e-4, atol=1e-6)


def test_noise_is_what_the_scheduler_adds(klein: Any) -> None:
    latents, noise = torch.randn(2, 2, 16, 4, 6).unbind()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    timesteps = scheduler.timesteps[[100, 700]]
    pack = klein.pipeline._pack_latents
    expected = scheduler.scale_noise(pack(latents), timesteps, pack(noise))
    torch.testing.assert_close(pack(klein.schedule.add_noise(latents, noise, timesteps)), expected, rtol=0, atol=1e-5)


def test_distilled_and_base_klein_have_their_own_defaults(klein: Any, dev: Any, folders: dict[str, Path]) -> None:
    base = load_policy(str(folders["flux2-klein-base"]), size=SIZE)
    assert (klein.guidance_scale, klein.num_inference_steps) == (1.0, 4)
    assert (base.guidance_scale, base.num_inference_steps) == (4.0, 50)
    assert (dev.guidance_scale, dev.num_inference_steps, dev.embedded_guidance) == (4.0, 50, 4.0)
    assert klein.schedule.shift == dev.schedule.shift == 1.0  # the dynamic shift is the sampler's


def test_three_layers_of_the_language_model_are_the_text(klein: Any, dev: Any) -> None:
    """Prompts are counted with the template around them, and cut where the pipeline cuts them."""
    klein_template = len("user\n" + "\n" + "assistant\n" + "\n\n" + "\n\n") + 5  # two im_start, im_end, think, /think
    dev_template = len(dev.pipeline.system_message) + 5  # <s>, two marks of the system message, two of the instruction
    for policy, template in ((klein, klein_template), (dev, dev_template)):
        assert policy.token_counts(["", "x" * 600]) == [template, template + 600]
        cut, longer = policy.encode_prompts(["x" * 600, "x" * 600 + "y"]).tensors["hidden"]
        assert cut.shape == (policy.max_tokens, 3 * WIDTH) == (512, 3 * WIDTH)
        assert torch.equal(cut, longer)


def test_the_text_around_the_prompt_is_part_of_the_fingerprint(folders: dict[str, Path]) -> None:
    policy: Any = load_policy(str(folders["flux2-dev"]), size=SIZE)
    other: Any = load_policy(str(folders["flux2-dev"]), size=SIZE)
    other.pipeline.system_message = "You draw."
    assert policy.encoder_fingerprint() != other.encoder_fingerprint()


def test_a_size_that_leaves_half_a_patch_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"size must be multiples of 4 for FLUX, got 18x16 pixels"):
        load_policy(str(folders["flux2-klein"]), size=(18, 16))


def test_adapters_reach_the_fused_projections(folders: dict[str, Path]) -> None:
    """Eight in the double block, and both projections of each single block, where attention and MLP are one layer."""
    policy: Any = load_policy(str(folders["flux2-klein"]), size=SIZE, lora=LoRA(rank=2), train=True)
    reached = {name.split(".lora_A")[0] for name, _ in policy.named_trainable() if ".lora_A" in name}
    double = {f"transformer_blocks.0.{target}" for target in policy.lora_targets if "mlp" not in target}
    single = {f"single_transformer_blocks.{i}.attn.{end}" for i in (0, 1) for end in ("to_qkv_mlp_proj", "to_out")}
    assert reached == double | single
    named: Any = load_policy(str(folders["flux2-klein"]), size=SIZE, lora=LoRA(2, target_modules=("to_q",)), train=True)
    assert {name.split(".lora_")[0] for name, _ in named.named_trainable()} == {"transformer_blocks.0.attn.to_q"}


@pytest.mark.parametrize(
    ("config", "count"),
    [(DEV, 32_223_281_152), (KLEIN_4B, 3_875_544_576), (KLEIN_9B, 9_078_581_248)],
    ids=["dev", "klein-4b", "klein-9b"],
)
def test_published_size(config: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        transformer = diffusers.Flux2Transformer2DModel(**config)
    assert sum(parameter.numel() for parameter in transformer.parameters()) == count
