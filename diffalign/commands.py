"""The bodies of the command line's commands, each usable from Python; they return what the terminal shows last.

Everything that can be refused is refused before weights are loaded: configuration, model folder, prediction type,
data columns, checkpoints of another configuration.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from torchvision.transforms.functional import pil_to_tensor

from diffalign import checkpoints
from diffalign.backbones import LoRA, ModelSource, inspect_model, load_policy
from diffalign.batches import PairBatch
from diffalign.checkpoints import CheckpointFolder, write_text
from diffalign.config import ConfigError, ModelConfig, RunConfig, dump_config, load_config, trainer_settings
from diffalign.data import DataConfig, EncodedPairs, PairSource, check_source, encode_pairs, load_pairs
from diffalign.generation import SamplingConfig, generate, make_requests, read_prompts, to_png, weights_fingerprint
from diffalign.loop import fit, make_accelerator
from diffalign.mining import mine_pairs
from diffalign.policy import Policy
from diffalign.quantization import check_quantization
from diffalign.randomness import Draw
from diffalign.sharding import is_sharded

logger = logging.getLogger("diffalign")

EVALUATION_SEED = 10_000
"""Added to the run's seed for evaluation pictures, so that none starts from the noise of a training picture."""
WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def pick_device() -> str:
    """The accelerator that is there, or the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def picture_size(config: RunConfig) -> tuple[int, int] | None:
    """Height and width of what a run encodes and draws, as the sections `model` and `data` say; None: the model's own.

    Raises:
        ConfigError: If they contradict each other.
    """
    wanted, data = config.model.resolution, config.data.resolution if config.data is not None else None
    size = (wanted, wanted) if isinstance(wanted, int) else wanted
    if data is not None and size is not None and size != (data, data):
        raise ConfigError(f"model.resolution is {wanted} and data.resolution is {data}; leave out data.resolution")
    return size if size is not None or data is None else (data, data)


def load_model(
    model: ModelConfig,
    source: ModelSource,
    *,
    train: bool = False,
    adapter: str | None = None,
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
        size: Height and width in pixels; None takes the model's own.
        dtype: Of the denoiser's frozen weights; None means float32.
        device: None picks the accelerator that is there, or the CPU.
    """
    policy: Any = load_policy(
        source,
        lora=LoRA(**model.lora.model_dump()) if train and model.lora is not None else None,
        train=train,
        adapter=adapter,
        dtype=dtype,
        device=device or pick_device(),
        attention=model.attention,
        size=size,
        num_frames=model.num_frames,
        quantization=model.quantization,
    )
    if model.vae_slicing or model.vae_tiling:
        policy.divide_vae(slicing=model.vae_slicing, tiling=model.vae_tiling)
    return cast(Policy, policy)


def sample(
    model: str, prompts: str, output: str, adapter: str | None, limit: int | None, sampling: Mapping[str, Any]
) -> str:
    """Body of `diffalign sample`."""
    settings = SamplingConfig(**sampling)
    source = inspect_model(model)
    rows = read_prompts(prompts, limit, settings.seed)
    policy = load_model(ModelConfig(pretrained_model_name_or_path=model), source, adapter=adapter)
    index = generate(
        policy, make_requests(rows, settings), output, settings, settings={"model": model, "adapter": adapter}
    )
    return f"images and index: {index}"


