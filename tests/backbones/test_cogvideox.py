"""What is special to CogVideoX: a shifted chain that ends in pure noise, time in the latents, filled-up frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.backbones import load_policy
from diffalign.predictions import Prediction
from diffalign.schedules import DiscreteSchedule
from tests.backbones.families.cogvideox import save_tiny

pytestmark = pytest.mark.slow  # as those of all families but the first ones

PROMPTS = ["a red circle", "two blue squares and a star"]
V15 = {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False, "invert": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("cogvideox") / "2b", shift=3.0)


@pytest.fixture(scope="module")
def base(folder: Path) -> Any:
    return load_policy(str(folder))


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Version 1.5."""
    return load_policy(str(save_tiny(tmp_path_factory.mktemp("cogvideox") / "1.5", shift=1.0, **V15)))


def test_the_defaults_come_from_the_configuration(base: Any) -> None:
    assert (base.guidance_scale, base.num_inference_steps) == (6.0, 50)
    assert (base.size, base.num_frames, base.max_tokens) == ((32, 48), 9, 32)
    assert base.latent_shape == (4, 3, 4, 6)
    assert base.prediction is Prediction.V


def test_the_chain_is_shifted_and_ends_in_pure_noise(base: Any) -> None:
    """Its table is the scheduler's, and the closed form: snr / 3, then Algorithm 1 of Lin et al. (arXiv:2305.08891)."""
    table = base.schedule.alphas_cumprod
    assert torch.equal(table, base.pipeline.scheduler.alphas_cumprod.double())
    abar = DiscreteSchedule.scaled_linear().alphas_cumprod
    snr = abar / (1 - abar) / 3
    expected = DiscreteSchedule(snr / (1 + snr)).zero_terminal_snr().alphas_cumprod
    torch.testing.assert_close(table, expected, rtol=1e-9, atol=1e-12)
    alphas, sigmas = base.schedule.scales(torch.tensor([999, 500]))
    assert (float(alphas[0]), float(sigmas[0])) == (0.0, 1.0)
    assert float(alphas[1]) < float(abar[500].sqrt())


def test_at_pure_noise_the_prediction_is_minus_the_sample(base: Any) -> None:
    noise = torch.randn(1, *base.latent_shape, generator=torch.Generator().manual_seed(0)).double()
    alphas, sigmas = base.schedule.scales(torch.tensor([999]))
    with torch.no_grad():
        output = base.predict(noise.float(), torch.tensor([999]), base.encode_prompts(PROMPTS[:1])).double()
    sample, noise_again = base.prediction.to_sample_and_noise(output, noise, alphas, sigmas)
    assert torch.equal(sample, -output)
    assert torch.equal(noise_again, noise)


def test_the_dpm_scheduler_draws_as_the_pipeline_does(tmp_path: Path) -> None:
    """The scheduler that the authors recommend for 5B; its step has arguments of its own, and noise from the seeds."""
    from diffusers import CogVideoXPipeline

    options = {"use_rotary_positional_embeddings": True}
    folder = save_tiny(tmp_path / "5b", shift=1.0, scheduler="CogVideoXDPMScheduler", **options)
    policy: Any = load_policy(str(folder))
    pipeline = CogVideoXPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert torch.equal(policy.schedule.alphas_cumprod, pipeline.scheduler.alphas_cumprod.double())
    expected = pipeline(
        prompt=PROMPTS,
        height=32,
        width=48,
        num_frames=9,
        num_inference_steps=3,
        max_sequence_length=32,
        generator=[torch.Generator().manual_seed(i) for i in range(2)],
        output_type="pt",
    ).frames
    drawn = policy.sample(PROMPTS, [0, 1], num_inference_steps=3)
    assert drawn.isfinite().all()
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-5)


def test_frames_come_in_eights_and_one(folder: Path) -> None:
    assert load_policy(str(folder), num_frames=17).latent_shape == (4, 5, 4, 6)
    with pytest.raises(ValueError, match="expected a multiple of 8 plus one, got 16; use 9"):
        load_policy(str(folder), num_frames=16)


def test_odd_latent_frames_are_filled_up_in_front(newer: Any) -> None:
    """9 frames are 3 latent ones; a token takes two, so a copy of the first stands before them and is not decoded."""
    video = torch.rand(1, 9, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    moments = newer.encode(video)
    assert newer.latent_shape == (4, 4, 4, 6)
    for part in moments:
        assert torch.equal(part[:, :, 0], part[:, :, 1])
    vae = newer.pipeline.vae
    with torch.no_grad():
        raw = vae.encode(video.transpose(1, 2) * 2 - 1).latent_dist
    scale = vae.config.scaling_factor
    assert vae.config.invert_scale_latents  # for the image of image-to-video only
    torch.testing.assert_close(moments.mean[:, :, 1:], raw.mean * scale, rtol=0, atol=1e-6)
    torch.testing.assert_close(moments.std[:, :, 1:], raw.std * scale, rtol=0, atol=1e-6)
    other = moments.mean.clone()
    other[:, :, 0] += 1
    assert torch.equal(newer.decode(other), newer.decode(moments.mean))


def test_the_filling_is_part_of_the_encoders_fingerprint(base: Any, newer: Any) -> None:
    assert base._encoding_settings() == {"filling": 0, "max_tokens": 32}
    assert newer._encoding_settings() == {"filling": 1, "max_tokens": 32}


PUBLISHED = {
    "zai-org/CogVideoX-2b": ({}, 1.69e9),
    "zai-org/CogVideoX-5b": (
        {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
        5.57e9,
    ),
    "zai-org/CogVideoX1.5-5B": (
        {
            "num_attention_heads": 48,
            "num_layers": 42,
            "sample_height": 96,
            "sample_width": 170,
            "sample_frames": 81,
            "patch_size_t": 2,
            "patch_bias": False,
            "use_rotary_positional_embeddings": True,
        },
        5.57e9,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_sizes(name: str) -> None:
    """Counted on the meta device; the rest of the 2B configuration is the class's default."""
    from diffusers import CogVideoXTransformer3DModel

    config, expected = PUBLISHED[name]
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel(**config)
    assert sum(p.numel() for p in transformer.parameters()) == pytest.approx(expected, rel=5e-3)
