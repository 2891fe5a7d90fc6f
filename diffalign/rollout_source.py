"""Batches for `fit` from rounds of the policy's own rollouts, cut into sampling steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from diffalign.batches import Conditioning
from diffalign.mining import Scorer
from diffalign.processes import ALONE, Processes
from diffalign.randomness import Draw, generator
from diffalign.rollout_config import RolloutConfig, RoundPlan
from diffalign.rollout_labels import preference
from diffalign.rollouts import Rollouts, StochasticSampler, TransitionPairs
from diffalign.rounds import LabelledRounds, RoundPrompts, Rounds, ScoredRounds

__all__ = ["RolloutConfig", "RolloutSource", "preference"]


@dataclass(frozen=True)
class _Pair:
    """Two of a prompt's images, the better one first unless they are tied.

    `rollouts` are the prompt's own; `chosen` and `rejected` are rows of them.
    """

    draw: Draw
    rollouts: Rollouts
    chosen: int
    rejected: int
    preference: int
    weight: float


class RolloutSource:
    """Batches for `fit` from rounds of the policy's own rollouts.

    A round draws K images for each of its prompts with the weights it meets, ranks every two images of a prompt, and
    lasts `steps_per_round` optimizer steps. As in D3PO's released code, an optimizer step visits each of its pairs at
    all S steps of the sampler, in an order of the pair's own that both images share, and micro-batches hold one step of
    each pair: `gradient_accumulation_steps` is a multiple of S, and the gradient the mean over steps.

    Prompts are visited in one endless sequence of permutations and dealt to the processes like cards, so that a round's
    images do not depend on how many there are; which pairs meet in one optimizer step does.

    With a `folder`, a round is written there when it is drawn, and a run that resumes in its middle reads it back, so
    that it repeats the uninterrupted one. Without a scorer, rounds are read only: `diffalign rollout` drew them, and
    people labelled them; see `diffalign.rollout_labels`.

    Args:
        sampler: Draws; a trainer's own, so that both agree on guidance and noise.
        scorer: Ranks; None for people.
        prompts: All prompts.
        config: How rounds are made; None takes the defaults.
        seed: Of the run.
        batch_size: Pairs per process and micro step.
        gradient_accumulation_steps: Micro steps per optimizer step.
        processes: Who shares a round.
        folder: `rollouts` in the run's folder, which also holds its checkpoints; None keeps rounds in memory only.

    Raises:
        ValueError: If there is no prompt, or pairs, steps and processes do not come out even.
    """

    def __init__(
        self,
        sampler: StochasticSampler,
        scorer: Scorer | None,
        prompts: Sequence[str],
        config: RolloutConfig | None = None,
        *,
        seed: int,
        batch_size: int = 1,
        gradient_accumulation_steps: int = 20,
        processes: Processes = ALONE,
        folder: Path | None = None,
    ) -> None:
        config = config or RolloutConfig()
        shuffled = RoundPrompts(prompts, seed, config.prompts_per_round)
        self.plan = RoundPlan(config, len(sampler.grid) - 1, batch_size, gradient_accumulation_steps, processes.count)
        self.sampler, self.config, self._seed, self._rank = sampler, config, seed, processes.rank
        self._rounds: Rounds
        if scorer is not None:
            self._rounds = ScoredRounds(sampler, scorer, shuffled, self.plan, processes, folder)
        elif folder is not None:
            self._rounds = LabelledRounds(sampler, shuffled, self.plan, processes, folder)
        else:
            raise ValueError("rounds without a scorer are read from disk: pass the folder where they are drawn")
        self._round = -1
        self._pairs: list[_Pair] = []
        self._metrics: dict[str, float] = {}

    @property
    def steps_per_round(self) -> int:
        """Optimizer steps that a round lasts."""
        return self.plan.steps_per_round

    def batch(self, step: int, micro_step: int) -> TransitionPairs:
        """This process's pairs of one micro step, each at one step of the sampler; on the CPU.

        Draws the round if `step` is the first of it, or reads it back.

        Raises:
            ValueError: If the round cannot be had; see `ScoredRounds` and `LabelledRounds`.
        """
        number, inside = divmod(step, self.steps_per_round)
        if number != self._round:
            self._take(number, inside)
        group, place = divmod(micro_step, self.plan.sampling_steps)
        first = inside * self.plan.pairs_per_step + group * self.plan.batch_size
        return _assemble([self._visit(slot, place) for slot in range(first, first + self.plan.batch_size)])

    def update(self, step: int) -> None:
        """Nothing: the next round is drawn when its first batch is asked for."""

    def metrics(self) -> dict[str, float]:
        """Of this process's round: its number, the shares of pairs that are tied or left out, and what `Round` says."""
        return dict(self._metrics)

    def waiting(self, step: int) -> str | None:
        """What a person has to do before this step, if there is anything."""
        number = step // self.steps_per_round
        return self._rounds.waiting(number) if number != self._round else None

    def _take(self, number: int, inside: int) -> None:
        found = self._rounds.get(number, inside)
        pairs = [pair for one in zip(found.rollouts, found.tables, strict=True) for pair in _pairs(*one)]
        if self.config.pairs == "best_worst":
            every = math.comb(self.config.num_images_per_prompt, 2)
            groups = zip(found.tables, (pairs[i : i + every] for i in range(0, len(pairs), every)), strict=True)
            pairs = [_furthest(table, group) for table, group in groups]
        self._round, self._pairs = number, pairs
        self._metrics = {
            "round": float(number),
            "round_ties": sum(pair.preference == 0 and pair.weight > 0 for pair in pairs) / len(pairs),
            "round_left_out": sum(pair.weight == 0 for pair in pairs) / len(pairs),
            **found.metrics,
        }

    def _visit(self, slot: int, place: int) -> tuple[_Pair, int]:
        """The pair of a round's visit `slot`, and which step of the sampler it is at `place` of its permutation."""
        epoch, index = divmod(slot, len(self._pairs))
        key = (self._seed, self._round, epoch)
        order = torch.randperm(len(self._pairs), generator=generator("pairs", *key, self._rank))
        pair = self._pairs[int(order[index])]
        steps = torch.randperm(self.plan.sampling_steps, generator=generator("steps", *key, pair.draw.pair_id))
        return pair, int(steps[place])


