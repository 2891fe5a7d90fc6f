"""SePPO: preference tuning from winners only, against samples of the model's own earlier checkpoints.

Zhang et al. 2024, "SePPO: Semi-Policy Preference Optimization for Diffusion Alignment" (arXiv:2410.05255). Training
goes in phases. At the start of phase k a checkpoint is drawn uniformly from those at the ends of the phases before, the
initial weights included. It is the reference of the phase, and draws the sample x^r that stands in for the rejected
image. With A = E(policy) - E(reference) on a half,

    loss = -log sigmoid( -beta / 2 * (A_chosen - sgn * A_sample) )
    sgn  = sign(-A_chosen), without gradient

The chosen image is the anchor of `sgn`, the paper's anchor-based adaptive flipper: where the reference denoises it
worse than the policy, the reference is the weaker model and its sample is pushed away, as in Diffusion-DPO. Where it
denoises it better, its sample counts as a good one and is pulled in too.

The training code was never released. What the paper leaves open is chosen here: mean errors and the factor one half;
noise and timestep shared by both halves; one checkpoint a phase; exact equality counts as +1, and so does everything
in the first `sgn_warmup` steps, where policy and reference hardly differ and rounding would toss the coin; samples come
from a deterministic sampler (DDIM, or Euler on flows) and not from DPM-Solver++.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from diffalign.batches import NoisyStates, PairBatch
from diffalign.policy import Policy
from diffalign.processes import launched
from diffalign.randomness import Draw, generator
from diffalign.reference_samples import Provenance, ReferenceSamples, SampledPairs
from diffalign.references import INITIAL
from diffalign.rollouts import DeterministicSampler
from diffalign.sharding import is_sharded
from diffalign.trainers.base import Data, LossOutput, PairTrainer, PairTrainerConfig

if TYPE_CHECKING:
    from diffalign.data import PairSource

__all__ = ["SePPO", "SePPOConfig", "SePPOSource"]


class SePPOConfig(PairTrainerConfig):
    """Settings of SePPO. How many phases there are, `training.max_train_steps` decides; the paper has 7 of 30 steps.

    Attributes:
        phase_steps: Optimizer steps of a phase. The last one is cut short if they do not go into `max_train_steps`.
        reference_draw: Which checkpoint a phase compares with: `uniform`ly drawn from all before it, the `latest`, or
            the `initial` weights; the last two are the paper's ablations.
        flipper: `anchor` for sgn, `indicator` for 1 in the place of +1 and 0 in the place of -1, `none` for +1 always.
        sgn_warmup: Steps at the start of the first phase where sgn is +1 whatever the errors say.
        sgn_draws: Over how many draws of timestep and noise the argument of the sign is averaged; each beyond the
            first costs a forward pass of policy and reference on the chosen half.
        num_inference_steps: Of the sampler that draws samples; 25 in the paper.
        guidance_scale: Likewise; 7.5 in the paper. 1 switches guidance off, as for models that read a scale as input.
        sample_batch_size: Samples drawn at once.
    """

    fixed_reference: ClassVar[bool] = False

    phase_steps: int = Field(default=30, ge=1)
    reference_draw: Literal["uniform", "latest", "initial"] = "uniform"
    flipper: Literal["anchor", "indicator", "none"] = "anchor"
    sgn_warmup: int = Field(default=10, ge=0)
    sgn_draws: int = Field(default=1, ge=1)
    num_inference_steps: int = Field(default=25, ge=1)
    guidance_scale: float = Field(default=7.5, ge=0, allow_inf_nan=False)
    sample_batch_size: int = Field(default=8, ge=1)


@dataclass(frozen=True)
class AnchoredStates(NoisyStates):
    """Pairs on the noise path, and what further draws say of their chosen halves.

    Attributes:
        evidence: Sum over the further draws of E(reference) - E(policy) on the chosen half, [B].
    """

    evidence: Tensor


class SePPO(PairTrainer):
    """Trains on `SampledPairs`, which `source` makes of winners; see the module's description.

    Attributes:
        sampler: Draws the samples.
        step: Optimizer steps done.
    """

    Config: ClassVar[type[PairTrainerConfig]] = SePPOConfig
    learns_from: ClassVar[Data] = "winners"
    any_size: ClassVar[bool] = False  # its samples have the policy's
    config: SePPOConfig

    def __init__(self, policy: Policy, config: SePPOConfig | None = None, **options: Any) -> None:
        super().__init__(policy, config, **options)
        self.sampler = DeterministicSampler(
            policy, num_inference_steps=self.config.num_inference_steps, guidance_scale=self.config.guidance_scale
        )
        self.step = 0
        self.seed = 0
        self.folder: Path | None = None

    @classmethod
    def forwards(cls, config: Any) -> dict[str, float]:
        """See `Trainer.forwards`; a pair that a phase visits twice needs one sample."""
        sample = config.num_inference_steps * (1 if config.guidance_scale == 1 else 2)
        return {"policy": 2, "reference": 2, "further draws": 2 * (config.sgn_draws - 1), "sampling": sample}

    def describe(self) -> str:
        """One line for the start of a run; see `PairTrainer.describe`."""
        config = self.config
        return (
            f"{super().describe()}; phases of {config.phase_steps} steps against a checkpoint drawn "
            f"{config.reference_draw}, flipper {config.flipper}; samples in {config.num_inference_steps} steps of "
            f"{type(self.sampler.solver).__name__} with guidance {config.guidance_scale:g}"
        )

    # --- phases ------------------------------------------------------------------------------------------------------

    def phase_of(self, step: int) -> int:
        """The phase, from 1, that the optimizer step after `step` of them belongs to."""
        return step // self.config.phase_steps + 1

    def reference_index(self, phase: int) -> int:
        """Which checkpoint a phase compares with, 0 <= index < phase; 0 is the initial one."""
        if self.config.reference_draw == "uniform":
            return int(torch.randint(phase, (), generator=generator(self.seed, "reference", phase)))
        return phase - 1 if self.config.reference_draw == "latest" else 0

    def reference_name(self, phase: int) -> str:
        """The name of that checkpoint."""
        index = self.reference_index(phase)
        return f"step-{index * self.config.phase_steps}" if index else INITIAL

    def source(self, source: PairSource, seed: int) -> SePPOSource:
        """The chosen halves of the data with samples of the phase's reference."""
        self.seed = seed
        return SePPOSource(self, source)

    def begin(self, step: int, folder: Path) -> None:
        """Puts the reference of the step's phase in place; which one that is depends on seed and phase alone.

        Raises:
            ValueError: If its file is missing, or the weights are spread over processes.
        """
        super().begin(step, folder)
        if is_sharded(self.policy.denoiser):
            raise ValueError(
                "SePPO draws samples in each process by itself, which weights that are spread over processes cannot "
                "do; train with DDP (configs/accelerate/ddp.yaml)"
            )
        self.folder, self.step = folder, step
        self.references.use(self.reference_name(self.phase_of(step)))

    def update(self, step: int) -> None:
        """At the end of a phase: keeps the weights, and takes the next phase's reference."""
        self.step = step
        if step % self.config.phase_steps == 0:
            self.references.keep(f"step-{step}")
            self.references.use(self.reference_name(self.phase_of(step)))

    # --- loss --------------------------------------------------------------------------------------------------------

    def loss(self, batch: PairBatch) -> LossOutput:
        """The batch's loss; see `PairTrainer.loss`.

        Raises:
            TypeError: If the batch does not say who drew its samples.
            ValueError: If they were drawn by another checkpoint than the reference, or for other pairs.
        """
        self._check_provenance(batch)
        states = self.noisy_states(batch)
        error, reference_error = self.errors(states)
        ratio = self.log_ratio(error, reference_error)
        signs = self.signs(ratio, states)
        margin = ratio[0] - signs * ratio[1]
        losses = self.objective(margin, states)
        loss = (batch.weight.to(losses.dtype) * losses).mean()
        metrics = self.metrics(losses, margin, error, reference_error)
        metrics["aaf_rate"] = (signs < 1).to(losses.dtype).mean()
        metrics["reference_index"] = losses.new_full((), self.reference_index(self.phase_of(self.step)))
        return LossOutput(loss, losses, metrics)

    def noisy_states(self, batch: PairBatch) -> AnchoredStates:
        """Both halves at the pair's one timestep with its one noise, and the chosen halves' errors at further draws."""
        states = super().noisy_states(batch)
        evidence = torch.zeros(len(batch), device=batch.chosen.device)
        for number in range(1, 1 if self._always_positive else self.config.sgn_draws):
            draws = [Draw(draw.seed, draw.epoch, f"{draw.pair_id}/anchor {number}") for draw in batch.draws]
            with torch.no_grad():
                error, reference_error = self.errors(self.noised(batch.chosen, batch.conditioning, draws))
            evidence = evidence + (reference_error - error)
        return AnchoredStates(**vars(states), evidence=evidence)

    def signs(self, ratio: Tensor, states: AnchoredStates) -> Tensor:
        """The sign of every pair, [B], without gradient.

        Args:
            ratio: Log ratios, [2, B]; the chosen one is (E(reference) - E(policy)) / 2.
            states: With the evidence of further draws.
        """
        anchor = 2 * ratio[0].detach() + states.evidence
        one = torch.ones_like(anchor)
        if self._always_positive:
            return one
        return torch.where(anchor >= 0, one, -one if self.config.flipper == "anchor" else torch.zeros_like(anchor))

    @property
    def _always_positive(self) -> bool:
        """Whether every sign is +1 now."""
        return self.config.flipper == "none" or self.step < min(self.config.sgn_warmup, self.config.phase_steps)

    @torch.no_grad()
    def validate(self, batch: PairBatch) -> dict[str, Tensor]:
        """Errors of policy and reference on winners; fixed pairs have no sample of a reference that moves."""
        error, reference_error = self.errors(self.noised(batch.chosen, batch.conditioning, batch.draws))
        return {"error_chosen": error.mean(), "ref_error_chosen": reference_error.mean()}

    def _check_provenance(self, batch: PairBatch) -> None:
        if not isinstance(batch, SampledPairs):
            raise TypeError(
                f"SePPO learns from winners and samples of its reference (SampledPairs), got a {type(batch).__name__}; "
                "take batches from trainer.source(pair_source, seed)"
            )
        if batch.reference != self.references.current:
            raise ValueError(
                f"the batch's samples were drawn by {batch.reference!r}, and the reference is "
                f"{self.references.current!r}; one checkpoint has to play both roles"
            )
        for draw, sample in zip(batch.draws, batch.sample_draws, strict=True):
            if draw.pair_id != sample.pair_id:
                raise ValueError(f"the sample of pair {draw.pair_id!r} was drawn for pair {sample.pair_id!r}")


