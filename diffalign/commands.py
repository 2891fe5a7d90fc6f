"""The bodies of the command line's commands, each usable from Python; they return what the terminal shows last.

Everything that can be refused is refused before weights are loaded: configuration, model folder, prediction type,
data columns, checkpoints of another configuration.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffalign import plugins
from diffalign.backbones import ModelSource, inspect_model
from diffalign.backbones.loading import LORA_FILE, check_options, policy_class
from diffalign.config import ConfigError, ModelConfig, RunConfig, load_config
from diffalign.configured import load_model, pairs_folder, pick_device, picture_size
from diffalign.generation import SamplingConfig, generate, make_requests, read_prompts, weights_fingerprint
from diffalign.media_checks import check_draws_images, check_media_settings, check_scorers
from diffalign.mining import mine_pairs
from diffalign.processes import launched
from diffalign.training import checked, train_config
from diffalign.validating import judge_side

logger = logging.getLogger("diffalign")

EVALUATION_SEED = 10_000
"""Added to the run's seed for evaluation pictures, so that none starts from the noise of a training picture."""


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


def train(config_path: str, overrides: Sequence[str] = (), dry_run: bool = False) -> str:
    """Body of `diffalign train`; with `dry_run` only what the run would cost, and nothing is written."""
    config = load_config(config_path, overrides)
    if dry_run:
        from diffalign.estimate import estimate_run

        return str(estimate_run(config, checked(config)))
    output_dir = train_config(config)
    return f"trained weights: {output_dir}\nmetrics: {output_dir / 'metrics.jsonl'}"


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
