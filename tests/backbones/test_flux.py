"""What is special to FLUX.1: packed tokens and their positions, embedded guidance, dev against schnell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from benchmarks.published_widths import FLUX_DEV
from diffalign.backbones import LoRA, load_policy
from tests.backbones.families.base import PROMPTS
from tests.backbones.families.flux import FAMILIES, unpack

SIZE = (16, 24)
DEV = {**FLUX_DEV, "axes_dims_rope": (16, 56, 56)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family.name: family.save(tmp_path_factory.mktemp(family.name)) for family in FAMILIES}


@pytest.fixture
def dev(folders: dict[str, Path]) -> Any:
    return load_policy(str(folders["flux-dev"]), size=SIZE)


@pytest.fixture(scope="module")
def schnell(folders: dict[str, Path]) -> Any:
    return load_policy(str(folders["flux-schnell"]), size=SIZE)


def inputs(denoiser: Any) -> list[dict[str, Any]]:
    """The keyword arguments of every coming call of a denoiser."""
    seen: list[dict[str, Any]] = []
    denoiser.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    return seen


@pytest.mark.slow
def test_the_network_is_given_what_the_pipeline_gives_it(dev: Any, folders: dict[str, Path]) -> None:
    """Tokens, times, guidance and positions one by one, with a guidance that is not the default."""
    pipeline = diffusers.FluxPipeline.from_pretrained(folders["flux-dev"], dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    theirs, ours = inputs(pipeline.transformer), inputs(dev.denoiser)
    pipeline(list(PROMPTS), height=16, width=24, num_inference_steps=2, guidance_scale=1.7, output_type="latent")
    dev.embedded_guidance = 1.7
    for expected, timestep in zip(theirs, pipeline.scheduler.timesteps, strict=True):
        dev.predict(unpack(dev, expected["hidden_states"]), timestep.expand(2), dev.encode_prompts(PROMPTS))
        for name in ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance"):
            torch.testing.assert_close(ours[-1][name], expected[name], rtol=0, atol=1e-6)
        assert torch.equal(ours[-1]["img_ids"], expected["img_ids"])
        assert torch.equal(ours[-1]["txt_ids"], expected["txt_ids"])


@pytest.mark.slow
def test_embedded_guidance_moves_dev_and_its_reference_and_leaves_schnell(dev: Any, schnell: Any) -> None:
    assert dev.embedded_guidance == dev.guidance_scale == 3.5
    for policy, moved in ((dev, True), (schnell, False)):
        arguments = (torch.randn(2, 4, 8, 12), torch.tensor([300.0, 800.0]), policy.encode_prompts(PROMPTS))
        before = policy.frozen().predict(*arguments)
        policy.embedded_guidance = 1.0
        after = policy.frozen().predict(*arguments)
        assert torch.equal(before, after) == (not moved)
        with torch.no_grad():
            assert torch.equal(policy.predict(*arguments), after)


def test_dev_and_schnell_differ_in_prompt_length_steps_and_shift(dev: Any, schnell: Any) -> None:
    assert (dev.max_tokens, dev.num_inference_steps) == (512, 28)
    assert (schnell.max_tokens, schnell.num_inference_steps) == (256, 4)
    assert dev.encode_prompts(["a"]).tensors["hidden"].shape == (1, 512, 32)
    assert schnell.encode_prompts(["a"]).tensors["hidden"].shape == (1, 256, 32)
    # Dev's dynamic shift is the sampler's; its unused `shift` of 3 must not reach training.
    assert dev.pipeline.scheduler.config.shift == 3.0
    assert dev.schedule.shift == schnell.schedule.shift == 1.0


def test_prompts_are_counted_as_t5_reads_them(dev: Any) -> None:
    """The word mark, one token per character, the end: what no cut would leave of the prompt."""
    assert dev.token_counts(["abc", "x" * 600]) == [5, 602]


@pytest.mark.slow
def test_freeing_drops_both_text_encoders(folders: dict[str, Path]) -> None:
    policy: Any = load_policy(str(folders["flux-dev"]), size=SIZE)
    policy.free_encoders()
    assert (policy.pipeline.vae, policy.pipeline.text_encoder, policy.pipeline.text_encoder_2) == (None, None, None)
    policy.reload_encoders()
    assert not policy.pipeline.text_encoder_2.training


@pytest.mark.slow
def test_a_size_that_leaves_half_a_patch_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"size must be multiples of 4 for FLUX, got 16x22 pixels"):
        load_policy(str(folders["flux-dev"]), size=(16, 22))
    assert load_policy(str(folders["flux-dev"])).size == (256, 256)  # 128 latents, a tiny autoencoder of factor 2


def test_adapters_reach_every_attention_projection(folders: dict[str, Path]) -> None:
    """Eight in the double block, three in the single block, whose output projection is shared with its MLP."""
    policy: Any = load_policy(str(folders["flux-dev"]), size=SIZE, lora=LoRA(rank=2), train=True)
    reached = {name.split(".lora_A")[0] for name, _ in policy.named_trainable() if ".lora_A" in name}
    double = {f"transformer_blocks.0.{target}" for target in policy.lora_targets}
    assert reached == double | {f"single_transformer_blocks.0.attn.to_{part}" for part in "qkv"}


@pytest.mark.slow
@pytest.mark.parametrize(("guidance", "count"), [(True, 11_901_408_320), (False, 11_891_178_560)])
def test_published_size(guidance: bool, count: int) -> None:
    """FLUX.1 dev, and schnell: the same without the guidance embedder (256 -> 3072 -> 3072)."""
    with torch.device("meta"):
        transformer = diffusers.FluxTransformer2DModel(**{**DEV, "guidance_embeds": guidance})
    assert sum(parameter.numel() for parameter in transformer.parameters()) == count
