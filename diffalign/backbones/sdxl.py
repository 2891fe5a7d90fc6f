"""Stable Diffusion XL: base, Turbo and refiner. A UNet with a pooled text embedding and micro-conditioning.

Podell et al. 2023, "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis" (arXiv:2307.01952).
Beside the hidden states of its text encoders the network reads the second encoder's pooled output and a vector of
"time ids" (section 2.2): original size, top left corner of the crop, target size; the refiner reads an aesthetic score
in place of the target size. Here they say that nothing was resized or cropped, original = target = `size` and crop =
(0, 0), for every training image and every drawn one; Diffusion-DPO (arXiv:2311.12908) trained with the same. Training
images of another size (`data.aspect_ratio_buckets`) have their own in place of `size`.

The published autoencoder overflows in half precision: it stays in float32 whatever the denoiser's dtype is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from diffalign.backbones.loading import ModelSource
from diffalign.backbones.sd import UNetPolicy
from diffalign.batches import Conditioning
from diffalign.devices import send

__all__ = ["StableDiffusionXLPolicy", "StableDiffusionXLRefinerPolicy"]

AESTHETIC_SCORE = 6.0
"""What the refiner's pipeline claims of an image that it draws, and Diffusion-DPO of every training image."""
NEGATIVE_AESTHETIC_SCORE = 2.5
"""What the refiner's pipeline claims in its unconditional branch."""


class StableDiffusionXLPolicy(UNetPolicy):
    """A `StableDiffusionXLPipeline` as a policy: SDXL base and SDXL-Turbo.

    The conditioning is {"hidden": [B, 77, 768 + 1280], "pooled": [B, 1280]}; the time ids follow from `size`.

    The empty prompt, to which dropped captions are set in training, is encoded like any other, as the released
    Diffusion-DPO code does. Guidance has an unconditional branch of its own where the pipeline's configuration has
    `force_zeros_for_empty_prompt` (base and Turbo): all zeros, hidden and pooled; see `encode_unconditional`.

    SDXL-Turbo (Sauer et al. 2023, arXiv:2311.17042) is known by its scheduler, an ancestral Euler sampler with trailing
    steps; its defaults are four steps, the ones its timestep law trains, and no guidance.
    """

    encoder_parts = ("vae", "text_encoder", "text_encoder_2")
    any_size = True
    load_options: Mapping[str, Any] = {"add_watermarker": False}  # type: ignore[misc]  # rewards would see the mark
    guidance_scale = 5.0
    num_inference_steps = 50

    def _configure(self, size: tuple[int, int] | None, num_frames: int | None) -> None:
        scheduler = self.pipeline.scheduler
        if "beta_schedule" not in scheduler.config:
            raise ValueError(
                f"{self.source.name}: expected a scheduler with a table of betas, found {type(scheduler).__name__}; "
                "models in another parametrisation (EDM) are not supported as Stable Diffusion XL"
            )
        super()._configure(size, num_frames)
        self.max_tokens = min(int(tokenizer.model_max_length) for tokenizer in self._tokenizers())
        trailing = scheduler.config.get("timestep_spacing") == "trailing"
        if type(scheduler).__name__ == "EulerAncestralDiscreteScheduler" and trailing:
            self.guidance_scale, self.num_inference_steps = 1.0, 4  # guidance is off at 1, as at the model card's 0

    def _tokenizers(self) -> list[Any]:
        found = [self.pipeline.tokenizer, self.pipeline.tokenizer_2]
        return [tokenizer for tokenizer in found if tokenizer is not None]

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, special ones included, before any cut; the larger count of the two tokenizers."""
        counts = [t(list(prompts), truncation=False, verbose=False).input_ids for t in self._tokenizers()]
        return [max(len(ids) for ids in rows) for rows in zip(*counts, strict=True)]

    def _embed(self, prompts: list[str]) -> Mapping[str, Tensor]:
        hidden, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, do_classifier_free_guidance=False
        )
        return {"hidden": hidden, "pooled": pooled}

    def unconditional(self, empty: Conditioning) -> Conditioning:
        """The pipeline's negative branch: zeros where it forces them, else the encoded empty prompt."""
        tensors = empty.tensors
        if self.pipeline.config.force_zeros_for_empty_prompt:
            tensors = {**tensors, **{name: torch.zeros_like(tensors[name]) for name in ("hidden", "pooled")}}
        return Conditioning(tensors)

    def _encoding_settings(self) -> Mapping[str, Any]:
        return {"empty_prompt": "encoded"}  # it was zeros once: caches of that time must not be taken for new ones

    def _forward(self, module: Any, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        tensors = conditioning.tensors
        output: Tensor = module(
            noisy_latents,
            timesteps,
            tensors["hidden"],
            added_cond_kwargs={
                "text_embeds": tensors["pooled"],
                "time_ids": self._time_ids(conditioning, self._size_of(noisy_latents)),
            },
            return_dict=False,
        )[0]
        return output

    def _size_of(self, latents: Tensor) -> tuple[int, int]:
        """Height and width in pixels of what latents [B, C, h, w] stand for."""
        if tuple(latents.shape[1:]) == self.latent_shape:
            return self.size  # whose sides need not be multiples of the factor
        factor = int(self.pipeline.vae_scale_factor)
        return latents.shape[-2] * factor, latents.shape[-1] * factor

    def _time_ids(self, conditioning: Conditioning, size: tuple[int, int] | None = None) -> Tensor:
        """(height, width, top, left, height, width) in pixels, [B, 6], float32: half precision would round sizes.

        Args:
            conditioning: B rows.
            size: Height and width; None takes `self.size`.
        """
        height, width = size or self.size
        pooled = conditioning.tensors["pooled"]
        ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
        return send(ids, pooled.device).expand(len(pooled), -1)

    def _latent_statistics(self) -> tuple[float | Tensor, float | Tensor]:
        """The scaling factor, and the statistics per channel where the autoencoder's configuration has them."""
        config = self._encoder("vae").config
        if config.latents_mean is None or config.latents_std is None:
            return super()._latent_statistics()
        mean, std = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))
        return mean, float(config.scaling_factor) / std


