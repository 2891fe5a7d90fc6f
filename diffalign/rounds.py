"""Rounds of rollouts: drawn and scored while a run trains, or drawn before and labelled by people.

A round is drawn with the weights at its start. Both kinds keep it in the run's folder, so that a run that resumes in
its middle, with other weights, goes on with the same images.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from diffalign.mining import Scorer
from diffalign.processes import ALONE, Processes
from diffalign.randomness import Draw, generator
from diffalign.resumable import write_atomically
from diffalign.rollout_config import RolloutConfig, RoundPlan
from diffalign.rollout_labels import labels_digest, preferences, read_labels, to_do
from diffalign.rollout_store import RoundFolder, drop_rounds, fingerprint, rounds_in_use
from diffalign.rollouts import Rollouts, StochasticSampler

__all__ = ["LabelledRounds", "Round", "RoundPrompts", "Rounds", "ScoredRounds", "chunks", "round_settings"]

logger = logging.getLogger("diffalign")


@dataclass(frozen=True)
class Round:
    """This process's part of a round.

    Attributes:
        rollouts: One entry for each prompt, of its K images.
        tables: Who is better among them, as `rollout_labels.preferences` says it, [K, K] each.
        metrics: To be logged with every step of the round.
    """

    rollouts: Sequence[Rollouts]
    tables: Sequence[Tensor]
    metrics: dict[str, float]


class Rounds(Protocol):
    """Where `RolloutSource` has its rounds from."""

    def get(self, number: int, inside: int) -> Round:
        """Round `number`, of which `inside` optimizer steps are done already."""
        ...

    def waiting(self, number: int) -> str | None:
        """What a person has to do before the round can be had, if there is anything."""
        ...


class RoundPrompts:
    """Which prompts a round draws: the next ones of an endless sequence of permutations.

    Args:
        prompts: All prompts.
        seed: Of the run.
        per_round: Prompts of a round.

    Raises:
        ValueError: If there is no prompt.
    """

    def __init__(self, prompts: Sequence[str], seed: int, per_round: int) -> None:
        if not prompts:
            raise ValueError("there is no prompt to draw; expected at least one")
        self.prompts, self.seed, self.per_round = tuple(prompts), seed, per_round

    def __call__(self, number: int, group: int) -> tuple[str, Draw]:
        """The prompt at a place of a round, with the random numbers of its visit."""
        epoch, index = divmod(number * self.per_round + group, len(self.prompts))
        order = torch.randperm(len(self.prompts), generator=generator(self.seed, "prompts", epoch))
        row = int(order[index])
        return self.prompts[row], Draw(self.seed, epoch, f"prompt-{row:05d}")


def round_settings(
    sampler: StochasticSampler, prompts: RoundPrompts, config: RolloutConfig, scorer: str | None
) -> dict[str, Any]:
    """What a round's trajectories depend on beside number and weights, as JSON values.

    Args:
        sampler: Draws.
        prompts: The run's.
        config: How rounds are made.
        scorer: Fingerprint of the reward model; None for people.
    """
    text = "\x1f".join(prompts.prompts)
    return {
        "seed": prompts.seed,
        "prompts": f"{len(prompts.prompts)}, digest {blake2b(text.encode(), digest_size=8).hexdigest()}",
        "prompts_per_round": config.prompts_per_round,
        "num_images_per_prompt": config.num_images_per_prompt,
        "batch_size": config.batch_size,
        "guidance_scale": sampler.guidance_scale,
        "noise": sampler.eta,
        "solver": type(sampler.solver).__name__,
        "timesteps": sampler.grid.tolist(),
        "latent_shape": list(sampler.policy.latent_shape),
        "scorer": scorer,
    }


def chunks(prompts: int, config: RolloutConfig) -> list[range]:
    """The prompts that are drawn together: all their images fit into `batch_size`, or it is one prompt."""
    size = max(1, config.batch_size // config.num_images_per_prompt)
    return [range(start, min(start + size, prompts)) for start in range(0, prompts, size)]


class ScoredRounds:
    """Rounds that are drawn when they are asked for, and ranked by a scorer.

    Args:
        sampler: Draws; a trainer's own, so that both agree on guidance and noise.
        scorer: Ranks.
        prompts: The run's.
        plan: How rounds are made.
        processes: Who shares a round.
        folder: `rollouts` in the run's folder, which also holds its checkpoints; None keeps nothing.
    """

    def __init__(
        self,
        sampler: StochasticSampler,
        scorer: Scorer,
        prompts: RoundPrompts,
        plan: RoundPlan,
        processes: Processes = ALONE,
        folder: Path | None = None,
    ) -> None:
        self.sampler, self.scorer, self.prompts, self.plan, self.config = sampler, scorer, prompts, plan, plan.config
        self.processes, self.folder = processes, folder
        self.groups = plan.groups(processes.rank)
        self._settings = round_settings(sampler, prompts, plan.config, scorer.fingerprint())

    def waiting(self, number: int) -> str | None:
        """Nothing."""
        return None

    def get(self, number: int, inside: int) -> Round:
        """See `Rounds`.

        Raises:
            ValueError: If steps are done and the round was not kept; if images have no score and `on_invalid` says
                "stop", or none has one.
        """
        if self.folder is None:
            if inside:
                raise ValueError(
                    f"step {number * self.plan.steps_per_round + inside} lies within round {number}, whose rollouts "
                    f"were not kept; pass RolloutSource a folder, or resume at a multiple of "
                    f"{self.plan.steps_per_round} steps"
                )
            return self._round(number, *self._draw(number))
        store = RoundFolder(self.folder, number, self._settings)
        if not inside:
            weights = fingerprint(self.sampler.policy.trained_state())
            # All of it or nothing, in all processes: networks that are spread over them draw together.
            kept = all(store.weights(group) == weights for group in self.groups)
            if not all(self.processes.gather(kept)):
                rollouts, scores = self._draw(number)
                for group, own, own_scores in zip(self.groups, rollouts, scores, strict=True):
                    store.write(group, own, weights, own_scores)
                if self.processes.is_first:
                    drop_rounds(self.folder, rounds_in_use(self.folder.parent, self.plan.steps_per_round) | {number})
                return self._round(number, rollouts, scores)
        rollouts, found, _ = read_back(store, self.groups, self.plan, inside)
        return self._round(number, rollouts, [own for own in found if own is not None])

    def _draw(self, number: int) -> tuple[list[Rollouts], list[Tensor]]:
        """Rollouts of the present weights and their scores, one entry for each of this process's prompts."""
        config = self.config
        visits = [self.prompts(number, group) for group in self.groups]
        rollouts: list[Rollouts] = []
        scores: list[Tensor] = []
        problems: list[tuple[str, str]] = []
        for chunk in chunks(len(visits), config):
            prompts, draws = zip(*(visits[place] for place in chunk), strict=True)
            drawn = self.sampler.rollout(prompts, draws, config.num_images_per_prompt, config.batch_size)
            rollouts += [drawn.of_prompt(place) for place in range(len(prompts))]
            scores += self._score(drawn, problems).chunk(len(prompts))
        images = len(visits) * config.num_images_per_prompt
        if problems and (config.on_invalid == "stop" or len(problems) == images):
            prompt, reason = problems[0]
            raise ValueError(
                f"round {number}: {len(problems)} of {images} images have no score, the first for {prompt!r}: "
                f"{reason}; check the weights, or the scorer"
            )
        return rollouts, scores

    def _score(self, drawn: Rollouts, problems: list[tuple[str, str]]) -> Tensor:
        """Scores [N], larger is better, NaN for images that have none, which are added to `problems`."""
        config = self.config
        prompts = [prompt for prompt in drawn.prompts for _ in range(config.num_images_per_prompt)]
        images = self.sampler.decode(drawn, config.batch_size)
        found = self.scorer.score(images, prompts, batch_size=config.score_batch_size, on_invalid="nan")
        invalid = ~(found.valid & found.score.isfinite())
        problems += [(prompts[row], found.errors[row] or "it is not finite") for row in invalid.nonzero().flatten()]
        sign = 1.0 if self.scorer.info.higher_is_better else -1.0
        return (sign * found.score.float()).masked_fill(invalid, float("nan"))

    def _round(self, number: int, rollouts: Sequence[Rollouts], scores: Sequence[Tensor]) -> Round:
        whole = torch.cat(list(scores))
        valid = whole[whole.isfinite()]
        metrics = {
            "round_score_mean": float(valid.mean()),
            "round_score_std": float(valid.std(correction=0)),
            "round_dropped": 1 - len(valid) / len(whole),
        }
        logger.info(
            "round %d: %d images, score %.4f (deviation %.4f), %d dropped",
            number, len(whole), *list(metrics.values())[:2], len(whole) - len(valid),
        )  # fmt: skip
        return Round(rollouts, [preferences(own) for own in scores], metrics)


