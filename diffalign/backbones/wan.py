"""Wan 2.1 and 2.2: flow transformers for video; the 14B model of 2.2 has one expert for each range of noise.

Wan Team 2025, "Wan: Open and Advanced Large-Scale Video Generative Models" (arXiv:2503.20314). The network reads t in
0..1000 and predicts noise - x0. Traps:

- the pipeline's scheduler gives the network whole numbers: the truncated 1000 * sigma. What the network receives is
  the timestep here, so a state of the sampler carries up to 0.001 more noise than its timestep says;
- latents are normalised per channel, by means and deviations in the autoencoder's configuration;
- text is 512 tokens in the pipeline's call, 226 in its `encode_prompt` unless told; embeddings after the last token
  are zeros, and the network attends to them: there is no mask;
- `transformer` denoises from `boundary_ratio` upwards and `transformer_2` below it, each with weights and guidance of
  its own. The rows of a training batch may lie on both sides;
- the 5B model (`expand_timesteps`) is given a timestep for each token by its pipeline, all the same for text to video.
  One for each sample gives the same numbers, without B * N modulations in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from diffalign.backbones.base import ADAPTER, LORA_FILE, PipelinePolicy, halve
from diffalign.backbones.options import FlowOptions
from diffalign.backbones.trained_weights import adapter_metadata, two_adapters, upcast
from diffalign.batches import Conditioning

__all__ = ["WanPolicy"]

TEXT_TOKENS = 512
"""What the network was trained with; the published pipeline's own default."""


