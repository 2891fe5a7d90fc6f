"""SePPO: the numeric checks of the flipper and the pool, and what a batch must say of its samples."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from diffalign.batches import PairBatch
from diffalign.randomness import Draw
from diffalign.reference_samples import SampledPairs
from diffalign.references import INITIAL
from diffalign.trainers.diffusion_dpo import DiffusionDPO
from diffalign.trainers.seppo import AnchoredStates, SePPO
from tests.trainers.gaussian import GaussianPolicy, random_pairs
from tests.trainers.golden import ANSWERS, REFERENCE, TablePolicy, golden_batch


def sampled(batch: PairBatch, reference: str = INITIAL) -> SampledPairs:
    """The batch with its rejected half as a sample."""
    return SampledPairs(**vars(batch), reference=reference, sample_draws=batch.draws)


def table_trainer(swapped: bool = False, **options: Any) -> SePPO:
    """On the golden pair; `swapped`, the reference is the better model on the winner."""
    answers, reference = (REFERENCE, ANSWERS) if swapped else (ANSWERS, REFERENCE)
    options = {"beta": 100.0, "sgn_warmup": 0, **options}
    return SePPO(TablePolicy(answers.clone().requires_grad_(True), reference), **options)


def value(trainer: SePPO, name: str = "loss") -> float:
    return float(trainer.loss(sampled(golden_batch())).metrics[name])


class Signed(SePPO):
    """With signs that are given."""

    sign = 1.0

    def signs(self, ratio: Tensor, states: AnchoredStates) -> Tensor:
        return torch.full_like(ratio[0], self.sign)


# --- the flipper -----------------------------------------------------------------------------------------------------


def test_1_golden_losses_of_the_three_signs() -> None:
    """Check 7.3.1: the anchor is +0.00375, so the sign is +1; the losses of the others by force."""
    trainer = table_trainer()
    assert value(trainer) == pytest.approx(0.485990, abs=1e-6)
    assert value(trainer, "aaf_rate") == 0
    assert value(trainer, "ref_error_chosen") - value(trainer, "error_chosen") == pytest.approx(0.00375, abs=1e-12)
    for sign, loss in ((1.0, 0.485990), (0.0, 0.603785), (-1.0, 0.741120)):
        forced = Signed(TablePolicy(ANSWERS.clone(), REFERENCE), beta=100.0)
        forced.sign = sign
        assert float(forced.loss(sampled(golden_batch())).loss) == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(("flipper", "sign"), [("anchor", -1), ("indicator", 0), ("none", 1)])
def test_1_a_better_reference_flips_its_sample(flipper: str, sign: int) -> None:
    """With the roles of policy and reference exchanged: A of the winner 0.00375, of the sample -0.005625."""
    trainer = table_trainer(swapped=True, flipper=flipper)
    z = -50 * (0.00375 + sign * 0.005625)
    assert value(trainer) == pytest.approx(math.log1p(math.exp(-z)), abs=1e-9)
    assert value(trainer, "aaf_rate") == (sign < 1)
    assert value(trainer, "z_mean") == pytest.approx(z, abs=1e-9)


def test_2_the_sign_has_no_gradient_and_only_gates_the_winner() -> None:
    """Check 7.3.2: the winner's gradient keeps its direction; the sample's is turned round."""
    found = {}
    for sign in (1.0, 0.0, -1.0):
        policy = TablePolicy(ANSWERS.clone().requires_grad_(True), REFERENCE)
        trainer = Signed(policy, beta=100.0)
        trainer.sign = sign
        trainer.loss(sampled(golden_batch())).loss.backward()
        assert policy.answers.grad is not None
        found[sign] = policy.answers.grad
    for sign in (0.0, -1.0):
        gates = found[sign][0] / found[1.0][0]
        assert bool((gates > 0).all())
        torch.testing.assert_close(gates, gates[:1].expand(4))
    assert bool((found[0.0][1] == 0).all())
    assert bool((found[-1.0][1] * found[1.0][1] < 0).all())
    with_grad = table_trainer(swapped=True)
    states = with_grad.noisy_states(sampled(golden_batch()))
    ratio = with_grad.log_ratio(*with_grad.errors(states))
    assert ratio.requires_grad
    assert not with_grad.signs(ratio, states).requires_grad


@pytest.mark.parametrize("flipper", ["anchor", "none"])
def test_3_positive_signs_are_diffusion_dpo(flipper: str) -> None:
    """Check 7.3.3, to the bit."""
    tables = TablePolicy(ANSWERS.repeat_interleave(3, 0), REFERENCE.repeat_interleave(3, 0))
    dpo = DiffusionDPO(tables, beta=100.0)
    seppo = SePPO(tables, beta=100.0, sgn_warmup=0, flipper=flipper)
    for weight in (torch.ones(3), torch.tensor([1.0, 2.0, 0.0])):
        batch = dataclasses.replace(golden_batch(3), weight=weight)
        ours, theirs = seppo.loss(sampled(batch)), dpo.loss(batch)
        assert torch.equal(ours.losses, theirs.losses)
        assert torch.equal(ours.loss, theirs.loss)


@pytest.mark.parametrize("flipper", ["anchor", "indicator"])
def test_4_equality_counts_as_positive(flipper: str) -> None:
    """Check 7.3.4: policy and reference the same."""
    trainer = SePPO(TablePolicy(ANSWERS.clone().requires_grad_(True), ANSWERS), sgn_warmup=0, flipper=flipper)
    output = trainer.loss(sampled(golden_batch()))
    assert float(output.losses) == pytest.approx(math.log(2), abs=1e-12)
    assert float(output.metrics["aaf_rate"]) == 0
    output.loss.backward()
    answers = trainer.policy.answers  # type: ignore[attr-defined]
    assert bool((answers.grad[1].abs() > 0).any())  # the sample is pushed away, and not ignored


def test_the_first_steps_do_not_flip() -> None:
    trainer = table_trainer(swapped=True, sgn_warmup=2, phase_steps=3)
    trainer.references.keep = lambda name: None  # type: ignore[method-assign]
    trainer.references.use = lambda name: None  # type: ignore[method-assign]
    rates = []
    for step in range(1, 8):
        rates.append(value(trainer, "aaf_rate"))
        trainer.update(step)
    assert rates == [0, 0, 1, 1, 1, 1, 1]
    long = table_trainer(swapped=True, sgn_warmup=10, phase_steps=1)  # the first phase only, however short
    long.step = 1
    assert value(long, "aaf_rate") == 1


def test_more_draws_average_the_argument_of_the_sign() -> None:
    """The mean over K draws of timestep and noise, each computed by hand."""
    batch, count = sampled(random_pairs(40)), 5
    policy = GaussianPolicy()
    policy.variance = 1.3  # not far from the reference's 2, so that single draws disagree
    single, several = SePPO(policy, sgn_warmup=0), SePPO(policy, sgn_warmup=0, sgn_draws=count)
    total = torch.zeros(40, dtype=torch.float64)
    for k in range(count):
        draws = [d if k == 0 else Draw(d.seed, d.epoch, f"{d.pair_id}/anchor {k}") for d in batch.draws]
        error, reference_error = single.errors(single.noised(batch.chosen, batch.conditioning, draws))
        total += reference_error - error
    expected = torch.where(total >= 0, 1.0, -1.0).double()
    for trainer, same in ((several, True), (single, False)):
        states = trainer.noisy_states(batch)
        signs = trainer.signs(trainer.log_ratio(*trainer.errors(states)), states)
        assert torch.equal(signs, expected) is same
    policy.told.clear()
    SePPO(policy, sgn_warmup=1, sgn_draws=count).noisy_states(batch)
    assert policy.told == []  # where every sign is +1 the further draws are spared


# --- the pool --------------------------------------------------------------------------------------------------------


def test_5_references_are_drawn_uniformly_from_the_pool() -> None:
    """Check 7.3.5: chi-square over {0..k-1}, 0.1 % level; phase 1 knows only the initial weights."""
    trainer = table_trainer(phase_steps=30)
    for phase, limit in ((1, 0.0), (2, 10.83), (5, 18.47), (7, 22.46)):
        counts: Counter[int] = Counter()
        for seed in range(2000):
            trainer.seed = seed
            counts[trainer.reference_index(phase)] += 1
        assert set(counts) == set(range(phase))
        expected = 2000 / phase
        assert sum((count - expected) ** 2 / expected for count in counts.values()) <= limit
    assert trainer.reference_name(1) == INITIAL


def test_5_the_draw_depends_on_seed_and_phase_alone() -> None:
    names = [table_trainer(phase_steps=30).reference_name(phase) for phase in range(1, 8)]
    again = table_trainer(phase_steps=30)
    assert [again.reference_name(phase) for phase in range(7, 0, -1)] == names[::-1]
    assert set(names) <= {INITIAL, *(f"step-{30 * k}" for k in range(1, 7))}
    assert [table_trainer(phase_steps=30).phase_of(step) for step in (0, 29, 30, 209)] == [1, 1, 2, 7]


@pytest.mark.parametrize(("how", "names"), [("latest", [INITIAL, "step-2", "step-4"]), ("initial", [INITIAL] * 3)])
def test_5_the_ablations(how: str, names: list[str]) -> None:
    trainer = table_trainer(reference_draw=how, phase_steps=2)
    assert [trainer.reference_name(phase) for phase in (1, 2, 3)] == names


# --- provenance ------------------------------------------------------------------------------------------------------


def test_6_batches_without_or_with_another_origin_are_refused() -> None:
    """Check 7.3.6, of batches."""
    trainer, batch = table_trainer(), golden_batch(2)
    with pytest.raises(TypeError, match=r"SePPO learns from winners and samples .* got a PairBatch; take batches from"):
        trainer.loss(batch)
    with pytest.raises(ValueError, match="drawn by 'step-30', and the reference is 'initial'"):
        trainer.loss(sampled(batch, "step-30"))
    with pytest.raises(ValueError, match="the sample of pair 'golden-0' was drawn for pair 'golden-1'"):
        trainer.loss(dataclasses.replace(sampled(batch), sample_draws=batch.draws[::-1]))


def test_a_batch_keeps_its_kind_when_it_is_moved_or_saved(tmp_path: Path) -> None:
    batch = sampled(golden_batch(2), "step-30")
    torch.save(batch.to_state(), tmp_path / "batch.pt")
    for other in (batch.to("cpu", torch.float32), PairBatch.from_state(torch.load(tmp_path / "batch.pt"))):
        assert isinstance(other, SampledPairs)
        assert (other.reference, other.sample_draws) == (batch.reference, batch.sample_draws)


def test_validation_looks_at_winners_alone() -> None:
    trainer = SePPO(GaussianPolicy(), sgn_warmup=0)
    batch = random_pairs(4)
    metrics = trainer.validate(dataclasses.replace(batch, rejected=torch.full_like(batch.rejected, float("nan"))))
    assert set(metrics) == {"error_chosen", "ref_error_chosen"}
    full = trainer.loss(sampled(batch)).metrics
    for name, number in metrics.items():
        torch.testing.assert_close(number, full[name])


@pytest.mark.parametrize(
    "options",
    [{"phase_steps": 0}, {"flipper": "sign"}, {"sgn_draws": 0}, {"reference_draw": "last"}, {"num_phases": 7}],
)
def test_settings_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        table_trainer(**options)
