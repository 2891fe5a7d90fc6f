"""The plain step of the benchmark at real widths: what it encodes, how it noises, and that each step does it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import plain_step, plain_widths
from benchmarks.building import add_encoders, build
from benchmarks.plain_families import FAMILIES
from benchmarks.published_widths import PUBLISHED
from benchmarks.tiny_widths import TINY

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "a photo of thing number 3 that is longer"]
VAE, VAE_16, VAE_WAN = 83_653_863, 83_819_683, 126_892_531
CLIP, CLIP_PROJECTED, BIGG = 123_060_480, 123_650_304, 694_659_840
T5, UMT5 = 4_762_310_656, 5_680_910_336
PARAMETERS = {
    "sd15-512": {"vae": VAE, "text_encoder": CLIP},
    "sdxl-1024": {"vae": VAE, "text_encoder": CLIP, "text_encoder_2": BIGG},
    "sd35m-512": {"vae": VAE_16, "text_encoder": CLIP_PROJECTED, "text_encoder_2": BIGG, "text_encoder_3": T5},
    "wan21-1.3b-480p": {"vae": VAE_WAN, "text_encoder": UMT5},
    "flux-dev-512": {"vae": VAE_16, "text_encoder": CLIP, "text_encoder_2": T5},
}
"""Of the published encoders; others are as those of the same family."""


@pytest.fixture(scope="module", params=TINY.values(), ids=lambda a: str(a.name))
def step(request: pytest.FixtureRequest) -> plain_widths.PlainWideStep:
    policy = build(request.param, lora=True, dtype=torch.float32, device=CPU)
    return plain_widths.PlainWideStep(policy, request.param, 1, torch.float32)


@torch.no_grad()
def test_prompts_are_encoded_as_the_pipeline_does_it(step: plain_widths.PlainWideStep) -> None:
    found = step.family.text(step.pipeline, PROMPTS)
    expected = step.policy.encode_prompts(PROMPTS).tensors  # by the pipeline's own `encode_prompt`
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)
        assert (tensor[0] - tensor[1]).abs().max() > 1e-3


@torch.no_grad()
def test_pictures_become_the_latents_of_a_cache(step: plain_widths.PlainWideStep) -> None:
    pixels = step.pictures.float()
    torch.manual_seed(3)
    found = step.family.latents(step.pipeline, pixels / 127.5 - 1)
    torch.manual_seed(3)
    drawn = torch.randn(found.shape)
    images = pixels / 255
    moments = step.policy.encode(images.transpose(1, 2) if images.ndim == 5 else images)
    assert found.shape[1:] == step.policy.latent_shape
    torch.testing.assert_close(found, moments.mean + moments.std * drawn, atol=1e-5, rtol=1e-4)


def test_both_halves_are_noised_alike(step: plain_widths.PlainWideStep) -> None:
    latents = torch.randn(6, *step.policy.latent_shape, generator=torch.Generator().manual_seed(0))
    noisy, timesteps, target = step.family.noised(step.pipeline, latents)
    is_flow = step.policy.prediction.value == "velocity"
    noise = target + latents if is_flow else target
    ones = [1] * (latents.ndim - 1)
    alphas, sigmas = (scale.float().view(-1, *ones) for scale in step.policy.schedule.scales(timesteps))
    torch.testing.assert_close(noisy, alphas * latents + sigmas * noise)
    for halves in (noise, timesteps):
        torch.testing.assert_close(*halves.chunk(2))
    assert len(timesteps[:3].unique()) == 3
    assert (noise[0] - noise[1]).abs().max() > 1


@torch.no_grad()
def test_flows_visit_the_middle_of_the_table_most() -> None:
    architecture = TINY["sd35m-512"]
    pipeline = build(architecture, lora=True, dtype=torch.float32, device=CPU).pipeline
    torch.manual_seed(0)
    _, timesteps, _ = FAMILIES[architecture.family].noised(pipeline, torch.zeros(2 * 4000, 1))
    table = pipeline.scheduler.timesteps
    entries = torch.bucketize(-timesteps[:4000], -table).float() / len(table)
    logits = entries.clamp(1e-3, 1 - 1e-3).logit()
    assert float(logits.mean()) == pytest.approx(0, abs=0.06)  # logit-normal with the scripts' 0 and 1
    assert float(logits.std()) == pytest.approx(1, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TINY.values(), ids=lambda a: str(a.name))
def test_the_plain_step_encodes_everything_each_time(architecture: Any) -> None:
    policy = build(architecture, lora=True, dtype=torch.float32, device=CPU)
    found = plain_widths.measure(policy, architecture, batch_size=1, dtype=torch.float32, steps=1, warmup=1, rounds=1)
    assert found["losses"][0] == pytest.approx(math.log(2), abs=1e-5)
    assert all(found["split_seconds"][part] > 0 for part in plain_step.PARTS)
    assert policy.denoiser.is_gradient_checkpointing == architecture.checkpointed


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_published_encoders_give_what_the_denoiser_reads(name: str) -> None:
    architecture = PUBLISHED[name]
    policy = build(architecture, lora=False, dtype=torch.bfloat16, device="meta", train=False)
    add_encoders(policy, architecture, torch.bfloat16)
    family, pipeline = FAMILIES[architecture.family], policy.pipeline
    for part, count in PARAMETERS.get(name, {}).items():
        weights = list(getattr(pipeline, part).parameters())
        assert sum(one.numel() for one in weights) == count
        assert {one.dtype for one in weights} == {torch.bfloat16}
    with FakeTensorMode():  # on the meta device UMT5 would look into its mask
        for part in architecture.text_encoders:
            getattr(pipeline, part)._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        embedded = family.text(pipeline, PROMPTS)
    shapes = {key: (2, *shape) for key, shape in architecture.conditioning.items()}
    assert {key: tuple(tensor.shape) for key, tensor in embedded.items()} == shapes
    pixels = torch.empty((2, *architecture.pixels), device="meta", dtype=torch.bfloat16)
    assert family.latents(pipeline, pixels).shape == (2, *architecture.latents)
