"""The embedded world's video model: a small CogVideoX, taught on clips that move as told, at pure noise first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, CogVideoXPipeline
from torch import Tensor, nn
from tqdm import tqdm

from diffalign.schedules import DiscreteSchedule, expand
from diffalign.shapes import video_networks
from diffalign.shapes.clips import FRAMES, clip_prompts, draw_clip, parse_clip_prompt, render_clip
from diffalign.shapes.scenes import draw_scene, render
from diffalign.shapes.stages import PromptSampler, Stage, generators, to_pixels

NOISY_SHARE = 0.5
"""How many timesteps are drawn from `NOISY` on, where the motion is decided."""
NOISY = 600
LEANING = ("right", "down")
"""The motions of the middle third of the first stage, see `train_video`."""
CLIPS_PER_STEP = 24


@torch.no_grad()
def encode_clips(vae: AutoencoderKL, work: Path, seed: int, count: int) -> tuple[Tensor, list[str]]:
    """Posterior moments [count, 16, T, 8, 8] of clips of the training prompts, and the prompts."""
    path, known = work / "clips.pt", clip_prompts("train")
    stored = torch.load(path, weights_only=True)["moments"] if path.exists() else None
    moments, texts = [], []
    for number in tqdm(range(count), desc="encode clips", unit="clip", mininterval=5):
        generator, _ = generators(seed, 12, number)
        prompt = known[int(generator.integers(len(known)))]
        texts.append(prompt.text)
        if stored is None:
            posterior = vae.encode(to_pixels(list(render_clip(draw_clip(prompt, generator))))).latent_dist
            moments.append(torch.cat([posterior.mean, posterior.std], dim=1).transpose(0, 1))
    if stored is None:
        stored = torch.stack(moments)
        torch.save({"moments": stored}, path)
    return stored, texts


def train_frames(vae: AutoencoderKL, work: Path, seed: int, steps: int) -> AutoencoderKL:
    """The autoencoder without the convolutions that a CogVideoX has not, its decoder trained further for that."""
    frames = video_networks.without_quant_convs(vae)
    frames.encoder.requires_grad_(False)
    frames.decoder.requires_grad_(True)
    stage = Stage("vae_frames", work, {"vae": frames}, lr=5e-4, steps=steps, ema=0.98)
    draw = PromptSampler()

    def loss_of(step: int) -> Tensor:
        generator, noise = generators(seed, 15, step)
        pixels = to_pixels([render(draw_scene(draw(generator), generator)) for _ in range(16)])
        with torch.no_grad():
            latents = frames.encode(pixels).latent_dist.sample(noise)
        error = frames.decode(latents).sample - pixels
        loss: Tensor = (error.square() + 0.5 * error.abs()).mean()
        return loss

    stage.run(loss_of)
    stage.load_average()
    return frames.requires_grad_(False)


def train_video(
    work: Path, vae: AutoencoderKL, seed: int, steps: tuple[int, int, int], clips: int, *, compiled: bool = False
) -> CogVideoXPipeline:
    """Transformer and text encoder together, with errors of v, on the latents of the pictures' autoencoder.

    What a word of motion changes is where the object is *in which frame*, a product of three things, none of which says
    anything alone: clips of all motions average to no motion. So training starts at pure noise, where the answer is the
    average clip of a prompt, and the middle third of that shows two motions only, whose average moves. A network that
    has learnt it tells the other motions from it within a hundred steps, and without that not in a thousand. Then come
    all timesteps.

    Args:
        work: Folder of the states and of the encoded clips.
        vae: The trained autoencoder, its scaling factor set.
        seed: Of everything random.
        steps: Of the decoder, and then of `CLIPS_PER_STEP` clips: at pure noise, and at all timesteps.
        clips: How many clips are encoded.
        compiled: Compile the transformer, with numbers that differ in the last digits.
    """
    moments, told = encode_clips(vae, work, seed, clips)
    frames = video_networks.inflate_vae(train_frames(vae, work, seed, steps[0]))
    torch.manual_seed(seed + 4)
    tokenizer = video_networks.build_video_tokenizer(prompt.text for prompt in clip_prompts("all"))
    text_encoder = video_networks.build_video_text_encoder(tokenizer)
    transformer = video_networks.build_video_transformer(FRAMES)
    schedule = DiscreteSchedule(video_networks.build_video_scheduler().alphas_cumprod)
    mean, std = moments.chunk(2, dim=1)
    ids, empty = (
        tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids for texts in (told, [""])
    )
    every = torch.arange(len(told))
    leaning = every[torch.tensor([parse_clip_prompt(text).motion in LEANING for text in told])]
    predict: Any = torch.compile(transformer) if compiled else transformer
    modules: dict[str, nn.Module] = {"text_encoder": text_encoder, "transformer": transformer}

    def loss_of(pool: Tensor, timesteps: Tensor, generator: torch.Generator) -> Tensor:
        rows = pool[torch.randint(len(pool), (CLIPS_PER_STEP,), generator=generator)]
        chosen = mean[rows]
        latents = (chosen + std[rows] * torch.randn(chosen.shape, generator=generator)) * vae.config.scaling_factor
        noise = torch.randn(chosen.shape, generator=generator)
        dropped = torch.rand(CLIPS_PER_STEP, 1, generator=generator) < 0.1
        hidden = text_encoder(torch.where(dropped, empty, ids[rows])).last_hidden_state
        noisy = schedule.add_noise(latents, noise, timesteps)
        output = predict(noisy.transpose(1, 2), hidden, timesteps, return_dict=False)[0].transpose(1, 2)
        alphas, sigmas = (expand(scale, latents) for scale in schedule.scales(timesteps))
        loss: Tensor = (output - (alphas * noise - sigmas * latents)).square().mean()
        return loss

    def at_pure_noise(step: int) -> Tensor:
        middle = steps[1] <= 3 * step < 2 * steps[1] and len(leaning) > 0
        last = torch.full((CLIPS_PER_STEP,), len(schedule) - 1)
        return loss_of(leaning if middle else every, last, generators(seed, 16, step)[1])

    def at_all_levels(step: int) -> Tensor:
        generator = generators(seed, 13, step)[1]
        noisier = torch.rand(CLIPS_PER_STEP, generator=generator) < NOISY_SHARE
        uniform = torch.rand(CLIPS_PER_STEP, generator=generator)
        low = torch.where(noisier, NOISY, 0)
        timesteps = (low + uniform * (len(schedule) - low)).long().clamp(max=len(schedule) - 1)
        return loss_of(every, timesteps, generator)

    for name, length, loss in (("video_words", steps[1], at_pure_noise), ("video", steps[2], at_all_levels)):
        stage = Stage(name, work, modules, lr=1e-3, steps=length, ema=0.99, cooldown=0.3)
        stage.run(loss)
    stage.load_average()
    return video_networks.build_video_pipeline(tokenizer, text_encoder, frames, transformer)