class WanPolicy(PipelinePolicy):
    """A `WanPipeline` as a policy; the conditioning is {"hidden": [B, 512, width]}, zeros after the last token.

    With two experts the denoiser is an `Experts`. Its LoRA is written as one file for each, which diffusers reads one
    after the other:

        pipeline.load_lora_weights(folder)
        second = "pytorch_lora_weights_transformer_2.safetensors"
        pipeline.load_lora_weights(folder, weight_name=second, load_into_transformer_2=True)

    An index with one expert alone, either of them, is a model of one expert, used at every timestep.

    Attributes:
        guidance_scale_2: Guidance of the low-noise expert when the policy is sampled with its own `guidance_scale`;
            any other scale holds for both experts, as in the pipeline. None for a single expert.
    """

    Options = FlowOptions
    is_video = True
    frame_rate = 16.0
    half_precision_text = True
    guides = "twice"
    more_parts = ("transformer_2",)
    guidance_scale = 5.0
    num_inference_steps = 50
    guidance_scale_2: float | None = None

    def _denoiser(self) -> Any:
        pipeline = self.pipeline
        high, low, ratio = pipeline.transformer, pipeline.transformer_2, pipeline.config.boundary_ratio
        if high is None and low is None:
            raise ValueError(f"{self.source.name}: expected transformer or transformer_2 in the index, found neither")
        if high is not None and low is not None and ratio is not None:
            return Experts(high, low, float(ratio) * int(pipeline.scheduler.config.num_train_timesteps))
        # the pipeline must not ask for the expert that is missing: its boundary goes below or above all timesteps
        pipeline.register_to_config(boundary_ratio=None if high is not None else math.inf)
        if high is None:
            self.part = "transformer_2"  # type: ignore[misc]
        return high if high is not None else low

    def _modules(self) -> dict[str, Any]:
        """Parts of the pipeline that are trained, in the order of falling noise."""
        return self._called(self.denoiser)

    def _configure(self, size: tuple[int, int] | None, num_frames: int | None) -> None:
        pipeline, config = self.pipeline, next(iter(self._modules().values())).config
        self.size, self.num_frames = (480, 832), 81
        if pipeline.config.expand_timesteps:
            self.size, self.num_frames, self.frame_rate = (704, 1280), 121, 24.0
        elif isinstance(self.denoiser, Experts):
            self.size, self.num_inference_steps = (720, 1280), 40
            self.guidance_scale, self.guidance_scale_2 = 4.0, 3.0
        self.size, self.num_frames = size or self.size, num_frames or self.num_frames
        factor, stride = int(pipeline.vae_scale_factor_spatial), int(pipeline.vae_scale_factor_temporal)
        multiple = factor * int(config.patch_size[1])
        if self.size[0] % multiple or self.size[1] % multiple:
            raise ValueError(
                f"size: expected multiples of {multiple} for Wan, got {self.size[0]}x{self.size[1]} pixels"
            )
        if (self.num_frames - 1) % stride:
            raise ValueError(
                f"num_frames: expected a multiple of {stride} plus one for Wan, got {self.num_frames}; "
                f"use {self.num_frames // stride * stride + 1}"
            )
        frames = (self.num_frames - 1) // stride + 1
        self.latent_shape = (int(config.in_channels), frames, self.size[0] // factor, self.size[1] // factor)
        self.schedule = self._flow_schedule(math.prod(self.latent_shape[1:]) // math.prod(config.patch_size))
        self.max_tokens = TEXT_TOKENS

    def _embed(self, prompts: list[str]) -> Mapping[str, Tensor]:
        hidden, _ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=self.max_tokens, device=self.device
        )
        return {"hidden": hidden}

    def _encoding_settings(self) -> Mapping[str, Any]:
        return {"max_sequence_length": self.max_tokens}

    def _forward(self, module: Any, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        output: Tensor = module(
            hidden_states=noisy_latents,
            timestep=timesteps,
            encoder_hidden_states=conditioning.tensors["hidden"],
            return_dict=False,
        )[0]
        return output

    def _latent_statistics(self) -> tuple[Tensor, Tensor]:
        config = self._encoder("vae").config
        mean, std = (torch.tensor(config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
        return mean, 1 / std

    def _sampling_arguments(self, guidance_scale: float) -> dict[str, Any]:
        arguments = super()._sampling_arguments(guidance_scale) | {"max_sequence_length": self.max_tokens}
        if self.guidance_scale_2 is not None and guidance_scale == self.guidance_scale:
            arguments["guidance_scale_2"] = self.guidance_scale_2
        return arguments

    def _halve(self, module: Any, dtype: torch.dtype) -> None:
        for expert in self._called(module).values():
            halve(expert, dtype)  # each by itself: the pipeline calls them without going through `Experts`

    def _called(self, module: Any) -> dict[str, Any]:
        return module.parts() if isinstance(module, Experts) else {self.part: module}

    def save_trained(self, folder: Path) -> None:
        """LoRA: a file for each expert, see the class. Full: `transformer/`, `transformer_2/`."""
        for part, expert in self._modules().items():
            if self.lora is None:
                expert.save_pretrained(folder / part)
                continue
            type(self.pipeline).save_lora_weights(
                folder,
                weight_name=self._lora_file(part),
                safe_serialization=True,
                transformer_lora_layers=get_peft_model_state_dict(expert, adapter_name=ADAPTER),
                transformer_lora_adapter_metadata=adapter_metadata(expert),
            )

    def _has_lora(self, folder: Path) -> bool:
        return all((folder / self._lora_file(part)).is_file() for part in self._modules())

    def _lora_names(self) -> str:
        return " and ".join(map(self._lora_file, self._modules()))

    def _load_adapter(self, folder: Path) -> None:
        experts = self._modules()
        if self.lora is not None:
            for expert in experts.values():
                expert.delete_adapters(ADAPTER)
        self._read_adapter(folder / LORA_FILE, self.denoiser, ADAPTER)
        self._take_settings(next(iter(experts.values())).peft_config[ADAPTER])

    def _read_adapter(self, path: Path, denoiser: Any, name: str) -> None:
        """Of two experts, `path` is the first one's file and the second's lies beside it under its own name."""
        experts = self._called(denoiser)
        for part, expert in experts.items():
            file = path.name if len(experts) == 1 else self._lora_file(part)
            # the two halves of `load_lora_weights`, which stumbles over a pipeline that has transformer_2 alone
            state, metadata = self.pipeline.lora_state_dict(path.parent, weight_name=file, return_lora_metadata=True)
            with two_adapters():
                self.pipeline.load_lora_into_transformer(state, expert, name, self.pipeline, metadata=metadata)
        upcast(denoiser, name)

    def _put(self, states: Mapping[str, Mapping[str, Tensor]], module: Any) -> None:
        for part, expert in self._called(module).items():
            expert.load_state_dict(states[part])

    def _lora_file(self, part: str) -> str:
        """Name of an expert's LoRA file: the first one's is what diffusers looks for.

        The second has a name and not a folder of its own: with a file of the usual name in sight, diffusers reads that
        one whatever `subfolder` says.
        """
        return LORA_FILE if part == next(iter(self._modules())) else f"{Path(LORA_FILE).stem}_{part}.safetensors"


class Experts(nn.Module):
    """Two transformers, one for each range of noise; every row of a batch goes to the one its timestep belongs to.

    An expert without rows still sees one patch of the first row, multiplied by zero: every trained parameter then has
    a gradient, and all processes of a sharded run gather the same weights in the same order.

    Args:
        transformer: For timesteps from `boundary` upwards.
        transformer_2: For timesteps below.
        boundary: In timesteps.
    """

    def __init__(self, transformer: nn.Module, transformer_2: nn.Module, boundary: float) -> None:
        super().__init__()
        self.transformer: Any = transformer
        self.transformer_2: Any = transformer_2
        self.boundary = boundary

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """The velocity, [B, C, t, h, w], of latents of that shape at timesteps [B] with text [B, L, width]."""
        high = timestep >= self.boundary
        places, outputs, idle = [], [], hidden_states.new_zeros(())
        for expert, chosen in ((self.transformer, high), (self.transformer_2, ~high)):
            rows = chosen.nonzero().flatten()
            if len(rows):
                inputs = hidden_states[rows], timestep[rows], encoder_hidden_states[rows]
                places.append(rows)
                outputs.append(expert(*inputs, return_dict=False)[0])
            else:
                t, h, w = expert.config.patch_size
                inputs = hidden_states[:1, :, :t, :h, :w], timestep[:1], encoder_hidden_states[:1]
                idle = (0 * expert(*inputs, return_dict=False)[0]).sum()
        return (torch.cat(outputs)[torch.cat(places).argsort()] + idle,)

    def parts(self) -> dict[str, Any]:
        """The experts under their names in the pipeline, high noise first."""
        return {"transformer": self.transformer, "transformer_2": self.transformer_2}

    @property
    def dtype(self) -> torch.dtype:
        """Of the experts' frozen weights."""
        dtype: torch.dtype = self.transformer.dtype
        return dtype

    @property
    def _no_split_modules(self) -> list[str]:
        """Blocks that a sharded run keeps whole."""
        names: list[str] = self.transformer._no_split_modules
        return names

    def add_adapter(self, settings: LoraConfig, adapter_name: str = ADAPTER) -> None:
        """One adapter of the same settings for each expert."""
        for expert in self.parts().values():
            expert.add_adapter(settings, adapter_name=adapter_name)

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable[..., Any] | None = None) -> None:
        """Recomputes both experts' activations in the backward pass, with the function that diffusers calls it by."""
        for expert in self.parts().values():
            expert.enable_gradient_checkpointing(gradient_checkpointing_func)

    def set_attention_backend(self, backend: str) -> None:
        """The attention implementation of both, by diffusers' names."""
        for expert in self.parts().values():
            expert.set_attention_backend(backend)
