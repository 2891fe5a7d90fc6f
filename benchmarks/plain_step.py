"""A step of Diffusion-DPO or Flow-DPO as public scripts write it: what a step costs that nobody has thought about.

Pictures are read and encoded, prompts tokenised and encoded at every step; the reference answers in a forward pass of
its own; nothing is compiled, fused or read ahead. The random numbers are those of `diffalign train`, so that both
train the same model on the same pairs and their losses can be compared. One class for each embedded model.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from diffalign.batches import Conditioning
from diffalign.data import PairSource
from diffalign.randomness import Draw

PARTS = ("images", "text", "reference", "policy", "backward", "optimizer")
"""What a step consists of."""
SIDES = ("chosen", "rejected")


def errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of every sample, [2B]."""
    return (prediction - target).square().flatten(1).mean(1)


def dpo_loss(error: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Diffusion-DPO's loss of errors [2B], chosen first; of velocities Flow-DPO's."""
    won, lost = (error - reference).chunk(2)
    return -F.logsigmoid(-0.5 * beta * (won - lost)).mean()


class PlainStep(ABC):
    """Trains a policy on a folder of pairs, step after step.

    Args:
        policy: With adapters, or with all weights trained; its encoders are in memory.
        source: Says which pairs a step sees, and draws for them.
        folder: Of the pictures, `index.jsonl` beside them.
        rows: The index: prompt and file names of every pair, in the order of the source's rows.
        beta: Of the loss.
        lr: Learning rate of AdamW.

    Attributes:
        seconds: Of every step so far, by part.
        losses: Of every step.
    """

    def __init__(
        self, policy: Any, source: PairSource, folder: Path, rows: list[dict[str, str]], beta: float, lr: float
    ) -> None:
        self.policy, self.source, self.folder, self.rows, self.beta = policy, source, folder, rows, beta
        self.pipeline, self.reference = policy.pipeline, policy.frozen()
        self.optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=lr)
        self.seconds: list[dict[str, float]] = []
        self.losses: list[float] = []

    @contextmanager
    def _clock(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[-1][part] = time.perf_counter() - started

    def __call__(self, step: int) -> None:
        """One optimizer step."""
        self.seconds.append({})
        visits = self.source.visits(step)
        rows, draws = [self.rows[row] for row, _ in visits], [draw for _, draw in visits]
        with self._clock("images"), torch.no_grad():
            latents = self._latents(rows, draws)
        with self._clock("text"), torch.no_grad():
            conditioning = Conditioning(self.text([row["prompt"] for row in rows])).repeat(2)
        noise = torch.stack([draw.normal("noise", latents.shape[1:]) for draw in draws])
        noise = noise.repeat(2, *[1] * (latents.ndim - 1))
        noisy, timesteps, target = self.noised(latents, noise, draws)
        arguments = (noisy, timesteps, conditioning)
        with self._clock("reference"), torch.no_grad():
            reference = errors(self.reference.predict(*arguments), target)
        with self._clock("policy"):
            loss = dpo_loss(errors(self.policy.predict(*arguments), target), reference, self.beta)
        with self._clock("backward"):
            loss.backward()  # type: ignore[no-untyped-call]
        with self._clock("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.policy.trainable_parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(float(loss.detach()))

    def _latents(self, rows: Sequence[dict[str, str]], draws: Sequence[Draw]) -> Tensor:
        vae = self.pipeline.vae
        pixels = torch.stack([self.read(self.folder / row[side]) for side in SIDES for row in rows])
        posterior = vae.encode(pixels).latent_dist
        fresh = [draw.normal(f"posterior/{side}", posterior.mean.shape[1:]) for side in SIDES for draw in draws]
        latents: Tensor = posterior.mean + posterior.std * torch.stack(fresh)
        latents = (latents - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor
        return latents

    @staticmethod
    def read(path: Path) -> Tensor:
        """A picture, [3, H, W] in [-1, 1]."""
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
        return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)

    @abstractmethod
    def text(self, prompts: list[str]) -> dict[str, Tensor]:
        """Embeddings by the names of `Conditioning`."""

    @abstractmethod
    def noised(self, latents: Tensor, noise: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents, timesteps and what the network should answer, of both halves."""


class PlainUNetStep(PlainStep):
    """Stable Diffusion, which predicts the noise."""

    def text(self, prompts: list[str]) -> dict[str, Tensor]:
        """See `PlainStep.text`."""
        tokens = self.pipeline.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        return {"hidden": self.pipeline.text_encoder(tokens.input_ids)[0]}

    def noised(self, latents: Tensor, noise: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor, Tensor]:
        """See `PlainStep.noised`."""
        timesteps, signal, sigma = self._scales(latents, draws)
        return signal * latents + sigma * noise, timesteps, noise

    def _scales(self, latents: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor, Tensor]:
        """Uniform timesteps of a chain, and both factors there."""
        table = torch.as_tensor(self.pipeline.scheduler.alphas_cumprod)
        uniform = torch.tensor([draw.uniform("timestep") for draw in draws], dtype=torch.float64)
        timesteps = (uniform * len(table)).long().repeat(2)
        kept = table[timesteps].reshape(-1, *[1] * (latents.ndim - 1))
        return timesteps, kept.sqrt(), (1 - kept).sqrt()


class PlainVideoStep(PlainUNetStep):
    """CogVideoX, which predicts v on frames that are encoded together."""

    @staticmethod
    def read(path: Path) -> Tensor:
        """A clip, [3, T, H, W] in [-1, 1]."""
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return torch.from_numpy(np.stack(frames).astype(np.float32) / 127.5 - 1).permute(3, 0, 1, 2)

    def text(self, prompts: list[str]) -> dict[str, Tensor]:
        """See `PlainStep.text`."""
        tokens = self.pipeline.tokenizer(
            prompts,
            padding="max_length",
            max_length=self.policy.max_tokens,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        )
        return {"hidden": self.pipeline.text_encoder(tokens.input_ids)[0]}

    def noised(self, latents: Tensor, noise: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor, Tensor]:
        """See `PlainStep.noised`."""
        timesteps, signal, sigma = self._scales(latents, draws)
        return signal * latents + sigma * noise, timesteps, signal * noise - sigma * latents


class PlainFlowStep(PlainStep):
    """Stable Diffusion 3, which predicts the velocity from picture to noise."""

    def text(self, prompts: list[str]) -> dict[str, Tensor]:
        """See `PlainStep.text`; as the public script does, through the pipeline."""
        hidden, _, pooled, _ = self.pipeline.encode_prompt(
            prompts,
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.pipeline.tokenizer_3.model_max_length,
        )
        return {"hidden": hidden, "pooled": pooled}

    def noised(self, latents: Tensor, noise: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor, Tensor]:
        """See `PlainStep.noised`; timesteps at the density of Stable Diffusion 3 over the scheduler's own table."""
        scheduler = self.pipeline.scheduler
        steps = scheduler.config.num_train_timesteps
        normal = torch.stack([draw.normal("timestep", (1,))[0] for draw in draws]).double()
        index = (normal.sigmoid() * steps).long()
        shift = scheduler.config.shift
        sigma = 1 - index / steps
        sigma = (shift * sigma / (1 + (shift - 1) * sigma)).repeat(2).to(latents.dtype)
        wide = sigma.reshape(-1, *[1] * (latents.ndim - 1))
        return (1 - wide) * latents + wide * noise, sigma * steps, noise - latents
