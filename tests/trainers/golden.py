"""A policy whose answers are a table, the golden pair of the self-checks, and gradients by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.batches import Conditioning, PairBatch
from diffalign.policy import Policy, Predictor
from diffalign.predictions import Prediction
from diffalign.randomness import Draw
from diffalign.schedules import FlowSchedule, Schedule
from diffalign.trainers.diffusion_dpo import DiffusionDPO

Batches = Callable[..., PairBatch]


class TablePolicy(Policy):
    """Answers with a table: `answers` [2B, d] with gradient, `reference_answers` [2B, d] without.

    A flow of four elements: its target, noise minus latents, may differ between the halves of a pair though they
    share their noise.
    """

    def __init__(
        self, answers: Tensor, reference_answers: Tensor, prediction: Prediction = Prediction.VELOCITY
    ) -> None:
        self.schedule: Schedule = FlowSchedule()
        self.prediction = prediction
        self.latent_shape = tuple(answers.shape[1:])
        self.answers, self.reference_answers = answers, reference_answers

    @property
    def resolution(self) -> int:
        return 2

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return self.answers

    def frozen(self) -> Predictor:
        class Reference:
            @staticmethod
            def predict(noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
                return self.reference_answers

        return Reference()

    def _unused(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("a pair trainer has no business here")

    encode_prompts = token_counts = encode = decode = sample = trainable_parameters = _unused
    save_trained = load_trained = encoder_fingerprint = free_encoders = reload_encoders = _unused


def double(*rows: Sequence[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


TARGETS = double((0.5, -0.25, 0, 1), (-1, 0.5, 0.25, 0))
ANSWERS = double((0.4, -0.2, 0.1, 0.9), (-0.9, 0.4, 0.3, 0.1))
REFERENCE = double((0.45, -0.3, 0.05, 0.8), (-0.95, 0.45, 0.2, 0.05))
GRADIENTS = double((-0.962280, 0.481140, 0.962280, -0.962280), (-0.962280, 0.962280, -0.481140, -0.962280))


def golden_batch(pairs: int = 1) -> PairBatch:
    """Pairs whose flow targets are `TARGETS`: the latents are the noise minus the target."""
    draws = tuple(Draw(0, 0, f"golden-{i}") for i in range(pairs))
    noise = torch.stack([draw.normal("noise", (4,)) for draw in draws]).double()
    conditioning = Conditioning({"hidden": torch.zeros(pairs, 1)})
    return PairBatch(conditioning, noise - TARGETS[0], noise - TARGETS[1], torch.ones(pairs), draws)


def golden_trainer(swapped: bool = False, **options: Any) -> DiffusionDPO:
    order = [1, 0] if swapped else [0, 1]
    answers = ANSWERS[order].clone().requires_grad_(True)
    return DiffusionDPO(TablePolicy(answers, REFERENCE[order]), **options)


def swap(batch: PairBatch) -> PairBatch:
    return dataclasses.replace(batch, chosen=batch.rejected, rejected=batch.chosen)


def gradients(trainer: Any, batch: PairBatch) -> dict[str, Tensor]:
    """One backward pass; gradients by parameter name."""
    for parameter in trainer.policy.trainable_parameters():
        parameter.grad = None
    trainer.loss(batch).loss.backward()
    named = trainer.policy.named_trainable()
    assert all(parameter.grad is not None for _, parameter in named)
    return {name: parameter.grad.clone() for name, parameter in named}
