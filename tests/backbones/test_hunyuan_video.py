"""What is special to HunyuanVideo: the prompt's template and its cut, padding, embedded guidance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from diffalign.backbones import LoRA, load_policy
from tests.backbones.families.base import PROMPTS
from tests.backbones.families.hunyuan_video import FAMILIES, save_tiny

pytestmark = pytest.mark.slow  # as those of all families but the first ones

FAMILY = FAMILIES[0]
LATENTS = torch.randn((2, *FAMILY.latent_shape), generator=torch.Generator().manual_seed(0))
TIMESTEPS = torch.tensor([1000.0, 250.0], dtype=torch.float64)
NO_TEMPLATE = {"template": "{}", "crop_start": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("hunyuan_video") / "pipeline")


def load(folder: Path, **options: Any) -> Any:
    return load_policy(str(folder), **{"size": FAMILY.size, "num_frames": FAMILY.num_frames, **options})


@pytest.fixture(scope="module")
def policy(folder: Path) -> Any:
    """No test may change it."""
    return load(folder)


def inputs(denoiser: Any) -> list[dict[str, Any]]:
    """The keyword arguments of every coming call of a denoiser."""
    seen: list[dict[str, Any]] = []
    denoiser.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_network_is_given_what_the_pipeline_gives_it(folder: Path, dtype: torch.dtype) -> None:
    """With a guidance and a template that are not the default; in bfloat16 5.3 * 1000 is another number."""
    pipeline = diffusers.HunyuanVideoPipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    theirs = inputs(pipeline.transformer)
    pipeline(
        prompt=list(PROMPTS),
        height=FAMILY.size[0],
        width=FAMILY.size[1],
        num_frames=FAMILY.num_frames,
        num_inference_steps=2,
        guidance_scale=5.3,
        prompt_template=NO_TEMPLATE,
        output_type="latent",
    )
    policy = load(folder, dtype=dtype)
    policy.embedded_guidance, policy.prompt_template = 5.3, NO_TEMPLATE
    ours = inputs(policy.denoiser)
    for given in theirs:
        with torch.no_grad():
            policy.predict(given["hidden_states"], given["timestep"], policy.encode_prompts(PROMPTS))
    assert len(ours) == len(theirs) == 2
    for mine, given in zip(ours, theirs, strict=True):
        for name in ("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections", "guidance"):
            assert mine[name].dtype == given[name].dtype, name
            assert torch.equal(mine[name], given[name]), name
        assert torch.equal(mine["encoder_attention_mask"], given["encoder_attention_mask"].long())


def test_the_template_is_read_and_cut_again(policy: Any) -> None:
    """The prompt's hidden states follow from the template before them, and padding follows after them."""
    conditioning = policy.encode_prompts(PROMPTS)
    hidden, mask = conditioning.tensors["hidden"], conditioning.tensors["mask"]
    pipeline, counts = policy.pipeline, policy.token_counts(PROMPTS)
    assert hidden.shape == (2, 256, 16)
    assert not mask.is_floating_point()
    for row, (prompt, count) in enumerate(zip(PROMPTS, counts, strict=True)):
        tokens = pipeline.tokenizer(policy.prompt_template["template"].format(prompt), return_tensors="pt").input_ids
        assert pipeline.tokenizer.decode(tokens[0, 95:]).startswith(prompt)
        with torch.no_grad():
            states = pipeline.text_encoder(tokens, output_hidden_states=True).hidden_states[-3]
        torch.testing.assert_close(hidden[row, :count], states[0, 95:], rtol=1e-4, atol=1e-5)
        assert mask[row].tolist() == [1] * count + [0] * (256 - count)


def test_a_tokenizer_that_pads_on_the_left_is_told_not_to(policy: Any, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    file = tmp_path / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "padding_side": "left"}))
    ours, expected = load(tmp_path).encode_prompts(PROMPTS), policy.encode_prompts(PROMPTS)
    assert all(torch.equal(ours.tensors[name], tensor) for name, tensor in expected.tensors.items())


def test_padding_is_not_read(policy: Any) -> None:
    conditioning = policy.encode_prompts(PROMPTS)
    hidden, mask = conditioning.tensors["hidden"].clone(), conditioning.tensors["mask"]
    with torch.no_grad():
        expected = policy.predict(LATENTS, TIMESTEPS, conditioning)
        hidden[mask == 0] = 7.0
        other = type(conditioning)({**conditioning.tensors, "hidden": hidden})
        torch.testing.assert_close(policy.predict(LATENTS, TIMESTEPS, other), expected)


def test_the_template_decides_the_embeddings_and_their_fingerprint(policy: Any, folder: Path) -> None:
    other = load(folder)
    assert other.encoder_fingerprint() == policy.encoder_fingerprint()
    other = load(folder)
    other.prompt_template = NO_TEMPLATE
    assert other.encoder_fingerprint() != policy.encoder_fingerprint()
    counts = zip(other.token_counts(PROMPTS), policy.token_counts(PROMPTS), strict=True)
    assert all(bare == templated for bare, templated in counts)


@pytest.mark.parametrize("wrong", [{"num_frames": 6}, {"size": (24, 32)}])
def test_sizes_that_do_not_fit_are_refused(folder: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"divisible by 16 and 4k \+ 1 frames, got"):
        load(folder, **wrong)


def test_adapters_are_on_both_kinds_of_blocks(folder: Path) -> None:
    policy = load(folder, lora=LoRA(rank=2), train=True)
    layers = {name.split(".lora_")[0] for name, _ in policy.named_trainable()}
    video, text = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    assert layers == {
        *(f"transformer_blocks.0.attn.{name}" for name in (*video, "to_out.0", *text)),
        *(f"single_transformer_blocks.0.attn.{name}" for name in video),
        *(f"context_embedder.token_refiner.refiner_blocks.0.attn.{name}" for name in (*video, "to_out.0")),
    }


def test_defaults_are_the_published_pipelines(folder: Path) -> None:
    policy = load_policy(str(folder))
    assert (policy.size, policy.num_frames) == ((720, 1280), 129)
    assert policy.latent_shape == (4, 33, 90, 160)
    assert (policy.guidance_scale, policy.num_inference_steps, policy.embedded_guidance) == (6.0, 50, 6.0)
    assert policy.prompt_template["crop_start"] == 95


def test_the_published_transformer_has_its_size() -> None:
    with torch.device("meta"):
        transformer = diffusers.HunyuanVideoTransformer3DModel(
            in_channels=16,
            out_channels=16,
            num_attention_heads=24,
            attention_head_dim=128,
            num_layers=20,
            num_single_layers=40,
            num_refiner_layers=2,
            mlp_ratio=4.0,
            patch_size=2,
            patch_size_t=1,
            qk_norm="rms_norm",
            guidance_embeds=True,
            text_embed_dim=4096,
            pooled_projection_dim=768,
            rope_theta=256.0,
            rope_axes_dim=(16, 56, 56),
        )
    assert sum(parameter.numel() for parameter in transformer.parameters()) == 12_821_012_544
