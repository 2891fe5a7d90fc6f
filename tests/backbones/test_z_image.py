"""What is special to Z-Image: reversed time and sign, lists of its own lengths, the chat template, Turbo."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffalign.backbones import LoRA, load_policy
from tests.backbones.families.base import PROMPTS
from tests.backbones.families.z_image import save_tiny

pytestmark = pytest.mark.slow  # as those of all families but the first ones

SIZE = (8, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("z-image") / "pipeline")


@pytest.fixture(scope="module")
def base(folder: Path) -> Any:
    """The plain model; no test may change it."""
    return load_policy(str(folder), size=SIZE)


def inputs(policy: Any) -> tuple[Any, ...]:
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    return latents, torch.tensor([300.0, 800.0]), policy.encode_prompts(PROMPTS)


def test_the_network_gets_lists_and_the_signals_time_and_its_sign_is_turned(base: Any) -> None:
    seen: list[Any] = []

    def look(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        seen.extend((*arguments, output[0]))

    latents, timesteps, conditioning = inputs(base)
    hook = base.denoiser.register_forward_hook(look)
    with torch.no_grad():
        velocity = base.predict(latents, timesteps, conditioning)
    hook.remove()
    clips, time, texts, output = seen
    assert [clip.shape for clip in clips] == [(4, 1, 4, 6)] * 2
    assert torch.equal(clips[1][:, 0], latents[1])
    torch.testing.assert_close(time, torch.tensor([0.7, 0.2]))
    assert [len(text) for text in texts] == base.token_counts(PROMPTS)
    assert torch.equal(velocity[1], -output[1][:, 0])


def test_prompts_are_padded_to_one_length_and_cut_at_it(base: Any) -> None:
    prompts = [*PROMPTS, "", "a star " * 200]
    counts = base.token_counts(prompts)
    assert counts[2] == 8  # the chat template alone
    assert counts[-1] > base.max_tokens == 512
    tensors = base.encode_prompts(prompts).tensors
    assert tensors["hidden"].shape == (4, 512, 16)
    assert tensors["mask"].dtype == torch.bool
    assert tensors["mask"].sum(dim=1).tolist() == [min(count, 512) for count in counts]
    theirs, _ = base.pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False)
    for row, text in enumerate(theirs):
        torch.testing.assert_close(tensors["hidden"][row][tensors["mask"][row]], text)


def test_prompts_given_stay_as_they_were(base: Any) -> None:
    """The pipeline writes its template into the list it is given."""
    prompts = list(PROMPTS)
    base.encode_prompts(prompts)
    base.sample(prompts, [0, 1], guidance_scale=0.0, num_inference_steps=1)
    assert prompts == list(PROMPTS)


def test_turbo_is_drawn_without_guidance_in_few_steps(base: Any, folder: Path, tmp_path: Path) -> None:
    assert (base.guidance_scale, base.num_inference_steps) == (5.0, 50)
    turbo: Any = load_policy(str(shutil.copytree(folder, tmp_path / "Z-Image-Turbo")), size=SIZE)
    assert (turbo.guidance_scale, turbo.num_inference_steps) == (0.0, 8)
    drawn = turbo.sample(PROMPTS, [0, 1], num_inference_steps=2)
    assert torch.equal(drawn, base.sample(PROMPTS, [0, 1], guidance_scale=0.0, num_inference_steps=2))


def test_adapters_sit_on_every_attention(folder: Path) -> None:
    policy: Any = load_policy(str(folder), size=SIZE, lora=LoRA(rank=2), train=True)
    layers = {name.split(".lora_")[0] for name, _ in policy.named_trainable()}
    assert layers == {
        f"{part}.0.attention.{name}"
        for part in ("noise_refiner", "context_refiner", "layers")
        for name in ("to_q", "to_k", "to_v", "to_out.0")
    }


def test_the_default_size_and_sizes_that_cannot_be_cut_into_patches(folder: Path) -> None:
    policy: Any = load_policy(str(folder))
    assert policy.size == (1024, 1024)
    assert policy.latent_shape == (4, 512, 512)  # the tiny autoencoder halves once
    assert (policy.schedule.steps, policy.schedule.shift) == (1000, 3.0)
    with pytest.raises(ValueError, match=r"size must be multiples of 4 pixels here, got \(8, 10\)"):
        load_policy(str(folder), size=(8, 10))


def test_the_published_transformer_has_six_billion_parameters() -> None:
    from diffusers import ZImageTransformer2DModel

    with torch.device("meta"):
        transformer = ZImageTransformer2DModel(
            all_patch_size=(2,),
            all_f_patch_size=(1,),
            in_channels=16,
            dim=3840,
            n_layers=30,
            n_refiner_layers=2,
            n_heads=30,
            n_kv_heads=30,
            norm_eps=1e-5,
            qk_norm=True,
            cap_feat_dim=2560,
            rope_theta=256.0,
            t_scale=1000.0,
            axes_dims=[32, 48, 48],
            axes_lens=[1536, 512, 512],
        )
    assert sum(p.numel() for p in transformer.parameters()) / 1e9 == pytest.approx(6.155, abs=0.005)
