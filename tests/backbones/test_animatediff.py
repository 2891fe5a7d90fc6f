"""What is special to AnimateDiff: text per frame, an image autoencoder per frame, motion modules, linear betas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.backbones import LoRA, load_policy
from diffalign.backbones.animatediff import FRAMES_AT_ONCE, MOTION_TARGETS
from diffalign.schedules import DiscreteSchedule
from tests.backbones.families.animatediff import SCHEDULER, save_tiny, tiny_adapter
from tests.backbones.families.sd import save_tiny as save_tiny_sd

pytestmark = pytest.mark.slow  # as those of all families but the first ones

FRAMES = 3


def load(folder: Path, **options: Any) -> Any:
    return load_policy(str(folder), **{"num_frames": FRAMES, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("animatediff") / "pipeline")


@pytest.fixture(scope="module")
def base(folder: Path) -> Any:
    return load(folder)


def test_the_defaults_are_the_published_pipelines(base: Any) -> None:
    assert (base.guidance_scale, base.num_inference_steps) == (7.5, 50)
    assert base.size == (8, 8)
    betas = torch.linspace(0.00085, 0.012, 1000, dtype=torch.float64)
    assert torch.equal(base.schedule.alphas_cumprod, DiscreteSchedule.from_betas(betas).alphas_cumprod)
    assert base.pipeline.motion_adapter is None
    assert any("motion_modules" in name for name, _ in base.denoiser.named_modules())


def test_more_frames_than_positions_are_refused_and_all_of_fewer_than_16_are_the_default(folder: Path) -> None:
    assert load(folder, num_frames=None).latent_shape == (4, 8, 4, 4)
    with pytest.raises(ValueError, match="positions of 8 frames, got 16; use at most 8"):
        load(folder, num_frames=16)


def test_frames_see_each_other_through_the_motion_modules_only(base: Any) -> None:
    conditioning = base.encode_prompts(["a red circle"])
    latents = torch.randn(1, 4, FRAMES, 4, 4, generator=torch.Generator().manual_seed(0))
    changed = latents.clone()
    changed[:, :, 2] += 1
    timesteps = torch.tensor([500])
    with torch.no_grad():
        one, other = (base.predict(x, timesteps, conditioning) for x in (latents, changed))
    assert not torch.allclose(one[:, :, 0], other[:, :, 0], atol=1e-4)


def test_every_frame_is_encoded_and_decoded_as_an_image(base: Any) -> None:
    """Also across the border of a chunk: 2 * 9 frames are more than go through at once."""
    videos = torch.rand(2, 9, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert 2 * 9 > FRAMES_AT_ONCE
    moments = base.encode(videos)
    assert moments.mean.shape == moments.std.shape == (2, 4, 9, 4, 4)
    decoded = base.decode(moments.mean)
    vae = base.pipeline.vae
    with torch.no_grad():
        for row, frame in ((0, 0), (1, 7), (1, 8)):
            posterior = vae.encode(videos[row, frame][None] * 2 - 1).latent_dist
            scale = vae.config.scaling_factor
            torch.testing.assert_close(moments.mean[row, :, frame], posterior.mean[0] * scale, rtol=0, atol=1e-5)
            torch.testing.assert_close(moments.std[row, :, frame], posterior.std[0] * scale, rtol=0, atol=1e-5)
            pixels = vae.decode(posterior.mean).sample[0] / 2 + 0.5
            torch.testing.assert_close(decoded[row, frame], pixels.clamp(0, 1), rtol=0, atol=1e-5)


def test_adapters_reach_all_attention_or_the_motion_modules_only(folder: Path, tmp_path: Path) -> None:
    everywhere = {name for name, _ in load(folder, lora=LoRA(rank=2), train=True).named_trainable()}
    policy = load(folder, lora=LoRA(rank=2, target_modules=MOTION_TARGETS), train=True)
    motion = {name for name, _ in policy.named_trainable()}
    assert motion == {name for name in everywhere if "motion_modules" in name}
    assert motion < everywhere
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.1)
    policy.save_trained(tmp_path)
    again = load(folder, adapter=tmp_path)
    assert {name for name, _ in again.named_trainable()} == motion
    with pytest.raises(ValueError, match=r"'down\.\*\.to_q' matches no layer of UNetMotionModel"):
        load(folder, lora=LoRA(target_modules=("down.*.to_q",)), train=True)


def test_an_image_model_and_an_adapter_become_a_folder(tmp_path: Path) -> None:
    """The three lines of the module's docstring."""
    from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter

    sd15 = save_tiny_sd(tmp_path / "sd15", "epsilon")
    tiny_adapter().save_pretrained(tmp_path / "adapter")
    options = {k: v for k, v in SCHEDULER.items() if not k.startswith("beta_") or k == "beta_schedule"}
    scheduler = DDIMScheduler.from_pretrained(sd15, subfolder="scheduler", **options)
    adapter = MotionAdapter.from_pretrained(tmp_path / "adapter")
    pipeline = AnimateDiffPipeline.from_pretrained(sd15, motion_adapter=adapter, scheduler=scheduler)
    pipeline.save_pretrained(tmp_path / "animatediff")
    policy = load(tmp_path / "animatediff")
    assert policy.schedule.alphas_cumprod[-1] == pytest.approx(float(pipeline.scheduler.alphas_cumprod[-1]), abs=1e-6)
    own, given = policy.denoiser.state_dict(), adapter.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in given.items())


def test_an_image_unet_without_an_adapter_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_sd(tmp_path / "pipeline", "epsilon")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"StableDiffusionPipeline"', '"AnimateDiffPipeline"'))
    with pytest.raises(ValueError, match=r"no motion adapter.*expected a saved AnimateDiffPipeline"):
        load(folder)


def test_the_published_size() -> None:
    """Stable Diffusion 1.5 (860 M) and guoyww/animatediff-motion-adapter-v1-5-2 (454 M), counted on the meta device."""
    from diffusers import MotionAdapter, UNetMotionModel

    with torch.device("meta"):
        unet = UNetMotionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            cross_attention_dim=768,
            num_attention_heads=8,
            motion_max_seq_length=32,
            use_motion_mid_block=True,
        )
        adapter = MotionAdapter(motion_max_seq_length=32, use_motion_mid_block=True)
    motion = sum(p.numel() for p in adapter.parameters())
    assert sum(p.numel() for p in unet.parameters()) - motion == 859_520_964
    assert motion == pytest.approx(453.6e6, rel=1e-3)
