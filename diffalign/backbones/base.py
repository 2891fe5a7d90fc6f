"""What every family shares: a diffusers pipeline as a policy, its adapters, its frozen reference, its files.

A family is a subclass that says which parts its pipeline has and what reaches its denoiser:

    part, encoder_parts, lora_targets       names of the parts and of the layers that get adapters
    Options                                 what users can tell it under `model.options`
    _configure()                            schedule, latent shape, sizes, token limit
    _embed(prompts)                         named tensors, through the pipeline's own `encode_prompt`
    _forward(module, ...)                   one call of the denoiser, in the project's latents, units and signs
    _ready(embedded)                        their names in the pipeline's call; only where they differ from the usual
    _raw_moments(pixels), _pixels(latents)  the autoencoder; only where it differs from the usual

What concerns autoencoder and text encoders is in `encoders.py`, adapters, reference and files in `trained_weights.py`.
Everything runs in eval mode, so that no dropout tells policy and reference apart.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Self

import diffusers
import torch
from torch import Tensor

from diffalign.attention import any_kernel, set_attention
from diffalign.backbones.deep_cache import DeepCache
from diffalign.backbones.encoders import Encoders
from diffalign.backbones.loading import LORA_FILE, UNUSED_PARTS, LoRA, ModelSource, load_tokenizers
from diffalign.backbones.negative import NegativeBranch
from diffalign.backbones.options import FamilyOptions
from diffalign.backbones.precision import halve, to_own_dtype, under_autocast
from diffalign.backbones.prompt_memory import PromptMemory
from diffalign.backbones.reward_guidance import RewardGuidance
from diffalign.backbones.trained_weights import ADAPTER
from diffalign.batches import Conditioning
from diffalign.devices import send
from diffalign.policy import Predictor
from diffalign.quantization import Quantization, check_quantization, quantization_config
from diffalign.schedules import FlowSchedule
from diffalign.sharding import is_sharded, shard_like

__all__ = ["ADAPTER", "JOINT_ATTENTION", "LORA_FILE", "PipelinePolicy", "halve", "under_autocast"]

JOINT_ATTENTION = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
"""`lora_targets` of transformers whose text has projections of its own in the image's attention (MMDiT)."""


READY = {"hidden": "prompt_embeds", "pooled": "pooled_prompt_embeds", "mask": "prompt_attention_mask"}
"""Our names of embeddings, and those that most pipelines' calls have for them."""


