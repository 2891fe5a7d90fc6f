"""Z-Image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.backbones.families.base import Family, save, tiny_vae
from tests.backbones.families.qwen_image import tiny_qwen_tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
"""Of the published tokenizer's, what the pipeline uses of it."""


def tiny_qwen3(tokenizer: Any, width: int = 16) -> Any:
    """A language model of two layers: the last but one state is then the first layer's."""
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    return Qwen3Model(config).eval()


def save_tiny(folder: Path) -> Path:
    """One layer and one refiner of each kind on 4x6 latents of 4 channels."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    torch.manual_seed(0)
    tokenizer = tiny_qwen_tokenizer(chat_template=CHAT_TEMPLATE)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 32, 32],
    )
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(sample_size=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False),
        text_encoder=tiny_qwen3(tokenizer),
        tokenizer=tokenizer,
        transformer=transformer,
    )
    return save(pipeline, folder)


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """The pipeline adds the whole difference on top of the conditional prediction."""
    return conditional + scale * (conditional - unconditional)


FAMILIES = [
    Family(
        name="z-image",
        save=save_tiny,
        pipeline_class="ZImagePipeline",
        latent_shape=(4, 4, 6),
        size=(8, 12),
        guidance_off=0.0,
        guidance_on=3.0,
        guide=guide,
    )
]
