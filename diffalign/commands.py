"""The bodies of the command line's commands, each usable from Python; they return what the terminal shows last.

Those that load no diffusion model are in `diffalign.light_commands`.

Everything that can be refused is refused before weights are loaded: configuration, model folder, prediction type,
data columns, checkpoints of another configuration.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffalign.backbones import ModelSource, inspect_model
from diffalign.backbones.loading import LORA_FILE, check_options, policy_class
from diffalign.backbones.reward_guidance import check_guidance, load_guidance
from diffalign.config import (
    ConfigError,
    ModelConfig,
    RunConfig,
    checked_config,
    load_config,
    read_settings,
    trainer_settings,
)
from diffalign.configured import find_negative_model, load_model, pairs_folder, picture_size
from diffalign.devices import pick_device
from diffalign.generation import SamplingConfig, generate, make_requests, weights_fingerprint
from diffalign.loop import Waiting
from diffalign.media_checks import check_judges, check_media_settings, check_scorers
from diffalign.mining import mine_pairs
from diffalign.processes import launched
from diffalign.prompts import read_prompts
from diffalign.training import checked, train_config
from diffalign.validating import BENCHMARK_PROMPTS, benchmark_requests, judge_side, open_benchmark

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
    negative = find_negative_model(source, settings)
    check_media_settings(source, num_frames=num_frames, sampling=settings)
    check_guidance(source, settings)
    rows = read_prompts(prompts, limit, settings.seed)
    requests, processes = make_requests(rows, settings, is_video=kind.is_video), launched()
    section = ModelConfig(pretrained_model_name_or_path=model, num_frames=num_frames)
    policy: Any = load_model(section, source, adapter=adapter, size=size, sampling=settings)
    policy.put_negative(negative, alpha=settings.negative_alpha, scale=settings.negative_scale)
    policy.reward_guidance = load_guidance(policy, settings)
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
    negative = find_negative_model(source, config.sampling)
    check_media_settings(
        source,
        num_frames=config.model.num_frames,
        options=config.model.options,
        data=config.data,
        sampling=config.sampling,
    )
    check_scorers(source, [reward_model_info(config.pairs.reward_model)], in_groups=True)
    processes = launched()
    reward_model = load_reward_model(
        config.pairs.reward_model, **{"device": pick_device(), **config.pairs.reward_options}
    )
    sampling = config.sampling
    policy = load_model(
        config.model, source, adapter=config.model.adapter, size=picture_size(config), sampling=sampling
    )
    policy.put_negative(negative, alpha=sampling.negative_alpha, scale=sampling.negative_scale)
    out = pairs_folder(config)
    model = {"model": config.model.pretrained_model_name_or_path, "adapter": config.model.adapter}
    seed = config.seed if config.pairs.seed is None else config.pairs.seed
    settings = config.pairs.model_copy(update={"seed": seed})
    summary = mine_pairs(policy, reward_model, settings, sampling, out, settings=model, processes=processes)
    facts = ", ".join(f"{k.replace('_', ' ')} {v:.4g}" if isinstance(v, float) else f"{k.replace('_', ' ')} {v}"
                      for k, v in summary.items() if isinstance(v, int | float))  # fmt: skip
    return f"{facts}\npairs: {out / 'index.jsonl'}"


def train(config_path: str, overrides: Sequence[str] = (), dry_run: bool = False) -> str:
    """Body of `diffalign train`; with `dry_run` only what the run would cost, and nothing is written."""
    config = load_config(config_path, overrides)
    if dry_run:
        from diffalign.estimate import estimate_run

        return str(estimate_run(config, checked(config)))
    try:
        output_dir = train_config(config)
    except Waiting as waiting:
        return str(waiting)
    return f"trained weights: {output_dir}\nmetrics: {output_dir / 'metrics.jsonl'}"


def train_reward(config_path: str, overrides: Sequence[str] = ()) -> str:
    """Body of `diffalign train-reward`: the section `reward` says which kind of reward model is trained."""
    from diffalign import reward_config, reward_training

    raw = read_settings(config_path, overrides)
    section = raw.get("reward")
    kind = section.get("kind") if isinstance(section, dict) else None
    if kind in reward_config.RUNS:
        from diffalign.reward_models.training import train_configured

        return train_configured(checked_config(reward_config.RUNS[kind], raw))
    folder, accuracy = reward_training.train_reward(checked_config(RunConfig, raw))
    return f"{reward_training.render_accuracy(accuracy)}\nreward model: {folder}\nmetrics: {folder / 'metrics.jsonl'}"


def rollout(config_path: str, overrides: Sequence[str] = ()) -> str:
    """Body of `diffalign rollout`."""
    from diffalign.rollout_command import draw_round

    return draw_round(load_config(config_path, overrides))


# --- evaluate --------------------------------------------------------------------------------------------------------


def evaluate(config_path: str, overrides: Sequence[str] = ()) -> str:
    """Body of `diffalign evaluate`."""
    from diffalign.eval.tables import render_table

    config = load_config(config_path, overrides)
    comparison = evaluate_config(config)
    return f"{render_table(comparison)}\nresults: {Path(config.output_dir) / 'evaluation' / 'comparison.json'}"


def evaluate_config(config: RunConfig) -> Any:
    """Draws, scores and judges base and aligned pictures, and compares them; returns the `Comparison`."""
    from diffalign.eval import compare_folder, read_rows, write_json
    from diffalign.reward_models import load_reward_model, reward_model_info
    from diffalign.reward_models.scoring import score_index

    evaluation = config.evaluation
    run = Path(config.output_dir)
    benchmark = open_benchmark(evaluation)
    source = inspect_model(config.model.pretrained_model_name_or_path, config.model.revision, config.model.variant)
    check_options(source, config.model.options)
    policy_class(source).check_sampling(source)
    check_judges(source, [reward_model_info(name) for name in evaluation.reward_models], benchmark)
    check_guidance(source, config.sampling)
    processes = launched()
    seed = EVALUATION_SEED + config.seed if evaluation.seed is None else evaluation.seed
    own_prompts = evaluation.prompts == BENCHMARK_PROMPTS
    rows = [] if own_prompts else read_prompts(evaluation.prompts, evaluation.num_prompts, seed)
    compared, negative_model = compared_weights(config, source)
    sampling = config.sampling.model_copy(
        update={
            "seed": seed,
            "num_images_per_prompt": evaluation.num_images_per_prompt,
            "negative_model": negative_model,
        }
    )
    negative = find_negative_model(source, sampling)
    requests = make_requests(rows, sampling, is_video=policy_class(source).is_video)
    if benchmark is not None and own_prompts:
        requests = benchmark_requests(benchmark)
    models = [load_reward_model(name, device=pick_device()) for name in evaluation.reward_models]
    folder = run / "evaluation"
    policy: Any = load_model(
        config.model,
        source,
        adapter=compared.get("adapter"),
        start=compared.get("start"),
        size=picture_size(config),
        sampling=sampling,
    )
    sampling = sampling.resolved(policy)
    guidance = load_guidance(policy, sampling)
    policy.put_negative(negative, alpha=sampling.negative_alpha, scale=sampling.negative_scale)
    usual = sampling.model_copy(update={"negative_model": None})
    trains_negative = trainer_settings(config)[0].trains_negative
    settings: dict[str, Any] = {"n_expected": len(requests)}
    for side, aligned in (("base", False), ("aligned", True)):
        reference = not (aligned or trains_negative)  # what trains a negative model is judged by the branch alone
        against = aligned and negative is not None
        weights = processes.on_first(partial(weights_fingerprint, policy, reference=reference, negative=against))
        model = {
            "path": config.model.pretrained_model_name_or_path,
            "adapter": compared.get("start") if reference else "adapter of this run",
            "weights": weights,
        }
        if trains_negative:
            model["adapter"] = compared.get("adapter")
        if against:
            model["negative_model"] = sampling.negative_model
        name = f"{side}-{weights[:8]}"
        policy.reward_guidance = guidance if aligned else None
        if policy.reward_guidance is not None:
            model["reward_guidance"] = policy.reward_guidance.settings()
            name += f"-{policy.reward_guidance.digest()}"
        logger.info("%s model: %d pictures", side, len(requests))
        index = generate(
            policy,
            requests,
            folder / name,
            sampling if against else usual,
            reference=reference,
            settings={"model": model["path"], "adapter": model["adapter"], "weights": weights},
            processes=processes,
        )
        scores = index.with_name("scores.jsonl") if models else None
        if scores is not None:
            summary = score_index(index, models, scores, processes=processes)
            if summary.failures and processes.is_first:
                logger.warning("%s", summary)
        processes.on_first(partial(judge_side, index, scores, benchmark, folder / f"{side}.jsonl"))
        settings[side] = {
            "model": model,
            "sampling": {
                "guidance_scale": sampling.guidance_scale,
                "num_inference_steps": sampling.num_inference_steps,
                "prompts": evaluation.prompts,
                **sampling.caches(),
            },
        }

    def conclude() -> Any:
        device = torch.device(pick_device()).type
        write_json(folder / "settings.json", settings)
        comparison = compare_folder(folder)
        write_json(folder / "comparison.json", comparison.to_dict(device))
        if benchmark is not None and own_prompts:
            for side in ("base", "aligned"):
                report = benchmark.aggregate(read_rows(folder / f"{side}.jsonl"))
                sampled = {**report.sampling, **settings[side]["sampling"]}
                report = replace(report, model=settings[side]["model"], sampling=sampled)
                write_json(folder / f"{side}_{benchmark.name}.json", report.to_dict(device))
        return comparison

    return processes.on_first(conclude)


def compared_weights(config: RunConfig, source: ModelSource) -> tuple[dict[str, str], str | None]:
    """What `evaluate` compares: arguments of `load_model`, and the negative model of the aligned side.

    A run that trains a negative model (`npo`, `self_npo`) is compared with usual guidance, both sides with the weights
    of the base model or of `model.adapter`: its own weights are the negative model, unless
    `sampling.negative_model` names others. Other runs are compared as `trained_weights` says; a
    `sampling.negative_model` then belongs to the aligned side.
    """
    if not trainer_settings(config)[0].trains_negative:
        return trained_weights(config, source), config.sampling.negative_model
    adapter = config.model.adapter
    return {} if adapter is None else {"adapter": adapter}, config.sampling.negative_model or config.output_dir


def trained_weights(config: RunConfig, source: ModelSource) -> dict[str, str]:
    """What `evaluate` compares of other runs, as arguments of `load_model`.

    The run's own weights against what they started from: the base model, or `model.adapter`. Where the run has trained
    nothing, `model.adapter` against the base model; or, with reward guidance or a negative model, the base model with
    and without it.
    """
    kind, run, adapter = policy_class(source), Path(config.output_dir), config.model.adapter
    files = (LORA_FILE, *(f"{part}/*.safetensors" for part in (kind.part, *kind.more_parts)))
    trained = any(any(run.glob(name)) for name in files)
    if adapter is None:
        guided = config.sampling.reward_guidance is not None or config.sampling.negative_model is not None
        return {} if guided and not trained else {"adapter": str(run)}
    if not trained:
        return {"adapter": adapter}
    return {"start": adapter, "adapter": str(run)}
