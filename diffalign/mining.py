"""Preference pairs from the policy's own images, ranked by a reward model: the body of `diffalign pairs`."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from diffalign.generation import INDEX_FILE, Request, SamplingConfig, generate, make_requests
from diffalign.processes import ALONE, Processes
from diffalign.prompts import read_prompts
from diffalign.resumable import Row, RowLog, claim_folder, to_line, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

    from diffalign.policy import Policy

_log = logging.getLogger("diffalign")

CANDIDATES = "candidates"
SCORES_FILE = "scores.jsonl"
SAMPLES_FILE = "samples.jsonl"
"""All images with a valid score, as scored samples; larger rewards are better."""
SUMMARY_FILE = "summary.json"
TIE = 1e-6
"""Scores that differ by no more than this are equal."""


class PairsConfig(BaseModel):
    """Which pairs to make.

    Attributes:
        prompts: A text file, a JSONL with a `prompt` field, or `diffalign://shapes/train`; see `read_prompts`.
        num_prompts: How many of them; None takes all.
        task_weights: Shares of the embedded world's tasks among `num_prompts`; equal if left out.
        num_images_per_prompt: Images that compete for each prompt.
        reward_model: Name of the reward model that ranks them.
        reward_options: Further arguments of the reward model.
        score_batch_size: Images scored at once.
        min_margin: Pairs whose scores differ by less are dropped, on the reward model's raw scale.
        pairs_per_prompt: Best against worst, then second best against second worst, and so on.
        seed: Of the choice of prompts and of the images; None is the run's seed, or 0 without a run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts: str = "diffalign://shapes/train"
    num_prompts: int | None = Field(default=None, ge=1)
    task_weights: dict[str, float] | None = None
    num_images_per_prompt: int = Field(default=4, ge=2)
    reward_model: str = "pickscore"
    reward_options: dict[str, Any] = Field(default_factory=dict)
    score_batch_size: int = Field(default=32, ge=1)
    min_margin: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    pairs_per_prompt: int = Field(default=1, ge=1)
    seed: int | None = None

    @model_validator(mode="after")
    def _enough_images(self) -> Self:
        if 2 * self.pairs_per_prompt > self.num_images_per_prompt:
            raise ValueError(
                f"pairs_per_prompt {self.pairs_per_prompt} needs num_images_per_prompt of at least "
                f"{2 * self.pairs_per_prompt}, got {self.num_images_per_prompt}"
            )
        return self


class Scores(Protocol):
    """What a scorer gives back for N images; see `diffalign.reward_models.base.RewardOutput`."""

    @property
    def score(self) -> Tensor:
        """Scores [N]; NaN where `valid` is False."""
        ...

    @property
    def valid(self) -> Tensor:
        """Whether each image could be scored, bool [N]."""
        ...

    @property
    def errors(self) -> tuple[str | None, ...]:
        """Why not, per image."""
        ...


class Scorer(Protocol):
    """What mining needs of a reward model; see `diffalign.reward_models.base.RewardModel`."""

    info: Any

    def score(
        self, media: Any, prompts: Any, *, batch_size: int = ..., on_invalid: Literal["raise", "nan"] = ...
    ) -> Scores:
        """Scores of N image files with their N prompts."""
        ...

    def fingerprint(self) -> str:
        """Changes when weights or settings do."""
        ...


@dataclass(frozen=True)
class Candidate:
    """An image that competes for its prompt. `score` is larger for better images, whatever the model's direction."""

    request: Request
    score: float


