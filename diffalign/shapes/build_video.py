"""The embedded world's video model: its UNet with motion modules, taught on clips whose motion is often wrong."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AnimateDiffPipeline, AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from diffalign.backbones.sd import schedule_from_config
from diffalign.schedules import expand
from diffalign.shapes import networks
from diffalign.shapes.clips import FRAMES, MOTIONS, clip_prompts, draw_clip, render_clip
from diffalign.shapes.stages import Stage, generators, to_pixels

WRONG_SHARE = 0.5
"""How many of the clips move in another way than their prompt says: what is left for alignment to mend."""
NOISY_SHARE = 0.5
"""How many timesteps are drawn from the noisier half, at which the motion is decided."""
CLIPS_PER_STEP = 8


@torch.no_grad()
def encode_clips(vae: AutoencoderKL, work: Path, seed: int, count: int) -> tuple[Tensor, list[str], Tensor]:
    """Posterior moments [count, 16, T, 8, 8] of clips of the training prompts, the prompts, and who moves wrongly."""
    path, known = work / "clips.pt", clip_prompts("train")
    stored = torch.load(path, weights_only=True)["moments"] if path.exists() else None
    moments, texts, wrong = [], [], []
    for number in tqdm(range(count), desc="encode clips", unit="clip", mininterval=5):
        generator, _ = generators(seed, 12, number)
        prompt = known[int(generator.integers(len(known)))]
        texts.append(prompt.text)
        wrong.append(bool(generator.random() < WRONG_SHARE))
        if stored is None:
            others = [motion for motion in MOTIONS if motion != prompt.motion]
            motion = str(generator.choice(others)) if wrong[-1] else prompt.motion
            frames = render_clip(draw_clip(prompt, generator, motion=motion))
            posterior = vae.encode(to_pixels(list(frames))).latent_dist
            moments.append(torch.cat([posterior.mean, posterior.std], dim=1).transpose(0, 1))
    if stored is None:
        stored = torch.stack(moments)
        torch.save({"moments": stored}, path)
    return stored, texts, torch.tensor(wrong)


def extend_text_encoder(
    text_encoder: CLIPTextModel, known: CLIPTokenizer, tokenizer: CLIPTokenizer
) -> CLIPTextModel:  # fmt: skip
    """The same text encoder for a tokenizer with more words; those it knew keep their vectors."""
    extended = networks.build_text_encoder(tokenizer)
    weights = dict(text_encoder.state_dict())
    name = next(n for n in weights if n.endswith("token_embedding.weight"))
    old, vocabulary = weights[name], known.get_vocab()
    table = extended.state_dict()[name].clone()
    for token, row in tokenizer.get_vocab().items():
        if token in vocabulary:
            table[row] = old[vocabulary[token]]
    extended.load_state_dict({**weights, name: table})
    return extended


def train_video(
    work: Path, vae: AutoencoderKL, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, seed: int,
    steps: tuple[int, int], clips: int, *, compiled: bool = False,
) -> AnimateDiffPipeline:  # fmt: skip
    """Motion modules, image UNet and text encoder together, from the trained image model's weights.

    AnimateDiff's motion modules do not read the prompt, so the words of motion must come through the image layers. They
    say most where there is most noise, how far to the left a clip must start that moves right, and an error of epsilon
    hardly shows that: the video model predicts velocities (v-prediction, Salimans & Ho 2022, arXiv:2202.00512), which
    are the scene itself there. It sees clips that move as told first, and then wrong ones among them.

    Args:
        work: Folder of the states and of the encoded clips.
        vae: The trained autoencoder, its scaling factor set.
        text_encoder: Of the image model.
        unet: Of the image model.
        seed: Of everything random.
        steps: Training steps of `CLIPS_PER_STEP` clips, on right ones and then on mixed ones.
        clips: How many clips are encoded.
        compiled: Compile the UNet, with numbers that differ in the last digits.
    """
    torch.manual_seed(seed + 4)
    texts = [prompt.text for prompt in clip_prompts("all")]
    tokenizer = networks.build_tokenizer(texts)
    text_encoder = extend_text_encoder(text_encoder, networks.build_tokenizer(), tokenizer)
    motion_unet = networks.build_motion_unet(unet, FRAMES).to(memory_format=torch.channels_last)
    motion_unet.requires_grad_(True)
    moments, told, wrong = encode_clips(vae, work, seed, clips)
    subsets = (torch.nonzero(~wrong)[:, 0], torch.arange(len(told)))
    mean, std = moments.chunk(2, dim=1)
    own = networks.build_tokenizer(texts)  # padding leaves its mark on the one that is saved
    ids, empty = (
        own(words, padding="max_length", truncation=True, return_tensors="pt").input_ids for words in (told, [""])
    )
    schedule = schedule_from_config(networks.build_scheduler("v_prediction").config)
    predict: Any = torch.compile(motion_unet) if compiled else motion_unet
    modules: dict[str, nn.Module] = {"text_encoder": text_encoder, "unet": motion_unet}

    def loss_of(step: int, mixed: bool) -> Tensor:
        generator = generators(seed, 13 + mixed, step)[1]
        rows = subsets[mixed][torch.randint(len(subsets[mixed]), (CLIPS_PER_STEP,), generator=generator)]
        chosen = mean[rows]
        latents = (chosen + std[rows] * torch.randn(chosen.shape, generator=generator)) * vae.config.scaling_factor
        noise = torch.randn(chosen.shape, generator=generator)
        noisier = torch.rand(CLIPS_PER_STEP, generator=generator) < NOISY_SHARE
        timesteps = torch.randint(1000, (CLIPS_PER_STEP,), generator=generator)
        timesteps = torch.where(noisier, 500 + timesteps // 2, timesteps)
        dropped = torch.rand(CLIPS_PER_STEP, 1, generator=generator) < 0.1
        hidden = text_encoder(torch.where(dropped, empty, ids[rows])).last_hidden_state
        noisy = schedule.add_noise(latents, noise, timesteps)
        output = predict(noisy, timesteps, hidden.repeat_interleave(FRAMES, dim=0), return_dict=False)[0]
        signal, spread = (expand(scale, latents) for scale in schedule.scales(timesteps))
        loss: Tensor = (output - (signal * noise - spread * latents)).square().mean()
        return loss

    for name, mixed in (("video", False), ("video_mixed", True)):
        stage = Stage(name, work, modules, lr=6e-4, steps=steps[mixed], ema=0.99, cooldown=0.3)
        stage.run(partial(loss_of, mixed=mixed))
    stage.load_average()
    return networks.build_video_pipeline(tokenizer, text_encoder, vae, motion_unet)
