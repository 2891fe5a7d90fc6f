"""HunyuanVideo: a flow transformer over video latents, guided by Llama hidden states and a pooled CLIP embedding.

Kong et al. 2024, "HunyuanVideo: A Systematic Framework For Large Video Generative Models" (arXiv:2412.03603). The
network reads t in 0..1000 and predicts noise - x0. The prompt is put into a template whose first 95 tokens are cut from
Llama's hidden states again. The published weights are distilled from guidance: its scale, times 1000, is an input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from torch import Tensor

from diffalign.backbones.base import JOINT_ATTENTION, PipelinePolicy
from diffalign.backbones.options import GuidedOptions, PromptTemplate, TokenOptions
from diffalign.batches import Conditioning

__all__ = ["HunyuanVideoPolicy"]

SIZE, NUM_FRAMES, MAX_TOKENS = (720, 1280), 129, 256
"""The published pipeline's defaults; no configuration holds them. Tokens are counted after the template's cut."""


class HunyuanVideoOptions(GuidedOptions, TokenOptions):
    """What HunyuanVideo can be told.

    Attributes:
        prompt_template: Instruction around every prompt; its beginning is cut from the embeddings.
    """

    prompt_template: PromptTemplate | None = None


class HunyuanVideoPolicy(PipelinePolicy):
    """A `HunyuanVideoPipeline` as a policy.

    The conditioning is {"hidden": [B, 256, width], "mask": [B, 256] 0 or 1, "pooled": [B, width]}.

    Attributes:
        prompt_template: {"template": text with one "{}" for the prompt, "crop_start": tokens cut from its beginning}.
        embedded_guidance: Scale that `predict` tells the network; `sample` takes its own as `guidance_scale`.
    """

    Options = HunyuanVideoOptions
    encoder_parts = ("vae", "text_encoder", "text_encoder_2")
    half_precision_text = True
    is_video = True
    frame_rate = 24.0
    # Single-stream blocks have no output projection; the two blocks that refine Llama's tokens are reached as well.
    lora_targets = JOINT_ATTENTION
    guides = "never"
    guidance_scale = 6.0
    num_inference_steps = 50
    prompt_template: Mapping[str, Any] = DEFAULT_PROMPT_TEMPLATE
    embedded_guidance: float = 6.0

    def _configure(self, size: tuple[int, int] | None, num_frames: int | None) -> None:
        pipeline, config, options = self.pipeline, self.denoiser.config, self.options
        self.size, self.num_frames = size or SIZE, num_frames or NUM_FRAMES
        space, time = int(pipeline.vae_scale_factor_spatial), int(pipeline.vae_scale_factor_temporal)
        patch = space * int(config.patch_size)
        if any(side % patch for side in self.size) or self.num_frames % time != 1:
            raise ValueError(
                f"HunyuanVideo needs height and width divisible by {patch} and {time}k + 1 frames, got "
                f"{self.size[0]}x{self.size[1]} and {self.num_frames} frames"
            )
        frames = (self.num_frames - 1) // time + 1
        self.latent_shape = (int(config.in_channels), frames, self.size[0] // space, self.size[1] // space)
        rows, columns = (side // patch for side in self.size)
        self.schedule = self._flow_schedule(frames // int(config.patch_size_t) * rows * columns)
        self.max_tokens = options.max_sequence_length or MAX_TOKENS
        if options.embedded_guidance is not None:
            self.embedded_guidance = options.embedded_guidance
        if options.prompt_template is not None:
            self.prompt_template = options.prompt_template.model_dump()
        # Llama tokenizers pad on the left unless told otherwise: the template's cut would then take padding and leave
        # the template, and the network, which only counts the mask, would read padding in place of the prompt.
        pipeline.tokenizer.padding_side = "right"

    def _embed(self, prompts: list[str]) -> Mapping[str, Tensor]:
        hidden, pooled, mask = self.pipeline.encode_prompt(
            prompts,
            prompt_template=dict(self.prompt_template),
            device=self.device,
            max_sequence_length=self.max_tokens,
        )
        return {"hidden": hidden, "mask": mask, "pooled": pooled}

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Llama's tokens of each prompt and of what the template puts after it, before any cut."""
        counts = super().token_counts([self.prompt_template["template"].format(prompt) for prompt in prompts])
        return [count - int(self.prompt_template["crop_start"]) for count in counts]

    def _forward(self, module: Any, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        # In the latents' dtype, as the pipeline has it: 6 * 1000 becomes 6016 in bfloat16, when drawing and here.
        guidance = noisy_latents.new_full((len(noisy_latents),), self.embedded_guidance) * 1000
        output: Tensor = module(
            hidden_states=noisy_latents,
            timestep=timesteps,
            encoder_hidden_states=conditioning.tensors["hidden"],
            encoder_attention_mask=conditioning.tensors["mask"],
            pooled_projections=conditioning.tensors["pooled"],
            guidance=guidance,
            return_dict=False,
        )[0]
        return output

    def _sampling_arguments(self, guidance_scale: float) -> dict[str, Any]:
        return {
            **super()._sampling_arguments(guidance_scale),
            "prompt_template": dict(self.prompt_template),
            "max_sequence_length": self.max_tokens,
        }

    def _encoding_settings(self) -> Mapping[str, Any]:
        return {"prompt_template": dict(self.prompt_template), "max_tokens": self.max_tokens}