class LabelledRounds:
    """Rounds that `diffalign rollout` drew and people labelled; see `diffalign.rollout_labels`.

    Args:
        sampler: As the images were drawn with.
        prompts: The run's.
        plan: How rounds are made.
        processes: Who shares a round.
        folder: `rollouts` in the run's folder.
    """

    def __init__(
        self,
        sampler: StochasticSampler,
        prompts: RoundPrompts,
        plan: RoundPlan,
        processes: Processes,
        folder: Path,
    ) -> None:
        self.policy, self.plan, self.processes, self.folder = sampler.policy, plan, processes, folder
        self.groups = plan.groups(processes.rank)
        self._settings = round_settings(sampler, prompts, plan.config, None)

    def waiting(self, number: int) -> str | None:
        """See `Rounds`."""
        return to_do(RoundFolder(self.folder, number, self._settings), self.plan.config)

    def get(self, number: int, inside: int) -> Round:
        """See `Rounds`.

        Raises:
            ValueError: If the round was not drawn or not labelled, or its labels changed since training on it began.
        """
        store, config = RoundFolder(self.folder, number, self._settings), self.plan.config
        reason = to_do(store, config)
        if reason is not None:
            raise ValueError(reason)
        digest, marker = labels_digest(store), store.path / "labels.digest"
        if inside and marker.is_file() and marker.read_text(encoding="utf-8") != digest:
            raise ValueError(
                f"the labels in {store.path} changed since training on them began; put them back, or resume a "
                f"checkpoint at a multiple of {self.plan.steps_per_round} steps"
            )
        if not inside and self.processes.is_first:
            write_atomically(marker, digest.encode())
        rollouts, _, weights = read_back(store, self.groups, self.plan, inside)
        if not inside and weights != fingerprint(self.policy.trained_state()):
            logger.warning("round %d was drawn with other weights than those that now learn from it", number)
        tables = read_labels(store, config)
        nothing = torch.full((config.num_images_per_prompt,) * 2, float("nan"))
        missing = sum(int(tables.get(group, nothing).triu(1).isnan().sum()) for group in self.groups)
        pairs = config.pairs_per_round // self.plan.num_processes
        logger.info("round %d: %d pairs, %d of them without a label", number, pairs, missing)
        return Round(rollouts, [tables.get(group, nothing) for group in self.groups], {})


def read_back(
    store: RoundFolder, groups: Sequence[int], plan: RoundPlan, inside: int
) -> tuple[list[Rollouts], list[Tensor | None], str]:
    """What `RoundFolder.read_all` gives; where it cannot, says which step needs it.

    Args:
        store: The round.
        groups: This process's prompts.
        plan: How rounds are made.
        inside: Optimizer steps of the round that are done already.
    """
    try:
        return store.read_all(groups)
    except ValueError as error:
        raise ValueError(
            f"step {store.number * plan.steps_per_round + inside} needs the rollouts of round {store.number}, which "
            f"cannot be had ({error}); resume a checkpoint at a multiple of {plan.steps_per_round} steps"
        ) from error
