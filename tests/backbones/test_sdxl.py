"""What is special to Stable Diffusion XL: time ids, dropped captions and guidance, Turbo's defaults, the refiner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.published_widths import SDXL_UNET
from diffalign.backbones import load_policy
from diffalign.batches import Conditioning
from diffalign.timesteps import TURBO_TIMESTEPS
from tests.backbones.families import sdxl

SIZE = (8, 16)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sdxl.save_tiny(tmp_path_factory.mktemp("sdxl") / "pipeline")


@pytest.fixture(scope="module")
def base(base_folder: Path) -> Any:
    return load_policy(str(base_folder), size=SIZE)


@pytest.fixture(scope="module")
def refiner(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_policy(str(sdxl.save_tiny_refiner(tmp_path_factory.mktemp("refiner") / "pipeline")), size=SIZE)


def seen_time_ids(policy: Any, conditioning: Conditioning) -> Tensor:
    seen: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["added_cond_kwargs"]["time_ids"])

    hook = policy.denoiser.register_forward_pre_hook(look, with_kwargs=True)
    try:
        latents = torch.zeros(len(conditioning), *policy.latent_shape)
        policy.predict(latents, torch.full((len(conditioning),), 10), conditioning)
    finally:
        hook.remove()
    return seen[0]


@pytest.mark.slow
def test_time_ids_are_height_and_width_without_crop(base: Any) -> None:
    expected = torch.tensor([[8.0, 16.0, 0.0, 0.0, 8.0, 16.0]]).expand(2, -1)
    assert torch.equal(seen_time_ids(base, base.encode_prompts(["a", ""])), expected)


@pytest.mark.slow
def test_time_ids_follow_the_size_in_full_precision(base_folder: Path) -> None:
    """1000 + 2 has no bfloat16; the embeddings do not depend on the size, so a cache of them survives it."""
    policy = load_policy(str(base_folder), size=(1002, 16), dtype=torch.bfloat16)
    conditioning = policy.encode_prompts(["a"]).to("cpu", torch.bfloat16)
    assert set(conditioning.tensors) == {"hidden", "pooled"}
    assert policy._time_ids(conditioning)[0].tolist() == [1002, 16, 0, 0, 1002, 16]  # type: ignore[attr-defined]


@pytest.mark.slow
def test_the_refiner_reads_five_numbers_and_the_score_of_its_branch(refiner: Any) -> None:
    """A dropped caption is still a good picture's; only guidance's other branch claims a bad one."""
    good, bad = [8.0, 16.0, 0.0, 0.0, 6.0], [8.0, 16.0, 0.0, 0.0, 2.5]
    assert seen_time_ids(refiner, refiner.encode_prompts(["a", ""])).tolist() == [good, good]
    assert seen_time_ids(refiner, refiner.encode_unconditional(2)).tolist() == [bad, bad]


@pytest.mark.slow
def test_dropped_captions_are_encoded_and_guidance_has_zeros(base: Any, refiner: Any) -> None:
    dropped = base.encode_prompts(["", "a red circle"])
    tokenizer, encoder = base.pipeline.tokenizer_2, base.pipeline.text_encoder_2
    with torch.no_grad():
        pooled = encoder(tokenizer([""], padding="max_length", return_tensors="pt").input_ids).text_embeds
    torch.testing.assert_close(dropped.tensors["pooled"][:1], pooled)
    assert dropped.tensors["hidden"][0].any()
    zeros = base.encode_unconditional(2).tensors
    assert {name: tensor.shape for name, tensor in zeros.items()} == {n: t.shape for n, t in dropped.tensors.items()}
    assert not any(tensor.any() for tensor in zeros.values())
    own = refiner.encode_unconditional(1).tensors
    assert torch.equal(own["hidden"], refiner.encode_prompts([""]).tensors["hidden"])


@pytest.mark.slow
def test_drawing_tells_the_unet_the_exact_size(base_folder: Path) -> None:
    """1000 + 2 has no bfloat16, and the drawn pictures are those of the network that `predict` calls."""
    policy: Any = load_policy(str(base_folder), size=(1002, 16), dtype=torch.bfloat16)
    seen: list[Tensor] = []

    class Stop(Exception):  # noqa: N818
        pass

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["added_cond_kwargs"]["time_ids"])
        raise Stop

    with policy._drawing_weights(False), torch.no_grad():
        policy.denoiser.register_forward_pre_hook(look, with_kwargs=True)  # after the one that casts
        latents = torch.zeros(1, *policy.latent_shape)
        conditioning = policy.encode_prompts(["a"])
        with pytest.raises(Stop):
            policy._forward(policy.denoiser, latents, torch.tensor([10]), conditioning)
    assert seen[0].dtype == torch.float32
    assert seen[0][0].tolist() == [1002, 16, 0, 0, 1002, 16]


def test_pooled_is_the_second_encoders(base: Any) -> None:
    ids = base.pipeline.tokenizer_2(["a red circle"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = base.pipeline.text_encoder_2(ids).text_embeds
    torch.testing.assert_close(base.encode_prompts(["a red circle"]).tensors["pooled"], expected)


@pytest.mark.slow
def test_turbo_is_known_by_its_scheduler(base: Any, tmp_path: Path) -> None:
    turbo: Any = load_policy(str(sdxl.save_tiny(tmp_path / "turbo", turbo=True)))
    assert (base.guidance_scale, base.num_inference_steps) == (5.0, 50)
    assert (turbo.guidance_scale, turbo.num_inference_steps) == (1.0, 4)
    turbo.pipeline.scheduler.set_timesteps(turbo.num_inference_steps)
    assert sorted(turbo.pipeline.scheduler.timesteps.int().tolist()) == list(TURBO_TIMESTEPS)


def test_the_autoencoder_stays_in_float32(base_folder: Path) -> None:
    policy: Any = load_policy(str(base_folder), size=SIZE, dtype=torch.float16)
    assert policy.denoiser.dtype == torch.float16
    assert policy.pipeline.vae.dtype == torch.float32
    assert policy.encode(torch.rand(1, 3, *SIZE)).mean.dtype == torch.float32


def test_token_limits_hold_for_both_encoders(base: Any, refiner: Any) -> None:
    assert base.max_tokens == refiner.max_tokens == base.pipeline.tokenizer.model_max_length
    assert base.token_counts(["", "a"]) == refiner.token_counts(["", "a"])


@pytest.mark.slow
def test_latent_statistics_of_the_autoencoder_are_used(tmp_path: Path) -> None:
    folder = sdxl.save_tiny(tmp_path / "pipeline", latents_mean=[-1.5, 1.0, 0.5, 2.0], latents_std=[8.0, 5.0, 4.0, 3.0])
    policy: Any = load_policy(str(folder), size=SIZE)
    images = torch.rand((1, 3, *SIZE), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        raw = policy.pipeline.vae.encode(images * 2 - 1).latent_dist.mean
    moments = policy.encode(images)
    mean, std = (torch.tensor(v).reshape(1, 4, 1, 1) for v in ((-1.5, 1.0, 0.5, 2.0), (8.0, 5.0, 4.0, 3.0)))
    torch.testing.assert_close(moments.mean, (raw - mean) * 0.13025 / std)
    final: list[Tensor] = []

    def last(pipe: Any, step: int, timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        final.append(values["latents"])
        return values

    drawn = policy.pipeline(
        prompt=["a"],
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        callback_on_step_end=last,
    ).images
    torch.testing.assert_close(policy.decode(final[-1]), drawn, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_other_parametrisations_are_refused_before_use(base_folder: Path, tmp_path: Path) -> None:
    from diffusers import EDMEulerScheduler, StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(
        base_folder, dtype=torch.float32, scheduler=EDMEulerScheduler()
    )
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a scheduler with a table of betas, found EDMEulerScheduler"):
        load_policy(str(tmp_path))


@pytest.mark.slow
def test_the_refiner_starts_from_images(refiner: Any) -> None:
    with pytest.raises(ValueError, match=r"give its images to refine\(images, prompts, seeds\)"):
        refiner.sample(["a"], [0])
    with pytest.raises(ValueError, match="a refiner cannot draw from noise"):
        refiner.check_sampling(refiner.source)
    images = torch.rand((2, 3, *SIZE), generator=torch.Generator().manual_seed(0))
    little = refiner.refine(images, ["a", "a"], [0, 1], strength=0.2, num_inference_steps=10)
    much = refiner.refine(images, ["a", "a"], [0, 1], strength=0.9, num_inference_steps=10)
    assert little.shape == images.shape
    assert not torch.allclose(little, much)
    with pytest.raises(ValueError, match=r"expected images \[1, 3, H, W\], one per prompt, got \[2, 3, 8, 16\]"):
        refiner.refine(images, ["a"], [0])
    for strength, steps in ((0.0, 10), (1.5, 10), (0.3, 2)):
        with pytest.raises(ValueError, match=f"at least one of {steps} steps, got {strength}"):
            refiner.refine(images, ["a", "a"], [0, 1], strength=strength, num_inference_steps=steps)


BASE_UNET = SDXL_UNET
"""The published configuration of SDXL base 1.0; Turbo's differs in `sample_size`: 64."""
REFINER_UNET: dict[str, Any] = BASE_UNET | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (384, 768, 1536, 1536),
    "transformer_layers_per_block": 4,
    "attention_head_dim": [6, 12, 24, 24],
    "cross_attention_dim": 1280,
    "projection_class_embeddings_input_dim": 2560,
}
"""The published configuration of the SDXL refiner 1.0: five time ids of 256 numbers beside 1280 pooled ones."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "parameters"), [(BASE_UNET, 2_567_463_684), (REFINER_UNET, 2_259_526_660)], ids=["base", "refiner"]
)
def test_published_unets_have_their_size(config: dict[str, Any], parameters: int) -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    assert sum(p.numel() for p in unet.parameters()) == parameters
