"""HunyuanVideo."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch

from tests.backbones.families.base import Family, save, tiny_clip


def tiny_llama(width: int = 16) -> tuple[Any, Any]:
    """A Llama tokenizer of single characters, and a decoder of `width` with random weights.

    The published template's opening is cut into pieces that are tokens of their own, so that it is 95 tokens long, as
    with the published tokenizer, and the prompt begins where the pipeline cuts.
    """
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    from transformers import AddedToken, LlamaConfig, LlamaModel, LlamaTokenizer

    letters = ["<unk>", "<s>", "</s>", "<pad>", "▁", *string.ascii_letters, *string.digits, *string.punctuation]
    tokenizer = LlamaTokenizer(
        vocab={letter: i for i, letter in enumerate(letters)}, merges=[], pad_token="<pad>", padding_side="right"
    )
    opening, ending = str(DEFAULT_PROMPT_TEMPLATE["template"]).split("{}")
    count, length = int(DEFAULT_PROMPT_TEMPLATE["crop_start"]), 5
    first = len(opening) - (count - 1) * length
    pieces = [opening[:first], *(opening[i : i + length] for i in range(first, len(opening), length)), ending]
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in dict.fromkeys(pieces)])
    assert len(tokenizer(opening).input_ids) == count
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, LlamaModel(config)


def save_tiny(folder: Path) -> Path:
    """One block of each kind on latents of 4 channels, 8 times smaller in space and 4 times in time."""
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    tokenizer, text_encoder = tiny_llama()
    tokenizer_2, text_encoder_2 = tiny_clip()
    config = text_encoder_2.config
    config.max_position_embeddings = 77  # the pipeline asks CLIP for 77 tokens, whatever its tokenizer says
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=16,
        rope_axes_dim=(2, 4, 2),
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    pipeline = HunyuanVideoPipeline(
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=CLIPTextModel(config),
        tokenizer_2=tokenizer_2,
    )
    return save(pipeline, folder)


FAMILIES = [
    Family(
        name="hunyuan-video",
        save=save_tiny,
        pipeline_class="HunyuanVideoPipeline",
        latent_shape=(4, 2, 2, 4),
        size=(16, 32),
        num_frames=5,
        guidance_off=6.0,  # an input of the network, never off; `test_hunyuan_video.py` compares another value
        guidance_on=None,
    )
]
