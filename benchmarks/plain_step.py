"""A Diffusion-DPO step as public scripts write it: what a step costs that nobody has thought about.

Pictures are read and encoded, prompts tokenised and encoded at every step; the reference answers in a forward pass of
its own; nothing is compiled, fused or read ahead. The random numbers are those of `diffalign train`, so that both
train the same model on the same pairs and their losses can be compared.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from diffalign.batches import Conditioning
from diffalign.data import PairSource

PARTS = ("images", "text", "reference", "policy", "backward", "optimizer")
"""What a step consists of."""


class PlainStep:
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
        self.alphas_cumprod = torch.as_tensor(self.pipeline.scheduler.alphas_cumprod)
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
        vae, sides = self.pipeline.vae, ("chosen", "rejected")
        with self._clock("images"), torch.no_grad():
            pixels = torch.stack([self._read(row[side]) for side in sides for row in rows])
            posterior = vae.encode(pixels).latent_dist
            fresh = [draw.normal(f"posterior/{side}", posterior.mean.shape[1:]) for side in sides for draw in draws]
            latents = (posterior.mean + posterior.std * torch.stack(fresh)) * vae.config.scaling_factor
        with self._clock("text"), torch.no_grad():
            ids = self.pipeline.tokenizer(
                [row["prompt"] for row in rows], padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids
            hidden = self.pipeline.text_encoder(ids)[0].repeat(2, 1, 1)
        uniform = torch.tensor([draw.uniform("timestep") for draw in draws], dtype=torch.float64)
        timesteps = (uniform * len(self.alphas_cumprod)).long().repeat(2)
        noise = torch.stack([draw.normal("noise", latents.shape[1:]) for draw in draws]).repeat(2, 1, 1, 1)
        kept = self.alphas_cumprod[timesteps][:, None, None, None]
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        with self._clock("reference"), torch.no_grad():
            conditioning = Conditioning({"hidden": hidden})
            reference = self._errors(self.reference.predict(noisy, timesteps, conditioning), noise)
        with self._clock("policy"):
            errors = self._errors(self.policy.predict(noisy, timesteps, conditioning), noise)
            won, lost = (errors - reference).chunk(2)
            loss = -F.logsigmoid(-0.5 * self.beta * (won - lost)).mean()
        with self._clock("backward"):
            loss.backward()  # type: ignore[no-untyped-call]
        with self._clock("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.policy.trainable_parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(float(loss.detach()))

    def _read(self, name: str) -> Tensor:
        with Image.open(self.folder / name) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
        return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)

    @staticmethod
    def _errors(prediction: Tensor, noise: Tensor) -> Tensor:
        return (prediction - noise).square().mean((1, 2, 3))
