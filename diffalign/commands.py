"""The bodies of the command line's commands, each usable from Python; they return what the terminal shows last.

Everything that can be refused is refused before weights are loaded: configuration, model folder, prediction type,
data columns, checkpoints of another configuration.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from diffalign import checkpoints, plugins
from diffalign.backbones import LoRA, ModelSource, inspect_model, load_policy
from diffalign.backbones.loading import LORA_FILE, check_gradient_checkpointing, check_options, policy_class
from diffalign.backbones.precision import DTYPES
from diffalign.backbones.starting import check_start
from diffalign.checkpoints import CheckpointFolder, write_text
from diffalign.config import ConfigError, ModelConfig, RunConfig, dump_config, load_config, trainer_settings
from diffalign.data import DataConfig, PairSource, check_media, check_source, encode_pairs, load_pairs
from diffalign.generation import SamplingConfig, generate, make_requests, read_prompts, weights_fingerprint
from diffalign.loop import fit, make_accelerator
from diffalign.media_checks import check_draws_images, check_media_settings, check_scorers
from diffalign.mining import mine_pairs
from diffalign.policy import Policy
from diffalign.processes import launched
from diffalign.quantization import check_quantization
from diffalign.training_checks import check_training
from diffalign.validating import Validation, judge_side

logger = logging.getLogger("diffalign")

EVALUATION_SEED = 10_000
"""Added to the run's seed for evaluation pictures, so that none starts from the noise of a training picture."""


def pick_device() -> str:
    """The accelerator that is there, or the CPU; the processes of a machine take its GPUs in turn."""
    if torch.cuda.is_available():
        local = os.environ.get("LOCAL_RANK")
        return "cuda" if local is None else f"cuda:{int(local) % torch.cuda.device_count()}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def picture_size(config: RunConfig) -> tuple[int, int] | None:
    """Height and width of what a run encodes and draws, as the sections `model` and `data` say; None: the model's own.

    Raises:
        ConfigError: If they contradict each other.
    """
    wanted, data = config.model.resolution, config.data.size if config.data is not None else None
    size = (wanted, wanted) if isinstance(wanted, int) else wanted
    if config.data is not None and data is not None and size is not None and size != data:
        found = f"model.resolution is {wanted} and data.resolution is {config.data.resolution}"
        raise ConfigError(f"{found}; leave out data.resolution")
    return size or data