def _pairs(rollouts: Rollouts, table: Tensor) -> list[_Pair]:
    """Every two images of a prompt; those that nobody compared get weight 0, so that all rounds have as many pairs."""
    pairs, draw = [], rollouts.draws[0]
    for i, j in combinations(range(len(table)), 2):
        known = bool(table[i, j].isfinite())
        order = int(table[i, j]) if known else 0
        chosen, rejected = (j, i) if order < 0 else (i, j)
        own = Draw(draw.seed, draw.epoch, f"{draw.pair_id}/{i}-{j}")
        pairs.append(_Pair(own, rollouts, chosen, rejected, abs(order), float(known)))
    return pairs


def _furthest(table: Tensor, pairs: Sequence[_Pair]) -> _Pair:
    """Of a prompt's pairs the one whose images differ most in wins minus losses; compared ones before others."""
    wins = table.nansum(dim=1)
    return max(pairs, key=lambda pair: (pair.weight, float(wins[pair.chosen] - wins[pair.rejected])))


def _assemble(visits: Sequence[tuple[_Pair, int]]) -> TransitionPairs:
    def latents(side: Callable[[_Pair], int], after: int) -> Tensor:
        return torch.stack([pair.rollouts.path[side(pair), step + after] for pair, step in visits])

    grid, steps = visits[0][0].rollouts.grid, torch.tensor([step for _, step in visits])
    return TransitionPairs(
        conditioning=Conditioning.concatenate([pair.rollouts.conditioning for pair, _ in visits]),
        chosen=latents(lambda pair: pair.chosen, 0),
        rejected=latents(lambda pair: pair.rejected, 0),
        weight=torch.tensor([pair.weight for pair, _ in visits]),
        draws=tuple(pair.draw for pair, _ in visits),
        next_chosen=latents(lambda pair: pair.chosen, 1),
        next_rejected=latents(lambda pair: pair.rejected, 1),
        timesteps=grid[steps],
        next_timesteps=grid[steps + 1],
        preference=torch.tensor([float(pair.preference) for pair, _ in visits]),
        unconditional=visits[0][0].rollouts.unconditional,
    )
