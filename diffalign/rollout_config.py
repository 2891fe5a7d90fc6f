"""How rounds of rollouts are made, and how many optimizer steps one lasts. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from diffalign.prompts import PromptRow, read_prompts


class RolloutConfig(BaseModel):
    """How rounds of rollouts are made.

    Attributes:
        prompts: A text file, a JSONL with a `prompt` field, or `diffalign://shapes/train`; see `read_prompts`.
        num_prompts: How many of them; None takes all. Rounds go through them in one endless shuffled sequence.
        task_weights: Shares of the embedded world's tasks among `num_prompts`; equal if left out.
        labels: Who ranks a round's images: "reward_model", or "human" for `labels*.jsonl` in the round's folder.
        reward_model: Name of the reward model; None for people.
        reward_options: Further arguments of the reward model.
        prompts_per_round: Over all processes; 80 in D3PO's runs with scorers.
        num_images_per_prompt: K, of one initial noise. 2 with scorers, 7 in its runs with people.
        pairs: Which images of a prompt are pairs: "all" takes every two, as in the paper; "best_worst" one pair, the
            two that are furthest apart. Drawing an image costs a quarter of learning from it, and the best of K is
            further from the worst than two images are from each other: more is learnt from as many forward passes.
        inner_epochs: How often a round's pairs are visited.
        batch_size: Trajectories per forward pass while drawing, in whole prompts if there is room for one.
        score_batch_size: Images scored at once.
        on_invalid: What becomes of an image without a valid score: "drop" leaves its pairs out of the loss and counts
            it, "stop" ends the run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts: str = "diffalign://shapes/train"
    num_prompts: int | None = Field(default=None, ge=1)
    task_weights: dict[str, float] | None = None
    labels: Literal["reward_model", "human"] = "reward_model"
    reward_model: str | None = None
    reward_options: dict[str, Any] = Field(default_factory=dict)
    prompts_per_round: int = Field(default=80, ge=1)
    num_images_per_prompt: int = Field(default=2, ge=2)
    pairs: Literal["all", "best_worst"] = "all"
    inner_epochs: int = Field(default=1, ge=1)
    batch_size: int = Field(default=8, ge=1)
    score_batch_size: int = Field(default=32, ge=1)
    on_invalid: Literal["drop", "stop"] = "drop"

    @model_validator(mode="after")
    def _one_judge(self) -> Self:
        if self.labels == "human" and (self.reward_model is not None or self.reward_options):
            raise ValueError("labels: human takes no reward_model; leave it out, or set labels: reward_model")
        if self.labels == "human" and self.pairs != "all":
            raise ValueError("labels: human learns from all that people compared; leave out pairs: best_worst")
        return self

    @property
    def images_per_round(self) -> int:
        """Over all processes."""
        return self.prompts_per_round * self.num_images_per_prompt

    @property
    def pairs_per_round(self) -> int:
        """Over all processes."""
        if self.pairs == "best_worst":
            return self.prompts_per_round
        return self.images_per_round * (self.num_images_per_prompt - 1) // 2

    def read_prompts(self, seed: int) -> list[PromptRow]:
        """The prompts that `prompts`, `num_prompts` and `task_weights` mean.

        Args:
            seed: Of the run; chooses among the embedded world's prompts.
        """
        return read_prompts(self.prompts, self.num_prompts, seed, self.task_weights)


@dataclass(frozen=True)
class RoundPlan:
    """How a round's pairs are cut into optimizer steps.

    As in D3PO's released code, an optimizer step visits each of its pairs at all S steps of the sampler, and a
    micro-batch holds one step of each of its pairs.

    Attributes:
        config: How rounds are made.
        sampling_steps: S.
        batch_size: Pairs per process and micro step.
        gradient_accumulation_steps: Micro steps per optimizer step, a multiple of S.
        num_processes: Processes that share a round.

    Raises:
        ValueError: If pairs, steps and processes do not come out even.
    """

    config: RolloutConfig
    sampling_steps: int
    batch_size: int
    gradient_accumulation_steps: int
    num_processes: int = 1

    def __post_init__(self) -> None:
        steps, config = self.sampling_steps, self.config
        if self.gradient_accumulation_steps % steps:
            raise ValueError(
                f"gradient_accumulation_steps must be a multiple of the {steps} sampling steps, all of which an "
                f"optimizer step visits, got {self.gradient_accumulation_steps}"
            )
        if config.prompts_per_round % self.num_processes:
            raise ValueError(
                f"prompts_per_round must be a multiple of the {self.num_processes} processes, got "
                f"{config.prompts_per_round}"
            )
        if self.visits % self.pairs_per_step:
            raise ValueError(
                f"a round has {self.visits} visits of pairs for each process, which is no multiple of the "
                f"{self.pairs_per_step} of an optimizer step; change prompts_per_round or the batch size"
            )

    @property
    def visits(self) -> int:
        """Of pairs, in a round and process."""
        return self.config.pairs_per_round // self.num_processes * self.config.inner_epochs

    @property
    def pairs_per_step(self) -> int:
        """Of a process and optimizer step."""
        return self.batch_size * self.gradient_accumulation_steps // self.sampling_steps

    @property
    def steps_per_round(self) -> int:
        """Optimizer steps that a round lasts."""
        return self.visits // self.pairs_per_step

    def groups(self, rank: int) -> range:
        """Numbers of the prompts of a round that are a process's: dealt like cards."""
        return range(rank, self.config.prompts_per_round, self.num_processes)