def pairs(config_path: str, overrides: Sequence[str] = ()) -> str:
    """Body of `diffalign pairs`."""
    from diffalign.reward_models import load_reward_model

    config = load_config(config_path, overrides)
    if config.pairs is None:
        raise ConfigError(f"{config_path} has no section 'pairs'; see configs/demo.yaml for one")
    source = inspect_model(config.model.pretrained_model_name_or_path, config.model.revision, config.model.variant)
    reward_model = load_reward_model(
        config.pairs.reward_model, **{"device": pick_device(), **config.pairs.reward_options}
    )
    policy = load_model(config.model, source, adapter=config.model.adapter, size=picture_size(config))
    out = pairs_folder(config)
    model = {"model": config.model.pretrained_model_name_or_path, "adapter": config.model.adapter}
    seed = config.seed if config.pairs.seed is None else config.pairs.seed
    settings = config.pairs.model_copy(update={"seed": seed})
    summary = mine_pairs(policy, reward_model, settings, config.sampling, out, settings=model)
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
    loaded = [load_reward_model(name, device=pick_device()) for name in models]
    return f"{score_index(index, loaded, out, batch_size)}\nscores: {out}"


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
    return DataConfig(train_data_dir=folder)


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
    policy = _training_policy(config, source, accelerator.device)
    encoded = encode_pairs(pair_set, policy, data, Path(data.encoded_dir or Path(config.output_dir) / "cache"))
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
            json.dumps({"method": trainer.describe(), "kappa": trainer.kappa, "pairs": len(train_view)}, indent=2),
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
    validate = _Validation(trainer, config, validation_view, accelerator.device, accelerator.is_main_process)
    folder = fit(trainer, pair_source, training, settings=whole, accelerator=accelerator, validate=validate)
    accelerator.end_training()
    return folder


def _checked(config: RunConfig) -> ModelSource:
    """The model of a training run, if method, model and settings fit together; loads no weights."""
    trainer_class, _ = trainer_settings(config)
    model = config.model
    if model.adapter is not None:
        raise ConfigError("model.adapter with `train`: training on top of a trained adapter is not supported yet")
    if model.quantization is not None:
        if model.lora is None:
            raise ConfigError("model.quantization: quantized weights cannot be trained; add adapters with model.lora")
        check_quantization(model.quantization, pick_device())
    picture_size(config)
    source = inspect_model(model.pretrained_model_name_or_path, model.revision, model.variant)
    trainer_class.check_prediction(source.prediction)
    return source


def _training_policy(config: RunConfig, source: ModelSource, device: torch.device) -> Policy:
    model = config.model
    policy: Any = load_model(
        model,
        source,
        train=True,
        size=picture_size(config),
        dtype=WEIGHT_DTYPES[config.training.mixed_precision],
        device=device,
    )
    if model.gradient_checkpointing:
        policy.denoiser.enable_gradient_checkpointing()
    if model.channels_last:
        policy.to_channels_last()
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


