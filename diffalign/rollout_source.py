"""Batches for `fit` from rounds of the policy's own rollouts: drawn, scored, ranked, and cut into sampling steps."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from diffalign.mining import TIE, Scorer
from diffalign.randomness import Draw, generator
from diffalign.rollouts import Rollouts, StochasticSampler, TransitionPairs

__all__ = ["RolloutConfig", "RolloutSource", "preference"]

logger = logging.getLogger("diffalign")


def preference(first: Tensor, second: Tensor) -> int:
    """1 if the first image is better, -1 if the second is, 0 for a tie.

    With several scores an image is better if it dominates: better in at least one of them and worse in none, as in
    D3PO's released code. Scores that differ by 1e-6 or less are equal.

    Args:
        first: Scores of an image, a number or [D]; larger is better.
        second: Scores of the other one, likewise.
    """
    difference = first - second
    return int(bool((difference > TIE).any())) - int(bool((difference < -TIE).any()))


class RolloutConfig(BaseModel):
    """How rounds of rollouts are made.

    Attributes:
        prompts_per_round: Over all processes; 80 in D3PO's runs with scorers.
        num_images_per_prompt: K; every two of them are a pair. 2 with scorers, 7 in its runs with people.
        inner_epochs: How often a round's pairs are visited.
        batch_size: Trajectories per forward pass while drawing.
        score_batch_size: Images scored at once.
        on_invalid: What becomes of an image without a valid score: "drop" leaves its pairs out of the loss and counts
            it, "stop" ends the run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts_per_round: int = Field(default=80, ge=1)
    num_images_per_prompt: int = Field(default=2, ge=2)
    inner_epochs: int = Field(default=1, ge=1)
    batch_size: int = Field(default=8, ge=1)
    score_batch_size: int = Field(default=32, ge=1)
    on_invalid: Literal["drop", "stop"] = "drop"


@dataclass(frozen=True)
class _Pair:
    """Two of a prompt's images, the better one first unless they are tied; rows of the round's rollouts."""

    draw: Draw
    prompt: int
    chosen: int
    rejected: int
    preference: int
    weight: float


