"""The networks of the embedded world's video model: a small CogVideoX around the pictures' autoencoder."""

from __future__ import annotations

import string
from collections.abc import Iterable

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from diffalign.shapes.networks import LATENT_CHANNELS
from diffalign.shapes.scenes import IMAGE_SIZE

VIDEO_TOKENS = 16
"""Text tokens of a clip's prompt: one a word, and the end."""
TEXT_WIDTH = 96


def build_video_tokenizer(texts: Iterable[str]) -> T5Tokenizer:
    """A T5 tokenizer that gives every word of `texts` one token, and spells the others."""
    words = sorted({word for text in texts for word in text.split()})
    special, letters = ("<pad>", "</s>", "<unk>", "▁"), (*string.ascii_letters, *string.digits, *string.punctuation)
    pieces = [(piece, 0.0) for piece in special]
    pieces += [(f"▁{word}", -1.0) for word in words] + [(letter, -10.0) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=VIDEO_TOKENS)


def build_video_text_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """A two-layer T5 encoder."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=TEXT_WIDTH // 4,
        d_ff=2 * TEXT_WIDTH,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return T5EncoderModel(config)


def build_video_transformer(frames: int) -> CogVideoXTransformer3DModel:
    """A denoiser of latents [`frames`, 8, 8, 8], tokens of 2x2, all of which see all others and the text."""
    return CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=48,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        time_embed_dim=128,
        text_embed_dim=TEXT_WIDTH,
        num_layers=6,
        sample_width=IMAGE_SIZE // 8,
        sample_height=IMAGE_SIZE // 8,
        sample_frames=frames,
        temporal_compression_ratio=1,
        max_text_seq_length=VIDEO_TOKENS,
    )


def build_video_scheduler() -> CogVideoXDDIMScheduler:
    """The chain that CogVideoX 5B is published with: v prediction, ending in pure noise."""
    return CogVideoXDDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        snr_shift_scale=1.0,
    )


def build_video_pipeline(
    tokenizer: T5Tokenizer,
    text_encoder: T5EncoderModel,
    vae: AutoencoderKLCogVideoX,
    transformer: CogVideoXTransformer3DModel,
) -> CogVideoXPipeline:
    """The parts as a stock `CogVideoXPipeline`."""
    return CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=build_video_scheduler(),
    )


@torch.no_grad()
def without_quant_convs(vae: AutoencoderKL) -> AutoencoderKL:
    """The autoencoder without the 1x1 convolutions next to the latents, which CogVideoX does not have.

    They are folded into their neighbours: the first exactly, the second up to the border, where its bias is not padded
    with zeros any more. The decoder has to be trained a little further for that.
    """
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    folded = AutoencoderKL(**{**config, "use_quant_conv": False, "use_post_quant_conv": False})
    state = {name: value.clone() for name, value in vae.state_dict().items()}
    quant, post = (state.pop(f"{name}.weight")[:, :, 0, 0] for name in ("quant_conv", "post_quant_conv"))
    quant_bias, post_bias = (state.pop(f"{name}.bias") for name in ("quant_conv", "post_quant_conv"))
    state["encoder.conv_out.weight"] = torch.einsum("oc,cihw->oihw", quant, state["encoder.conv_out.weight"])
    state["encoder.conv_out.bias"] = quant @ state["encoder.conv_out.bias"] + quant_bias
    first = state["decoder.conv_in.weight"]
    state["decoder.conv_in.weight"] = torch.einsum("ochw,ci->oihw", first, post)
    state["decoder.conv_in.bias"] = state["decoder.conv_in.bias"] + torch.einsum("ochw,c->o", first, post_bias)
    folded.load_state_dict(state)
    return folded


@torch.no_grad()
def inflate_vae(vae: AutoencoderKL) -> AutoencoderKLCogVideoX:
    """An autoencoder of clips that does to a frame what `vae`, one of pictures, does to it; exactly, to a single one.

    A causal convolution over time gets the picture's weights at its last tap, the frame itself, and zeros before it; a
    norm that reads the latents gets a factor of one and nothing to add. Of several frames the norms see the statistics
    together.

    Args:
        vae: Of `without_quant_convs`, without attention in the middle; its scaling factor is taken over.
    """
    config = vae.config
    video = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * len(config.block_out_channels),
        up_block_types=("CogVideoXUpBlock3D",) * len(config.block_out_channels),
        block_out_channels=tuple(config.block_out_channels),
        latent_channels=config.latent_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
        temporal_compression_ratio=1,
        sample_height=IMAGE_SIZE,
        sample_width=IMAGE_SIZE,
        scaling_factor=config.scaling_factor,
    )
    state = {name: torch.zeros_like(value) for name, value in video.state_dict().items()}
    for name in state:
        if name.endswith("conv_y.conv.bias"):
            state[name].fill_(1.0)
    for name, value in vae.state_dict().items():
        part, kind = name.replace("conv_norm_out", "norm_out").rsplit(".", 1)
        names = (f"{part}.{kind}", f"{part}.conv.{kind}", f"{part}.norm_layer.{kind}")
        target = state[next(candidate for candidate in names if candidate in state)]
        (target[:, :, -1] if target.ndim == 5 else target).copy_(value)
    video.load_state_dict(state)
    return video.eval().requires_grad_(False)
