"""FLUX.2 dev (Mistral with its processor), klein (Qwen3, distilled) and klein base (guided)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.backbones.families.base import Family, save

KLEIN_LAYERS, DEV_LAYERS = 28, 31
"""The pipelines read hidden layers 9, 18, 27 and 10, 20, 30 unless told: deep and narrow needs no telling."""
WIDTH = 16

QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
MISTRAL_TEMPLATE = (
    "<s>{% for message in messages %}{% if message.role == 'system' %}[SYSTEM_PROMPT]{{ message.content[0].text }}"
    "[/SYSTEM_PROMPT]{% else %}[INST]{{ message.content[0].text }}[/INST]{% endif %}{% endfor %}"
)


def byte_vocabulary(*special: str) -> dict[str, int]:
    """The special tokens and one token per byte."""
    from tokenizers.pre_tokenizers import ByteLevel

    return {token: i for i, token in enumerate((*special, *sorted(ByteLevel.alphabet())))}


def tiny_qwen3() -> tuple[Any, Any]:
    """A byte tokenizer with a chat template, and a deep, narrow Qwen3."""
    from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

    tokenizer = Qwen2Tokenizer(
        vocab=byte_vocabulary("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"),
        merges=[],
        additional_special_tokens=["<|im_start|>", "<|im_end|>", "<think>", "</think>"],
    )
    tokenizer.chat_template = QWEN_TEMPLATE
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=KLEIN_LAYERS,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
    )
    return tokenizer, Qwen3ForCausalLM(config)


def tiny_mistral3() -> tuple[Any, Any]:
    """A processor around a byte tokenizer that pads on the left, and a deep, narrow Mistral 3."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        MistralConfig,
        PixtralImageProcessor,
        PixtralProcessor,
        PixtralVisionConfig,
        PreTrainedTokenizerFast,
    )

    special = ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    backend = Tokenizer(models.BPE(vocab=byte_vocabulary("<unk>", "<s>", "</s>", "<pad>", *special), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=special,
        padding_side="left",
    )
    processor = PixtralProcessor(
        image_processor=PixtralImageProcessor(patch_size=4, size={"longest_edge": 8}),
        tokenizer=tokenizer,
        patch_size=4,
        spatial_merge_size=2,
        chat_template=MISTRAL_TEMPLATE,
    )
    config = Mistral3Config(
        text_config=MistralConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=DEV_LAYERS,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
            sliding_window=None,
        ),
        vision_config=PixtralVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=4
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
    )
    return processor, Mistral3ForConditionalGeneration(config)


def tiny_flux2_vae() -> Any:
    """An autoencoder that halves the side, with batch-norm statistics that differ in every folded channel."""
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    vae.bn.running_mean.copy_(torch.randn(16))
    vae.bn.running_var.copy_(0.5 + torch.rand(16))
    return vae


def save_tiny(folder: Path, pipeline_class: str, text: Callable[[], tuple[Any, Any]], **options: Any) -> Path:
    """One double and two single blocks on 4x6 latents of 16 channels."""
    import diffusers

    torch.manual_seed(0)
    tokenizer, text_encoder = text()
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=pipeline_class == "Flux2Pipeline",
    )
    pipeline = getattr(diffusers, pipeline_class)(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=tiny_flux2_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        **options,
    )
    return save(pipeline, folder)


def unpack(policy: Any, packed: Tensor) -> Tensor:
    """By the pipeline's own method and position ids, which the policy does not use."""
    ids = policy.pipeline._prepare_latent_ids(torch.empty(len(packed), *policy.latent_shape))
    latents: Tensor = policy.pipeline._unpack_latents_with_ids(packed, ids)
    return latents


FAMILIES = [
    Family(
        name=name,
        save=partial(save_tiny, pipeline_class=pipeline_class, text=text, **options),
        pipeline_class=pipeline_class,
        latent_shape=(16, 4, 6),
        size=(16, 24),
        guidance_off=guidance_off,
        guidance_on=guidance_on,
        latents=unpack,
        # many layers are slow with the usual 512 tokens, of which the system message takes some hundred bytes
        options={"max_sequence_length": tokens},
        call={"max_sequence_length": tokens},
    )
    for name, pipeline_class, text, tokens, options, guidance_off, guidance_on in (
        # dev's guidance is read by the network: the policy's `embedded_guidance`
        ("flux2-dev", "Flux2Pipeline", tiny_mistral3, 256, {}, 4.0, None),
        ("flux2-klein", "Flux2KleinPipeline", tiny_qwen3, 128, {"is_distilled": True}, 4.0, None),
        ("flux2-klein-base", "Flux2KleinPipeline", tiny_qwen3, 128, {"is_distilled": False}, 1.0, 4.0),
    )
]