class _Validation:
    """Validation of a run: implicit accuracy on fixed triples, pictures and their scores."""

    def __init__(
        self, trainer: Any, config: RunConfig, view: EncodedPairs | None, device: torch.device, main: bool
    ) -> None:
        self.trainer, self.config, self.device, self.main = trainer, config, device, main
        self.policy: Policy = trainer.policy
        self.batches: list[PairBatch] = []
        if view is not None and len(view):
            source = PairSource(view, seed=config.seed, batch_size=1, prefetch=False)
            size = config.training.per_device_train_batch_size
            for batch in source.fixed_batches(len(view), size):
                for k in range(config.training.validation_draws):
                    draws = tuple(Draw(d.seed, d.epoch - k, d.pair_id) for d in batch.draws)
                    self.batches.append(dataclasses.replace(batch, draws=draws))
        self.scorer: Any = None

    def __call__(self, step: int) -> dict[str, float]:
        values = self._triples()
        # A sharded denoiser draws with all processes or not at all.
        if self.config.training.validation_prompts and (self.main or is_sharded(self.policy.denoiser)):
            values |= self._pictures(step)
        return values

    @torch.no_grad()
    def _triples(self) -> dict[str, float]:
        """Means over the fixed (pair, timestep, noise) triples, the same ones at every call."""
        sums: dict[str, float] = {}
        count = sum(len(b) for b in self.batches)
        for batch in self.batches:
            metrics = self.trainer.loss(batch.to(self.device)).metrics
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(batch) / count
        if "z_square" in sums:
            sums["z_std"] = max(sums.pop("z_square") - sums["z_mean"] ** 2, 0.0) ** 0.5
        return sums

    def _pictures(self, step: int) -> dict[str, float]:
        training, sampling = self.config.training, self.config.sampling
        prompts = list(training.validation_prompts)
        images = self.policy.sample(
            prompts,
            list(range(len(prompts))),
            guidance_scale=sampling.guidance_scale,
            num_inference_steps=sampling.num_inference_steps,
        )
        self.policy.free_encoders()
        if not self.main:
            return {}
        folder = Path(self.config.output_dir) / "validation"
        folder.mkdir(parents=True, exist_ok=True)
        row = torch.cat(list(images), dim=2)  # side by side
        (folder / f"step-{step:06d}.png").write_bytes(to_png(row))
        if training.reward_model is None:
            return {}
        if self.scorer is None:
            from diffalign.reward_models import load_reward_model

            self.scorer = load_reward_model(training.reward_model)
        return {f"score/{training.reward_model}": float(self.scorer(images, prompts).mean())}


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

    evaluation = config.evaluation
    run = Path(config.output_dir)
    adapter = config.model.adapter or str(run)
    source = inspect_model(config.model.pretrained_model_name_or_path, config.model.revision, config.model.variant)
    seed = EVALUATION_SEED + config.seed if evaluation.seed is None else evaluation.seed
    rows = read_prompts(evaluation.prompts, evaluation.num_prompts, seed)
    sampling = config.sampling.model_copy(update={"seed": seed, "num_images_per_prompt": 1})
    requests = make_requests(rows, sampling)
    models = [load_reward_model(name, device=pick_device()) for name in evaluation.reward_models]
    folder = run / "evaluation"
    policy = load_model(config.model, source, adapter=adapter, size=picture_size(config))
    sampling = sampling.resolved(policy)
    settings: dict[str, Any] = {"n_expected": len(requests)}
    for side, reference in (("base", True), ("aligned", False)):
        weights = weights_fingerprint(policy, reference=reference)
        model = {
            "path": config.model.pretrained_model_name_or_path,
            "adapter": None if reference else "adapter of this run",
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
        )
        _score_side(index, models, evaluation.benchmark, folder / f"{side}.jsonl")
        settings[side] = {
            "model": model,
            "sampling": {
                "guidance_scale": sampling.guidance_scale,
                "num_inference_steps": sampling.num_inference_steps,
                "prompts": evaluation.prompts,
            },
        }
    write_json(folder / "settings.json", settings)
    comparison = compare_folder(folder)
    write_json(folder / "comparison.json", comparison.to_dict(pick_device()))
    return comparison


def _score_side(index: Path, models: Sequence[Any], benchmark: str | None, out: Path) -> None:
    """Scores and verdicts of one side's pictures, as results rows beside their folder."""
    from diffalign import plugins
    from diffalign.eval import Case, Row, read_jsonl, write_rows
    from diffalign.reward_models.media import to_rgb
    from diffalign.reward_models.scoring import score_index

    scores_path = index.with_name("scores.jsonl")
    summary = score_index(index, models, scores_path)
    if summary.failures:
        logger.warning("%s", summary)
    scores = {row["id"]: row["scores"] for row in read_jsonl(scores_path)}
    judge = plugins.find("eval", benchmark)() if benchmark else None
    rows = []
    for item in read_jsonl(index):
        row = Row(
            id=item["id"],
            prompt=item["prompt"],
            seed=item["seed"],
            task=item.get("task"),
            image=f"{index.parent.name}/{item['image']}",
            scores=scores[item["id"]],
        )
        if judge is not None:
            picture = pil_to_tensor(to_rgb(index.parent / item["image"])).float() / 255
            verdict = judge.score(picture[None], [Case(row.id, row.prompt, row.seed, row.task)])[0]
            row = dataclasses.replace(row, correct=verdict.correct, reason=verdict.reason, evidence=verdict.evidence)
        rows.append(row)
    write_rows(out, rows)


def read_config_yaml(run_dir: str | Path) -> dict[str, Any]:
    """The configuration a run was made with, as `train` wrote it."""
    content: dict[str, Any] = yaml.safe_load((Path(run_dir) / "config.yaml").read_text(encoding="utf-8"))
    return content
