"""Legacy: ModelScope's text-to-video UNet and its descendants (ZeroScope), epsilon prediction on 5-D latents.

Wang et al. 2023, "ModelScope Text-to-Video Technical Report" (arXiv:2308.06571). diffusers has deprecated the pipeline
(frozen at 0.33.1, it says so in its log) and its UNet has none of the adapter methods of the other models. Adapters are
therefore put in, switched, written and read here, through peft; no released pipeline reads the LoRA file, only
`load_trained`. Prefer another family for new work.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import delete_adapter_layers
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from diffalign.backbones.animatediff import VideoUNetPolicy
from diffalign.backbones.base import ADAPTER, LORA_FILE, PipelinePolicy
from diffalign.backbones.loading import LoRA
from diffalign.batches import Conditioning

__all__ = ["TextToVideoPolicy"]


class TextToVideoPolicy(VideoUNetPolicy):
    """A `TextToVideoSDPipeline` as a policy; legacy, see the module."""

    guidance_scale = 9.0

    def _forward(self, module: Any, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        # this UNet repeats the text once per frame by itself
        output: Tensor = module(noisy_latents, timesteps, conditioning.tensors["hidden"], return_dict=False)[0]
        return output

    def _inject(self, settings: LoraConfig) -> None:
        inject_adapter_in_model(settings, self.denoiser, adapter_name=ADAPTER)

    def _switch_adapter(self, on: bool) -> None:
        for module in self.denoiser.modules():
            if isinstance(module, BaseTunerLayer):
                module.enable_adapters(on)

    def _lora_layers(self) -> dict[str, Tensor]:
        return PipelinePolicy._lora_layers(self)  # under peft's names, which `load_trained` hands back to peft

    def load_trained(self, folder: Path) -> None:
        """Reads `save_trained`'s folder; rank, alpha and targets come from the LoRA file's metadata.

        Raises:
            ValueError: If there is nothing to read, the file says nothing of its adapter, or it does not fit the UNet.
        """
        path = folder / LORA_FILE
        if not path.is_file():
            super().load_trained(folder)
            return
        with safe_open(path, framework="pt") as file:
            settings = json.loads((file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
        tensors = {name.removeprefix(f"{self.part}."): tensor for name, tensor in load_file(path).items()}
        if f"{self.part}.r" not in settings:
            raise ValueError(f"{path}: expected rank and targets in the file's metadata, as save_trained writes them")
        if self.lora is not None:
            delete_adapter_layers(self.denoiser, ADAPTER)
            del self.denoiser.peft_config  # peft takes an empty one for a second adapter
        self.lora = LoRA(
            rank=settings[f"{self.part}.r"],
            alpha=settings[f"{self.part}.lora_alpha"],
            target_modules=tuple(settings[f"{self.part}.target_modules"]),
            use_dora=settings[f"{self.part}.use_dora"],
            use_rslora=settings[f"{self.part}.use_rslora"],
        )
        self._add_adapter(self.lora)
        expected = PipelinePolicy._lora_layers(self)
        if tensors.keys() != expected.keys():
            odd = sorted(tensors.keys() ^ expected.keys())
            raise ValueError(f"{path}: does not fit this UNet; {len(odd)} layers differ, the first is {odd[0]}")
        set_peft_model_state_dict(self.denoiser, tensors, adapter_name=ADAPTER)
        self.denoiser.eval()
