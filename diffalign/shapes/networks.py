"""The architectures of the embedded world, with random weights: tokenizer, pipeline and scorer.

Everything is a stock class of transformers and diffusers, small enough to train on a laptop and to ship.
"""

from __future__ import annotations

import json

from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    T5Tokenizer,
)

from diffalign.shapes.scenes import IMAGE_SIZE, prompts

MAX_TOKENS = 20
TEXT_WIDTH = 128
LATENT_CHANNELS = 8


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges give every word of the world one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        special_tokens=[*alphabet, *(f"{c}</w>" for c in alphabet)],
        vocab_size=4096,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    words = sorted({word for prompt in prompts("all") for word in prompt.text.split()})
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bpe.train_from_iterator(words * 2, trainer)
    model = json.loads(bpe.to_str())["model"]
    vocab: dict[str, int] = dict(model["vocab"])
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    merges = [tuple(m) if not isinstance(m, str) else tuple(m.split(" ")) for m in model["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A two-layer CLIP text encoder."""
    return CLIPTextModel(_text_config(tokenizer, layers=2))


def _text_config(tokenizer: CLIPTokenizer, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_vae() -> AutoencoderKL:
    """A KL autoencoder: [3, 64, 64] in [-1, 1] to latents [8, 8, 8]."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
    )


def build_unet() -> UNet2DConditionModel:
    """A denoiser of latents [8, 8, 8], epsilon prediction."""
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(80, 128),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DPMSolverMultistepScheduler:
    """Stable Diffusion's noise schedule, sampled with DPM-Solver++ (2M)."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        steps_offset=1,
        timestep_spacing="leading",
    )


def build_pipeline(
    tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, vae: AutoencoderKL, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """The parts as a stock `StableDiffusionPipeline` without safety checker."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_scorer(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A small CLIP with 8-pixel patches on 64x64 pictures: the embedded reward model."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=8,
    )
    text = _text_config(tokenizer, layers=2)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=TEXT_WIDTH))


def build_flow_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModelWithProjection, ...]:
    """The two text encoders of the flow pipeline.

    Stable Diffusion 3 reads the last layer but one: the first has three layers, of which two can take over the weights
    of `build_text_encoder`; the second, which the pipeline needs too, is as small as can be.
    """
    first = _text_config(tokenizer, layers=3)
    second = _text_config(tokenizer, layers=2)
    second.update({"hidden_size": 16, "intermediate_size": 32, "projection_dim": 16, "num_attention_heads": 2})
    return CLIPTextModelWithProjection(first), CLIPTextModelWithProjection(second)


def build_flow_transformer() -> SD3Transformer2DModel:
    """A flow transformer for latents [8, 8, 8]: four joint blocks on 64 image tokens."""
    return SD3Transformer2DModel(
        sample_size=IMAGE_SIZE // 8,
        patch_size=1,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=TEXT_WIDTH + 16,
        caption_projection_dim=192,
        pooled_projection_dim=TEXT_WIDTH + 16,
        pos_embed_max_size=IMAGE_SIZE // 8,
        qk_norm="rms_norm",
    )


def build_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Rectified flow, its steps shifted a little towards noise."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.5)


def build_flow_pipeline(
    tokenizer: CLIPTokenizer,
    text_encoders: tuple[CLIPTextModelWithProjection, ...],
    vae: AutoencoderKL,
    transformer: SD3Transformer2DModel,
) -> StableDiffusion3Pipeline:
    """The parts as a stock `StableDiffusion3Pipeline` without T5.

    Its third tokenizer says with its `model_max_length` of 1 that there is one zero token in T5's place, not 256.
    """
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0)]  # never read, but none may be empty
    third = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=1)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=build_flow_scheduler(),
        vae=vae,
        text_encoder=text_encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=text_encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=third,
    )
