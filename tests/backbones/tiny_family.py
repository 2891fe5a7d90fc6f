"""What tests of every family share: its folder, policies of it, and pairs to train on."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from diffalign.backbones import LoRA, load_policy
from diffalign.batches import PairBatch
from diffalign.randomness import Draw
from tests.backbones.families import PROMPTS, Family

STEPS = 3


class Tiny:
    """One family's folder, its plain policy, a trained one with its adapter's file, and fresh ones."""

    def __init__(self, family: Family, folder: Path) -> None:
        self.family, self.folder, self.adapter = family, folder / "pipeline", folder / "adapter"
        family.save(self.folder)
        self.base = self.load()
        self._drawn: dict[float, Tensor] = {}

    def load(self, **how: Any) -> Any:
        video = {"num_frames": self.family.num_frames} if self.family.num_frames > 1 else {}
        return load_policy(str(self.folder), size=self.family.size, options=self.family.options, **video, **how)

    @functools.cached_property
    def trained(self) -> Any:
        """A policy whose adapter is not the reference any more, as it was saved in `adapter`; not to be changed."""
        policy = self.load(lora=LoRA(rank=2, alpha=6.0), train=True)
        move_away(policy)
        policy.save_trained(self.adapter)
        return policy

    def drawn(self, guidance: float) -> Tensor:
        """What the plain policy draws for `PROMPTS` with seeds 0, 1."""
        if guidance not in self._drawn:
            options = {"guidance_scale": guidance, "num_inference_steps": STEPS}
            self._drawn[guidance] = self.sample(self.base, PROMPTS, [0, 1], **options)
        return self._drawn[guidance]

    def pipeline(self) -> Any:
        kind = getattr(diffusers, self.family.pipeline_class)
        pipeline = kind.from_pretrained(self.folder, dtype=torch.float32, **self.family.load)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def draw(self, pipeline: Any, guidance: float) -> Tensor:
        """What the plain pipeline draws for `PROMPTS` with seeds 0, 1."""
        family = self.family
        frames = {"num_frames": family.num_frames} if family.num_frames > 1 else {}
        start = {"height": family.size[0], "width": family.size[1]}
        if family.refines:
            start = {**family.refines, "image": family.refines["image"].expand(len(PROMPTS), -1, -1, -1)}
        output = pipeline(
            prompt=list(PROMPTS),
            **start,
            generator=[torch.Generator().manual_seed(i) for i in range(len(PROMPTS))],
            num_inference_steps=STEPS,
            output_type="pt",
            **{family.guidance_argument: guidance},
            **frames,
            **family.call,
        )
        media: Tensor = output.frames if family.num_frames > 1 else output.images
        return media

    def sample(self, policy: Any, prompts: Sequence[str], seeds: Sequence[int], **options: Any) -> Tensor:
        """What the policy draws, from noise or from the family's image."""
        if not self.family.refines:
            return torch.as_tensor(policy.sample(prompts, seeds, **options))
        images = self.family.refines["image"].expand(len(prompts), -1, -1, -1)
        return torch.as_tensor(
            policy.refine(images, prompts, seeds, strength=self.family.refines["strength"], **options)
        )

    def media(self, count: int = 2) -> Tensor:
        """Smooth random pixels in [0, 1]: [B, 3, H, W] or [B, T, 3, H, W]."""
        frames = (self.family.num_frames,) if self.family.num_frames > 1 else ()
        return torch.rand((count, *frames, 3, *self.family.size), generator=torch.Generator().manual_seed(1))

    def latents(self, count: int = 2) -> Tensor:
        return torch.randn((count, *self.family.latent_shape), generator=torch.Generator().manual_seed(2))

    def batch(self, policy: Any, count: int = 2) -> PairBatch:
        draws = tuple(Draw(0, 0, f"pair-{i}") for i in range(count))
        conditioning = policy.encode_prompts(PROMPTS[:count])
        return PairBatch(conditioning, self.latents(count), self.latents(count).flip(0), torch.ones(count), draws)


def move_away(policy: Any, scale: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in policy.named_trainable():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
