"""The five steps from a batch of pairs to a loss. The base class *is* Diffusion-DPO; methods override steps.

Wallace et al. 2023, "Diffusion Model Alignment Using Direct Preference Optimization" (arXiv:2311.12908), Eq. 14,
in the form of the authors' released code: one timestep and one noise sample per pair, shared by both halves; mean
squared errors; the factor one half; no weight in time. With E the mean squared error against the network's own
regression target y (noise for epsilon networks),

    log_ratio = -(E(policy) - E(reference)) / 2
    margin    = log_ratio(chosen) - log_ratio(rejected)
    loss      = -log sigmoid(beta * margin)

The paper's Eq. 14 has separate noise for the halves and three different factors in its text and appendix; the
released models came from the form above.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from diffalign.batches import Conditioning, NoisyStates, PairBatch
from diffalign.devices import send
from diffalign.losses import BetaConvention, LossType, convert_beta, ipo_raw_loss, margin_loss, per_sample_error
from diffalign.policy import Policy
from diffalign.predictions import Prediction
from diffalign.randomness import Draw
from diffalign.reference_errors import ReferencedPairs, ReferencedSource, ReferenceErrors
from diffalign.references import References
from diffalign.timesteps import TimestepLaw, draw_timesteps, effective_schedule

if TYPE_CHECKING:
    from diffalign.data import PairSource
    from diffalign.loop import BatchSource

Data = Literal["pairs", "winners", "scored", "rollouts"]
"""Pairs; their chosen images alone; images with a number; what the policy itself draws."""


class LossOutput:
    """A loss with its metrics.

    Attributes:
        loss: Scalar with gradient.
        losses: Loss per pair without weights, [B], detached.
        metrics: Scalars, detached, to be averaged over micro-batches and processes.
    """

    def __init__(self, loss: Tensor, losses: Tensor, metrics: dict[str, Tensor]) -> None:
        self.loss, self.losses, self.metrics = loss, losses.detach(), metrics


class TrainerConfig(BaseModel):
    """What every trainer can be told.

    Attributes:
        caption_dropout: Share of visits at which a caption is replaced by the empty one, for all that the visit
            compares. 0.2 for models that are sampled with guidance, 0 for distilled ones.
        timestep_sampling: Law of the timesteps; see `diffalign.timesteps`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    caption_dropout: float = Field(default=0.2, ge=0, le=1)
    timestep_sampling: TimestepLaw = "uniform"


class PairTrainerConfig(TrainerConfig):
    """What every pair trainer can be told. Defaults are Diffusion-DPO's.

    Attributes:
        beta: Strength of the pull to the reference, under `beta_convention`. Errors are means, so thousands are
            normal (2000 to 5000 for SD1.5).
        beta_convention: How `beta` is meant; see `diffalign.losses.convert_beta`.
        loss_type: Loss of the margin, under TRL's names.
        label_smoothing: Assumed share of wrong labels ("sigmoid") or known flip rate ("robust").
        reference: `live` asks the reference at every step; `cached` once for every draw, before the first step, and
            keeps the answers beside the encoded pairs for all runs that share them.
        draws_per_pair: After so many visits a pair repeats its draws; None draws anew always. `cached` needs it.
        reference_batch_size: Pairs that are measured at once for the cache; a forward pass sees twice as many samples.
    """

    fixed_reference: ClassVar[bool] = True
    """Whether the reference's errors depend on a visit's draw alone, so that they can be cached."""

    beta: float = 2000.0
    beta_convention: BetaConvention = "mean_half"
    loss_type: LossType = "sigmoid"
    label_smoothing: float = 0.0
    reference: Literal["live", "cached"] = "live"
    draws_per_pair: int | None = Field(default=None, ge=1)
    reference_batch_size: int = Field(default=16, ge=1)

    @model_validator(mode="after")
    def _check(self) -> PairTrainerConfig:
        if self.reference == "cached" and not self.fixed_reference:
            raise ValueError("reference: this method's reference sees other states at every visit; set it to live")
        if self.reference == "cached" and self.draws_per_pair is None:
            raise ValueError("reference: cached needs draws_per_pair, the visits after which a pair repeats its draws")
        margin_loss(self.loss_type, self.beta, self.label_smoothing)
        return self