def mine_pairs(
    policy: Policy,
    reward_model: Scorer,
    config: PairsConfig,
    sampling: SamplingConfig,
    out_dir: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Draws images for each prompt, scores them, and pairs the best with the worst; a rerun goes on where it was.

    `out_dir/candidates/` holds all images, `scores.jsonl` their scores, `index.jsonl` the pairs (fields id, prompt,
    chosen, rejected, score_chosen, score_rejected, margin; paths relative to `out_dir`) and `samples.jsonl` all images
    that have a score (id, prompt, image, reward), both written at the end, and `summary.json` the returned numbers.
    Images are scored from their files, so that a score does not depend on when it was computed. `min_margin` and
    `pairs_per_prompt` may change between runs in one folder: images and scores are used again.

    Args:
        policy: Draws the images.
        reward_model: Ranks them. An image it cannot score drops out and is named; it never counts as 0.
        config: What to draw and how to pair. Its name of the reward model is recorded, not looked up.
        sampling: Guidance, steps and batch size; `config` has the number of images and the seed.
        out_dir: Output folder; new, or of an earlier run with the same settings.
        settings: What `settings.json` should say about the model; see `generate`.
        processes: Who shares the work; see `generate`.

    Returns:
        Counts of prompts, images, dropped images (without a valid score), pairs, ties (groups whose scores are equal
        or too near) and short groups (fewer than two valid images), the mean margin, and the ids and errors of the
        dropped images: what `summary.json` holds.

    Raises:
        ValueError: If the folder is of another run, or if not one pair could be made.
    """
    out_dir = Path(out_dir)
    config = config if config.seed is not None else config.model_copy(update={"seed": 0})
    prompts = read_prompts(config.prompts, config.num_prompts, config.seed or 0, config.task_weights)
    sampling = sampling.model_copy(update={"num_images_per_prompt": config.num_images_per_prompt, "seed": config.seed})
    requests = make_requests(prompts, sampling, is_video=policy.is_video)

    def claim() -> None:
        scorer = {
            "reward_model": config.reward_model,
            "reward_options": config.reward_options,
            "score_batch_size": config.score_batch_size,
            "reward_weights": reward_model.fingerprint(),
        }
        claim_folder(out_dir, scorer, (INDEX_FILE, SCORES_FILE, CANDIDATES))

    processes.on_first(claim)
    origin = config.model_dump(include={"prompts", "num_prompts", "task_weights", "num_images_per_prompt", "seed"})
    made_from = {**(settings or {}), **origin}
    generate(policy, requests, out_dir / CANDIDATES, sampling, settings=made_from, processes=processes)
    batch_size = config.score_batch_size
    if reward_model.info.groupwise:  # such a score needs all images of a prompt in one call
        batch_size = -(-batch_size // config.num_images_per_prompt) * config.num_images_per_prompt
    rows = score_images(reward_model, requests, out_dir, batch_size, processes)
    sign = 1.0 if reward_model.info.higher_is_better else -1.0
    return processes.on_first(lambda: _pair_up(config, requests, rows, sign, out_dir))


def _pair_up(
    config: PairsConfig, requests: Sequence[Request], rows: Sequence[Row], sign: float, out_dir: Path
) -> dict[str, Any]:
    """Writes the pairs and the summary, which it returns."""
    candidates = [
        None if row["score"] is None else Candidate(request, sign * row["score"])
        for request, row in zip(requests, rows, strict=True)
    ]
    pairs: list[dict[str, Any]] = []
    ties = short = 0
    prompts = len(requests) // config.num_images_per_prompt
    for number in range(prompts):
        start = number * config.num_images_per_prompt
        group = [c for c in candidates[start : start + config.num_images_per_prompt] if c is not None]
        found = choose_pairs(group, config.pairs_per_prompt, config.min_margin)
        short += len(group) < 2
        ties += len(group) >= 2 and not found
        pairs += [_pair_row(f"{number:05d}-{k}", *pair, sign) for k, pair in enumerate(found)]
    samples = [_sample_row(candidate) for candidate in candidates if candidate is not None]
    write_atomically(out_dir / SAMPLES_FILE, "".join(map(to_line, samples)).encode())
    dropped = [{"id": row["id"], "error": row["error"]} for row in rows if row["score"] is None]
    summary = {
        "prompts": prompts,
        "images": len(requests),
        "dropped": len(dropped),
        "pairs": len(pairs),
        "ties": ties,
        "short_groups": short,
        "mean_margin": sum(pair["margin"] for pair in pairs) / len(pairs) if pairs else None,
        "dropped_images": dropped,
    }
    _report(summary, out_dir, pairs, config.min_margin)
    return summary


def choose_pairs(
    group: Sequence[Candidate], count: int = 1, min_margin: float = 0.0
) -> list[tuple[Candidate, Candidate]]:
    """Up to `count` (chosen, rejected) pairs of one prompt's images: the k-th best against the k-th worst.

    The result does not depend on the order of `group`: among equal scores the image with the smaller id ranks first.
    Pairs whose scores differ by 1e-6 or less, or by less than `min_margin`, are left out.
    """
    ranked = sorted(group, key=lambda c: (-c.score, c.request.id))
    pairs = [(ranked[k], ranked[-1 - k]) for k in range(min(count, len(ranked) // 2))]
    return [(a, b) for a, b in pairs if a.score - b.score > TIE and a.score - b.score >= min_margin]


def score_images(
    reward_model: Scorer, requests: Sequence[Request], out_dir: Path, batch_size: int, processes: Processes = ALONE
) -> list[Row]:
    """Scores of the candidates in `out_dir`, one row {id, score, error} per request, kept in `scores.jsonl`.

    `score` is None, with the reason in `error`, for an image that could not be scored.
    """

    def is_current(row: Row) -> bool:
        score = row.get("score")
        return row.keys() == {"id", "score", "error"} and (score is None or isinstance(score, float))

    log = RowLog(out_dir / SCORES_FILE, [request.id for request in requests], batch_size, is_current, processes)
    with log.progress("scoring", "image") as progress:
        for chunk in log.todo:
            batch = requests[chunk.start : chunk.stop]
            output = reward_model.score(
                [out_dir / CANDIDATES / request.file for request in batch],
                [request.prompt for request in batch],
                batch_size=batch_size,
                on_invalid="nan",
            )
            log.append(
                [
                    _score_row(request, float(score), bool(valid), error)
                    for request, score, valid, error in zip(
                        batch, output.score.tolist(), output.valid.tolist(), output.errors, strict=True
                    )
                ]
            )
            progress.update(len(batch))
    return log.finish()


def _score_row(request: Request, score: float, valid: bool, error: str | None) -> Row:
    if valid and isfinite(score):
        return {"id": request.id, "score": score, "error": None}
    return {"id": request.id, "score": None, "error": error or f"the score is {score}"}


def _pair_row(pair_id: str, chosen: Candidate, rejected: Candidate, sign: float) -> dict[str, Any]:
    return {
        "id": pair_id,
        "prompt": chosen.request.prompt,
        "chosen": f"{CANDIDATES}/{chosen.request.file}",
        "rejected": f"{CANDIDATES}/{rejected.request.file}",
        "score_chosen": sign * chosen.score,
        "score_rejected": sign * rejected.score,
        "margin": chosen.score - rejected.score,
    }


def _sample_row(candidate: Candidate) -> dict[str, Any]:
    request = candidate.request
    image = f"{CANDIDATES}/{request.file}"
    return {"id": request.id, "prompt": request.prompt, "image": image, "reward": candidate.score}


def _report(summary: Mapping[str, Any], out_dir: Path, pairs: Sequence[Row], min_margin: float) -> None:
    for dropped in summary["dropped_images"]:
        _log.warning("image %s has no score and is left out: %s", dropped["id"], dropped["error"])
    write_atomically(out_dir / SUMMARY_FILE, (json.dumps(summary, indent=2, ensure_ascii=False) + "\n").encode())
    index = out_dir / INDEX_FILE
    if not pairs:
        index.unlink(missing_ok=True)
        raise ValueError(
            f"not one pair could be made from {summary['prompts']} prompts: {summary['ties']} groups differ by less "
            f"than the margin {max(TIE, min_margin):g}, {summary['short_groups']} have fewer than two scored images; "
            "lower min_margin or draw more images per prompt"
        )
    write_atomically(index, "".join(to_line(pair) for pair in pairs).encode())
