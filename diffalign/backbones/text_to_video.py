"""Legacy: ModelScope's text-to-video UNet and its descendants (ZeroScope), epsilon prediction on 5-D latents.

Wang et al. 2023, "ModelScope Text-to-Video Technical Report" (arXiv:2308.06571). diffusers has deprecated the pipeline
(frozen at 0.33.1, it says so in its log) and its UNet has none of the adapter methods of the other models. Adapters are
therefore put in, switched, written and read here, through peft; no released pipeline reads the LoRA file, only
`load_trained`. Prefer another family for new work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers.utils import delete_adapter_layers
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from diffalign.backbones.animatediff import VideoUNetPolicy
from diffalign.backbones.base import ADAPTER, LORA_FILE, PipelinePolicy
from diffalign.backbones.starting import read_lora
from diffalign.backbones.trained_weights import two_adapters, upcast
from diffalign.batches import Conditioning

__all__ = ["TextToVideoPolicy"]


class TextToVideoPolicy(VideoUNetPolicy):
    """A `TextToVideoSDPipeline` as a policy; legacy, see the module."""

    guidance_scale = 9.0

    def _forward(self, module: Any, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        # this UNet repeats the text once per frame by itself
        output: Tensor = module(noisy_latents, timesteps, conditioning.tensors["hidden"], return_dict=False)[0]
        return output

    def _inject(self, settings: LoraConfig, name: str = ADAPTER) -> None:
        inject_adapter_in_model(settings, self.denoiser, adapter_name=name)

    def _lora_layers(self) -> dict[str, Tensor]:
        return PipelinePolicy._lora_layers(self)  # under peft's names, which `load_trained` hands back to peft

    def _load_adapter(self, folder: Path) -> None:
        if self.lora is not None:
            delete_adapter_layers(self.denoiser, ADAPTER)
            del self.denoiser.peft_config[ADAPTER]
            if not self.denoiser.peft_config:
                del self.denoiser.peft_config  # peft takes an empty one for a second adapter
        self._read_adapter(folder / LORA_FILE, self.denoiser, ADAPTER)
        self._take_settings(self.denoiser.peft_config[ADAPTER])

    def _read_adapter(self, path: Path, denoiser: Any, name: str) -> None:
        """Rank, alpha and targets come from the file's metadata."""
        lora = read_lora(path)
        tensors = {key.removeprefix(f"{self.part}."): tensor for key, tensor in load_file(path).items()}
        with two_adapters():
            inject_adapter_in_model(self._adapter_settings(lora), denoiser, adapter_name=name)
        expected = get_peft_model_state_dict(denoiser, adapter_name=name)
        if tensors.keys() != expected.keys():
            odd = sorted(tensors.keys() ^ expected.keys())
            raise ValueError(f"{path}: does not fit this UNet; {len(odd)} layers differ, the first is {odd[0]}")
        set_peft_model_state_dict(denoiser, tensors, adapter_name=name)
        upcast(denoiser, name)