class SePPOSource:
    """Batches for `fit`: winners from the data, the other half drawn by the phase's reference.

    The samples of a phase are drawn when its first batch is asked for, one for each pair that the phase visits, and
    kept under `samples/` of the run's folder.

    Args:
        trainer: Has the reference and the sampler.
        pairs: Winners.
    """

    def __init__(self, trainer: SePPO, pairs: PairSource) -> None:
        self.trainer, self.pairs = trainer, pairs
        self._samples: ReferenceSamples | None = None

    def batch(self, step: int, micro_step: int) -> SampledPairs:
        """This process's pairs of one micro step; on the CPU."""
        samples = self._samples_at(step)
        batch = self.pairs.batch(step, micro_step)
        names = [draw.pair_id for draw in batch.draws]
        pairs = replace(batch, rejected=samples.latents(names))
        provenance = samples.provenance
        sample_draws = tuple(map(provenance.draw_of, names))
        return SampledPairs(**vars(pairs), reference=provenance.reference, sample_draws=sample_draws)

    def update(self, step: int) -> None:
        """Nothing: the next phase's samples are drawn when its first batch is asked for."""
        self.pairs.update(step)

    def _samples_at(self, step: int) -> ReferenceSamples:
        trainer, config = self.trainer, self.trainer.config
        phase = trainer.phase_of(step)
        if self._samples is not None and self._samples.provenance.phase == phase:
            return self._samples
        reference = trainer.reference_name(phase)
        if trainer.folder is None or trainer.references.current != reference:
            raise ValueError(
                f"phase {phase} is drawn by {reference!r}, and the reference is {trainer.references.current!r}; call "
                "trainer.begin and trainer.update as fit does"
            )
        provenance = Provenance(
            phase=phase,
            reference=reference,
            weights=trainer.references.fingerprint(reference),
            seed=trainer.seed,
            data=self.pairs.encoded.fingerprint,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            batch_size=config.sample_batch_size,
        )
        first = (phase - 1) * config.phase_steps
        steps = range(first, first + config.phase_steps)
        rows = list(dict.fromkeys(row for step in steps for row, _ in self.pairs.visits(step)))
        folder = trainer.folder / "samples" / f"phase-{phase:03d}-{reference}"
        self._samples = None  # nothing half drawn stays if this is interrupted
        samples = ReferenceSamples(folder, self.pairs.encoded, rows, provenance)
        spent = trainer.policy.forwards
        samples.draw(trainer.sampler, trainer.reference)
        # Counted at the phase's first step, drawn now or by a process that was killed; later checkpoints know of them.
        share = len(rows) // launched().count if step == first else 0
        trainer.policy.forwards = spent + share * trainer.sampler.forwards_per_sample
        self._samples = samples
        return samples
