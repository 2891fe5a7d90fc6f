"""FLUX.2 dev and klein: a flow transformer over normalised 2x2 patches, conditioned on layers of a language model.

Black Forest Labs 2025 and 2026; published as diffusers' `Flux2Pipeline` (Mistral Small 3, embedded guidance) and
`Flux2KleinPipeline` (Qwen3; classifier-free guidance in the base models, none in the distilled ones). The network reads
t in 0..1 and predicts noise - x0. Three hidden layers of the language model, side by side, are the text; image and text
positions have four columns (frame, row, column, place in the text).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from peft import LoraConfig
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from diffalign.backbones.base import JOINT_ATTENTION, PipelinePolicy
from diffalign.backbones.flux import (
    PATCH,
    TIME_UNITS,
    FluxOptions,
    embedded,
    image_size,
    positions,
    tokens,
    untokens,
)
from diffalign.backbones.loading import LoRA, ModelSource, read_index
from diffalign.backbones.negative import Guides
from diffalign.batches import Conditioning

__all__ = ["Flux2KleinPolicy", "Flux2Policy"]


class Flux2Policy(PipelinePolicy):
    """A `Flux2Pipeline` as a policy.

    The conditioning is {"hidden": [B, 512, 3 * width]}, padding included: the network attends to it, no mask exists.

    Latents are what the scheduler sees, as [B, 4C, h / 2, w / 2]: the autoencoder's C channels folded in 2x2 patches
    and normalised channel by channel with the statistics of its batch norm. These differ within a patch, so noise is
    added after the folding, not before.

    Attributes:
        embedded_guidance: The guidance scale that dev's network is told in `predict`, for policy and reference alike.
            The default, 4.0, is what dev is sampled with. Official fine-tuning scripts take values from 1.0 to 3.5:
            `model.options.embedded_guidance`. Sampling has its own `guidance_scale`. Klein's network has no such input.
    """

    Options = FluxOptions
    half_precision_text = True
    lora_targets = (*JOINT_ATTENTION, "attn.to_qkv_mlp_proj")
    guides: ClassVar[Guides] = "never"
    guidance_scale = 4.0
    num_inference_steps = 50
    embedded_guidance = 4.0

    def _configure(self, size: tuple[int, int] | None, num_frames: int | None) -> None:
        self.size = image_size(self.pipeline, size)
        factor = int(self.pipeline.vae_scale_factor) * PATCH
        self.latent_shape = (int(self.denoiser.config.in_channels), self.size[0] // factor, self.size[1] // factor)
        self.schedule = self._flow_schedule(self.latent_shape[1] * self.latent_shape[2])
        self.max_tokens = self.options.max_sequence_length or int(self.pipeline.tokenizer_max_length)
        if self.options.embedded_guidance is not None:
            self.embedded_guidance = self.options.embedded_guidance

    def _dynamic_shift(self, tokens: int) -> float:
        """FLUX.2's own: a formula fitted to lengths and numbers of steps, here the family's usual number."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return math.exp(compute_empirical_mu(tokens, self.num_inference_steps))

    def _adapter_settings(self, lora: LoRA) -> LoraConfig:
        """Adds the output projection of the single blocks to the family's layers.

        It is named `attn.to_out`, which in the double blocks is a list: only full names tell them apart.
        """
        if lora.target_modules is None:
            blocks = range(int(self.denoiser.config.num_single_layers))
            outputs = (f"single_transformer_blocks.{i}.attn.to_out" for i in blocks)
            lora = dataclasses.replace(lora, target_modules=(*self.lora_targets, *outputs))
        return super()._adapter_settings(lora)

    # --- text --------------------------------------------------------------------------------------------------------

    def _encoding_settings(self) -> Mapping[str, Any]:
        # The texts around the prompt: they change embeddings as weights do.
        return {
            "chat_template": self.pipeline.tokenizer.chat_template,
            "system_message": getattr(self.pipeline, "system_message", None),
            "max_sequence_length": self.max_tokens,
        }

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt with the system message and the chat template around it, before any cut."""
        return [self._token_count(prompt) for prompt in prompts]

    def _token_count(self, prompt: str) -> int:
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        inputs = self.pipeline.tokenizer.apply_chat_template(
            format_input(prompts=[prompt], system_message=self.pipeline.system_message),
            add_generation_prompt=False,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        return int(inputs["input_ids"].shape[-1])

    def _embed(self, prompts: list[str]) -> Mapping[str, Tensor]:
        hidden, _ = self.pipeline.encode_prompt(prompts, device=self.device, max_sequence_length=self.max_tokens)
        return {"hidden": hidden}

    # --- images ------------------------------------------------------------------------------------------------------

    def _latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Running mean and inverse deviation of the autoencoder's batch norm, [1, 4C, 1, 1]."""
        vae = self._encoder("vae")
        mean, variance = (t.float().reshape(1, -1, 1, 1) for t in (vae.bn.running_mean, vae.bn.running_var))
        return mean, (variance + float(vae.config.batch_norm_eps)).rsqrt()

    def _raw_moments(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = vae.encode(pixels).latent_dist
        return pixel_unshuffle(posterior.mean, PATCH), pixel_unshuffle(posterior.std, PATCH)

    def _pixels(self, vae: Any, latents: Tensor) -> Tensor:
        return super()._pixels(vae, pixel_shuffle(latents, PATCH))

    # --- denoiser ----------------------------------------------------------------------------------------------------

    def _forward(self, module: Any, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        hidden, device = conditioning.tensors["hidden"], noisy_latents.device
        rows, columns = noisy_latents.shape[-2:]
        output: Tensor = module(
            hidden_states=tokens(noisy_latents),
            timestep=timesteps.float() / TIME_UNITS,
            guidance=embedded(self, timesteps),
            encoder_hidden_states=hidden,
            txt_ids=positions(1, 1, 1, hidden.shape[1], device=device),
            img_ids=positions(1, rows, columns, 1, device=device),
            return_dict=False,
        )[0]
        return untokens(output, rows, columns)

    def _sampling_arguments(self, guidance_scale: float) -> dict[str, Any]:
        return {**super()._sampling_arguments(guidance_scale), "max_sequence_length": self.max_tokens}


class Flux2KleinPolicy(Flux2Policy):
    """A `Flux2KleinPipeline` as a policy; see `Flux2Policy` for latents and conditioning.

    Distilled models (`is_distilled` in `model_index.json`) ignore the guidance scale and draw in four steps; the base
    models are guided against the empty prompt.
    """

    guides = "twice"

    @classmethod
    def check_negative(cls, source: ModelSource) -> None:
        """Refuses the distilled models, which their index names; see `NegativeBranch.check_negative`."""
        if read_index(source).get("is_distilled"):
            raise ValueError(
                f"{source.name}: it is distilled and draws without an unconditional branch, so a negative model has no "
                "place in it; take the base model, or leave out the negative model"
            )

    def _configure(self, size: tuple[int, int] | None, num_frames: int | None) -> None:
        super()._configure(size, num_frames)
        if self.pipeline.config.is_distilled:
            self.guidance_scale = 1.0
            self.num_inference_steps = 4

    def _token_count(self, prompt: str) -> int:
        text = self.pipeline.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return len(self.pipeline.tokenizer(text, truncation=False, verbose=False).input_ids)
