"""What every family shares: a diffusers pipeline as a policy, its adapters, its frozen reference, its files.

A family is a subclass that says which parts its pipeline has and what reaches its denoiser:

    part, encoder_parts, lora_targets       names of the parts and of the layers that get adapters
    _configure()                            schedule, latent shape, sizes, token limit
    _embed(prompts)                         named tensors, through the pipeline's own `encode_prompt`
    _forward(module, ...)                   one call of the denoiser, in the project's latents, units and signs
    _raw_moments(pixels), _pixels(latents)  the autoencoder; only where it differs from the usual

Everything runs in eval mode, so that no dropout tells policy and reference apart.
"""

from __future__ import annotations

import copy
import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import diffusers
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from diffalign.attention import set_attention
from diffalign.backbones.loading import UNUSED_PARTS, LoRA, ModelSource, check_tokenizer
from diffalign.batches import Conditioning, Moments
from diffalign.policy import Policy, Predictor
from diffalign.quantization import Quantization, check_quantization, quantization_config
from diffalign.randomness import generator
from diffalign.sharding import is_sharded, shard_like

LORA_FILE = "pytorch_lora_weights.safetensors"
ADAPTER = "default"
"""Name of the trained adapter inside peft."""


class PipelinePolicy(Policy):
    """A diffusers pipeline as a policy.

    The reference is the same denoiser with its adapter switched off (LoRA), or a frozen copy taken before training
    (full fine-tuning).

    Args:
        pipeline: The pipeline; its modules are used, not copied.
        source: Where it came from.
        lora: Adapters to train, or None.
        train: With `lora` None: train all weights of the denoiser, which must be float32.
        reference_dtype: Of the frozen copy that full fine-tuning keeps; None keeps the denoiser's.
        size: Height and width in pixels; None takes the model's own.
        num_frames: Frames of a video; None takes the model's own.
    """

    part: ClassVar[str] = "transformer"
    """Attribute of the pipeline that holds the denoiser."""
    more_parts: ClassVar[tuple[str, ...]] = ()
    """Further attributes that hold denoisers; loaded in the same dtype, where the pipeline has them."""
    encoder_parts: ClassVar[tuple[str, ...]] = ("vae", "text_encoder")
    """Attributes that `encode`, `decode` and `encode_prompts` need; freed while training."""
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    """Layers that get adapters unless the user names others."""
    half_precision_text: ClassVar[bool] = False
    """Whether text encoders take the denoiser's dtype: for those of billions of parameters."""
    load_options: ClassVar[Mapping[str, Any]] = {}
    """Further arguments of the pipeline's `from_pretrained`."""
    is_video: ClassVar[bool] = False

    def __init__(
        self,
        pipeline: Any,
        source: ModelSource,
        *,
        lora: LoRA | None = None,
        train: bool = False,
        reference_dtype: torch.dtype | None = None,
        size: tuple[int, int] | None = None,
        num_frames: int | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.source = source
        self.lora = lora
        pipeline.set_progress_bar_config(disable=True)
        self.denoiser: Any = self._denoiser()
        self.wrapped: Any = self.denoiser
        self.prediction = source.prediction
        self._parts = tuple(part for part in self.encoder_parts if getattr(pipeline, part, None) is not None)
        self._freed: dict[str, tuple[Any, torch.dtype]] = {}
        self._vae_switches: tuple[str, ...] = ()
        self._fingerprint: str | None = None
        for module in (*(getattr(pipeline, part) for part in self._parts), self.denoiser):
            module.eval().requires_grad_(False)
        self._configure(size, num_frames)
        self._frozen: Any = None
        if lora is not None:
            self._add_adapter(lora)
        elif train:
            self._frozen = copy.deepcopy(self.denoiser)
            if reference_dtype is not None and reference_dtype != self.denoiser.dtype:
                self._halve(self._frozen, reference_dtype)
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
        size: tuple[int, int] | None = None,
        num_frames: int | None = None,
        quantization: Quantization | None = None,
    ) -> Self:
        """Loads the pipeline from its folder or the Hub, safetensors only; see `load_policy`."""
        full = train and lora is None  # trained weights are float32, whatever the reference is kept in
        frozen = dtype or torch.float32
        dtypes = dict.fromkeys((cls.part, *cls.more_parts), torch.float32 if full else frozen)
        dtypes["default"] = torch.float32
        if cls.half_precision_text:
            dtypes |= {part: frozen for part in cls.encoder_parts if part.startswith("text_encoder")}
        options = dict(cls.load_options)
        if quantization is not None:
            check_quantization(quantization, str(device))
            present = [part for part in (cls.part, *cls.more_parts) if source.parts.get(part) is not None]
            options["quantization_config"] = quantization_config(quantization, present, frozen)
        absent = {part: None for part in source.parts if part in UNUSED_PARTS or source.parts[part] is None}
        pipeline = getattr(diffusers, source.family).from_pretrained(
            source.location,
            revision=source.revision,
            variant=source.variant,
            dtype=dtypes,
            use_safetensors=True,
            **absent,
            **options,
        )
        check_tokenizer(source.name, _inner_tokenizer(getattr(pipeline, "tokenizer", None)))
        policy = cls(
            pipeline,
            source,
            lora=lora,
            train=train,
            reference_dtype=dtype if full else None,
            size=size,
            num_frames=num_frames,
        )
        if attention != "native":
            for module in (policy.denoiser, policy._frozen):
                if module is not None:
                    set_attention(module, attention)
        pipeline.to(device)
        if policy._frozen is not None:
            policy._frozen.to(device)
        return policy

    # --- what a family says ------------------------------------------------------------------------------------------

    def _denoiser(self) -> Any:
        """The module whose weights are trained."""
        return getattr(self.pipeline, self.part)

    @abstractmethod
    def _configure(self, size: tuple[int, int] | None, num_frames: int | None) -> None:
        """Sets `schedule`, `latent_shape`, `size`, `num_frames`, `max_tokens` and the sampling defaults."""

    @abstractmethod
    def _embed(self, prompts: list[str]) -> Mapping[str, Tensor]:
        """Embeddings of the prompts by the pipeline's own `encode_prompt`, every tensor with B rows."""

    @abstractmethod
    def _forward(self, module: Any, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """One call of `module` (denoiser, wrapper or frozen copy); latents in and prediction out [B, C, ...].

        Latents and conditioning have the module's dtype already.
        """

    def _sampling_arguments(self, guidance_scale: float) -> dict[str, Any]:
        """Arguments of the pipeline's call beside prompt, generator, steps and output type."""
        arguments: dict[str, Any] = {
            "guidance_scale": guidance_scale,
            "height": self.size[0],
            "width": self.size[1],
        }
        if self.is_video:
            arguments["num_frames"] = self.num_frames
        return arguments

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

    # --- encoders ----------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the denoiser lives."""
        return next(self.denoiser.parameters()).device  # type: ignore[no-any-return]

    @property
    def resolution(self) -> int:
        """The shorter side in pixels."""
        return min(self.size)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Embeddings of the prompts, floating-point tensors as float32; see the family's `_embed`."""
        for part in self._parts:
            if part.startswith("text_encoder"):
                self._encoder(part)
        tensors = self._embed(list(prompts))
        return Conditioning({n: t.float() if t.is_floating_point() else t for n, t in tensors.items()})

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
                tokenizer = _inner_tokenizer(component)
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
                for name, tensor in sorted(module.state_dict().items()):
                    digest.update(name.encode())
                    digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def free_encoders(self) -> None:
        """Drops autoencoder and text encoders; `encode`, `decode` and `encode_prompts` then need `reload_encoders`."""
        self.encoder_fingerprint()
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

    # --- denoiser ----------------------------------------------------------------------------------------------------

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's output, same shape as `noisy_latents`, with gradient."""
        return self._call(self.wrapped, self.denoiser.dtype, noisy_latents, timesteps, conditioning)

    def _call(
        self, module: Any, dtype: torch.dtype, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        device = noisy_latents.device
        return self._forward(module, noisy_latents.to(dtype), timesteps.to(device), conditioning.to(device, dtype))

    def frozen(self) -> Predictor:
        """Adapter switched off, or the frozen copy; the policy itself if nothing is trained."""
        return _Frozen(self)

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Switches the adapter off inside the block and on again after it, whatever happens."""
        if self.lora is None:
            yield
            return
        self._switch_adapter(False)
        try:
            yield
        finally:
            self._switch_adapter(True)

    def _switch_adapter(self, on: bool) -> None:
        if on:
            self.denoiser.enable_adapters()
        else:
            self.denoiser.disable_adapters()

    def _add_adapter(self, lora: LoRA) -> None:
        self._inject(self._adapter_settings(lora))
        self._upcast_adapter()
        self._initialise_adapter(lora)

    def _adapter_settings(self, lora: LoRA) -> LoraConfig:
        return LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha if lora.alpha is not None else lora.rank,
            init_lora_weights="gaussian",
            target_modules=list(lora.target_modules or self.lora_targets),
            use_dora=lora.use_dora,
            use_rslora=lora.use_rslora,
        )

    @classmethod
    def add_adapter_to(cls, denoiser: Any, lora: LoRA) -> None:
        """Puts untrained adapters into a denoiser that no pipeline holds, to be counted."""
        policy = cls.__new__(cls)
        policy.denoiser = denoiser
        policy._inject(policy._adapter_settings(lora))

    def _halve(self, module: Any, dtype: torch.dtype) -> None:
        """Rounds the frozen copy; see `halve`."""
        halve(module, dtype)

    def _inject(self, settings: LoraConfig) -> None:
        self.denoiser.add_adapter(settings, adapter_name=ADAPTER)

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

    def to_channels_last(self) -> None:
        """Puts convolution weights into the order GPUs like best.

        Raises:
            ValueError: If the denoiser is no UNet, where nothing would be gained.
        """
        if self.part != "unet":
            raise ValueError(
                f"model.channels_last is for UNets, and this model's denoiser is a {type(self.denoiser).__name__}; "
                "leave it out"
            )
        for module in (self.denoiser, self._frozen):
            if module is not None:
                module.to(memory_format=torch.channels_last)

    def compile(self, backend: str = "inductor") -> None:
        """Compiles policy and reference in place: names of weights stay, and both compute the same way."""
        for module in (self.denoiser, self._frozen):
            if module is not None:
                module.compile(backend=backend)

    def shard_reference(self) -> None:
        """Spreads the frozen copy over the processes as the denoiser is, if it is and there is a copy."""
        if self._frozen is not None and is_sharded(self.denoiser) and not is_sharded(self._frozen):
            shard_like(self._frozen, self.denoiser)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The adapter's parameters, or all of the denoiser's."""
        return [parameter for _, parameter in self.named_trainable()]

    def named_trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Trainable parameters with their names, in a fixed order."""
        named = self.denoiser.named_parameters()
        if self.lora is not None:
            return [(n, p) for n, p in named if f".{ADAPTER}" in n and "lora_" in n]
        return [(n, p) for n, p in named if p.requires_grad]

    # --- sampling and saving -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        reference: bool = False,
    ) -> Tensor:
        """Images [B, 3, H, W] or videos [B, T, 3, H, W] in [0, 1], float32 on the CPU; see `Policy.sample`."""
        arguments = self._sampling_arguments(self.guidance_scale if guidance_scale is None else guidance_scale)
        return self._draw(prompts, seeds, num_inference_steps or self.num_inference_steps, reference, arguments)

    def _draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        num_inference_steps: int,
        reference: bool,
        arguments: Mapping[str, Any],
    ) -> Tensor:
        if len(prompts) != len(seeds):
            raise ValueError(f"expected one seed per prompt, got {len(prompts)} prompts and {len(seeds)} seeds")
        self.reload_encoders()
        with self._drawing_weights(reference), torch.autocast(self.device.type, enabled=False):
            output = self.pipeline(
                prompt=list(prompts),
                generator=[torch.Generator().manual_seed(int(seed)) for seed in seeds],
                num_inference_steps=num_inference_steps,
                output_type="pt",
                **arguments,
            )
        media = output.frames if self.is_video else output.images
        return media.float().cpu()  # type: ignore[no-any-return]

    @contextmanager
    def _drawing_weights(self, reference: bool) -> Iterator[None]:
        """Puts policy or reference into the pipeline for the block."""
        module = self._frozen if reference and self._frozen is not None else self.denoiser
        self._place(module)
        cast = module.register_forward_pre_hook(_to_own_dtype, with_kwargs=True)
        vae, decode = self.pipeline.vae, self.pipeline.vae.decode
        vae.decode = lambda latents, *args, **kwargs: decode(latents.to(vae.dtype), *args, **kwargs)
        try:
            if reference:
                with self.adapter_off():
                    yield
            else:
                yield
        finally:
            cast.remove()
            del vae.decode
            self._place(self.denoiser)

    def _place(self, module: Any) -> None:
        """Makes the pipeline draw with `module`."""
        setattr(self.pipeline, self.part, module)

    def save_trained(self, folder: Path) -> None:
        """LoRA: `pytorch_lora_weights.safetensors`, as diffusers' `load_lora_weights` reads it. Full: `<part>/`."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.lora is None:
            self.denoiser.save_pretrained(folder / self.part)
            return
        settings = self.denoiser.peft_config[ADAPTER].to_dict()  # without them alpha is taken to be the rank
        type(self.pipeline).save_lora_weights(
            folder,
            safe_serialization=True,
            **{
                f"{self.part}_lora_layers": self._lora_layers(),
                f"{self.part}_lora_adapter_metadata": {
                    k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()
                },
            },
        )

    def _lora_layers(self) -> dict[str, Tensor]:
        """The adapter's tensors under the names that diffusers writes."""
        layers: dict[str, Tensor] = get_peft_model_state_dict(self.denoiser, adapter_name=ADAPTER)
        return layers

    def load_trained(self, folder: Path) -> None:
        """Reads `save_trained`'s folder.

        Raises:
            ValueError: If the folder holds neither a LoRA file nor the denoiser's folder.
        """
        if (folder / LORA_FILE).is_file():
            if self.lora is not None:
                self.denoiser.delete_adapters(ADAPTER)
            self.pipeline.load_lora_weights(folder, weight_name=LORA_FILE, adapter_name=ADAPTER)
            config = self.denoiser.peft_config[ADAPTER]
            targets = tuple(sorted(config.target_modules))
            self.lora = LoRA(
                config.r, config.lora_alpha, targets, use_dora=config.use_dora, use_rslora=config.use_rslora
            )
            self._upcast_adapter()
        elif any((folder / self.part).glob("*.safetensors")):
            trained = type(self.denoiser).from_pretrained(folder / self.part, torch_dtype=self.denoiser.dtype)
            self._frozen = self._frozen or copy.deepcopy(self.denoiser).requires_grad_(False)
            self.denoiser.load_state_dict(trained.state_dict())
        else:
            raise ValueError(f"{folder}: expected {LORA_FILE} or a {self.part} folder with safetensors, found neither")
        self.denoiser.eval()


class _Frozen:
    """The reference of a `PipelinePolicy`: same `predict`, initial weights, no gradient."""

    def __init__(self, policy: PipelinePolicy) -> None:
        self.policy = policy

    @torch.no_grad()
    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's output with the weights that training started from, [B, C, ...]."""
        policy = self.policy
        module = policy._frozen if policy._frozen is not None else policy.denoiser
        with policy.adapter_off():
            return policy._call(module, policy.denoiser.dtype, noisy_latents, timesteps, conditioning)


def _inner_tokenizer(component: Any) -> Any:
    """The tokenizer inside a multimodal processor, which some pipelines call their tokenizer; others unchanged."""
    return getattr(component, "tokenizer", component)


def under_autocast(module: Any, dtype: torch.dtype) -> None:
    """Makes every call of `module` run under autocast to `dtype`, whoever calls it."""
    forward = module.forward

    def cast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(next(module.parameters()).device.type, dtype=dtype):
            return forward(*args, **kwargs)

    module.forward = cast


def halve(module: Any, dtype: torch.dtype) -> None:
    """Half the memory, and bit for bit what autocast computes of the float32 weights.

    Autocast rounds the weights of linear and convolutional layers itself; norms, embeddings and tables it leaves alone,
    and rounding those too would tell the reference apart from a policy that has not been trained yet.
    """
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    for name, layer in module.named_modules():
        rounded = isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        if rounded and kept.isdisjoint(name.split(".")):
            layer.to(dtype)
    under_autocast(module, dtype)


def _on(value: float | Tensor, like: Tensor) -> float | Tensor:
    return value.to(like.device, torch.float32) if isinstance(value, Tensor) else value


def _to_own_dtype(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Latents and embeddings of a pipeline come in its text encoder's dtype; a denoiser wants its own.

    Scalars and vectors stay as they are: timesteps lose their last digits in half precision.
    """

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1:
            return value.to(module.dtype)
        if isinstance(value, list | tuple):
            return type(value)(cast(item) for item in value)
        if isinstance(value, dict):
            return {key: cast(item) for key, item in value.items()}
        return value

    return cast(args), cast(kwargs)
