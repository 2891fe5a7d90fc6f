"""What is special to LTX-Video: text mask, positions in seconds, decoders that read a timestep and draw noise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLLTXVideo, LTXVideoTransformer3DModel

from diffalign.backbones import load_policy
from diffalign.backbones.ltx import LTXPolicy
from tests.backbones.families.ltx import LATENTS, save_tiny

pytestmark = pytest.mark.slow  # as those of all families but the first ones

SIZE = {"size": (32, 64), "num_frames": 9}
PUBLISHED_2B = {
    "in_channels": 128,
    "out_channels": 128,
    "patch_size": 1,
    "patch_size_t": 1,
    "num_attention_heads": 32,
    "attention_head_dim": 64,
    "cross_attention_dim": 2048,
    "num_layers": 28,
    "activation_fn": "gelu-approximate",
    "qk_norm": "rms_norm_across_heads",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": 4096,
    "attention_bias": True,
    "attention_out_bias": True,
}
PUBLISHED_13B = PUBLISHED_2B | {"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("ltx") / "pipeline")


@pytest.fixture(scope="module")
def base(folder: Path) -> Any:
    """The plain model; no test may change it."""
    return load_policy(str(folder), **SIZE)


@pytest.fixture(scope="module")
def noisy_decoder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model as of 0.9.1, whose decoder reads a timestep and adds noise in its layers."""
    options = {"timestep_conditioning": True, "decoder_inject_noise": (True, True, False, False)}
    policy: Any = load_policy(str(save_tiny(tmp_path_factory.mktemp("ltx") / "0.9.1", **options)), **SIZE)
    with torch.no_grad():
        for name, parameter in policy.pipeline.vae.named_parameters():
            if "per_channel_scale" in name:
                parameter.fill_(0.5)
    return policy


def latents(count: int = 2) -> torch.Tensor:
    return torch.randn((count, *LATENTS), generator=torch.Generator().manual_seed(4))


def test_padding_after_the_text_changes_nothing(base: Any) -> None:
    conditioning = base.encode_prompts(["a red circle", "blue"])
    hidden, mask = conditioning.tensors["hidden"], conditioning.tensors["mask"]
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == base.token_counts(["a red circle", "blue"])
    other = type(conditioning)({"hidden": torch.where(mask[..., None], hidden, 7.0), "mask": mask})
    timesteps = torch.tensor([300.0, 800.0])
    with torch.no_grad():
        expected = base.predict(latents(), timesteps, conditioning)
        torch.testing.assert_close(base.predict(latents(), timesteps, other), expected, rtol=0, atol=1e-6)
        changed = type(conditioning)({"hidden": torch.where(mask[..., None], 7.0, hidden), "mask": mask})
        assert not torch.allclose(base.predict(latents(), timesteps, changed), expected, atol=1e-3)


def test_positions_depend_on_the_frame_rate(folder: Path) -> None:
    policy: Any = load_policy(str(folder), **SIZE)
    arguments = latents(), torch.tensor([300.0, 800.0]), policy.encode_prompts(["a", "b"])
    with torch.no_grad():
        expected = policy.predict(*arguments)
        policy.frame_rate = 50
        assert not torch.allclose(policy.predict(*arguments), expected, atol=1e-4)
    assert policy._sampling_arguments(3.0)["frame_rate"] == 50


def test_the_training_law_is_shifted_as_the_sampler_is_if_wanted(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamic shift: exp(mu), with mu linear in the number of tokens (1024 to 4096 for 0.95 to 2.05)."""
    assert base.schedule.shift == 1.0
    monkeypatch.setattr(base, "options", LTXPolicy.Options(timestep_shift="dynamic"))
    monkeypatch.setattr(base, "schedule", base._flow_schedule(math.prod(base.latent_shape[1:])))
    assert base.schedule.shift == pytest.approx(math.exp(0.95 + (64 - 1024) / (4096 - 1024) * 1.1))
    scheduler = base.pipeline.scheduler
    sigmas = torch.linspace(1, 0.25, 4)
    shifted = torch.as_tensor(scheduler.time_shift(math.log(base.schedule.shift), 1.0, sigmas))
    index = (1 - sigmas) * base.schedule.steps
    torch.testing.assert_close(base.schedule.timestep_of_index(index).float() / 1000, shifted)


def test_a_decoder_that_draws_noise_gives_the_same_video_for_the_same_latents(noisy_decoder: Any) -> None:
    vae = noisy_decoder.pipeline.vae
    raw, zero = latents(), torch.zeros(2)
    with torch.no_grad():
        assert not torch.equal(vae.decode(raw, zero).sample, vae.decode(raw, zero).sample)
    torch.manual_seed(11)
    expected_next = torch.rand(3)
    torch.manual_seed(11)
    video = noisy_decoder.decode(latents())
    assert torch.equal(torch.rand(3), expected_next)
    torch.rand(5)
    assert torch.equal(noisy_decoder.decode(latents()), video)
    torch.testing.assert_close(noisy_decoder.decode(latents()[1:]), video[1:], rtol=0, atol=1e-5)


def test_sampling_with_such_a_decoder_follows_the_seeds_alone(noisy_decoder: Any) -> None:
    drawn = noisy_decoder.sample(["a", "b"], [0, 1], num_inference_steps=2)
    torch.rand(5)
    assert torch.equal(noisy_decoder.sample(["a", "b"], [0, 1], num_inference_steps=2), drawn)
    alone = noisy_decoder.sample(["b"], [1], num_inference_steps=2)
    torch.testing.assert_close(alone, drawn[1:], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (32, 48)}, "size: expected multiples of 32 for LTX, got 32x48 pixels"),
        ({"num_frames": 12}, "num_frames: expected a multiple of 8 plus one for LTX, got 12; use 9"),
    ],
)
def test_sizes_the_pipeline_would_change_or_refuse_are_refused(folder: Path, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_policy(str(folder), **{**SIZE, **options})


def test_defaults_are_the_published_ones(folder: Path) -> None:
    policy = load_policy(str(folder))
    assert (policy.size, policy.num_frames) == ((512, 704), 161)
    assert (policy.guidance_scale, policy.num_inference_steps) == (3.0, 50)


@pytest.mark.parametrize(("config", "count"), [(PUBLISHED_2B, 1.923e9), (PUBLISHED_13B, 13.04e9)], ids=["2b", "13b"])
def test_full_size_transformers_have_the_published_number_of_parameters(config: Any, count: float) -> None:
    with torch.device("meta"):
        model = LTXVideoTransformer3DModel(**config)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(count, rel=2e-3)


def test_the_full_size_autoencoder_has_the_published_strides() -> None:
    with torch.device("meta"):
        vae = AutoencoderKLLTXVideo()
    assert (vae.spatial_compression_ratio, vae.temporal_compression_ratio) == (32, 8)
    assert vae.latents_mean.shape == (128,)