class PipelinePolicy(Encoders, NegativeBranch):
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
        options: What the family can be told, an instance of its `Options`.
    """

    Options: ClassVar[type[FamilyOptions]] = FamilyOptions
    """Class of what users can tell this family; see `diffalign.backbones.options`."""
    more_parts: ClassVar[tuple[str, ...]] = ()
    """Further attributes that hold denoisers; loaded in the same dtype, where the pipeline has them."""
    half_precision_text: ClassVar[bool] = False
    """Whether text encoders take the denoiser's dtype: for those of billions of parameters."""
    reward_guidance: RewardGuidance | None = None
    """What `sample` is guided by beside prompts, if anything; see `diffalign.backbones.reward_guidance`."""
    deep_cache: DeepCache | None = None
    """What of the denoiser `sample` computes in every step, if not all; see `diffalign.backbones.deep_cache`."""
    load_options: ClassVar[Mapping[str, Any]] = {}
    """Further arguments of the pipeline's `from_pretrained`."""

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
        options: FamilyOptions | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.source = source
        self.lora = lora
        self.options: Any = options if options is not None else self.Options()
        pipeline.set_progress_bar_config(disable=True)
        self.denoiser: Any = self._denoiser()
        self.wrapped: Any = self.denoiser
        self.prediction = source.prediction
        self._parts = tuple(part for part in self.encoder_parts if getattr(pipeline, part, None) is not None)
        self._freed = {}
        self._vae_switches = ()
        self._fingerprint = None
        self._memory = PromptMemory()
        for module in (*(getattr(pipeline, part) for part in self._parts), self.denoiser):
            module.eval().requires_grad_(False)
        self._configure(size, num_frames)
        self._frozen = None
        if lora is not None:
            self._add_adapter(lora)
        elif train:
            self._keep_copy(reference_dtype)
        self.denoiser.eval()

    @classmethod
    def load(
        cls,
        source: ModelSource,
        *,
        lora: LoRA | None = None,
        train: bool = False,
        start: Path | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        attention: str = "native",
        size: tuple[int, int] | None = None,
        num_frames: int | None = None,
        quantization: Quantization | None = None,
        options: FamilyOptions | None = None,
    ) -> Self:
        """Loads the pipeline from its folder or the Hub, safetensors only; see `load_policy`.

        With the LoRA file of `start`, `lora` must be None: its adapter is the one that is trained.
        """
        continued = start is not None and (start / LORA_FILE).is_file()
        full = train and lora is None and not continued  # trained weights are float32, whatever the reference has
        frozen = dtype or torch.float32
        dtypes = dict.fromkeys((cls.part, *cls.more_parts), torch.float32 if full else frozen)
        dtypes["default"] = torch.float32
        if cls.half_precision_text:
            dtypes |= {part: frozen for part in cls.encoder_parts if part.startswith("text_encoder")}
        settings = dict(cls.load_options)
        if quantization is not None:
            check_quantization(quantization, str(device))
            present = [part for part in (cls.part, *cls.more_parts) if source.parts.get(part) is not None]
            settings["quantization_config"] = quantization_config(quantization, present, frozen)
        absent = {part: None for part in source.parts if part in UNUSED_PARTS or source.parts[part] is None}
        pipeline = getattr(diffusers, source.family).from_pretrained(
            source.location,
            revision=source.revision,
            variant=source.variant,
            dtype=dtypes,
            use_safetensors=True,
            **load_tokenizers(source),
            **absent,
            **settings,
        )
        policy = cls(
            pipeline,
            source,
            lora=lora,
            train=full,
            reference_dtype=dtype if full else None,
            size=size,
            num_frames=num_frames,
            options=options,
        )
        if start is not None:
            policy.start_from(start)
        if attention != "native":
            for module in (policy.denoiser, policy._frozen):
                if module is not None:
                    set_attention(module, attention)
        pipeline.to(device)
        if policy._frozen is not None:
            policy._frozen.to(device)
        return policy

    # --- what a family says ------------------------------------------------------------------------------------------

    @classmethod
    def check_sampling(cls, source: ModelSource) -> None:
        """Refuses a model that cannot draw from noise, before its weights load.

        Raises:
            ValueError: If it cannot.
        """

    def _denoiser(self) -> Any:
        """The module whose weights are trained."""
        return getattr(self.pipeline, self.part)

    @abstractmethod
    def _configure(self, size: tuple[int, int] | None, num_frames: int | None) -> None:
        """Sets `schedule`, `latent_shape`, `size`, `num_frames`, `max_tokens` and the sampling defaults."""

    @abstractmethod
    def _forward(self, module: Any, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """One call of `module` (denoiser, wrapper or frozen copy); latents in and prediction out [B, C, ...].

        Latents and conditioning have the module's dtype already.
        """

    def _sampling_arguments(self, guidance_scale: float) -> dict[str, Any]:
        """Arguments of the pipeline's call beside prompt, generator, steps and output type; JSON values."""
        arguments: dict[str, Any] = {
            "guidance_scale": guidance_scale,
            "height": self.size[0],
            "width": self.size[1],
        }
        if self.is_video:
            arguments["num_frames"] = self.num_frames
        return arguments

    def _flow_schedule(self, tokens: int) -> FlowSchedule:
        """The schedule of a flow model, with the one rule for its timestep shift.

        The shift is the one of a freshly loaded scheduler's table, as in diffusers' training scripts and Flow-DPO: the
        configuration's where it is a number, and none (1) where the sampler computes it anew for every resolution
        ("dynamic"). `options.timestep_shift` sets another one, or with "dynamic" the sampler's at this size.

        Args:
            tokens: Length of the sequence that one latent is for the network.
        """
        config, wanted = self.pipeline.scheduler.config, self.options.timestep_shift
        dynamic = bool(config.get("use_dynamic_shifting"))
        if wanted == "dynamic":
            if not dynamic:
                raise ValueError(
                    f"model.options.timestep_shift: the sampler of {self.source.name} has no dynamic shift; "
                    "give a number"
                )
            shift = self._dynamic_shift(tokens)
        elif wanted is not None:
            shift = float(wanted)
        else:  # DPM-Solver and UniPC call it flow_shift
            shift = 1.0 if dynamic else float(config.get("flow_shift", config.get("shift", 1.0)))
        return FlowSchedule(int(config.num_train_timesteps), shift)

    def _dynamic_shift(self, tokens: int) -> float:
        """The sampler's shift for latents of so many tokens: a straight line through two lengths, in its logarithm."""
        config = self.pipeline.scheduler.config
        short, long = config["base_image_seq_len"], config["max_image_seq_len"]
        slope = (config["max_shift"] - config["base_shift"]) / (long - short)
        line = float(config["base_shift"]) + (tokens - short) * slope
        return line if config.get("time_shift_type") == "linear" else math.exp(line)

    # --- denoiser ----------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the denoiser lives."""
        return next(self.denoiser.parameters()).device  # type: ignore[no-any-return]

    @property
    def resolution(self) -> int:
        """The shorter side in pixels."""
        return min(self.size)

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's output, same shape as `noisy_latents`, with gradient."""
        return self._call(self.wrapped, self.denoiser.dtype, noisy_latents, timesteps, conditioning)

    def _call(
        self, module: Any, dtype: torch.dtype, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        device = noisy_latents.device
        self.forwards += len(noisy_latents)
        timesteps, conditioning = send(timesteps, device), conditioning.to(device, dtype)
        return self._forward(module, noisy_latents.to(dtype), timesteps, conditioning)

    def frozen(self) -> Predictor:
        """The reference, see the class; the policy itself if nothing is trained."""
        return _Frozen(self)

    def to_channels_last(self) -> None:
        """Puts convolution weights into the order that convolutions compute faster with.

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

    def compile(self, backend: str = "inductor", mode: str | None = None, *, blocks: bool = False) -> None:
        """Compiles policy and reference in place: names of weights stay, and both compute the same way.

        Args:
            backend: Of `torch.compile`.
            mode: Likewise; "reduce-overhead" records CUDA graphs.
            blocks: Compile only the blocks that the network repeats, which takes less time before the first step.

        Raises:
            ValueError: If the network names no such blocks.
        """
        settings = {"backend": backend} | ({} if mode is None else {"mode": mode})
        for module in (self.denoiser, self._frozen):
            if module is not None:
                for part in self._called(module).values():  # what pipelines call; of several, each by itself
                    (part.compile_repeated_blocks if blocks else part.compile)(**settings)
        self.compiled = backend

    def shard_reference(self) -> None:
        """Spreads the frozen copy over the processes as the denoiser is, if it is and there is a copy."""
        if self._frozen is not None and is_sharded(self.denoiser) and not is_sharded(self._frozen):
            shard_like(self._frozen, self.denoiser)

    # --- sampling ----------------------------------------------------------------------------------------------------

    def sampling_settings(self, guidance_scale: float) -> dict[str, Any]:
        """See `Policy.sampling_settings`: what the pipeline is called with, but for the guidance scale itself."""
        arguments = self._sampling_arguments(guidance_scale)
        settings = {name: value for name, value in arguments.items() if name != "guidance_scale"}
        settings["scheduler"] = json.loads(self.pipeline.scheduler.to_json_string())
        settings["scheduler"].pop("_diffusers_version", None)
        if self.reward_guidance is not None:
            settings["reward_guidance"] = self.reward_guidance.settings()
        if self.deep_cache is not None:
            settings["deep_cache"] = self.deep_cache.settings()
        if self.compiled:
            settings["torch_compile"] = self.compiled
        return settings

    @torch.no_grad()
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
        """Images [B, 3, H, W] or videos [B, T, 3, H, W] in [0, 1], float32 on the CPU; see `Policy.sample`."""
        arguments = self._sampling_arguments(self.guidance_scale if guidance_scale is None else guidance_scale)
        steps = num_inference_steps or self.num_inference_steps
        return self._draw(prompts, seeds, steps, arguments, reference=reference, negative=negative)

    def _draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        num_inference_steps: int,
        arguments: Mapping[str, Any],
        *,
        reference: bool = False,
        negative: bool = False,
    ) -> Tensor:
        if len(prompts) != len(seeds):
            raise ValueError(f"expected one seed per prompt, got {len(prompts)} prompts and {len(seeds)} seeds")
        self.reload_encoders()
        rows = len(prompts) if negative else None
        guide = nullcontext() if self.reward_guidance is None else self.reward_guidance.during(self, prompts)
        plain = torch.autocast(self.device.type, enabled=False)
        with self._drawing_weights(reference, rows), plain, any_kernel(), guide:
            output = self.pipeline(
                generator=[torch.Generator().manual_seed(int(seed)) for seed in seeds],
                num_inference_steps=num_inference_steps,
                output_type="pt",
                **{**arguments, **self._prompt_arguments(prompts, arguments)},
            )
        media = output.frames if self.is_video else output.images
        return media.float().cpu()  # type: ignore[no-any-return]

    def _prompt_arguments(self, prompts: Sequence[str], arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Prompts as the pipeline's call takes them: embedded already, and with them what guidance contrasts them with.

        Args:
            prompts: B prompts.
            arguments: The others of the call.
        """
        named = self._ready(self._recalled(prompts))
        if self.guides != "never":
            empty = self.unconditional(Conditioning(self._recalled([""]))).repeat(len(prompts))
            named |= {f"negative_{name}": value for name, value in self._ready(empty.tensors).items()}
        return named

    def _ready(self, embedded: Mapping[str, Tensor]) -> dict[str, Any]:
        """What `_embed` gave, B rows, under the names that the pipeline's call has for it."""
        return {READY[name]: tensor for name, tensor in embedded.items() if name in READY}

    @contextmanager
    def _drawing_weights(self, reference: bool, negative_rows: int | None = None) -> Iterator[None]:
        """Puts policy or reference into the pipeline for the block, and the negative model beside it.

        Args:
            reference: Which of the two.
            negative_rows: Prompts that are drawn at once, if the negative model is to be the unconditional branch.
        """
        if reference:
            self.wake_reference()
        module = self._frozen if reference and self._frozen is not None else self.denoiser
        self._place(module)
        cast = module.register_forward_pre_hook(to_own_dtype(module), with_kwargs=True)
        vae, decode = self.pipeline.vae, self.pipeline.vae.decode
        vae.decode = lambda latents, *args, **kwargs: decode(latents.to(vae.dtype), *args, **kwargs)
        try:
            with ExitStack() as weights:
                if reference:
                    weights.enter_context(self.adapter_off())
                if self.deep_cache is not None:
                    weights.enter_context(self.deep_cache.during(*self._called(module).values()))
                if negative_rows is not None:
                    weights.enter_context(self._negative_branch(module, negative_rows))
                yield
        finally:
            cast.remove()
            del vae.decode
            self._place(self.denoiser)


class _Frozen:
    """The reference of a `PipelinePolicy`: same `predict`, initial weights, no gradient."""

    def __init__(self, policy: PipelinePolicy) -> None:
        self.policy = policy

    @torch.no_grad()
    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's output with the weights that training started from, [B, C, ...]."""
        policy = self.policy
        policy.wake_reference()
        module = policy._frozen if policy._frozen is not None else policy.denoiser
        with policy.adapter_off():
            return policy._call(module, policy.denoiser.dtype, noisy_latents, timesteps, conditioning)
