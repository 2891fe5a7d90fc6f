"""What an architecture is: a denoiser, what it is fed, and the models that stand around it in its pipeline.

Those that are published are in `benchmarks/published_widths.py`, small ones of the same families in
`benchmarks/tiny_widths.py`, and `benchmarks/building.py` makes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

import diffalign as da

CLIP_TOKENS = 77


@dataclass(frozen=True)
class Part:
    """One model of a pipeline.

    Attributes:
        kind: Its class: in transformers for text encoders, in diffusers for everything else.
        config: Arguments of that class, or of its configuration's.
    """

    kind: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Architecture:
    """A denoiser and what it is fed.

    Attributes:
        name: Model and side in pixels.
        family: Class of its pipeline, a key of `diffalign.backbones.loading.FAMILIES`.
        denoiser: What is trained.
        scheduler: Of its pipeline.
        autoencoder: For the plain step.
        text_encoders: Name in the pipeline -> model, likewise.
        latents: Shape of one latent, [C, h, w] or [C, t, h, w].
        conditioning: Shape of one prompt's embeddings, by name.
        pairs: Mode -> pairs of a step that one GPU of 140 GB should hold; without modes that it cannot train.
        forward_tflop: Of one sample through the denoiser, as the performance goals count it; None takes what
            `benchmarks.accounting.count_tflop` finds.
        checkpointed: Whether activations are recomputed, without which a pair does not fit.
    """

    name: str
    family: str
    denoiser: Part
    scheduler: Part
    autoencoder: Part
    text_encoders: Mapping[str, Part]
    latents: tuple[int, ...]
    conditioning: Mapping[str, tuple[int, ...]]
    pairs: Mapping[str, int]
    forward_tflop: float | None = None
    checkpointed: bool = False

    @property
    def is_unet(self) -> bool:
        """Whether its denoiser has convolutions that a memory format can help."""
        return self.denoiser.kind.startswith("UNet")

    @property
    def repeats_blocks(self) -> bool:
        """Whether diffusers says which blocks of its denoiser can be compiled alone; of SD3's it does not."""
        return bool(getattr(diffusers, self.denoiser.kind)._repeated_blocks)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels: all these autoencoders shrink eight times."""
        return self.latents[-2] * 8, self.latents[-1] * 8

    @property
    def frames(self) -> int | None:
        """Of a video whose autoencoder joins four frames after the first; None for images."""
        return 4 * (self.latents[1] - 1) + 1 if len(self.latents) == 4 else None

    @property
    def pixels(self) -> tuple[int, ...]:
        """Shape of one picture, [3, H, W], or video, [3, T, H, W]."""
        frames = () if self.frames is None else (self.frames,)
        return 3, *frames, *self.size

    def embeddings(self) -> dict[str, Tensor]:
        """Random embeddings of one prompt, one row each, float32."""
        draw = da.generator("benchmark", "text")
        return {name: torch.randn((1, *shape), generator=draw) for name, shape in self.conditioning.items()}
