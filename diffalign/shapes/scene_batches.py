"""Encoded scenes, and random batches of them: what the denoisers of the embedded world are trained on."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from diffalign.shapes import networks
from diffalign.shapes.scenes import degrade, draw_scene, render
from diffalign.shapes.stages import PromptSampler, generators, to_pixels


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, work: Path, seed: int, count: int, *, poor: bool = False
                  ) -> tuple[Tensor, list[str]]:  # fmt: skip
    """Posterior means and deviations, [count, 16, 8, 8], of tidy scenes of the training prompts, and the prompts.

    With `poor`, every scene is drawn badly, see `degrade`.
    """
    path = work / ("poor_scenes.pt" if poor else "tidy_scenes.pt")
    if path.exists():
        state = torch.load(path, weights_only=True)
        return state["moments"], state["texts"]
    draw = PromptSampler()
    moments, texts = [], []
    for start in tqdm(range(0, count, 100), desc=f"encode {path.stem}", unit="batch", mininterval=5):
        generator, _ = generators(seed, 7 if poor else 6, start)
        chosen = [draw(generator) for _ in range(100)]
        pictures = []
        for prompt in chosen:
            picture = render(draw_scene(prompt, generator, tidy=True))
            pictures.append(degrade(picture, generator) if poor else picture)
        posterior = vae.encode(to_pixels(pictures)).latent_dist
        moments.append(torch.cat([posterior.mean, posterior.std], dim=1))
        texts += [p.text for p in chosen]
    state = {"moments": torch.cat(moments), "texts": texts}
    torch.save(state, path)
    return state["moments"], texts


class SceneBatches:
    """Latents and token ids of random scenes.

    Args:
        clean: Latent moments [N, 16, 8, 8] and prompts of well-drawn scenes.
        poor: The same of badly drawn ones.
        scaling: The autoencoder's scaling factor.
        shift: The autoencoder's shift factor, taken away before scaling.
    """

    def __init__(self, clean: tuple[Tensor, list[str]], poor: tuple[Tensor, list[str]], scaling: float,
                 shift: float = 0.0) -> None:  # fmt: skip
        self.counts = len(clean[1]), len(poor[1])
        self.mean, self.std = torch.cat([clean[0], poor[0]]).chunk(2, dim=1)
        tokenizer = networks.build_tokenizer()  # of their own: padding leaves its mark on the one that is saved
        self.told, self.empty = (
            tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
            for texts in (clean[1] + poor[1], [""])
        )
        self.scaling, self.shift = scaling, shift

    def draw(self, generator: torch.Generator, share: float, size: int) -> tuple[Tensor, Tensor]:
        """Scaled latents [size, 8, 8, 8], each of a poor drawing with probability `share`, and their rows [size]."""
        clean, poor = (torch.randint(n, (size,), generator=generator) for n in self.counts)
        rows = torch.where(torch.rand(size, generator=generator) < share, self.counts[0] + poor, clean)
        mean = self.mean[rows]
        latents = mean + self.std[rows] * torch.randn(mean.shape, generator=generator)
        return (latents - self.shift) * self.scaling, rows

    def ids(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Token ids of the rows' prompts, [size, 20]; a tenth without its prompt."""
        dropped = torch.rand(len(rows), 1, generator=generator) < 0.1
        return torch.where(dropped, self.empty, self.told[rows])
