"""AnimateDiff: a Stable Diffusion UNet with motion modules between its layers, which see all frames of a video.

Guo et al. 2023, "AnimateDiff: Animate Your Personalized Text-to-Image Diffusion Models without Specific Tuning"
(arXiv:2307.04725). What is loaded is a saved `AnimateDiffPipeline`; a Stable Diffusion 1.5 folder and a motion adapter
become one in three lines:

    adapter = MotionAdapter.from_pretrained("guoyww/animatediff-motion-adapter-v1-5-2")
    pipeline = AnimateDiffPipeline.from_pretrained(sd15, motion_adapter=adapter, scheduler=scheduler)
    pipeline.save_pretrained(folder)

with `scheduler = DDIMScheduler.from_pretrained(sd15, subfolder="scheduler", beta_schedule="linear", clip_sample=False,
timestep_spacing="linspace", steps_offset=1)`: the motion modules were trained with linear betas, Stable Diffusion's own
scheduler has others, and the noise of training follows the folder.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from diffalign.backbones.loading import ModelSource
from diffalign.backbones.sd import UNetPolicy
from diffalign.backbones.trained_weights import ADAPTER
from diffalign.batches import Conditioning

__all__ = ["AnimateDiffPolicy"]

MOTION_TARGETS = tuple(f"motion_modules.*.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0"))
"""`LoRA.target_modules` that train the motion modules only and leave the image model as it is."""
FRAMES_AT_ONCE = 16
"""Frames that go through the image autoencoder together, as in the pipeline's own decoding."""


class VideoUNetPolicy(UNetPolicy):
    """What video UNets share: latents [B, C, T, h, w], and an image autoencoder that sees one frame at a time.

    The conditioning is {"hidden": [B, tokens, width]}.
    """

    is_video = True
    frame_rate = 8.0
    num_inference_steps = 50

    def _configure(self, size: tuple[int, int] | None, num_frames: int | None) -> None:
        super()._configure(size, num_frames)
        self.num_frames = num_frames or self._usual_frames()
        channels, height, width = self.latent_shape
        self.latent_shape = (channels, self.num_frames, height, width)

    def _usual_frames(self) -> int:
        """The pipelines' default; no configuration names it."""
        return 16

    def _embed(self, prompts: list[str]) -> Mapping[str, Tensor]:
        hidden, _ = self.pipeline.encode_prompt(prompts, self.device, 1, False)
        return {"hidden": hidden}

    def _raw_moments(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        def moments(images: Tensor) -> Tensor:
            posterior = vae.encode(images).latent_dist
            return torch.stack((posterior.mean, posterior.std), dim=1)

        mean, std = _frame_by_frame(moments, pixels).unbind(1)
        return mean, std

    def _pixels(self, vae: Any, latents: Tensor) -> Tensor:
        return _frame_by_frame(lambda frames: vae.decode(frames, return_dict=False)[0], latents)


class AnimateDiffPolicy(VideoUNetPolicy):
    """An `AnimateDiffPipeline` as a policy.

    LoRA goes into all attention projections, those of the image model and of the motion modules; a `*` in
    `LoRA.target_modules` stands for any part of a layer's name, so `MOTION_TARGETS` keeps to the motion modules.
    """

    def __init__(self, pipeline: Any, source: ModelSource, **options: Any) -> None:
        if pipeline.motion_adapter is None and source.parts.get("unet") == "UNet2DConditionModel":
            raise ValueError(
                f"{source.name}: the folder has an image UNet and no motion adapter, so the motion modules would be "
                "random; expected a saved AnimateDiffPipeline, or a motion_adapter folder beside the unet"
            )
        pipeline.register_modules(motion_adapter=None)  # the UNet has its own copy of these weights
        super().__init__(pipeline, source, **options)

    def _configure(self, size: tuple[int, int] | None, num_frames: int | None) -> None:
        super()._configure(size, num_frames)
        longest = int(self.denoiser.config.motion_max_seq_length)
        if self.num_frames > longest:
            raise ValueError(
                f"num_frames: the motion modules know positions of {longest} frames, got {self.num_frames}; "
                f"use at most {longest}"
            )

    def _usual_frames(self) -> int:
        """The pipeline's default, or as many as the motion modules know positions of."""
        return min(16, int(self.denoiser.config.motion_max_seq_length))

    def _inject(self, settings: LoraConfig, name: str = ADAPTER) -> None:
        settings.target_modules = set(_layers(self.denoiser, settings.target_modules or ()))
        super()._inject(settings, name)

    def _forward(self, module: Any, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        # the UNet folds frames into the batch and repeats the time embedding by itself, but not the text
        hidden = conditioning.tensors["hidden"].repeat_interleave(noisy_latents.shape[2], dim=0)
        output: Tensor = module(noisy_latents, timesteps, hidden, return_dict=False)[0]
        return output


def _frame_by_frame(call: Callable[[Tensor], Tensor], videos: Tensor) -> Tensor:
    """`call` on frames [N, C, H, W] of videos [B, C, T, H, W]; its results [N, ..., h, w] as [B, ..., T, h, w]."""
    batch, _, frames = videos.shape[:3]
    images = videos.transpose(1, 2).flatten(0, 1)
    results = torch.cat([call(chunk) for chunk in torch.split(images, FRAMES_AT_ONCE)])
    return results.reshape(batch, frames, *results.shape[1:]).movedim(1, -3)


def _layers(model: nn.Module, names: Collection[str]) -> list[str]:
    """Names as peft reads them, ends of layers' names, with every name that has a `*` replaced by what it matches.

    peft itself knows such patterns only as one regular expression, which its lists cannot hold.
    """
    layers: list[str] = []
    for name in names:
        matches = [full for full, _ in model.named_modules() if fnmatchcase(f".{full}", f"*.{name}")]
        if "*" in name and not matches:
            raise ValueError(f"lora.target_modules: {name!r} matches no layer of {type(model).__name__}")
        layers += matches if "*" in name else [name]
    return layers