class StableDiffusionXLRefinerPolicy(StableDiffusionXLPolicy):
    """A `StableDiffusionXLImg2ImgPipeline` as a policy: the SDXL refiner, with the second text encoder only.

    The conditioning is {"hidden": [B, 77, 1280], "pooled": [B, 1280], "aesthetic_score": [B, 1]}; the last is left out
    for models without `requires_aesthetics_score` in their pipeline's configuration, which read six time ids.

    Every prompt has the score 6, the empty one too, as in Diffusion-DPO's training; the pipeline's unconditional branch
    has 2.5. The refiner improves images and draws none from noise: `refine` takes the place of `sample`.
    Train it with `timestep_sampling: refiner`, the lowest-noise fifth that it knows.
    """

    def _embed(self, prompts: list[str]) -> Mapping[str, Tensor]:
        tensors = dict(super()._embed(prompts))
        if self.pipeline.config.requires_aesthetics_score:
            tensors["aesthetic_score"] = torch.full((len(prompts), 1), AESTHETIC_SCORE, device=self.device)
        return tensors

    def unconditional(self, empty: Conditioning) -> Conditioning:
        """The pipeline's negative branch, which claims a low score; see `StableDiffusionXLPolicy`."""
        tensors = dict(super().unconditional(empty).tensors)
        if "aesthetic_score" in tensors:
            tensors["aesthetic_score"] = torch.full_like(tensors["aesthetic_score"], NEGATIVE_AESTHETIC_SCORE)
        return Conditioning(tensors)

    @classmethod
    def check_sampling(cls, source: ModelSource) -> NoReturn:
        """Refuses: a refiner starts from images.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"{source.name}: a refiner cannot draw from noise; draw with the base model's policy and give its "
            "images to refine(images, prompts, seeds)"
        )

    def _encoding_settings(self) -> Mapping[str, Any]:
        scored = bool(self.pipeline.config.requires_aesthetics_score)
        return {**super()._encoding_settings(), "requires_aesthetics_score": scored}

    def _time_ids(self, conditioning: Conditioning, size: tuple[int, int] | None = None) -> Tensor:
        """(height, width, top, left, aesthetic score), [B, 5], float32; the base's six for models without a score."""
        ids, score = super()._time_ids(conditioning, size), conditioning.tensors.get("aesthetic_score")
        return ids if score is None else torch.cat([ids[:, :4], score.float()], dim=1)

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
        """Refuses, see `check_sampling`."""
        self.check_sampling(self.source)

    @torch.no_grad()
    def refine(
        self,
        images: Tensor,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        strength: float = 0.3,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        reference: bool = False,
        negative: bool = False,
    ) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], float32 on the CPU: noised a little and denoised by the diffusers pipeline.

        Args:
            images: [B, 3, H, W] in [0, 1], for example what the base model's policy drew.
            prompts: One per image.
            seeds: One per image; see `Policy.sample`.
            strength: Share of the steps that is run, in (0, 1]; at 1 nothing of the image is left.
            guidance_scale: None takes the family's own.
            num_inference_steps: Of the whole path, of which `strength` is run; None takes the family's own.
            reference: Draw with the frozen reference's weights.
            negative: Let the unconditional branch use the negative model's, see `put_negative`.

        Raises:
            ValueError: If the shapes do not fit, or no step would be run.
        """
        if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(prompts):
            raise ValueError(f"expected images [{len(prompts)}, 3, H, W], one per prompt, got {list(images.shape)}")
        steps = num_inference_steps or self.num_inference_steps
        if not 0 < strength <= 1 or int(steps * strength) < 1:
            raise ValueError(f"expected a strength in (0, 1] that leaves at least one of {steps} steps, got {strength}")
        guidance = self.guidance_scale if guidance_scale is None else guidance_scale
        arguments = {"image": images, "strength": strength, "guidance_scale": guidance}
        return self._draw(prompts, seeds, steps, arguments, reference=reference, negative=negative)
