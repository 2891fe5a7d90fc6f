"""Stable Diffusion 1.x and 2.x: a UNet on VAE latents with one CLIP text encoder; epsilon or v prediction."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import CLIPTextModel

from diffalign.attention import set_attention
from diffalign.backbones.loading import LoRA, ModelSource
from diffalign.batches import Conditioning, Moments
from diffalign.policy import Policy, Predictor
from diffalign.randomness import generator
from diffalign.schedules import DiscreteSchedule

__all__ = ["StableDiffusionPolicy"]

LORA_FILE = "pytorch_lora_weights.safetensors"
_ADAPTER = "default"


class StableDiffusionPolicy(Policy):
    """A `StableDiffusionPipeline` as a policy.

    The reference is the same UNet with its adapter switched off (LoRA), or a frozen copy taken before training
    (full fine-tuning). Everything runs in eval mode, so that no dropout tells policy and reference apart.

    Args:
        pipeline: The pipeline; its modules are used, not copied.
        source: Where it came from.
        lora: Adapters to train, or None.
        train: With `lora` None: train all weights of the UNet, which must be float32.
        reference_dtype: Of the frozen copy that full fine-tuning keeps; None keeps the UNet's.
    """

    def __init__(
        self,
        pipeline: Any,
        source: ModelSource,
        *,
        lora: LoRA | None = None,
        train: bool = False,
        reference_dtype: torch.dtype | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.source = source
        self.lora = lora
        pipeline.set_progress_bar_config(disable=True)
        self.denoiser: Any = pipeline.unet
        self.wrapped: Any = pipeline.unet  # what training calls: the UNet, or accelerate's wrapper around it
        self.prediction = source.prediction
        self.schedule = schedule_from_config(pipeline.scheduler.config)
        self.scaling = float(pipeline.vae.config.scaling_factor)
        self.shift = float(getattr(pipeline.vae.config, "shift_factor", None) or 0.0)
        side = int(self.denoiser.config.sample_size)
        self.latent_shape = (int(self.denoiser.config.in_channels), side, side)
        self.resolution = side * int(pipeline.vae_scale_factor)
        self.tokenizer = pipeline.tokenizer
        self.max_tokens = int(pipeline.tokenizer.model_max_length)
        self._fingerprint: str | None = None
        for module in (pipeline.vae, pipeline.text_encoder, self.denoiser):
            module.eval().requires_grad_(False)
        self._frozen: UNet2DConditionModel | None = None
        if lora is not None:
            self.denoiser.add_adapter(
                LoraConfig(
                    r=lora.rank,
                    lora_alpha=lora.alpha if lora.alpha is not None else lora.rank,
                    init_lora_weights="gaussian",
                    target_modules=list(lora.target_modules),
                ),
                adapter_name=_ADAPTER,
            )
            self._upcast_adapter()
            self._initialise_adapter(lora)
        elif train:
            self._frozen = copy.deepcopy(self.denoiser)
            if reference_dtype is not None and reference_dtype != self.denoiser.dtype:
                self._frozen.to(reference_dtype)
            self.denoiser.requires_grad_(True)
        self.denoiser.eval()

    @classmethod
    def load(
        cls,
        source: ModelSource,
        *,
        lora: LoRA | None = None,
        train: bool = False,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        attention: str = "native",
    ) -> StableDiffusionPolicy:
        """Loads the pipeline from its folder or the Hub, safetensors only; see `load_policy`."""
        full = train and lora is None  # trained weights are float32, whatever the reference is kept in
        pipeline = StableDiffusionPipeline.from_pretrained(
            source.location,
            revision=source.revision,
            variant=source.variant,
            dtype={"unet": torch.float32 if full else dtype or torch.float32, "default": torch.float32},
            use_safetensors=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        if attention != "native":
            set_attention(pipeline.unet, attention)
        pipeline.to(device)
        return cls(pipeline, source, lora=lora, train=train, reference_dtype=dtype if full else None)

    def _upcast_adapter(self) -> None:
        for parameter in self.trainable_parameters():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))

    def _initialise_adapter(self, lora: LoRA) -> None:
        """B = 0 as peft left it, and A normal with deviation 1 / rank (peft's "gaussian"), drawn from the seed.

        A run that is killed before its first checkpoint then starts again from the same numbers.
        """
        for name, parameter in self.named_trainable():
            if "lora_A" in name:
                normal = torch.randn(parameter.shape, generator=generator(lora.seed, "adapter", name))
                parameter.data.copy_(normal / lora.rank)

    @property
    def device(self) -> torch.device:
        """Where the denoiser lives."""
        return next(self.denoiser.parameters()).device  # type: ignore[no-any-return]

    # --- encoders ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Last hidden states of the text encoder, {"hidden": [B, tokens, width]}, padded to the maximum."""
        encoder = self._encoder("text_encoder")
        ids = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).input_ids
        hidden = encoder(ids.to(encoder.device), attention_mask=None)[0]
        return Conditioning({"hidden": hidden.float()})

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, start and end included, before any cut."""
        return [len(ids) for ids in self.tokenizer(list(prompts), truncation=False, verbose=False).input_ids]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Moments:
        """Posterior moments of (latents - shift) * scale for images [B, 3, H, W] in [0, 1], float32."""
        vae = self._encoder("vae")
        posterior = vae.encode((images * 2 - 1).to(vae.device, vae.dtype)).latent_dist
        return Moments((posterior.mean.float() - self.shift) * self.scaling, posterior.std.float() * self.scaling)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], float32."""
        vae = self._encoder("vae")
        decoded = vae.decode((latents / self.scaling + self.shift).to(vae.device, vae.dtype)).sample
        images: Tensor = (decoded.float() / 2 + 0.5).clamp(0, 1)
        return images

    def _encoder(self, part: str) -> Any:
        module = getattr(self.pipeline, part)
        if module is None:
            raise RuntimeError(f"the {part} was freed; call reload_encoders() first")
        return module

    def encoder_fingerprint(self) -> str:
        """Hash of configurations and weights of autoencoder and text encoder, and of the tokenizer's vocabulary."""
        if self._fingerprint is None:
            digest = hashlib.blake2b(digest_size=16)
            digest.update(json.dumps(sorted(self.tokenizer.get_vocab().items())).encode())
            digest.update(f"{self.max_tokens} {self.scaling} {self.shift}".encode())
            for part in ("vae", "text_encoder"):
                module = self._encoder(part)
                settings = {
                    k: str(v)
                    for k, v in dict(module.config.items() if part == "vae" else module.config.to_dict()).items()
                }
                settings.pop("_name_or_path", None)
                digest.update(json.dumps(settings, sort_keys=True).encode())
                for name, tensor in sorted(module.state_dict().items()):
                    digest.update(name.encode())
                    digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def free_encoders(self) -> None:
        """Drops autoencoder and text encoder; `encode`, `decode` and `sample` then need `reload_encoders`."""
        self.encoder_fingerprint()
        self.pipeline.vae = None
        self.pipeline.text_encoder = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def reload_encoders(self) -> None:
        """Reads autoencoder and text encoder again if they were freed."""
        if self.pipeline.vae is not None:
            return
        options: dict[str, Any] = {
            "revision": self.source.revision,
            "variant": self.source.variant,
            "use_safetensors": True,
        }
        vae = AutoencoderKL.from_pretrained(self.source.location, subfolder="vae", torch_dtype=torch.float32, **options)
        text = CLIPTextModel.from_pretrained(
            self.source.location, subfolder="text_encoder", dtype=torch.float32, **options
        )
        for module in (vae, text):
            module.eval().requires_grad_(False)
        self.pipeline.vae, self.pipeline.text_encoder = vae.to(self.device), text.to(self.device)

    # --- denoiser ------------------------------------------------------------------------------------------------

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The UNet's output, [B, C, h, w], with gradient."""
        return _forward(self.wrapped, self.denoiser.dtype, noisy_latents, timesteps, conditioning)

    def frozen(self) -> Predictor:
        """Adapter switched off, or the frozen copy; the policy itself if nothing is trained."""
        return _Frozen(self)

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Switches the adapter off inside the block and on again after it, whatever happens."""
        if self.lora is None:
            yield
            return
        self.denoiser.disable_adapters()
        try:
            yield
        finally:
            self.denoiser.enable_adapters()

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The adapter's parameters, or all of the UNet's."""
        return [parameter for _, parameter in self.named_trainable()]

    def named_trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Trainable parameters with their names, in a fixed order."""
        if self.lora is not None:
            return [(n, p) for n, p in self.denoiser.named_parameters() if f".{_ADAPTER}." in n and "lora_" in n]
        return [(n, p) for n, p in self.denoiser.named_parameters() if p.requires_grad]

    # --- sampling and saving ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        guidance_scale: float = 7.5,
        num_inference_steps: int = 25,
        reference: bool = False,
    ) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], float32 on the CPU; see `Policy.sample`."""
        if len(prompts) != len(seeds):
            raise ValueError(f"expected one seed per prompt, got {len(prompts)} prompts and {len(seeds)} seeds")
        self.reload_encoders()
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        unet = self._frozen if reference and self._frozen is not None else self.denoiser
        self.pipeline.unet = unet
        cast = unet.register_forward_pre_hook(_to_own_dtype, with_kwargs=True)
        try:
            with self._reference_weights(reference), torch.autocast(self.device.type, enabled=False):
                images = self.pipeline(
                    prompt=list(prompts),
                    generator=generators,
                    guidance_scale=guidance_scale,
                    num_inference_steps=num_inference_steps,
                    output_type="pt",
                ).images
        finally:
            cast.remove()
            self.pipeline.unet = self.denoiser
        return images.float().cpu()  # type: ignore[no-any-return]

    @contextmanager
    def _reference_weights(self, reference: bool) -> Iterator[None]:
        if not reference:
            yield
            return
        with self.adapter_off():
            yield

    def save_trained(self, folder: Path) -> None:
        """LoRA: `pytorch_lora_weights.safetensors`, as diffusers' `load_lora_weights` reads it. Full: `unet/`."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.lora is None:
            self.denoiser.save_pretrained(folder / "unet")
            return
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.denoiser, adapter_name=_ADAPTER))
        settings = self.denoiser.peft_config[_ADAPTER].to_dict()  # without them alpha is taken to be the rank
        StableDiffusionPipeline.save_lora_weights(
            folder,
            unet_lora_layers=layers,
            safe_serialization=True,
            unet_lora_adapter_metadata={k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()},
        )

    def load_trained(self, folder: Path) -> None:
        """Reads `save_trained`'s folder.

        Raises:
            ValueError: If the folder holds neither a LoRA file nor a UNet.
        """
        if (folder / LORA_FILE).is_file():
            if self.lora is not None:
                self.denoiser.delete_adapters(_ADAPTER)
            self.pipeline.load_lora_weights(folder, weight_name=LORA_FILE, adapter_name=_ADAPTER)
            config = self.denoiser.peft_config[_ADAPTER]
            self.lora = LoRA(config.r, config.lora_alpha, tuple(sorted(config.target_modules)))
            self._upcast_adapter()
        elif any((folder / "unet").glob("*.safetensors")):
            unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=self.denoiser.dtype)
            self._frozen = self._frozen or copy.deepcopy(self.denoiser).requires_grad_(False)
            self.denoiser.load_state_dict(unet.state_dict())
        else:
            raise ValueError(f"{folder}: expected {LORA_FILE} or a unet folder with safetensors, found neither")
        self.denoiser.eval()


class _Frozen:
    """The reference of a `StableDiffusionPolicy`: same `predict`, initial weights, no gradient."""

    def __init__(self, policy: StableDiffusionPolicy) -> None:
        self.policy = policy

    @torch.no_grad()
    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The UNet's output with the weights that training started from, [B, C, h, w]."""
        policy = self.policy
        module = policy._frozen if policy._frozen is not None else policy.denoiser
        with policy.adapter_off():
            return _forward(module, module.dtype, noisy_latents, timesteps, conditioning)


