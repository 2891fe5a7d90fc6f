"""The model that is trained, behind one interface for every family, and its frozen reference."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from diffalign.batches import Conditioning, Moments
from diffalign.predictions import Prediction
from diffalign.schedules import Schedule
from diffalign.sharding import whole

if TYPE_CHECKING:
    from diffalign.backbones.negative_files import NegativeModel


class Predictor(Protocol):
    """Anything with a denoiser's forward pass: a policy or its frozen reference."""

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's output for noisy latents [B, C, ...] at timesteps [B]; same shape as the latents."""
        ...


class Policy(ABC):
    """A generative model under training: denoiser, autoencoder, text encoder and sampler of one family.

    Attributes:
        schedule: Turns timesteps into (alpha, sigma).
        prediction: What the denoiser's output means.
        denoiser: The module whose weights are trained.
        wrapped: What `predict` calls: the denoiser, or the wrapper that the loop puts around it (DDP, compilation).
        latent_shape: Shape of one latent at `size`, for example (4, 64, 64).
        size: Height and width in pixels of what is encoded and drawn.
        is_video: Whether it draws videos.
        num_frames: Frames of a video; 1 for images.
        frame_rate: Frames per second of its videos, as the family was trained; 0 for images.
        reads_frame_rate: Whether the network is told `frame_rate`.
        any_size: Whether `encode` and `predict` take pictures of other sizes than `size`, for
            `data.aspect_ratio_buckets`.
        autocast: What products of the denoiser, policy and reference, are rounded to; None if to nothing.
        compiled: Backend that the denoiser is compiled with; empty if it is not. Batches of one size are then the fast
            ones.
        forwards: Samples that went through the denoiser so far, of policy and reference; those of `sample` not counted.
        max_tokens: How many tokens the text encoder reads, its special ones included.
        guidance_scale: What the family is usually sampled with, in the terms of its own pipeline.
        num_inference_steps: Likewise.
    """

    schedule: Schedule
    prediction: Prediction
    denoiser: nn.Module
    wrapped: nn.Module
    latent_shape: tuple[int, ...]
    size: tuple[int, int]
    is_video: ClassVar[bool] = False
    num_frames: int = 1
    frame_rate: float = 0.0
    reads_frame_rate: ClassVar[bool] = False
    any_size: ClassVar[bool] = False
    max_tokens: int
    autocast: torch.dtype | None = None
    compiled: str = ""
    forwards: int = 0
    guidance_scale: float
    num_inference_steps: int

    @property
    @abstractmethod
    def resolution(self) -> int:
        """The shorter side of `size`."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Embeddings of B prompts, B rows; "" gives the row that a dropped caption uses."""

    def encode_unconditional(self, count: int) -> Conditioning:
        """`count` rows of what classifier-free guidance contrasts a prompt with, in the family's own pipeline.

        Not always what a dropped caption is in training: SDXL drops to the encoded empty prompt and guides with zeros.
        """
        return self.unconditional(self.encode_prompts([""] * count))

    def unconditional(self, empty: Conditioning) -> Conditioning:
        """`encode_unconditional` from rows of the empty prompt's embeddings; needs no text encoder."""
        return empty

    @abstractmethod
    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt before any cut, special ones included; compare with `max_tokens`."""

    @abstractmethod
    def encode(self, images: Tensor) -> Moments:
        """Posterior moments of the scaled latents of images [B, 3, H, W] in [0, 1], float32.

        Video models take [B, T, 3, H, W] and give moments [B, C, t, h, w].
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] of scaled latents [B, C, h, w]; videos [B, T, 3, H, W] of [B, C, t, h, w]."""

    @abstractmethod
    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's output, with gradient; same shape as `noisy_latents`."""

    @abstractmethod
    def frozen(self) -> Predictor:
        """The reference: the same `predict` with the weights training started from, without gradient."""

    @abstractmethod
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        reference: bool = False,
        negative: bool = False,
    ) -> Tensor:
        """Images [B, 3, H, W], or videos [B, T, 3, H, W], in [0, 1], made by the family's own diffusers pipeline.

        Each image starts from its own generator seeded with `seeds[i]`, so that it does not depend on the batch it
        is made in.
        Guidance and steps are the family's own where they are None.
        With `reference`, the frozen reference's weights are used instead of the policy's; with `negative`, those of
        `put_negative` in the unconditional branch of guidance, whose other branch does not change.
        """

    def sampling_settings(self, guidance_scale: float) -> dict[str, Any]:
        """What `sample` depends on beside weights, prompts, seeds, steps and `guidance_scale`, as JSON values."""
        return {}

    @abstractmethod
    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters an optimizer may change, float32."""

    def trained_state(self) -> dict[str, Tensor]:
        """Copies of the trained parameters by name, on the CPU, float32; see `put_reference`."""
        return {name: whole(parameter).to("cpu", copy=True) for name, parameter in self.named_trainable()}

    def named_trainable(self) -> list[tuple[str, nn.Parameter]]:
        """`trainable_parameters` with their names, in a fixed order."""
        return [(str(number), parameter) for number, parameter in enumerate(self.trainable_parameters())]

    def put_reference(self, state: Mapping[str, Tensor] | None) -> None:
        """Makes the reference what `trained_state` returned, for `frozen()`'s predictors and for `sample`.

        Args:
            state: The trained parameters of the reference; None takes what training started from.
        """
        raise NotImplementedError(f"{type(self).__name__} has one reference only")

    def put_negative(self, model: NegativeModel | str | Path | None, *, alpha: float = 1.0, scale: float = 1.0) -> None:
        """Gives the unconditional branch of guidance weights of its own, for `sample` with `negative`.

        They are base + alpha * (policy - base) + scale * (model - what its training started from), of the policy's
        weights as they are now. See `diffalign.backbones.negative_files`.

        Args:
            model: Weights trained to be disliked, such as the output folder of an `npo` run; None takes them out.
            alpha: Share of what the policy has learnt, in 0..1; 1 minus the "merge weight" of the released scripts.
            scale: Share of what the negative model has learnt, in 0..1.

        Raises:
            ValueError: If the family has no unconditional branch, or the weights are none of this denoiser's.
        """
        if model is not None:
            raise NotImplementedError(f"{type(self).__name__} takes no negative model")

    def negative_fingerprint(self) -> str:
        """A hash of what `put_negative` added to the policy's weights.

        Raises:
            ValueError: If there is none.
        """
        raise NotImplementedError(f"{type(self).__name__} takes no negative model")

    @abstractmethod
    def save_trained(self, folder: Path) -> None:
        """Writes the trained weights as diffusers publishes them: a LoRA file, or the denoiser's folder."""

    @abstractmethod
    def load_trained(self, folder: Path) -> None:
        """Reads what `save_trained` wrote back into the policy."""

    def rest_reference(self) -> None:  # noqa: B027 - most have nothing to do
        """Lets the reference's own weights, if it has any, wait in the CPU's memory until the reference is asked."""

    def reference_fingerprint(self) -> str:
        """A hash of what the reference's answers and their meaning come from: weights, prediction, schedule."""
        raise NotImplementedError(
            f"{type(self).__name__} cannot name its reference, which a cache needs; set trainer.reference to live"
        )

    @abstractmethod
    def encoder_fingerprint(self) -> str:
        """A hash of everything that determines `encode` and `encode_prompts`: weights and configurations."""

    @abstractmethod
    def free_encoders(self) -> None:
        """Drops the autoencoder and text encoder from memory; `reload_encoders` brings them back."""

    @abstractmethod
    def reload_encoders(self) -> None:
        """Loads what `free_encoders` dropped."""
