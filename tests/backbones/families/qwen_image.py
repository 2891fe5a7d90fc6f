"""Qwen-Image, with a tokenizer for which the published template's opening has the published 34 tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_unshuffle

from tests.backbones.families.base import PROMPTS, Family, save

OPENING = (
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of "
    "the objects and background:\nuser\nassistant\n"
)


def tiny_qwen_tokenizer(**options: Any) -> Any:
    """A Qwen tokenizer that has one token for each word of the published template, and bytes for the rest."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=special,
    )
    words.train_from_iterator([OPENING] * 3, trainer)
    model = json.loads(words.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        model_max_length=1024,
        additional_special_tokens=special[1:],
        **options,
    )


def tiny_qwen_vl(tokenizer: Any, width: int = 16) -> Any:
    """A vision-language model of one text layer."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1000000.0},
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": width,
        },
        image_token_id=1,
        video_token_id=2,
        vision_start_token_id=1,
        vision_end_token_id=2,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def save_tiny(folder: Path) -> Path:
    """A two-block transformer on 4x6 latents of 4 channels, packed to 2x3 patches of 16."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    torch.manual_seed(0)
    tokenizer = tiny_qwen_tokenizer()
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[-0.7571, -0.7089, 0.1075, 1.5508],
        latents_std=[2.8184, 1.4541, 2.3275, 1.1253],
    )
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256,
        base_shift=0.5,
        max_image_seq_len=8192,
        max_shift=0.9,
        shift_terminal=0.02,
        use_dynamic_shifting=True,
    )
    pipeline = QwenImagePipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=tiny_qwen_vl(tokenizer),
        tokenizer=tokenizer,
        transformer=transformer,
    )
    return save(pipeline, folder)


def unpacked(policy: Any, tokens: Tensor) -> Tensor:
    """The pipeline's packed latents [B, N, 4C] as [B, C, h, w], by its own function."""
    pipeline = policy.pipeline
    latents: Tensor = pipeline._unpack_latents(tokens, *policy.size, pipeline.vae_scale_factor)[:, :, 0]
    return latents


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """True guidance: every 2x2 patch, all channels together, keeps the length of the conditional prediction."""
    guided = unconditional + scale * (conditional - unconditional)
    was, now = (pixel_unshuffle(latents, 2).norm(dim=1, keepdim=True) for latents in (conditional, guided))
    return guided * (was / now).repeat_interleave(2, 2).repeat_interleave(2, 3)


FAMILIES = [
    Family(
        name="qwen-image",
        save=save_tiny,
        pipeline_class="QwenImagePipeline",
        latent_shape=(4, 4, 6),
        size=(8, 12),
        call={"negative_prompt": [" "] * len(PROMPTS)},
        guidance_on=3.0,  # not the default, so that a scale that is not passed on shows
        guidance_argument="true_cfg_scale",
        latents=unpacked,
        guide=guide,
    )
]