def _forward(
    module: Any, dtype: torch.dtype, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning
) -> Tensor:
    hidden = conditioning.tensors["hidden"].to(noisy_latents.device, dtype)
    output: Tensor = module(noisy_latents.to(dtype), timesteps.to(noisy_latents.device), hidden, return_dict=False)[0]
    return output


def _to_own_dtype(unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The pipeline's latents and embeddings are the text encoder's float32; a UNet in half precision wants its own."""
    latents, *rest = args
    hidden = kwargs["encoder_hidden_states"].to(unet.dtype)
    return (latents.to(unet.dtype), *rest), {**kwargs, "encoder_hidden_states": hidden}


def schedule_from_config(config: Any) -> DiscreteSchedule:
    """The noise table of a diffusers scheduler's configuration, recomputed in float64 where it has a formula."""
    steps, kind = int(config["num_train_timesteps"]), config["beta_schedule"]
    if config.get("trained_betas") is not None:
        schedule = DiscreteSchedule.from_betas(config["trained_betas"])
    elif kind == "scaled_linear":
        schedule = DiscreteSchedule.scaled_linear(steps, config["beta_start"], config["beta_end"])
    elif kind == "linear":
        betas = torch.linspace(config["beta_start"], config["beta_end"], steps, dtype=torch.float64)
        schedule = DiscreteSchedule.from_betas(betas)
    else:
        return DiscreteSchedule.from_betas(DDPMScheduler.from_config(dict(config)).betas)
    return schedule.zero_terminal_snr() if config.get("rescale_betas_zero_snr") else schedule
