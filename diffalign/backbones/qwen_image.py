"""Qwen-Image: a flow transformer on 2x2 patches of a video autoencoder's latents, told by a vision-language model.

Wu et al. 2025, "Qwen-Image Technical Report" (arXiv:2508.02324). The network reads t / 1000 and predicts noise - x0.
The autoencoder is made for videos: an image is a clip of one frame, and its latents have a mean and a deviation per
channel. Guidance is "true" guidance: two forward passes, and the result is scaled back to the conditional one's length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle

from diffalign.backbones.base import JOINT_ATTENTION, PipelinePolicy
from diffalign.backbones.options import PromptTemplate, TokenOptions
from diffalign.backbones.trained_weights import ADAPTER
from diffalign.batches import Conditioning

__all__ = ["QwenImagePolicy"]

UNCONDITIONAL = " "
"""What the published examples give as the negative prompt; the empty prompt stands for it here."""
UNREAD = ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "txt_mlp")
"""Parts of the last block whose output nothing reads: the text stream ends there."""


class QwenImageOptions(TokenOptions):
    """What Qwen-Image can be told.

    Attributes:
        prompt_template: Chat around every prompt; its opening is cut from the embeddings.
    """

    prompt_template: PromptTemplate | None = None


class QwenImagePolicy(PipelinePolicy):
    """A `QwenImagePipeline` as a policy; `guidance_scale` is the pipeline's `true_cfg_scale`.

    The conditioning is {"hidden": [B, 512, width], "mask": [B, 512]}, the mask true at real tokens, which come first.
    The template's opening, the same for every prompt, is cut off as the pipeline does.
    """

    Options = QwenImageOptions
    half_precision_text = True
    lora_targets = JOINT_ATTENTION
    guides = "twice"
    guidance_scale = 4.0
    num_inference_steps = 50
    max_sequence_length = 512
    """Tokens of the prompt that are kept, the template's end included; the default of the pipeline's call."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # They would get no gradient, and distributed training waits for the gradient of everything that asks for one.
        if self._frozen is not None:
            for name in UNREAD:
                self.denoiser.transformer_blocks[-1].get_submodule(name).requires_grad_(False)

    def _configure(self, size: tuple[int, int] | None, num_frames: int | None) -> None:
        self.patch_size = int(self.denoiser.config.patch_size)
        factor = int(self.pipeline.vae_scale_factor)
        side = int(self.pipeline.default_sample_size) * factor
        self.size = size or (side, side)
        multiple = factor * self.patch_size
        if any(length % multiple for length in self.size):
            raise ValueError(f"size must be multiples of {multiple} pixels here, got {self.size}; choose another")
        channels = int(self.denoiser.config.in_channels) // self.patch_size**2
        self.latent_shape = (channels, self.size[0] // factor, self.size[1] // factor)
        self.schedule = self._flow_schedule(self.latent_shape[1] * self.latent_shape[2] // self.patch_size**2)
        self.max_sequence_length = self.options.max_sequence_length or self.max_sequence_length
        self.max_tokens = self.max_sequence_length
        template = self.options.prompt_template
        if template is not None:
            self.pipeline.prompt_template_encode = template.template
            self.pipeline.prompt_template_encode_start_idx = template.crop_start

    # --- prompts -----------------------------------------------------------------------------------------------------

    def _embed(self, prompts: list[str]) -> Mapping[str, Tensor]:
        hidden, mask = self.pipeline.encode_prompt(
            [prompt or UNCONDITIONAL for prompt in prompts],
            device=self.device,
            max_sequence_length=self.max_sequence_length,
        )
        if mask is None:  # the pipeline's way to say that no row has padding
            mask = hidden.new_ones(hidden.shape[:2], dtype=torch.bool)
        missing = self.max_sequence_length - hidden.shape[1]
        return {"hidden": pad(hidden, (0, 0, 0, missing)), "mask": pad(mask.bool(), (0, missing))}

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt and of the template's end, without its opening, before any cut."""
        template, opening = self.pipeline.prompt_template_encode, self.pipeline.prompt_template_encode_start_idx
        texts = [template.format(prompt or UNCONDITIONAL) for prompt in prompts]
        return [len(ids) - opening for ids in self.pipeline.tokenizer(texts, truncation=False, verbose=False).input_ids]

    def _encoding_settings(self) -> Mapping[str, Any]:
        return {
            "max_sequence_length": self.max_sequence_length,
            "template": self.pipeline.prompt_template_encode,
            "crop_start": self.pipeline.prompt_template_encode_start_idx,
            "unconditional": UNCONDITIONAL,
        }

    # --- autoencoder -------------------------------------------------------------------------------------------------

    def _latent_statistics(self) -> tuple[float | Tensor, float | Tensor]:
        config = self._encoder("vae").config
        mean, std = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
        return mean.reshape(1, -1, 1, 1), 1 / std.reshape(1, -1, 1, 1)

    def _raw_moments(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = super()._raw_moments(vae, pixels.unsqueeze(2))
        return mean.squeeze(2), std.squeeze(2)

    def _pixels(self, vae: Any, latents: Tensor) -> Tensor:
        return super()._pixels(vae, latents.unsqueeze(2)).squeeze(2)

    # --- denoiser ----------------------------------------------------------------------------------------------------

    def _forward(self, module: Any, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        hidden, mask = conditioning.tensors["hidden"], conditioning.tensors["mask"]
        shortest, longest = min(conditioning.lengths), max(conditioning.lengths)
        # padding that every row has costs time and says nothing
        hidden, mask = hidden[:, :longest], mask[:, :longest]
        height, width = (length // self.patch_size for length in noisy_latents.shape[-2:])
        patches = pixel_unshuffle(noisy_latents, self.patch_size).flatten(2).transpose(1, 2)
        output = module(
            hidden_states=patches,
            timestep=timesteps.float()
            / 1000,  # the network multiplies by 1000 again, whatever the scheduler's number of steps
            encoder_hidden_states=hidden,
            encoder_hidden_states_mask=None if shortest == longest else mask,
            img_shapes=[[(1, height, width)]] * len(patches),
            return_dict=False,
        )[0]
        return pixel_shuffle(output.transpose(1, 2).unflatten(2, (height, width)), self.patch_size)

    def _inject(self, settings: LoraConfig, name: str = ADAPTER) -> None:
        """Spells the targets out as full names, without the layers that nothing reads; see `UNREAD`.

        Full names, because peft's `exclude_modules` travels in the LoRA file and warns whoever loads it.
        """
        last = f"transformer_blocks.{len(self.denoiser.transformer_blocks) - 1}."
        unread = tuple(last + name for name in UNREAD)
        targets = tuple(f".{target}" for target in settings.target_modules or ())
        found = {layer for layer, _ in self.denoiser.named_modules() if f".{layer}".endswith(targets)}
        settings.target_modules = {layer for layer in found if not layer.startswith(unread)} or settings.target_modules
        super()._inject(settings, name)

    # --- sampling ----------------------------------------------------------------------------------------------------

    def _sampling_arguments(self, guidance_scale: float) -> dict[str, Any]:
        arguments = super()._sampling_arguments(guidance_scale)
        arguments["true_cfg_scale"] = arguments.pop("guidance_scale")  # that name is for distilled models there
        arguments["max_sequence_length"] = self.max_sequence_length
        if guidance_scale > 1:  # without a negative prompt the pipeline would not guide; one serves the whole batch
            arguments["negative_prompt"] = UNCONDITIONAL
        return arguments

    def _prompt_arguments(self, prompts: Sequence[str], arguments: Mapping[str, Any]) -> dict[str, Any]:
        named = super()._prompt_arguments(prompts, arguments) | {"negative_prompt": None}
        guided = arguments["true_cfg_scale"] > 1  # else the pipeline complains of negative embeddings
        return {name: value for name, value in named.items() if guided or not name.startswith("negative_")}

    def _ready(self, embedded: Mapping[str, Tensor]) -> dict[str, Any]:
        longest = int(embedded["mask"].sum(dim=1).max())  # as in `_forward`
        return {
            "prompt_embeds": embedded["hidden"][:, :longest],
            "prompt_embeds_mask": embedded["mask"][:, :longest],
        }
