"""What is special to Mochi: reversed time and sign, latent statistics per channel, empty prompts that are zeroed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.backbones import LoRA, load_policy
from tests.backbones.families.base import PROMPTS
from tests.backbones.families.mochi import FAMILIES, save_tiny

pytestmark = pytest.mark.slow  # as those of all families but the first ones

FAMILY = FAMILIES[0]
LATENTS = torch.randn((2, *FAMILY.latent_shape), generator=torch.Generator().manual_seed(0))
TIMESTEPS = torch.tensor([1000.0, 250.0], dtype=torch.float64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("mochi") / "pipeline")


def load(folder: Path, **options: Any) -> Any:
    return load_policy(str(folder), **{"size": FAMILY.size, "num_frames": FAMILY.num_frames, **options})


@pytest.fixture(scope="module")
def policy(folder: Path) -> Any:
    """No test may change it."""
    return load(folder)


def test_time_and_sign_are_turned_around(policy: Any) -> None:
    """At pure noise, t = 1000, the network reads 0; what it calls the way to the data is minus the velocity."""
    seen: list[Any] = []
    hooks = [
        policy.denoiser.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True),
        policy.denoiser.register_forward_hook(lambda _, args, output: seen.append(output[0])),
    ]
    with torch.no_grad():
        velocity = policy.predict(LATENTS, TIMESTEPS, policy.encode_prompts(PROMPTS))
    for hook in hooks:
        hook.remove()
    given, answer = seen
    assert given["timestep"].tolist() == [0.0, 750.0]
    assert torch.equal(given["hidden_states"], LATENTS)
    assert torch.equal(velocity, -answer)


def test_a_scheduler_that_runs_the_other_way_is_refused(folder: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "invert_sigmas": False}))
    with pytest.raises(ValueError, match="must have invert_sigmas true, got False"):
        load(tmp_path)


def test_latents_are_normalised_channel_by_channel(policy: Any) -> None:
    config = policy.pipeline.vae.config
    videos = torch.rand((1, FAMILY.num_frames, 3, *FAMILY.size), generator=torch.Generator().manual_seed(1))
    moments = policy.encode(videos)
    with torch.no_grad():
        raw = policy.pipeline.vae.encode(videos.transpose(1, 2) * 2 - 1).latent_dist
    assert config.scaling_factor == 1.3
    for channel, (mean, std) in enumerate(zip(config.latents_mean, config.latents_std, strict=True)):
        expected = (raw.mean[:, channel] - mean) / std * 1.3
        torch.testing.assert_close(moments.mean[:, channel], expected)
        torch.testing.assert_close(moments.std[:, channel], raw.std[:, channel] / std * 1.3)


def test_padding_is_not_read(policy: Any) -> None:
    conditioning = policy.encode_prompts(PROMPTS)
    hidden, mask = conditioning.tensors["hidden"].clone(), conditioning.tensors["mask"]
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == policy.token_counts(PROMPTS)
    with torch.no_grad():
        expected = policy.predict(LATENTS, TIMESTEPS, conditioning)
        hidden[~mask] = 7.0
        other = type(conditioning)({"hidden": hidden, "mask": mask})
        torch.testing.assert_close(policy.predict(LATENTS, TIMESTEPS, other), expected)


@pytest.mark.parametrize(("force_zeros", "tokens"), [(True, 0), (False, 1)])
def test_an_empty_prompt_blanks_no_other_row(tmp_path: Path, force_zeros: bool, tokens: int) -> None:
    """diffusers zeroes a whole batch whose last prompt is empty; captions are dropped row by row in training."""
    policy = load(save_tiny(tmp_path, force_zeros=force_zeros))
    prompts = ["", PROMPTS[0], "", PROMPTS[1], ""]
    together = policy.encode_prompts(prompts)
    for i, prompt in enumerate(prompts):
        alone = policy.encode_prompts([prompt])
        torch.testing.assert_close(together.tensors["hidden"][[i]], alone.tensors["hidden"])
        assert torch.equal(together.tensors["mask"][[i]], alone.tensors["mask"])
    assert together.tensors["mask"].sum(1).tolist()[::2] == [tokens] * 3
    assert min(together.tensors["mask"].sum(1).tolist()[1::2]) > 10
    if force_zeros:
        drawn = policy.sample(prompts[1:3], [0, 1], num_inference_steps=2)
        for i in range(2):
            alone = policy.sample([prompts[1 + i]], [i], num_inference_steps=2)
            torch.testing.assert_close(drawn[[i]], alone, rtol=0, atol=1e-4)
        with pytest.raises(ValueError, match="one seed per prompt, got 2 prompts and 1 seeds"):
            policy.sample(prompts[1:3], [0], num_inference_steps=2)


@pytest.mark.parametrize("wrong", [{"num_frames": 8}, {"size": (24, 32)}])
def test_sizes_that_do_not_fit_are_refused(folder: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"divisible by 16 and 6k \+ 1 frames, got"):
        load(folder, **wrong)


def test_adapters_are_on_the_video_stream_of_every_block(folder: Path) -> None:
    policy = load(folder, lora=LoRA(rank=2), train=True)
    layers = {name.split(".lora_")[0] for name, _ in policy.named_trainable()}
    names = ("to_q", "to_k", "to_v", "to_out.0")
    assert layers == {f"transformer_blocks.{block}.attn1.{name}" for block in range(2) for name in names}


def test_defaults_are_the_published_pipelines(folder: Path) -> None:
    policy = load_policy(str(folder))
    assert (policy.size, policy.num_frames) == ((480, 848), 19)
    assert policy.latent_shape == (12, 4, 60, 106)
    assert (policy.guidance_scale, policy.num_inference_steps) == (4.5, 64)


def test_the_published_transformer_has_its_size() -> None:
    from diffusers import MochiTransformer3DModel

    with torch.device("meta"):
        transformer = MochiTransformer3DModel(
            patch_size=2,
            num_attention_heads=24,
            attention_head_dim=128,
            num_layers=48,
            pooled_projection_dim=1536,
            in_channels=12,
            qk_norm="rms_norm",
            text_embed_dim=4096,
            time_embed_dim=256,
            activation_fn="swiglu",
            max_sequence_length=256,
        )
    assert sum(parameter.numel() for parameter in transformer.parameters()) == 10_027_677_744


def test_the_guide_quotes_this_family_and_every_contract_test() -> None:
    """docs/adding_a_model.md works through this file; its code is the repository's, but for white space."""
    root = Path(__file__).parents[2]
    guide = (root / "docs" / "adding_a_model.md").read_text(encoding="utf-8")
    sources = [
        "".join((root / path).read_text(encoding="utf-8").split())
        for path in (
            "diffalign/backbones/mochi.py",
            "diffalign/backbones/loading.py",
            "tests/backbones/families/mochi.py",
        )
    ]
    quotes = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    assert len(quotes) >= 10
    for quote in quotes:
        assert any("".join(quote.split()) in source for source in sources), quote
    contract = (root / "tests" / "backbones" / "test_contract.py").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(test_\w+)`", guide, flags=re.MULTILINE)) == set(
        re.findall(r"^def (test_\w+)", contract, flags=re.MULTILINE)
    )
