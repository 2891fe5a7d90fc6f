"""The video model's parts: its autoencoder is the pictures' one, its tokenizer knows every word."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL

from diffalign.shapes.clips import clip_prompts
from diffalign.shapes.networks import build_vae
from diffalign.shapes.video_networks import build_video_tokenizer, inflate_vae, without_quant_convs


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    """Random, but with every parameter away from its initial value."""
    torch.manual_seed(0)
    vae = build_vae()
    with torch.no_grad():
        for p in vae.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return vae.eval().requires_grad_(False)


def test_without_its_small_convolutions_the_encoder_is_the_same(vae: AutoencoderKL) -> None:
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    theirs, ours = (model.encode(pixels).latent_dist for model in (vae, without_quant_convs(vae)))
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.std, theirs.std, rtol=1e-4, atol=1e-5)


def test_the_first_layer_of_the_decoder_differs_at_the_border_only(vae: AutoencoderKL) -> None:
    latents = torch.randn(2, 8, 8, 8)
    theirs = vae.decoder.conv_in(vae.post_quant_conv(latents))
    ours = without_quant_convs(vae).decoder.conv_in(latents)
    torch.testing.assert_close(ours[..., 1:-1, 1:-1], theirs[..., 1:-1, 1:-1], rtol=1e-4, atol=1e-5)
    assert (ours - theirs).abs()[..., 0, :].max() > 1e-3


@pytest.mark.parametrize("frames", [1, 6])
def test_a_still_clip_is_coded_as_its_picture(vae: AutoencoderKL, frames: int) -> None:
    """Equal frames have one frame's statistics, so the norms over time change nothing."""
    picture = without_quant_convs(vae)
    video = inflate_vae(picture)
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    latents = picture.encode(pixels).latent_dist.mean
    coded = video.encode(pixels[:, :, None].expand(-1, -1, frames, -1, -1)).latent_dist.mean
    assert coded.shape == (1, 8, frames, 8, 8)
    torch.testing.assert_close(coded, latents[:, :, None].expand_as(coded), rtol=1e-4, atol=1e-4)
    shown = video.decode(coded).sample
    torch.testing.assert_close(
        shown, picture.decode(latents).sample[:, :, None].expand_as(shown), rtol=1e-4, atol=1e-4
    )  # fmt: skip


def test_every_word_of_the_clips_is_one_token() -> None:
    texts = [prompt.text for prompt in clip_prompts("all")]
    tokenizer = build_video_tokenizer(texts)
    for text in texts[::37]:
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.split()) + 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.unk_token_id not in tokenizer("a video of a qy7!").input_ids
