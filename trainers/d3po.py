"""D3PO: the pair loss on the steps of the policy's own sampling trajectories.

Yang et al. 2023, "Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model" (arXiv:2311.13231).
Every step x_t -> x_p of a trajectory is an action with a Gaussian density. With both images of a pair at one step,

    log q_i = mean over elements of [log p_policy(x_p | x_t, prompt) - log p_reference(x_p | x_t, prompt)]
    loss    = -log sigmoid( beta * (h_0 log q_0' + h_1 log q_1') )

where (h_0, h_1) is (1, -1), (-1, 1), or (0, 0) for a tie, and q' is q bounded: `clip: released` clamps it to
[1 - e, 1 + e] on both sides, so that an image that has left the interval has no gradient any more, even where it went
the wrong way; `one_sided`, the default, bounds only what the loss would raise without end, the better image's q above
and the worse one's below. Released, the loss stays within [0.683164, 0.703231] for beta = e = 0.1: a loss near ln 2 is
normal, and the ratios tell how training goes.

As in the released code: densities are means over elements and not sums (which is what beta and e are meant for), the
mean of a step is DDIM's, and guidance is part of policy and reference in training too, since without it the densities
would be those of another sampler than the one that drew.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from diffalign.batches import PairBatch
from diffalign.checkpoints import CheckpointFolder
from diffalign.devices import send_like
from diffalign.policy import Policy
from diffalign.references import INITIAL
from diffalign.rollout_source import RolloutSource
from diffalign.rollouts import StochasticSampler, TransitionPairs
from diffalign.schedules import expand
from diffalign.trainers.base import Data, LossOutput, PairTrainer, PairTrainerConfig
from diffalign.transitions import Transition

__all__ = ["D3PO", "D3POConfig"]


class D3POConfig(PairTrainerConfig):
    """Settings of D3PO, and of the sampler whose steps it learns from.

    Attributes:
        beta: On log ratios that are means over elements; 0.1 as released.
        beta_convention: There are no errors whose convention could differ.
        loss_type: The bounded margin, at most 0.2 times beta, is far from where the other losses have their optimum.
        caption_dropout: None: a density belongs to the prompt that the image was drawn for.
        timestep_sampling: None: the steps are the sampler's.
        clip: How q is bounded, `one_sided` or `released`.
        clip_range: e, in (0, 1).
        guidance_scale: Of rollouts and training; 5 as released, 1 switches guidance off.
        num_inference_steps: Steps of a trajectory; 20 as released.
        eta: Noise of the sampler, above 0; None is 1 for chains, as released, and 0.7 for flows.
        ref_update: What the reference is: "never" keeps what training started from, as the released code does with
            scorers; "every_round" takes the weights at the start of each round, as the paper does with people.
    """

    fixed_reference: ClassVar[bool] = False

    beta: float = 0.1
    beta_convention: Literal["mean_half"] = "mean_half"
    loss_type: Literal["sigmoid"] = "sigmoid"
    caption_dropout: float = Field(default=0.0, ge=0, le=0)
    timestep_sampling: Literal["uniform"] = "uniform"
    clip: Literal["one_sided", "released"] = "one_sided"
    clip_range: float = Field(default=0.1, gt=0, lt=1)
    guidance_scale: float = Field(default=5.0, ge=0, allow_inf_nan=False)
    num_inference_steps: int = Field(default=20, ge=1, le=999)
    eta: float | None = None
    ref_update: Literal["never", "every_round"] = "never"

    @field_validator("draws_per_pair")
    @classmethod
    def _draws_once(cls, draws: int | None) -> int | None:
        if draws is not None:
            raise ValueError("rollouts are drawn anew in every round and repeat no draw; leave it out")
        return draws

    @field_validator("eta")
    @classmethod
    def _has_density(cls, eta: float | None) -> float | None:
        if eta is not None and not 0 < eta < math.inf:
            raise ValueError("eta must be above 0, or the sampler's steps have no probability; D3PO has 1")
        return eta


class D3PO(PairTrainer):
    """Trains on `TransitionPairs`, as `RolloutSource` makes them with this trainer's `sampler`.

    Attributes:
        sampler: Draws rollouts, and gives the law of their steps.
    """

    Config: ClassVar[type[PairTrainerConfig]] = D3POConfig
    learns_from: ClassVar[Data] = "rollouts"
    config: D3POConfig

    def __init__(self, policy: Policy, config: D3POConfig | None = None, **options: Any) -> None:
        super().__init__(policy, config, **options)
        self.sampler = StochasticSampler(
            policy,
            num_inference_steps=self.config.num_inference_steps,
            guidance_scale=self.config.guidance_scale,
            eta=self.config.eta,
        )
        self._steps_per_round = 0
        self._folder: Path | None = None

    def source(self, source: Any, seed: int) -> RolloutSource:
        """The source itself, whose rounds the reference follows if `ref_update` says so.

        Args:
            source: Of rollouts, with this trainer's `sampler`.
            seed: Of the run.
        """
        rollouts: RolloutSource = source
        self._steps_per_round = rollouts.steps_per_round
        return rollouts

    def begin(self, step: int, folder: Path) -> None:
        """See `Trainer.begin`: brings back the reference of the round that `step` lies in.

        Raises:
            ValueError: If the reference follows rounds and nothing is known about them.
        """
        super().begin(step, folder)
        self._folder = folder
        if self.config.ref_update == "every_round":
            if not self._steps_per_round:
                raise ValueError("ref_update 'every_round' follows a source's rounds; fit trainer.source(source, seed)")
            number = step // self._steps_per_round
            self.references.use(_reference(number))

    def update(self, step: int) -> None:
        """After the last step of a round the weights become the next round's reference, if `ref_update` says so."""
        if self.config.ref_update == "never" or step % self._steps_per_round:
            return
        number = step // self._steps_per_round
        self.references.keep(_reference(number))
        self.references.use(_reference(number))
        # A run that is killed now goes on from its last checkpoint, whose round has another reference.
        steps = CheckpointFolder(self._folder).steps() if self._folder is not None else []
        needed = {done // self._steps_per_round for done in steps}
        for old in range(1, number):
            if old not in needed:
                self.references.drop(_reference(old))

    @classmethod
    def forwards(cls, config: Any) -> dict[str, float]:
        """See `Trainer.forwards`: of one step of a pair, with two images a prompt."""
        guided = 1 if config.guidance_scale == 1 else 2
        return {"policy": 2 * guided, "reference": 2 * guided, "rollouts": 2 * guided}

    def describe(self) -> str:
        """One line for the start of a run."""
        config = self.config
        reference = "reference the start" if config.ref_update == "never" else "reference each round's start"
        return (
            f"D3PO: beta {config.beta:g} on mean log ratios, clip {config.clip} at {config.clip_range:g}; "
            f"{config.num_inference_steps} steps of {type(self.sampler.solver).__name__} with noise "
            f"{self.sampler.eta:g} and guidance {config.guidance_scale:g}; {reference}"
        )

    def loss(self, batch: PairBatch) -> LossOutput:
        """The batch's loss: weighted mean over pairs.

        Raises:
            TypeError: If the pairs are no transitions.
        """
        if not isinstance(batch, TransitionPairs):
            raise TypeError(
                f"D3PO learns from steps of its policy's own sampler (TransitionPairs), got a {type(batch).__name__}; "
                "take batches from a RolloutSource with trainer.sampler"
            )
        policy, reference = self.transitions(batch)
        drawn = torch.cat([batch.next_chosen, batch.next_rejected])
        ratio = (policy.log_prob(drawn) - reference.log_prob(drawn)).reshape(2, -1)
        signs = torch.stack([batch.preference, -batch.preference]).to(ratio)
        bounded = self.bounded(ratio, signs)
        losses = self._loss_of((signs * bounded).sum(0))
        loss = (batch.weight.to(losses.dtype) * losses).mean()
        logs = self._logs(losses, ratio, bounded, signs, policy, reference)
        return LossOutput(loss, losses, logs | self._gradients(losses, policy, batch))

    def transitions(self, batch: TransitionPairs) -> tuple[Transition, Transition]:
        """Laws of both images' steps under policy, with gradient, and reference, 2B rows, chosen first.

        The reference goes first, as in `PairTrainer.errors`.
        """
        arguments = (
            torch.cat([batch.chosen, batch.rejected]),
            batch.timesteps.repeat(2),
            batch.next_timesteps.repeat(2),
            batch.conditioning.repeat(2),
            batch.unconditional,
        )
        with torch.no_grad():
            reference = self.sampler.transition(self.reference, *arguments)
        return self.sampler.transition(self.policy, *arguments), reference

    def bounded(self, ratio: Tensor, signs: Tensor) -> Tensor:
        """The bounded log q' of log q, [2, B]; `signs` is 1 for better images, -1 for worse ones, [2, B]."""
        low, high = math.log1p(-self.config.clip_range), math.log1p(self.config.clip_range)
        if self.config.clip == "released":
            return ratio.clamp(low, high)
        return torch.where(signs > 0, ratio.clamp(max=high), ratio.clamp(min=low))

    def _gradients(self, losses: Tensor, policy: Transition, batch: TransitionPairs) -> dict[str, Tensor]:
        """Norm of the gradient of a pair's loss in the guided outputs of its two images, by sampling step.

        `grad_per_step/951` and so on, scalars. Each is S times its share of the batch, so that their means over an
        optimizer step, which visits every pair at all S steps, are the means over its pairs. It costs no pass of the
        network: autograd goes from the loss to the step's mean only, and a mean is affine in the output.
        """
        if not policy.mean.requires_grad:
            return {}
        (by_mean,) = torch.autograd.grad(losses.sum(), policy.mean, retain_graph=True)
        with torch.no_grad():
            zero = torch.zeros(len(losses), 1, dtype=by_mean.dtype, device=by_mean.device)
            step = zero, batch.timesteps, batch.next_timesteps
            slope = self.sampler.solver.step(zero + 1, *step).mean - self.sampler.solver.step(zero, *step).mean
            norms = by_mean.reshape(2, len(losses), -1).square().sum((0, 2)).sqrt() * slope[:, 0].abs()
            times = self.sampler.grid[:-1]
            here = batch.timesteps[:, None] == times
            shares = (norms[:, None] * send_like(here, norms)).mean(0) * len(times)
        return {f"grad_per_step/{time:g}": share for time, share in zip(times.tolist(), shares, strict=True)}

    @torch.no_grad()
    def _logs(
        self,
        losses: Tensor,
        ratio: Tensor,
        bounded: Tensor,
        signs: Tensor,
        policy: Transition,
        reference: Transition,
    ) -> dict[str, Tensor]:
        """Detached scalars: `z` is what the sigmoid sees, the accuracy ignores the bounds, `kl` is per element.

        `ratio_chosen` and `ratio_rejected` are means of q over the better and the worse images; of a tie, the first
        counts as better.
        """
        ordered = torch.where(signs[:1] < 0, ratio.flip(0), ratio)
        margin, z = (signs * ratio).sum(0), self.beta * (signs * bounded).sum(0)
        distance = (policy.mean - reference.mean).square() / (2 * expand(policy.std, policy.mean).square())
        return {
            "loss": losses.mean(),
            "z_mean": z.mean(),
            "z_square": z.square().mean(),
            "implicit_accuracy": ((margin > 0).to(z) + 0.5 * (margin == 0).to(z)).mean(),
            "ratio_chosen": ordered[0].exp().mean(),
            "ratio_rejected": ordered[1].exp().mean(),
            "clipped": (bounded != ratio).to(z).mean(),
            "ties": (signs[0] == 0).to(z).mean(),
            "kl": distance.mean(),
        }


def _reference(number: int) -> str:
    """Name of a round's reference."""
    return f"round-{number:03d}" if number else INITIAL
