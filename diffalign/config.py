"""Configurations: frozen models, read strictly from YAML, overridden by dotted paths.

Defaults live here, in `diffalign.data`, `diffalign.generation`, `diffalign.mining`, `diffalign.rollout_config` and in
the trainers' `Config` classes, and nowhere else. Unknown keys are errors with a suggestion. Leaf names are the words
that users of diffusers, accelerate, peft and TRL already type, with the same meaning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError

from diffalign.data import DataConfig
from diffalign.generation import SamplingConfig
from diffalign.mining import PairsConfig
from diffalign.rollout_config import RolloutConfig
from diffalign.validation import explain, unknown_key

C = TypeVar("C", bound=BaseModel)


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line for the user."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LoRAConfig(_Strict):
    """Low-rank adapters; leave the whole section out for full fine-tuning.

    Attributes:
        rank: Rank of every adapter.
        alpha: Scale; the adapter is multiplied by alpha / rank. None means alpha = rank.
        target_modules: Names of the layers that get one; None takes the model family's own.
        use_dora: Weights in size and direction, trained apart (arXiv:2402.09353).
        use_rslora: Multiply by alpha / sqrt(rank) instead (arXiv:2312.03732).
    """

    rank: int = Field(default=8, ge=1)
    alpha: float | None = None
    target_modules: tuple[str, ...] | None = None
    use_dora: bool = False
    use_rslora: bool = False


class ModelConfig(_Strict):
    """Which model, and how its weights are held.

    Attributes:
        pretrained_model_name_or_path: A folder in the diffusers layout, a Hub id, or `diffalign://shapes`.
        revision: Branch, tag or commit on the Hub.
        variant: Weight file variant on the Hub, such as "fp16".
        lora: Adapters to train; leave out for full fine-tuning.
        adapter: Trained weights that `train` goes on from, and the reference with it, or that `pairs` and `evaluate`
            use, as a run's output folder holds them. If it is a LoRA, that one is trained further; leave out `lora`.
        attention: "native", "xformers", or a diffusers attention backend. "_native_flash", "_native_cudnn",
            "_native_efficient" and "_native_math" hold any model to one of PyTorch's own kernels.
        gradient_checkpointing: Recompute activations in the backward pass to save memory. True: all of each block's,
            for one more forward pass. "selective": all but what convolutions, attention and narrowing products give.
        resolution: Side in pixels of what is encoded and drawn, or [height, width]; None takes `data.resolution`, and
            without that the model's own.
        num_frames: Frames of a video; None takes the model's own.
        options: What the model's family can be told, such as `embedded_guidance` of FLUX; see docs/model_options.md.
        quantization: "nf4" (bitsandbytes) or "int8" (torchao) weights of the denoiser under the adapters, QLoRA.
        torch_compile: Compile the denoiser; worth its minutes in long runs on a GPU. "blocks": only the blocks that it
            repeats, each kind once, which takes a fraction of the time.
        torch_compile_backend: Backend of `torch.compile`.
        torch_compile_mode: Its mode: "reduce-overhead" records CUDA graphs, "max-autotune" times kernels.
        channels_last: Weights of a UNet in the order that convolutions compute faster with, on GPUs and CPUs.
        vae_slicing: Encode and decode one picture at a time, to save memory.
        vae_tiling: Encode and decode large pictures in overlapping tiles; changes latents slightly where tiles meet.
    """

    pretrained_model_name_or_path: str
    revision: str | None = None
    variant: str | None = None
    lora: LoRAConfig | None = None
    adapter: str | None = None
    attention: str = "native"
    gradient_checkpointing: bool | Literal["selective"] = False
    resolution: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None
    num_frames: int | None = Field(default=None, ge=1)
    options: dict[str, Any] = Field(default_factory=dict)
    quantization: Literal["nf4", "int8"] | None = None
    torch_compile: bool | Literal["blocks"] = False
    torch_compile_backend: str = "inductor"
    torch_compile_mode: Literal["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = None
    channels_last: bool = False
    vae_slicing: bool = False
    vae_tiling: bool = False


class TrainingConfig(_Strict):
    """The loop. Names and meanings as in diffusers' training scripts.

    Attributes:
        output_dir: Where the run writes.
        max_train_steps: Optimizer steps.
        per_device_train_batch_size: Pairs per forward pass and process.
        gradient_accumulation_steps: Forward passes per optimizer step.
        learning_rate: Of AdamW or Adafactor; with `scale_lr` multiplied by the pairs per optimizer step.
        scale_lr: See `learning_rate`.
        lr_scheduler: Name of a diffusers schedule ("constant", "constant_with_warmup", "linear", "cosine", ...).
        lr_warmup_steps: In optimizer steps, whatever the number of processes.
        optimizer: "adamw", "adamw_8bit" (needs bitsandbytes) or "adafactor".
        fused_optimizer: AdamW in one kernel instead of one per operation; the same numbers up to rounding. None: on
            accelerators.
        max_grad_norm: Global norm to clip at; 0 switches clipping off.
        mixed_precision: "no", "fp16" or "bf16"; trained weights and errors stay float32.
        allow_tf32: Let matrix products in float32 round their factors to TF32's 10 bits on NVIDIA GPUs that can, for as
            long as the run lasts. False leaves them as they are in the process. Convolutions in float32 do so in either
            case, as PyTorch allows it to cuDNN by itself.
        cudnn_benchmark: Let cuDNN time its algorithms for every new shape of a convolution and take the fastest, for as
            long as the run lasts; for UNets on NVIDIA GPUs.
        use_ema: Keep a moving average of the trained weights, saved under `ema/`.
        ema_decay: Its decay per optimizer step.
        logging_steps: A line in metrics.jsonl every so many optimizer steps.
        sync_steps: Losses and metrics stay on the device and are read every so many optimizer steps; in between the CPU
            never waits for it. A bad loss is then seen up to so many steps late, and changes no weight meanwhile, for
            which AdamW must be fused. None: 1 on a CPU; on a GPU so many that ten micro-batches wait to be read.
        checkpointing_steps: A checkpoint every so many optimizer steps.
        checkpoints_total_limit: How many checkpoints to keep; None keeps all.
        resume_from_checkpoint: "latest", a checkpoint's folder, or None.
        report_to: Trackers besides metrics.jsonl: "tensorboard", "wandb", "all" or None.
        validation_steps: Validation every so many optimizer steps; 0 switches it off.
        num_validation_pairs: Pairs set aside, by prompt, for the fixed validation triples.
        validation_draws: (timestep, noise) triples per validation pair.
        validation_prompts: Prompts drawn at each validation, and scored with `reward_model` if one is named.
        reward_model: Name of the reward model for validation scores.
    """

    output_dir: str = "runs/diffalign"
    max_train_steps: int = Field(default=2000, ge=1)
    per_device_train_batch_size: int = Field(default=4, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=1e-5, gt=0)
    scale_lr: bool = False
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant_with_warmup"
    lr_warmup_steps: int = Field(default=0, ge=0)
    optimizer: Literal["adamw", "adamw_8bit", "adafactor"] = "adamw"
    fused_optimizer: bool | None = None
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-2
    adam_epsilon: float = 1e-8
    max_grad_norm: float = Field(default=1.0, ge=0)
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    allow_tf32: bool = False
    cudnn_benchmark: bool = False
    use_ema: bool = False
    ema_decay: float = Field(default=0.9999, gt=0, lt=1)
    logging_steps: int = Field(default=1, ge=1)
    sync_steps: int | None = Field(default=None, ge=1)
    checkpointing_steps: int = Field(default=500, ge=1)
    checkpoints_total_limit: int | None = Field(default=None, ge=1)
    resume_from_checkpoint: str | None = None
    report_to: str | None = None
    validation_steps: int = Field(default=0, ge=0)
    num_validation_pairs: int = Field(default=0, ge=0)
    validation_draws: int = Field(default=4, ge=1)
    validation_prompts: tuple[str, ...] = ()
    reward_model: str | None = None


class RewardConfig(_Strict):
    """A reward model to train on the run's pairs: `diffalign train-reward`.

    Attributes:
        kind: "noisy_latent": the first blocks of the model's own flow transformer and a head, for guidance.
        layers: How many blocks.
        trunk: Whether these blocks are trained with the head, or stay as they are.
        ties: k of the law of comparisons, at least 1; 5 in VideoReward. 1 is Bradley and Terry's, without ties.
        timestep_sampling: Law of the timesteps; guidance asks for rewards at all of them.
    """

    kind: Literal["noisy_latent"] = "noisy_latent"
    layers: int = Field(default=8, ge=1)
    trunk: Literal["trained", "frozen"] = "trained"
    ties: float = Field(default=1.0, ge=1, allow_inf_nan=False)
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"


class EvaluationConfig(_Strict):
    """Base against aligned, on prompts no training saw.

    Attributes:
        prompts: A text file, a JSONL with a `prompt` field, `diffalign://shapes/held_out`, or `diffalign://benchmark`
            for the benchmark's own prompts, seeds and number of samples.
        num_prompts: How many of them; None takes all.
        num_images_per_prompt: Pictures or clips of each prompt, each with a seed of its own. Intervals keep those of a
            prompt together. A benchmark's own prompts come with the benchmark's own number.
        reward_models: Names of the scorers.
        benchmark: "shapes" lets the embedded world's judge look at the pictures as well, "geneval" GenEval's.
        benchmark_options: Arguments of the benchmark, such as `detector: FOLDER` of "geneval".
        seed: Of the pictures; base and aligned use the same one. None derives it from the run's seed.
    """

    prompts: str = "diffalign://shapes/held_out"
    num_prompts: int | None = Field(default=None, ge=1)
    num_images_per_prompt: int = Field(default=1, ge=1)
    reward_models: tuple[str, ...] = ("pickscore",)
    benchmark: str | None = None
    benchmark_options: dict[str, Any] = Field(default_factory=dict)
    seed: int | None = None


def _scalar_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class RunConfig(_Strict):
    """A whole experiment: one file serves `pairs`, `train`, `train-reward`, `evaluate` and `report`.

    `trainer` holds the method's name and its own settings, checked against the method's `Config`. Without `data`,
    `train` reads the pairs that `diffalign pairs` wrote for this config, in `<output_dir>/pairs`; methods that learn
    from the model's own rollouts have a section `rollout` instead.
    """

    output_dir: str
    seed: int = 0
    model: ModelConfig
    pairs: PairsConfig | None = None
    rollout: RolloutConfig | None = None
    data: DataConfig | None = None
    trainer: Annotated[dict[str, Any], BeforeValidator(_scalar_name)] = Field(
        default_factory=lambda: {"name": "diffusion_dpo"}
    )
    reward: RewardConfig | None = None
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file and applies overrides of the form `training.learning_rate=1e-5`.

    Args:
        path: A file, or the name of a packaged config such as `configs/demo.yaml`.
        overrides: Dotted path, equals sign, YAML value.

    Raises:
        ConfigError: One line per problem: what was found, what was expected.
    """
    return checked_config(RunConfig, read_settings(path, overrides))


