"""How good the model is so far: validation of a run while it trains, and scores of drawn pictures.

These put reward models and benchmarks to use, which the core reaches only here and in `diffalign.commands`.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch

from diffalign.batches import PairBatch
from diffalign.config import ConfigError, EvaluationConfig, RunConfig
from diffalign.data import EncodedPairs, PairSource
from diffalign.generation import Request, to_png
from diffalign.policy import Policy
from diffalign.randomness import Draw
from diffalign.sharding import is_sharded
from diffalign.videos import to_mp4

logger = logging.getLogger("diffalign")


class Validation:
    """Validation of a run: the method's metrics on fixed triples, pictures and their scores.

    Args:
        trainer: Whose policy is validated.
        config: The run.
        view: Pairs set aside for it, or None.
        device: Where the trainer works.
        main: Whether this process writes.
    """

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
        """Metrics after `step` optimizer steps; pictures, if any are wanted, go into the run's folder."""
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
            metrics = self.trainer.validate(batch.to(self.device))
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
        row = torch.cat(list(images), dim=-1)  # side by side
        if self.policy.is_video:
            fps = sampling.fps or self.policy.frame_rate
            (folder / f"step-{step:06d}.mp4").write_bytes(to_mp4(row, fps))
        else:
            (folder / f"step-{step:06d}.png").write_bytes(to_png(row))
        if training.reward_model is None:
            return {}
        if self.scorer is None:
            from diffalign.reward_models import load_reward_model

            self.scorer = load_reward_model(training.reward_model)
        return {f"score/{training.reward_model}": float(self.scorer(images, prompts).mean())}


BENCHMARK_PROMPTS = "diffalign://benchmark"
"""Stands for a benchmark's own prompts, seeds and number of samples."""


def open_benchmark(evaluation: EvaluationConfig) -> Any | None:
    """The benchmark of an evaluation, or None if it has none.

    Raises:
        ConfigError: If there is none of that name, or it has no such option.
    """
    from diffalign import plugins

    own = evaluation.prompts == BENCHMARK_PROMPTS
    if evaluation.benchmark is None:
        if own or evaluation.benchmark_options:
            raise ConfigError(f"{BENCHMARK_PROMPTS} and evaluation.benchmark_options need evaluation.benchmark")
        return None
    options: dict[str, Any] = {}
    if own:
        options |= {"num_prompts": evaluation.num_prompts}
        options |= {} if evaluation.seed is None else {"seed": evaluation.seed}
    benchmark = plugins.find("eval", evaluation.benchmark)
    try:
        return benchmark(**options | evaluation.benchmark_options)
    except TypeError as error:
        raise ConfigError(f"evaluation.benchmark_options of {evaluation.benchmark!r}: {error}") from error


def benchmark_requests(benchmark: Any) -> list[Request]:
    """What a benchmark wants to see, in its order."""
    return [
        Request(case.id.replace("/", "-"), case.prompt, case.seed, {"task": case.task}, benchmark.is_video)
        for case in benchmark.cases()
    ]


def judge_side(index: Path, scores_path: Path | None, judge: Any | None, out: Path) -> None:
    """Scores and verdicts of one side's pictures or videos, as results rows beside their folder.

    Args:
        index: Of the pictures.
        scores_path: Their scores; None if no reward model was asked for.
        judge: The benchmark, or None.
        out: The file of rows.
    """
    from diffalign.eval import Case, Row, read_jsonl, write_rows
    from diffalign.eval.runner import score_files, slice_size

    scores = {row["id"]: row["scores"] for row in read_jsonl(scores_path)} if scores_path is not None else {}
    items = read_jsonl(index)
    rows = [
        Row(
            id=item["id"],
            prompt=item["prompt"],
            seed=item["seed"],
            task=item.get("task"),
            image=f"{index.parent.name}/{item['image']}" if "image" in item else None,
            scores=scores[item["id"]] if scores_path is not None else {},
        )
        for item in items
    ]
    if judge is not None:
        files = [index.parent / item["image" if "image" in item else "video"] for item in items]
        at_once = slice_size(judge)
        for start in range(0, len(rows), at_once):
            batch = rows[start : start + at_once]
            cases = [Case(row.id, row.prompt, row.seed, row.task) for row in batch]
            verdicts = score_files(judge, cases, files[start : start + at_once])
            rows[start : start + at_once] = [
                dataclasses.replace(
                    row,
                    task=v.task,
                    scores={**row.scores, **v.scores},
                    correct=v.correct,
                    reason=v.reason,
                    evidence=v.evidence,
                )
                for row, v in zip(batch, verdicts, strict=True)
            ]
    write_rows(out, rows)