class RolloutSource:
    """Batches for `fit` from rounds of the policy's own, scored rollouts.

    A round draws K images for each of its prompts with the weights it meets, ranks every two images of a prompt, and
    lasts `steps_per_round` optimizer steps. As in D3PO's released code, an optimizer step visits each of its pairs at
    all S steps of the sampler, in an order of the pair's own that both images share, and micro-batches hold one step of
    each pair: `gradient_accumulation_steps` is a multiple of S, and the gradient the mean over steps.

    Prompts are visited in one endless sequence of permutations and dealt to the processes like cards, so that a round's
    images do not depend on how many there are; which pairs meet in one optimizer step does. A run that resumes within a
    round draws the round again with the weights it has; it repeats the uninterrupted one exactly if
    `checkpointing_steps` is a multiple of `steps_per_round`.

    Args:
        sampler: Draws; a trainer's own, so that both agree on guidance and noise.
        scorer: Ranks.
        prompts: All prompts.
        config: How rounds are made; None takes the defaults.
        seed: Of the run.
        batch_size: Pairs per process and micro step.
        gradient_accumulation_steps: Micro steps per optimizer step.
        num_processes: Processes that share a round.
        process_index: Which of them this is.

    Raises:
        ValueError: If there is no prompt, or pairs, steps and processes do not come out even.
    """

    def __init__(
        self,
        sampler: StochasticSampler,
        scorer: Scorer,
        prompts: Sequence[str],
        config: RolloutConfig | None = None,
        *,
        seed: int,
        batch_size: int = 1,
        gradient_accumulation_steps: int = 20,
        num_processes: int = 1,
        process_index: int = 0,
    ) -> None:
        config = config or RolloutConfig()
        steps, images = len(sampler.grid) - 1, config.num_images_per_prompt
        if not prompts:
            raise ValueError("there is no prompt to draw; expected at least one")
        if gradient_accumulation_steps % steps:
            raise ValueError(
                f"gradient_accumulation_steps must be a multiple of the {steps} sampling steps, all of which an "
                f"optimizer step visits, got {gradient_accumulation_steps}"
            )
        if config.prompts_per_round % num_processes:
            raise ValueError(
                f"prompts_per_round must be a multiple of the {num_processes} processes, got {config.prompts_per_round}"
            )
        pairs = config.prompts_per_round // num_processes * (images * (images - 1) // 2)
        per_step = batch_size * gradient_accumulation_steps // steps
        if pairs * config.inner_epochs % per_step:
            raise ValueError(
                f"a round has {pairs * config.inner_epochs} visits of pairs for each process, which is no multiple of "
                f"the {per_step} of an optimizer step; change prompts_per_round or the batch size"
            )
        self.sampler, self.scorer, self.prompts, self.config = sampler, scorer, tuple(prompts), config
        self.steps_per_round = pairs * config.inner_epochs // per_step
        self._seed, self._batch_size, self._per_step, self._steps = seed, batch_size, per_step, steps
        self._num_processes, self._process_index = num_processes, process_index
        self._round = -1
        self._rollouts: Rollouts
        self._pairs: list[_Pair] = []
        self._summary: dict[str, float] = {}

    def batch(self, step: int, micro_step: int) -> TransitionPairs:
        """This process's pairs of one micro step, each at one step of the sampler; on the CPU.

        Draws the round's rollouts if `step` is the first of them.
        """
        number, inside = divmod(step, self.steps_per_round)
        if number != self._round:
            if inside:
                logger.warning("step %d lies within round %d, which is drawn with the present weights", step, number)
            self._draw_round(number)
        group, place = divmod(micro_step, self._steps)
        first = inside * self._per_step + group * self._batch_size
        return self._assemble([self._visit(slot, place) for slot in range(first, first + self._batch_size)])

    def update(self, step: int) -> None:
        """Nothing: the next round is drawn when its first batch is asked for."""

    def metrics(self) -> dict[str, float]:
        """This process's last round: mean and deviation of its scores, images dropped and pairs tied."""
        return dict(self._summary)

    def _visit(self, slot: int, place: int) -> tuple[_Pair, int]:
        """The pair of a round's visit `slot`, and which step of the sampler it is at `place` of its permutation."""
        epoch, index = divmod(slot, len(self._pairs))
        key = (self._seed, self._round, epoch)
        order = torch.randperm(len(self._pairs), generator=generator("pairs", *key, self._process_index))
        pair = self._pairs[int(order[index])]
        steps = torch.randperm(self._steps, generator=generator("steps", *key, pair.draw.pair_id))
        return pair, int(steps[place])

    def _assemble(self, visits: Sequence[tuple[_Pair, int]]) -> TransitionPairs:
        rollouts, steps = self._rollouts, torch.tensor([step for _, step in visits])
        chosen = torch.tensor([pair.chosen for pair, _ in visits])
        rejected = torch.tensor([pair.rejected for pair, _ in visits])
        return TransitionPairs(
            conditioning=rollouts.conditioning[[pair.prompt for pair, _ in visits]],
            chosen=rollouts.path[chosen, steps],
            rejected=rollouts.path[rejected, steps],
            weight=torch.tensor([pair.weight for pair, _ in visits]),
            draws=tuple(pair.draw for pair, _ in visits),
            next_chosen=rollouts.path[chosen, steps + 1],
            next_rejected=rollouts.path[rejected, steps + 1],
            timesteps=rollouts.grid[steps],
            next_timesteps=rollouts.grid[steps + 1],
            preference=torch.tensor([float(pair.preference) for pair, _ in visits]),
            unconditional=rollouts.unconditional,
        )

    # --- a round -----------------------------------------------------------------------------------------------------

    def _draw_round(self, number: int) -> None:
        config = self.config
        first = number * config.prompts_per_round
        visits = range(first + self._process_index, first + config.prompts_per_round, self._num_processes)
        prompts, draws = zip(*map(self._prompt, visits), strict=True)
        rollouts = self.sampler.rollout(prompts, draws, config.num_images_per_prompt, config.batch_size)
        scores = self._score(number, rollouts)
        self._round, self._rollouts, self._pairs = number, rollouts, _pairs(rollouts, scores)
        valid = scores[scores.isfinite()]
        self._summary = {
            "score_mean": float(valid.mean()),
            "score_std": float(valid.std(correction=0)),
            "dropped": float(len(scores) - len(valid)),
            "ties": float(sum(pair.preference == 0 and pair.weight > 0 for pair in self._pairs)),
        }
        logger.info(
            "round %d: %d images, score %.4f (deviation %.4f), %d dropped, %d of %d pairs tied",
            number, len(scores), *self._summary.values(), len(self._pairs),
        )  # fmt: skip

    def _prompt(self, position: int) -> tuple[str, Draw]:
        """The prompt at a place of the endless sequence, with the random numbers of its visit."""
        epoch, index = divmod(position, len(self.prompts))
        order = torch.randperm(len(self.prompts), generator=generator(self._seed, "prompts", epoch))
        row = int(order[index])
        return self.prompts[row], Draw(self._seed, epoch, f"prompt-{row:05d}")

    def _score(self, number: int, rollouts: Rollouts) -> Tensor:
        """Scores [N], larger is better, NaN for images that were dropped."""
        config = self.config
        prompts = [prompt for prompt in rollouts.prompts for _ in range(config.num_images_per_prompt)]
        images = self.sampler.decode(rollouts, config.batch_size)
        found = self.scorer.score(images, prompts, batch_size=config.score_batch_size, on_invalid="nan")
        invalid = ~(found.valid & found.score.isfinite())
        if bool(invalid.any()) and (config.on_invalid == "stop" or bool(invalid.all())):
            row = int(invalid.nonzero()[0])
            raise ValueError(
                f"round {number}: {int(invalid.sum())} of {len(prompts)} images have no score, the first for "
                f"{prompts[row]!r}: {found.errors[row] or 'it is not finite'}; check the weights, or the scorer"
            )
        sign = 1.0 if self.scorer.info.higher_is_better else -1.0
        return (sign * found.score.float()).masked_fill(invalid, float("nan"))


def _pairs(rollouts: Rollouts, scores: Tensor) -> list[_Pair]:
    """Every two images of each prompt; those without a score get weight 0, so that all rounds have as many pairs."""
    pairs, images = [], rollouts.images_per_prompt
    for prompt, draw in enumerate(rollouts.draws):
        for i, j in combinations(range(prompt * images, (prompt + 1) * images), 2):
            order = preference(scores[i], scores[j])
            chosen, rejected = (j, i) if order < 0 else (i, j)
            own = Draw(draw.seed, draw.epoch, f"{draw.pair_id}/{i % images}-{j % images}")
            weight = float(bool(scores[[i, j]].isfinite().all()))
            pairs.append(_Pair(own, prompt, chosen, rejected, abs(order), weight))
    return pairs