def load_model(
    model: ModelConfig,
    source: ModelSource,
    *,
    train: bool = False,
    adapter: str | None = None,
    start: str | None = None,
    size: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Policy:
    """The policy of a configuration: how `train`, `pairs`, `sample` and `evaluate` all load it.

    Args:
        model: The section `model`.
        source: The model it names, looked at already.
        train: Whether to train it: with the adapters of `model.lora`, or whole.
        adapter: Trained weights to put on top.
        start: Trained weights that policy and reference both start from.
        size: Height and width in pixels; None takes the model's own.
        dtype: Of the denoiser's frozen weights; None means float32.
        device: None picks the accelerator that is there, or the CPU.
    """
    policy: Any = load_policy(
        source,
        lora=LoRA(**model.lora.model_dump()) if train and model.lora is not None else None,
        train=train,
        adapter=adapter,
        start=start,
        dtype=dtype,
        device=device or pick_device(),
        attention=model.attention,
        size=size,
        num_frames=model.num_frames,
        quantization=model.quantization,
        options=model.options,
    )
    if model.vae_slicing or model.vae_tiling:
        policy.divide_vae(slicing=model.vae_slicing, tiling=model.vae_tiling)
    if model.channels_last:
        policy.to_channels_last()
    return cast(Policy, policy)


def sample(
    model: str,
    prompts: str,
    output: str,
    adapter: str | None,
    limit: int | None,
    sampling: Mapping[str, Any],
    size: tuple[int, int] | None = None,
    num_frames: int | None = None,
) -> str:
    """Body of `diffalign sample`."""
    settings = SamplingConfig(**sampling)
    source = inspect_model(model)
    kind = policy_class(source)
    kind.check_sampling(source)
    check_media_settings(source, num_frames=num_frames, sampling=settings)
    rows = read_prompts(prompts, limit, settings.seed)
    requests, processes = make_requests(rows, settings, is_video=kind.is_video), launched()
    section = ModelConfig(pretrained_model_name_or_path=model, num_frames=num_frames)
    policy = load_model(section, source, adapter=adapter, size=size)
    made_from = {"model": model, "adapter": adapter}
    index = generate(policy, requests, output, settings, settings=made_from, processes=processes)
    return f"{'videos' if kind.is_video else 'images'} and index: {index}"


def pairs(config_path: str, overrides: Sequence[str] = ()) -> str:
    """Body of `diffalign pairs`."""
    from diffalign.reward_models import load_reward_model, reward_model_info

    config = load_config(config_path, overrides)
    if config.pairs is None:
        raise ConfigError(f"{config_path} has no section 'pairs'; see configs/demo.yaml for one")
    source = inspect_model(config.model.pretrained_model_name_or_path, config.model.revision, config.model.variant)
    check_options(source, config.model.options)
    policy_class(source).check_sampling(source)
    check_media_settings(
        source,
        num_frames=config.model.num_frames,
        options=config.model.options,
        data=config.data,
        sampling=config.sampling,
    )
    check_scorers(source, [reward_model_info(config.pairs.reward_model)])
    processes = launched()
    reward_model = load_reward_model(
        config.pairs.reward_model, **{"device": pick_device(), **config.pairs.reward_options}
    )
    policy = load_model(config.model, source, adapter=config.model.adapter, size=picture_size(config))
    out = pairs_folder(config)
    model = {"model": config.model.pretrained_model_name_or_path, "adapter": config.model.adapter}
    seed = config.seed if config.pairs.seed is None else config.pairs.seed
    settings = config.pairs.model_copy(update={"seed": seed})
    summary = mine_pairs(policy, reward_model, settings, config.sampling, out, settings=model, processes=processes)
    facts = ", ".join(f"{k.replace('_', ' ')} {v:.4g}" if isinstance(v, float) else f"{k.replace('_', ' ')} {v}"
                      for k, v in summary.items() if isinstance(v, int | float))  # fmt: skip
    return f"{facts}\npairs: {out / 'index.jsonl'}"


def score(index: str, models: Sequence[str], output: str | None, batch_size: int) -> str:
    """Body of `diffalign score`."""
    from diffalign.reward_models import load_reward_model
    from diffalign.reward_models.scoring import score_index

    if not Path(index).is_file():
        raise ValueError(f"index {index!r} does not exist; expected a JSONL file with the fields id, prompt, image")
    out = Path(output) if output else Path(index).with_name("scores.jsonl")
    processes = launched()
    loaded = [load_reward_model(name, device=pick_device()) for name in models]
    return f"{score_index(index, loaded, out, batch_size, processes=processes)}\nscores: {out}"


def report(run_dir: str, output: str | None) -> str:
    """Body of `diffalign report`."""
    from diffalign.eval.report import write_report

    if not Path(run_dir).is_dir():
        raise ValueError(f"run folder {run_dir!r} does not exist; give the output_dir of a run")
    out = Path(output) if output else Path(run_dir) / "report.html"
    write_report(run_dir, out)
    return f"report: {out}"


def doctor(output: str) -> str:
    """Body of `diffalign doctor`."""
    from diffalign.doctor import collect, render

    return render(collect(output))


# --- train -----------------------------------------------------------------------------------------------------------


def pairs_folder(config: RunConfig) -> Path:
    """Where `diffalign pairs` writes, and where `train` reads if no other data are named."""
    return Path(config.output_dir) / "pairs"


def data_config(config: RunConfig) -> DataConfig:
    """The run's data: the section `data`, or the pairs that `diffalign pairs` made."""
    if config.data is not None:
        return config.data
    if config.pairs is None:
        raise ConfigError("config has neither a section 'data' nor 'pairs'; name the preference pairs to train on")
    folder = pairs_folder(config)
    if not (folder / "index.jsonl").is_file():
        raise ConfigError(f"{folder} holds no pairs yet; run `diffalign pairs` with this config first")
    return DataConfig(train_data_dir=folder, fps=config.sampling.fps)


def train(config_path: str, overrides: Sequence[str] = (), dry_run: bool = False) -> str:
    """Body of `diffalign train`; with `dry_run` only what the run would cost, and nothing is written."""
    config = load_config(config_path, overrides)
    if dry_run:
        from diffalign.estimate import estimate_run

        return str(estimate_run(config, _checked(config)))
    output_dir = train_config(config)
    return f"trained weights: {output_dir}\nmetrics: {output_dir / 'metrics.jsonl'}"


def train_config(config: RunConfig, say: Callable[[str], None] | None = None) -> Path:
    """Trains as `config` says and returns the output folder.

    Args:
        config: The run.
        say: Where the method's line with kappa goes; the log if None.

    Raises:
        ValueError: If the configuration, model, data or checkpoint cannot be used; before any weights are loaded.
    """
    source = _checked(config)
    trainer_class, settings = trainer_settings(config)
    training = config.training.model_copy(update={"output_dir": config.output_dir})
    data = data_config(config)
    check_source(data)
    whole = config.model_dump(mode="json")
    _check_resume(training, whole)
    accelerator = make_accelerator(training)
    pair_set = load_pairs(data)
    check_media(pair_set, policy_class(source))
    policy = _training_policy(config, source, accelerator.device)
    cache = Path(data.encoded_dir or Path(config.output_dir) / "cache")
    encoded = encode_pairs(pair_set, policy, data, cache, processes=launched())
    policy.free_encoders()
    train_view, validation_view = encoded, None
    if training.num_validation_pairs:
        train_view, validation_view = encoded.split(training.num_validation_pairs, config.seed)
    trainer = trainer_class(policy, settings)
    if accelerator.is_main_process:
        (say or logger.info)(trainer.describe())
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
        write_text(Path(config.output_dir) / "config.yaml", dump_config(config))
        write_text(
            Path(config.output_dir) / "run.json",
            json.dumps(
                {
                    "method": trainer.describe(),
                    "kappa": trainer.kappa,
                    "pairs": len(train_view),
                    "cache": encoded.fingerprint,
                    "started_from": config.model.adapter,
                },
                indent=2,
            ),
        )
    pair_source = PairSource(
        train_view,
        seed=config.seed,
        batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        caption_dropout=settings.caption_dropout,
    )
    validate = Validation(trainer, config, validation_view, accelerator.device, accelerator.is_main_process)
    # Without `end_training`, so that `evaluate` can follow in the same processes; the command line ends their talk.
    return fit(trainer, pair_source, training, settings=whole, accelerator=accelerator, validate=validate)


def _checked(config: RunConfig) -> ModelSource:
    """The model of a training run, if method, model and settings fit together; loads no weights."""
    trainer_class, _ = trainer_settings(config)
    if getattr(trainer_class, "needs_rollouts", False):
        raise ConfigError(
            f"trainer {config.trainer['name']!r} learns from rollouts, which `diffalign train` does not make yet; call "
            "diffalign.fit with a diffalign.rollout_source.RolloutSource from Python"
        )
    model = config.model
    source = inspect_model(model.pretrained_model_name_or_path, model.revision, model.variant)
    check_options(source, model.options)
    lora = LoRA(**model.lora.model_dump()) if model.lora is not None else None
    if model.adapter is not None:
        lora = check_start(source, Path(model.adapter), lora)
    if model.gradient_checkpointing:
        check_gradient_checkpointing(source)
    if config.training.validation_steps and config.training.validation_prompts:
        policy_class(source).check_sampling(source)
    if model.quantization is not None:
        if lora is None:
            raise ConfigError("model.quantization: quantized weights cannot be trained; add adapters with model.lora")
        check_quantization(model.quantization, pick_device())
    law = getattr(trainer_settings(config)[1], "timestep_sampling", "uniform")
    check_training(config, source.prediction, law)
    picture_size(config)
    check_media_settings(
        source, num_frames=model.num_frames, options=model.options, data=config.data, sampling=config.sampling
    )
    if config.training.validation_prompts and config.training.reward_model is not None:
        from diffalign.reward_models import reward_model_info

        check_scorers(source, [reward_model_info(config.training.reward_model)])
    trainer_class.check_prediction(source.prediction)
    return source


def _training_policy(config: RunConfig, source: ModelSource, device: torch.device) -> Policy:
    model = config.model
    policy: Any = load_model(
        model,
        source,
        train=True,
        start=model.adapter,
        size=picture_size(config),
        dtype=DTYPES[config.training.mixed_precision],
        device=device,
    )
    if model.gradient_checkpointing:
        policy.denoiser.enable_gradient_checkpointing()
    if model.torch_compile:
        policy.compile(model.torch_compile_backend)
    return cast(Policy, policy)


def _check_resume(training: Any, whole: Mapping[str, Any]) -> None:
    folder = CheckpointFolder(Path(training.output_dir))
    if training.resume_from_checkpoint:
        path = folder.find(training.resume_from_checkpoint)
        if path is not None:
            checkpoints.compare_settings(path, whole)
    elif folder.steps():
        raise checkpoints.CheckpointError(
            f"{training.output_dir} already holds checkpoints of a run; resume it with "
            "training.resume_from_checkpoint=latest, or choose another output_dir"
        )


# --- evaluate --------------------------------------------------------------------------------------------------------


def evaluate(config_path: str, overrides: Sequence[str] = ()) -> str:
    """Body of `diffalign evaluate`."""
    from diffalign.eval.tables import render_table

    config = load_config(config_path, overrides)
    comparison = evaluate_config(config)
    return f"{render_table(comparison)}\nresults: {Path(config.output_dir) / 'evaluation' / 'comparison.json'}"


def evaluate_config(config: RunConfig) -> Any:
    """Draws, scores and judges base and aligned pictures, and compares them; returns the `Comparison`."""
    from diffalign.eval import compare_folder, write_json
    from diffalign.reward_models import load_reward_model
    from diffalign.reward_models.scoring import score_index

    evaluation = config.evaluation
    run = Path(config.output_dir)
    if evaluation.benchmark:
        plugins.find("eval", evaluation.benchmark)
    source = inspect_model(config.model.pretrained_model_name_or_path, config.model.revision, config.model.variant)
    check_options(source, config.model.options)
    policy_class(source).check_sampling(source)
    check_draws_images(source, "evaluate")
    processes = launched()
    seed = EVALUATION_SEED + config.seed if evaluation.seed is None else evaluation.seed
    rows = read_prompts(evaluation.prompts, evaluation.num_prompts, seed)
    sampling = config.sampling.model_copy(update={"seed": seed, "num_images_per_prompt": 1})
    requests = make_requests(rows, sampling)
    models = [load_reward_model(name, device=pick_device()) for name in evaluation.reward_models]
    folder = run / "evaluation"
    compared = trained_weights(config, source)
    policy = load_model(
        config.model,
        source,
        adapter=compared.get("adapter"),
        start=compared.get("start"),
        size=picture_size(config),
    )
    sampling = sampling.resolved(policy)
    settings: dict[str, Any] = {"n_expected": len(requests)}
    for side, reference in (("base", True), ("aligned", False)):
        weights = processes.on_first(partial(weights_fingerprint, policy, reference=reference))
        model = {
            "path": config.model.pretrained_model_name_or_path,
            "adapter": compared.get("start") if reference else "adapter of this run",
            "weights": weights,
        }
        logger.info("%s model: %d pictures", side, len(requests))
        index = generate(
            policy,
            requests,
            folder / f"{side}-{weights[:8]}",
            sampling,
            reference=reference,
            settings={"model": model["path"], "adapter": model["adapter"], "weights": weights},
            processes=processes,
        )
        scores = index.with_name("scores.jsonl")
        summary = score_index(index, models, scores, processes=processes)
        if summary.failures and processes.is_first:
            logger.warning("%s", summary)
        processes.on_first(partial(judge_side, index, scores, evaluation.benchmark, folder / f"{side}.jsonl"))
        settings[side] = {
            "model": model,
            "sampling": {
                "guidance_scale": sampling.guidance_scale,
                "num_inference_steps": sampling.num_inference_steps,
                "prompts": evaluation.prompts,
            },
        }

    def conclude() -> Any:
        write_json(folder / "settings.json", settings)
        comparison = compare_folder(folder)
        write_json(folder / "comparison.json", comparison.to_dict(torch.device(pick_device()).type))
        return comparison

    return processes.on_first(conclude)


def trained_weights(config: RunConfig, source: ModelSource) -> dict[str, str]:
    """What `evaluate` compares, as arguments of `load_model`.

    The run's own weights against what they started from: the base model, or `model.adapter`. Where the run has trained
    nothing, `model.adapter` against the base model.
    """
    kind, run, adapter = policy_class(source), Path(config.output_dir), config.model.adapter
    files = (LORA_FILE, *(f"{part}/*.safetensors" for part in (kind.part, *kind.more_parts)))
    if adapter is None:
        return {"adapter": str(run)}
    if not any(any(run.glob(name)) for name in files):
        return {"adapter": adapter}
    return {"start": adapter, "adapter": str(run)}