class Trainer:
    """Turns batches into losses: what `fit` knows of a method.

    Args:
        policy: The model, with its frozen reference.
        config: Settings, or None to build them from `options`.
        options: Fields of `Config`.

    Attributes:
        policy: The model.
        reference: Predicts with the policy's reference; which weights that is, the policy's `put_reference` says.
        references: Earlier states of the trained weights, by name, for methods whose reference moves.
        schedule: What a timestep means in training.
    """

    Config: ClassVar[type[TrainerConfig]] = TrainerConfig
    predictions: ClassVar[frozenset[Prediction]] = frozenset({Prediction.EPSILON, Prediction.V, Prediction.VELOCITY})
    learns_from: ClassVar[Data] = "pairs"
    """What `diffalign train` feeds it."""
    any_size: ClassVar[bool] = True
    """Whether batches of pictures of other sizes than the policy's are understood, for `data.aspect_ratio_buckets`."""
    trains_negative: ClassVar[bool] = False
    """Whether the result is a negative model, for the unconditional branch of guidance."""

    def __init__(self, policy: Policy, config: TrainerConfig | None = None, **options: Any) -> None:
        self.config: Any = config if config is not None else self.Config(**options)
        self.check_prediction(policy.prediction)
        self.policy = policy
        self.reference = policy.frozen()
        self.references = References(policy)
        self.schedule = effective_schedule(policy.schedule, self.config.timestep_sampling)

    @classmethod
    def check_prediction(cls, prediction: Prediction) -> None:
        """Refuses models this method has no equation for.

        Raises:
            ValueError: If `prediction` is not one of `predictions`.
        """
        if prediction not in cls.predictions:
            known = ", ".join(sorted(cls.predictions))
            raise ValueError(
                f"{cls.__name__} cannot train a model that predicts {prediction.value!r}; it knows {known}"
            )

    def describe(self) -> str:
        """One line for the start of a run: the method and what its settings amount to."""
        return f"{type(self).__name__}: {self.config}"

    @classmethod
    def forwards(cls, config: Any) -> dict[str, float]:
        """Cost of a visit (a pair, or an image) in samples through the denoiser, by part, on average; for `--dry-run`.

        Args:
            config: Settings of the method.
        """
        return {"policy": 2, "reference": 2}

    def facts(self) -> dict[str, Any]:
        """What `run.json` says of the method beside that line, JSON values."""
        return {"negative_model": True} if self.trains_negative else {}

    def source(self, source: PairSource, seed: int) -> BatchSource:
        """Where batches come from: the data's own, unless the method draws something itself.

        Args:
            source: Of the encoded data; of the chosen images alone, twice, where the method learns from winners.
            seed: Of the run.
        """
        return source

    def begin(self, step: int, folder: Path) -> None:
        """Called once before the first batch of a run or of its continuation.

        Args:
            step: Optimizer steps done; not 0 after a resume.
            folder: Where the run writes.
        """
        self.references.begin(folder)

    def noised(self, latents: Tensor, conditioning: Conditioning, draws: Sequence[Draw]) -> NoisyStates:
        """Latents at the timesteps and with the noise of their draws.

        Args:
            latents: One or several whole batches of B stacked, [K * B, C, ...]; they share timesteps and noise.
            conditioning: B rows.
            draws: B entries.
        """
        times = len(latents) // len(draws)
        timesteps = draw_timesteps(self.policy.schedule, draws, self.config.timestep_sampling)
        timesteps = timesteps.repeat(times)
        noise = torch.stack([draw.normal("noise", latents.shape[1:]) for draw in draws]).to(latents.dtype)
        noise = send(noise, latents.device).repeat(times, *[1] * (latents.ndim - 1))
        alphas, sigmas = self.schedule.scales(timesteps)  # a table on the CPU, as timesteps still are
        return NoisyStates(
            conditioning=conditioning.repeat(times),
            latents=latents,
            noise=noise,
            timesteps=send(timesteps, latents.device),
            noisy_latents=self.schedule.add_noise(latents, noise, timesteps),
            target=self.policy.prediction.target(latents, noise, alphas, sigmas),
            alphas=alphas,
        )

    def errors(self, states: NoisyStates, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean squared errors of policy (with gradient) and reference, both [N], at least float32.

        Those of the reference are not computed if they are `known` [N].

        The reference goes first: no adapter is switched between the policy's forward and backward, where a switch
        would drop gradients silently, or change what gradient checkpointing computes again.
        """
        arguments = (states.noisy_latents, states.timesteps, states.conditioning)
        reference_error = known if known is not None else self.reference_errors(states)
        return per_sample_error(self.policy.predict(*arguments), states.target), reference_error

    @torch.no_grad()
    def reference_errors(self, states: NoisyStates) -> Tensor:
        """Mean squared errors of the reference, [N], at least float32."""
        output = self.reference.predict(states.noisy_latents, states.timesteps, states.conditioning)
        return per_sample_error(output, states.target)

    def loss(self, batch: PairBatch) -> LossOutput:
        """The batch's loss, with metrics."""
        raise NotImplementedError

    def validate(self, batch: PairBatch) -> dict[str, Tensor]:
        """Metrics of a fixed batch of encoded pairs, which no optimizer step sees."""
        return self.loss(batch).metrics

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold of the method beside the trained weights: tensors and plain values.

        All processes ask for it together, as they may have to put sharded tensors together.
        """
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on with what `state` returned; called before `begin`, with the trained weights in place."""

    def update(self, step: int) -> None:
        """Called after every optimizer step, for methods whose reference moves; the source is updated after it."""


class PairTrainer(Trainer):
    """Diffusion-DPO, and what the other pair methods change of it; see the module's description."""

    Config: ClassVar[type[TrainerConfig]] = PairTrainerConfig

    def __init__(self, policy: Policy, config: TrainerConfig | None = None, **options: Any) -> None:
        super().__init__(policy, config, **options)
        self.latent_numel = int(torch.tensor(policy.latent_shape).prod())
        self.beta = convert_beta(self.config.beta, self.config.beta_convention, self.latent_numel)
        self._loss_of = margin_loss(self.config.loss_type, self.beta, self.config.label_smoothing)
        self.cached: ReferenceErrors | None = None  # of `source`

    @property
    def kappa(self) -> float:
        """Half of beta: the factor of the error difference inside the sigmoid, the only number that matters."""
        return self.beta / 2

    def describe(self) -> str:
        """One line for the start of a run: method, kappa and its equivalent per summed element."""
        config = self.config
        return (
            f"{type(self).__name__}: loss {config.loss_type}, beta {config.beta:g} ({config.beta_convention}) "
            f"-> kappa {self.kappa:g} on mean errors, {self.kappa / self.latent_numel:.4g} per summed element "
            f"({self.latent_numel} elements a latent)"
        )

    def facts(self) -> dict[str, Any]:
        """Kappa beside the usual."""
        return {**super().facts(), "kappa": self.kappa}

    @classmethod
    def forwards(cls, config: Any) -> dict[str, float]:
        """See `Trainer.forwards`; with the cache, after every draw was measured once."""
        return {"policy": 2} if getattr(config, "reference", "live") == "cached" else super().forwards(config)

    def source(self, source: PairSource, seed: int) -> BatchSource:
        """The data's pairs; with `reference: cached`, with what the reference makes of their draws."""
        if self.config.reference == "live":
            return source
        law = {"timestep_sampling": self.config.timestep_sampling}
        root = source.encoded.folder / "reference_errors"
        self.cached = ReferenceErrors(source, self.policy, law, root)
        return ReferencedSource(source, self.cached)

    def begin(self, step: int, folder: Path) -> None:
        """With `reference: cached`, measures what no earlier process has measured; see `ReferenceErrors.fill`."""
        super().begin(step, folder)
        if self.cached is not None:
            self.cached.fill(step, self._measure, self.config.reference_batch_size)
            self.policy.rest_reference()

    def update(self, step: int) -> None:
        """With `reference: cached`, lets the reference rest again if a validation has asked it."""
        super().update(step)
        if self.cached is not None:
            self.policy.rest_reference()

    def _measure(self, batch: PairBatch) -> Tensor:
        return self.reference_errors(self.noisy_states(batch.to(next(self.policy.denoiser.parameters()).device)))

    # --- the five steps --------------------------------------------------------------------------------------------

    def loss(self, batch: PairBatch) -> LossOutput:
        """The batch's loss: weighted mean over pairs of the loss of the margin."""
        pairs = self.pairs(batch)
        states = self.noisy_states(pairs)
        error, reference_error = self.errors(states, _cached(pairs))
        ratio = self.log_ratio(error, reference_error)
        margin = self.margin(ratio, states)
        losses = self.objective(margin, states)
        loss = (pairs.weight.to(losses.dtype) * losses).mean()
        return LossOutput(loss, losses, self.metrics(losses, margin, error, reference_error))

    def pairs(self, batch: PairBatch) -> PairBatch:
        """Which samples are chosen and which rejected, and their weight."""
        return batch

    def noisy_states(self, batch: PairBatch) -> NoisyStates:
        """Both halves at the pair's one timestep with the pair's one noise, chosen first."""
        return self.noised(torch.cat([batch.chosen, batch.rejected]), batch.conditioning, batch.draws)

    def log_ratio(self, error: Tensor, reference_error: Tensor) -> Tensor:
        """Estimate of log p_policy - log p_reference: [2, B], chosen first."""
        return (-(error - reference_error) / 2).reshape(2, -1)

    def margin(self, ratio: Tensor, states: NoisyStates) -> Tensor:
        """Chosen minus rejected, [B]."""
        return ratio[0] - ratio[1]

    def objective(self, margin: Tensor, states: NoisyStates) -> Tensor:
        """Loss per pair, [B]; beta enters here and only here."""
        return self._loss_of(margin)

    # --- logs --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def metrics(self, losses: Tensor, margin: Tensor, error: Tensor, reference_error: Tensor) -> dict[str, Tensor]:
        """The mandatory logs, detached scalars.

        `z` = beta * margin; `implicit_accuracy` counts z = 0 as one half; `gate` = sigmoid(-z) scales every
        gradient: one half at the start, zero when saturated.
        """
        z = self.beta * margin.detach()
        policy, reference = error.detach().reshape(2, -1), reference_error.reshape(2, -1)
        metrics = {
            "loss": losses.detach().mean(),
            "model_mse": policy.mean(),
            "ref_mse": reference.mean(),
            "error_chosen": policy[0].mean(),
            "error_rejected": policy[1].mean(),
            "ref_error_chosen": reference[0].mean(),
            "ref_error_rejected": reference[1].mean(),
            "z_mean": z.mean(),
            "z_square": z.square().mean(),
            "implicit_accuracy": ((z > 0).to(z.dtype) + 0.5 * (z == 0).to(z.dtype)).mean(),
            "gate": torch.sigmoid(-z).mean(),
        }
        if self.config.loss_type == "ipo":
            metrics["ipo_raw_loss"] = ipo_raw_loss(margin.detach(), self.beta).mean()
        return metrics


def _cached(pairs: PairBatch) -> Tensor | None:
    """What is known of the reference's errors, [2B], chosen first."""
    return torch.cat([pairs.chosen_error, pairs.rejected_error]) if isinstance(pairs, ReferencedPairs) else None
