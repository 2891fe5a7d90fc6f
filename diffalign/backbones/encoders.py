"""The half of a policy that turns images and prompts into tensors and back: autoencoder, text encoders, tokenizers."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffalign.backbones.loading import ModelSource, inner_tokenizer
from diffalign.backbones.prompt_memory import PromptMemory
from diffalign.batches import Conditioning, Moments
from diffalign.policy import Policy
from diffalign.weight_hashes import hash_weights


class Encoders(Policy):
    """Encoding, decoding, the fingerprint of both, and freeing what they need; see `PipelinePolicy`."""

    encoder_parts: ClassVar[tuple[str, ...]] = ("vae", "text_encoder")
    """Attributes that `encode`, `decode` and `encode_prompts` need; freed while training."""
    is_video: ClassVar[bool] = False

    pipeline: Any
    source: ModelSource
    _parts: tuple[str, ...]
    _freed: dict[str, tuple[Any, torch.dtype]]
    _vae_switches: tuple[str, ...]
    _fingerprint: str | None
    _memory: PromptMemory

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the denoiser lives."""

    # --- what a family says ------------------------------------------------------------------------------------------

    @abstractmethod
    def _embed(self, prompts: list[str]) -> Mapping[str, Tensor]:
        """Embeddings of the prompts by the pipeline's own `encode_prompt`, every tensor with B rows."""

    def _latent_statistics(self) -> tuple[float | Tensor, float | Tensor]:
        """(shift, scale) with latents = (raw - shift) * scale, numbers or tensors that broadcast to [B, C, ...]."""
        config = self._encoder("vae").config
        return float(getattr(config, "shift_factor", None) or 0.0), float(config.scaling_factor)

    def _raw_moments(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the autoencoder's own latents of pixels in [-1, 1], [B, 3, H, W] or [B, 3, T, H, W]."""
        posterior = vae.encode(pixels).latent_dist
        return posterior.mean, posterior.std

    def _pixels(self, vae: Any, latents: Tensor) -> Tensor:
        """Pixels in [-1, 1] of the autoencoder's own latents, [B, 3, H, W] or [B, 3, T, H, W]."""
        pixels: Tensor = vae.decode(latents, return_dict=False)[0]
        return pixels

    def _encoding_settings(self) -> Mapping[str, Any]:
        """What else decides `encode` and `encode_prompts`, for the fingerprint; JSON values."""
        return {}

    # --- encoding ----------------------------------------------------------------------------------------------------

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Embeddings of the prompts, floating-point tensors as float32; see the family's `_embed`."""
        return _in_float32(self._embedded(list(prompts)))

    def recall_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """`encode_prompts`, from memory where the same prompts were drawn before; not for prompts that come once."""
        return _in_float32(self._recalled(prompts))

    def encode_unconditional(self, count: int) -> Conditioning:
        """See `Policy.encode_unconditional`; the empty prompt is encoded once."""
        return self.unconditional(self.recall_prompts([""])).repeat(count)

    def _recalled(self, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        """What `_embed` gives, in its own dtypes, from memory where it can be."""
        return self._memory.recall(prompts, self._embedded)

    @torch.no_grad()
    def _embedded(self, prompts: list[str]) -> Mapping[str, Tensor]:
        for part in self._parts:
            if part.startswith("text_encoder"):
                self._encoder(part)
        return self._embed(prompts)

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, special ones included, before any cut."""
        tokenizer = self.pipeline.tokenizer
        return [len(ids) for ids in tokenizer(list(prompts), truncation=False, verbose=False).input_ids]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Moments:
        """Posterior moments of (latents - shift) * scale, float32.

        Args:
            images: [B, 3, H, W] in [0, 1], or videos [B, T, 3, H, W].
        """
        vae = self._encoder("vae")
        pixels = (images * 2 - 1).to(vae.device, vae.dtype)
        if self.is_video:
            pixels = pixels.transpose(1, 2)
        mean, std = self._raw_moments(vae, pixels)
        shift, scale = self._latent_statistics()
        return Moments((mean.float() - _on(shift, mean)) * _on(scale, mean), std.float() * _on(scale, mean))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] or videos [B, T, 3, H, W] in [0, 1], float32."""
        vae = self._encoder("vae")
        shift, scale = self._latent_statistics()
        raw = latents.to(vae.device).float()
        pixels = self._pixels(vae, (raw / _on(scale, raw) + _on(shift, raw)).to(vae.dtype)).float()
        images = (pixels / 2 + 0.5).clamp(0, 1)
        return images.transpose(1, 2) if self.is_video else images

    def _encoder(self, part: str) -> Any:
        module = getattr(self.pipeline, part)
        if module is None:
            raise RuntimeError(f"the {part} was freed; call reload_encoders() first")
        return module

    def encoder_fingerprint(self) -> str:
        """Hash of configurations and weights of autoencoder and text encoders, and of the tokenizers' vocabularies."""
        if self._fingerprint is None:
            digest = hashlib.blake2b(digest_size=16)
            for name, component in sorted(self.pipeline.components.items()):
                tokenizer = inner_tokenizer(component)
                if hasattr(tokenizer, "get_vocab"):
                    digest.update(f"{name} {tokenizer.model_max_length}".encode())
                    digest.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
            digest.update(json.dumps(dict(self._encoding_settings()), sort_keys=True).encode())
            if "enable_tiling" in self._vae_switches:  # latents differ where tiles meet; slices change nothing
                digest.update(b"tiles")
            for part in self._parts:
                module = self._encoder(part)
                config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
                settings = {k: str(v) for k, v in config.items() if k != "_name_or_path"}
                digest.update(f"{part} {json.dumps(settings, sort_keys=True)}".encode())
                hash_weights(digest, sorted(module.state_dict().items()))
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def free_encoders(self) -> None:
        """Drops autoencoder and text encoders; `encode`, `decode` and `encode_prompts` then need `reload_encoders`."""
        self.encoder_fingerprint()
        self._memory.clear()
        for part in self._parts:
            module = getattr(self.pipeline, part)
            if module is not None:
                self._freed[part] = (type(module), module.dtype)
                setattr(self.pipeline, part, None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def reload_encoders(self) -> None:
        """Reads autoencoder and text encoders again if they were freed."""
        for part, (kind, dtype) in self._freed.items():
            module = kind.from_pretrained(
                self.source.location,
                subfolder=part,
                revision=self.source.revision,
                variant=self.source.variant,
                use_safetensors=True,
                dtype=dtype,
            )
            setattr(self.pipeline, part, module.eval().requires_grad_(False).to(self.device))
        if "vae" in self._freed:
            self._switch_vae()
        self._freed.clear()

    def divide_vae(self, *, slicing: bool = False, tiling: bool = False) -> None:
        """Lets the autoencoder work on one picture at a time, or on overlapping tiles of each, to save memory.

        Raises:
            ValueError: If this family's autoencoder cannot.
        """
        wanted = {"enable_slicing": slicing, "enable_tiling": tiling}
        self._vae_switches = tuple(name for name, on in wanted.items() if on)
        self._fingerprint = None
        self._switch_vae()

    def _switch_vae(self) -> None:
        vae = self._encoder("vae")
        for name in self._vae_switches:
            try:
                getattr(vae, name)()
            except (AttributeError, NotImplementedError) as error:
                switch = name.replace("enable", "vae")
                raise ValueError(f"model.{switch}: {type(vae).__name__} cannot do it; leave it out") from error


def _in_float32(tensors: Mapping[str, Tensor]) -> Conditioning:
    return Conditioning({n: t.float() if t.is_floating_point() else t for n, t in tensors.items()})


def _on(value: float | Tensor, like: Tensor) -> float | Tensor:
    return value.to(like.device, torch.float32) if isinstance(value, Tensor) else value
