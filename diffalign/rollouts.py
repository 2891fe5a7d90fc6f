"""Rollouts: images that the policy draws itself, with every step of its sampler and that step's probability.

Methods that learn from their own trajectories need p(x_next | x_t, prompt) of every step, under the policy that drew
it and under others. `StochasticSampler` draws trajectories and gives the law of a step under any predictor, so that
drawing and training cannot disagree about grid, noise or guidance; `RolloutSource` turns scored trajectories into
batches.

The sampler is DDIM with noise on Stable Diffusion's own grid for chains, and Flow-GRPO's stochastic equation on the
grid of a fresh scheduler for flows; see `diffalign.transitions`. All K images of a prompt start from one initial noise,
so that they differ by the steps that are learned from (D3PO, Yang et al. 2023, arXiv:2311.13231).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from diffalign.batches import Conditioning, PairBatch
from diffalign.mining import TIE, Scorer
from diffalign.policy import Policy, Predictor
from diffalign.randomness import Draw, generator
from diffalign.schedules import DiscreteSchedule, FlowSchedule, Schedule
from diffalign.transitions import Transition, at_least_float32, leading_timesteps, solver_for

__all__ = ["RolloutConfig", "RolloutSource", "Rollouts", "StochasticSampler", "TransitionPairs", "preference"]

logger = logging.getLogger("diffalign")


@dataclass(frozen=True)
class Rollouts:
    """Trajectories of N = P * K images: the K images of prompt 0, then those of prompt 1, and so on; on the CPU.

    Attributes:
        prompts: P prompts.
        draws: Where each prompt's random numbers come from, P entries.
        conditioning: The prompts' embeddings, P rows.
        unconditional: What guidance contrasts them with, one row.
        path: Latents at every level, the initial noise first, [N, S + 1, C, ...], float32.
        grid: The levels' timesteps, [S + 1].
        log_probs: Log-density of every step when it was drawn, mean over elements, [N, S], float32.
    """

    prompts: tuple[str, ...]
    draws: tuple[Draw, ...]
    conditioning: Conditioning
    unconditional: Conditioning
    path: Tensor
    grid: Tensor
    log_probs: Tensor

    @property
    def images_per_prompt(self) -> int:
        """K."""
        return len(self.path) // len(self.prompts)

    @property
    def latents(self) -> Tensor:
        """Before each step, [N, S, C, ...]."""
        return self.path[:, :-1]

    @property
    def next_latents(self) -> Tensor:
        """After each step, [N, S, C, ...]."""
        return self.path[:, 1:]

    @property
    def timesteps(self) -> Tensor:
        """Of `latents`, [S]."""
        return self.grid[:-1]

    @property
    def next_timesteps(self) -> Tensor:
        """Of `next_latents`, [S]."""
        return self.grid[1:]

    @property
    def final(self) -> Tensor:
        """What is decoded, [N, C, ...]."""
        return self.path[:, -1]


@dataclass(frozen=True)
class TransitionPairs(PairBatch):
    """One step of the sampler for both images of B pairs of one prompt each.

    `chosen` and `rejected` are the latents *before* the step, [B, C, ...]. Both images take the same step.

    Attributes:
        next_chosen: Latents after the step, [B, C, ...].
        next_rejected: Likewise.
        timesteps: Before the step, [B], in the network's units, on the CPU.
        next_timesteps: After the step, [B], likewise.
        preference: 1 where `chosen` is the better image, -1 where `rejected` is, 0 for a tie; [B].
        unconditional: What guidance contrasts the prompts with, one row.
    """

    next_chosen: Tensor
    next_rejected: Tensor
    timesteps: Tensor
    next_timesteps: Tensor
    preference: Tensor
    unconditional: Conditioning

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TransitionPairs:
        """Moved to a device; latents and conditioning also cast to `dtype` if one is given."""
        pairs = super().to(device, dtype)
        return TransitionPairs(
            pairs.conditioning,
            pairs.chosen,
            pairs.rejected,
            pairs.weight,
            pairs.draws,
            self.next_chosen.to(device, dtype),
            self.next_rejected.to(device, dtype),
            self.timesteps,
            self.next_timesteps,
            self.preference.to(device),
            self.unconditional.to(device, dtype),
        )


def sampling_grid(schedule: Schedule, steps: int) -> Tensor:
    """The falling timesteps of a model's own sampler, the last one 0, [steps + 1].

    Chains: `leading_timesteps`. Flows: the table of a freshly loaded Euler scheduler, which spreads timesteps evenly
    between the ends of its shifted table and shifts them again: 1, .9601, ..., .2780, .0089, 0 for 10 steps of shift 3.

    Raises:
        ValueError: If the schedule has fewer levels than that.
    """
    if isinstance(schedule, DiscreteSchedule):
        if not 1 <= steps < len(schedule):
            raise ValueError(f"expected 1 to {len(schedule) - 1} sampling steps for this schedule, got {steps}")
        return leading_timesteps(schedule, steps)
    if not isinstance(schedule, FlowSchedule) or steps < 1:
        raise ValueError(f"expected a chain or a flow and at least 1 step, got {type(schedule).__name__} and {steps}")
    lowest = float(schedule.timestep_of_index(torch.tensor(schedule.steps - 1)))
    even = torch.linspace(schedule.steps, lowest, steps, dtype=torch.float64)
    return torch.cat([schedule.timestep_of_index(schedule.steps - even), even.new_zeros(1)])


class StochasticSampler:
    """Draws with noise at every step, and knows the law of every step.

    Args:
        policy: Draws.
        num_inference_steps: S; 20 in D3PO.
        guidance_scale: Weight w of classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) in the convention of
            diffusers, u + w (c - u); 1 switches it off, as for models that read a scale as an input.
        eta: Noise of a step, above 0; None is 1 for chains (DDIM's eta) and 0.7 for flows (Flow-GRPO's noise level).

    Raises:
        ValueError: If `eta` is not above 0, or the schedule has no such sampler.
    """

    def __init__(
        self, policy: Policy, *, num_inference_steps: int = 20, guidance_scale: float = 5.0, eta: float | None = None
    ) -> None:
        if eta is None:
            eta = 0.7 if isinstance(policy.schedule, FlowSchedule) else 1.0
        self.policy, self.guidance_scale, self.eta = policy, guidance_scale, eta
        self.solver = solver_for(policy.schedule, policy.prediction, eta)
        self.grid = sampling_grid(policy.schedule, num_inference_steps)

    def transition(
        self,
        predictor: Predictor,
        latents: Tensor,
        timesteps: Tensor,
        next_timesteps: Tensor,
        conditioning: Conditioning,
        unconditional: Conditioning,
    ) -> Transition:
        """The law of the next latents under a predictor, with guidance; both branches have its gradient.

        Args:
            predictor: The policy or its reference.
            latents: [B, C, ...].
            timesteps: Of the latents, [B].
            next_timesteps: Where the step leads, [B].
            conditioning: B rows.
            unconditional: One row.
        """
        if self.guidance_scale == 1:
            output = predictor.predict(latents, timesteps, conditioning)
        else:
            both = Conditioning.concatenate([unconditional.repeat(len(latents)), conditioning])
            twice = latents.repeat(2, *[1] * (latents.ndim - 1))
            without, told = at_least_float32(predictor.predict(twice, timesteps.repeat(2), both)).chunk(2)
            output = without + self.guidance_scale * (told - without)
        return self.solver.step(output, latents, timesteps, next_timesteps)

    @torch.no_grad()
    def rollout(
        self, prompts: Sequence[str], draws: Sequence[Draw], images_per_prompt: int = 2, batch_size: int = 8
    ) -> Rollouts:
        """Trajectories of K images for every prompt.

        An image's numbers depend on its prompt's `Draw` and its place among the K alone, never on its batch.

        Args:
            prompts: P prompts.
            draws: One per prompt.
            images_per_prompt: K.
            batch_size: Trajectories per forward pass, before guidance doubles it; changes the last digits only.

        Raises:
            ValueError: If there is not one draw per prompt, or no prompt.
        """
        if not prompts or len(prompts) != len(draws):
            raise ValueError(f"expected one draw per prompt, got {len(prompts)} prompts and {len(draws)} draws")
        policy = self.policy
        policy.reload_encoders()
        parts = [policy.encode_prompts(prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size)]
        conditioning, unconditional = Conditioning.concatenate(parts), policy.encode_unconditional(1)
        images = [(number, k) for number in range(len(prompts)) for k in range(images_per_prompt)]
        drawn = []
        for start in range(0, len(images), batch_size):
            chunk = images[start : start + batch_size]
            told = conditioning[[number for number, _ in chunk]]
            drawn.append(self._trajectories([(draws[number], k) for number, k in chunk], told, unconditional))
        return Rollouts(
            prompts=tuple(prompts),
            draws=tuple(draws),
            conditioning=conditioning.to("cpu"),
            unconditional=unconditional.to("cpu"),
            path=torch.cat([path for path, _ in drawn]),
            grid=self.grid,
            log_probs=torch.cat([log_probs for _, log_probs in drawn]),
        )

    def _trajectories(
        self, images: Sequence[tuple[Draw, int]], conditioning: Conditioning, unconditional: Conditioning
    ) -> tuple[Tensor, Tensor]:
        """Paths [B, S + 1, C, ...] and log-densities [B, S] of images named by their prompt's draw and a number."""
        device = next(self.policy.denoiser.parameters()).device
        shape = self.policy.latent_shape
        conditioning, unconditional = conditioning.to(device), unconditional.to(device)
        latents = torch.stack([draw.normal("initial noise", shape) for draw, _ in images]).to(device)
        path, log_probs = [latents], []
        for step, (now, after) in enumerate(pairwise(self.grid)):
            times = now.expand(len(images)), after.expand(len(images))
            law = self.transition(self.policy, latents, *times, conditioning, unconditional)
            noise = torch.stack([draw.normal(f"image {k}, step {step}", shape) for draw, k in images])
            latents = law.draw(noise.to(device)).float()  # the next step starts from exactly what is stored
            path.append(latents)
            log_probs.append(law.log_prob(latents).float())
        return torch.stack(path, 1).cpu(), torch.stack(log_probs, 1).cpu()

    @torch.no_grad()
    def decode(self, rollouts: Rollouts, batch_size: int = 8) -> Tensor:
        """The images, [N, 3, H, W], or videos, [N, T, 3, H, W], in [0, 1], on the CPU."""
        final = rollouts.final
        chunks = [final[start : start + batch_size] for start in range(0, len(final), batch_size)]
        return torch.cat([self.policy.decode(chunk).float().cpu() for chunk in chunks])


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