def read_settings(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The sections of a configuration file with its overrides, not checked yet; arguments as in `load_config`."""
    raw = _read_yaml(_find(path))
    for override in overrides:
        _apply(raw, override)
    return raw


def checked_config(schema: type[C], raw: Mapping[str, Any]) -> C:
    """A configuration of one kind, made of what `read_settings` gave.

    Raises:
        ConfigError: One line per problem: what was found, what was expected.
    """
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(dict(e), schema) for e in error.errors())) from error


def _find(path: str | Path) -> Path:
    from importlib import resources

    path = Path(path)
    if path.is_file():
        return path
    packaged = Path(str(resources.files("diffalign.configs").joinpath(path.name)))
    if path.parent in (Path("."), Path("configs")) and packaged.is_file():
        return packaged
    folder = packaged.parent
    known = ", ".join(sorted(p.name for p in folder.glob("*.yaml")))
    raise ConfigError(f"config file {str(path)!r} does not exist (packaged configs: {known})")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(raw).__name__}")
    return {key: section for key, section in raw.items() if section is not None}  # "training:" alone: all defaults


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-5 as text; this loader reads it as the number everyone means."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    __import__("re").compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _apply(raw: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    *parents, leaf = path.split(".")
    here = raw
    for part in parents:
        here = here.setdefault(part, {})
        if not isinstance(here, dict):
            raise ConfigError(f"override {override!r}: {part!r} is a value, not a section")
    try:
        here[leaf] = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: not a YAML value: {' '.join(str(error).split())}") from error


def _explain(error: Mapping[str, Any], schema: type[BaseModel]) -> str:
    path = [str(part) for part in error["loc"]]
    where = ".".join(path)
    if error["type"] == "extra_forbidden":
        known = _keys_at(path[:-1], schema)
        return unknown_key(where, path[-1], known)
    if error["type"] == "missing":
        return f"config key {where!r} is missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"config key {where!r}: {message}; found {error['input']!r}"


def _keys_at(path: Sequence[str], schema: type[BaseModel]) -> list[str]:
    model: Any = schema
    for part in path:
        field = getattr(model, "model_fields", {}).get(part)
        model = _model_of(field.annotation) if field is not None else None
    return list(getattr(model, "model_fields", {}))


def _model_of(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) is not None:
        return next((m for a in get_args(annotation) if (m := _model_of(a)) is not None), None)
    return None


def trainer_settings(config: RunConfig) -> tuple[type[Any], Any]:
    """The trainer class that `config.trainer` names, and its checked settings.

    Raises:
        ConfigError: For an unknown trainer, an unknown key or a bad value.
    """
    from diffalign.plugins import find

    settings = dict(config.trainer)
    name = settings.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError("config key 'trainer.name' is missing, for example trainer: {name: diffusion_dpo}")
    try:
        trainer = find("trainers", name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        return trainer, trainer.Config(**settings)
    except ValidationError as error:
        raise ConfigError(explain(error, "trainer", trainer.Config.model_fields)) from error


def dump_config(config: BaseModel) -> str:
    """The configuration as YAML, with every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
