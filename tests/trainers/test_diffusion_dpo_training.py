"""The self-checks 9 to 12, 14 to 18 and 20 of the pair loss: what pairs share, what reaches the weights, alarms.

Checks 11, 12 and 18 concern data as well: `tests/data` looks at readers, source and cache, this file at the trainer.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from diffalign.backbones import LoRA, load_policy
from diffalign.batches import Conditioning, Moments, PairBatch
from diffalign.losses import per_sample_error
from diffalign.monitor import EarlyWarnings
from diffalign.randomness import Draw
from diffalign.trainers.diffusion_dpo import DiffusionDPO
from tests.trainers.golden import (
    TARGETS,
    Batches,
    TablePolicy,
    golden_batch,
    golden_trainer,
    gradients,
    swap,
)

# --- 9, 10: what pairs share and what they do not --------------------------------------------------------------------


def test_09_both_halves_share_timestep_and_noise(lora_policy: Any, batches: Batches) -> None:
    """Check 7.1.9: halves of t and noise are equal, and no two pairs share theirs."""
    states = DiffusionDPO(lora_policy).noisy_states(batches(5))
    for tensor in (states.timesteps, states.noise, states.conditioning.tensors["hidden"]):
        first, second = tensor.chunk(2)
        assert torch.equal(first, second)
    assert torch.equal(states.latents, torch.cat([batches(5).chosen, batches(5).rejected]))
    assert len(set(states.timesteps.tolist())) == 5
    assert len({tuple(noise.flatten().tolist()) for noise in states.noise}) == 5


def test_09_the_rejected_image_does_not_touch_the_chosen_states(lora_policy: Any, batches: Batches) -> None:
    """Check 7.1.9: another rejected image leaves the chosen x_t bit-identical."""
    trainer, batch = DiffusionDPO(lora_policy), batches(3)
    other = dataclasses.replace(batch, rejected=batch.rejected + 1)
    before, after = trainer.noisy_states(batch), trainer.noisy_states(other)
    assert torch.equal(before.noisy_latents[:3], after.noisy_latents[:3])
    assert torch.equal(before.target[:3], after.target[:3])
    assert not torch.equal(before.noisy_latents[3:], after.noisy_latents[3:])


def rows(batch: PairBatch, order: Sequence[int]) -> PairBatch:
    index = list(order)
    return PairBatch(
        batch.conditioning[index],
        batch.chosen[index],
        batch.rejected[index],
        batch.weight[index],
        tuple(batch.draws[i] for i in index),
    )


@pytest.mark.slow
def test_10_permuting_pairs_permutes_their_losses(lora_policy: Any, batches: Batches, policies: Any) -> None:
    """Check 7.1.10: losses belong to pairs, not to places; permuting only the rejected halves changes them."""
    policies.move_away(lora_policy)
    trainer, batch, order = DiffusionDPO(lora_policy, beta=100.0), batches(4), [2, 0, 3, 1]
    losses = trainer.loss(batch).losses
    torch.testing.assert_close(trainer.loss(rows(batch, order)).losses, losses[order], rtol=1e-5, atol=1e-6)
    mixed = trainer.loss(dataclasses.replace(batch, rejected=batch.rejected[order])).losses
    assert float((mixed - losses).abs().max()) > 1e-3


# --- 11, 12, 18: the trainer's side of the data contract ---------------------------------------------------------


def test_11_weights_scale_the_pairs_and_nothing_else(lora_policy: Any, batches: Batches, policies: Any) -> None:
    """Check 7.1.11: the trainer sees no labels, only order and weight; a weight of 0 drops a pair's gradient."""
    policies.move_away(lora_policy)
    trainer, batch = DiffusionDPO(lora_policy, beta=100.0), batches(2)
    weighted = dataclasses.replace(batch, weight=torch.tensor([2.0, 0.0]))
    output = trainer.loss(weighted)
    assert torch.equal(output.losses, trainer.loss(batch).losses)
    assert output.loss.item() == pytest.approx(float(output.losses[0]))
    alone, both = gradients(trainer, rows(batch, [0])), gradients(trainer, weighted)
    scale = max(float(g.abs().max()) for g in alone.values())
    for name, gradient in alone.items():
        torch.testing.assert_close(both[name], gradient, rtol=0, atol=1e-5 * scale)


def test_12_a_dropped_caption_is_dropped_for_both_halves_and_both_models(lora_policy: Any, batches: Batches) -> None:
    """Check 7.1.12: policy and reference see the batch's own row, the same for chosen and rejected."""
    empty = lora_policy.encode_prompts([""])
    batch = batches(2)
    hidden = torch.cat([empty.tensors["hidden"], lora_policy.encode_prompts(["a red circle"]).tensors["hidden"]])
    batch = dataclasses.replace(batch, conditioning=Conditioning({"hidden": hidden}))
    seen: list[Tensor] = []
    lora_policy.denoiser.register_forward_pre_hook(lambda _, args: seen.append(args[2].detach().clone()))
    DiffusionDPO(lora_policy).loss(batch)
    assert len(seen) == 2  # reference and policy
    for conditioning in seen:
        for row, expected in ((0, 0), (1, 1), (2, 0), (3, 1)):
            assert torch.equal(conditioning[row], hidden[expected])


def test_12_caption_dropout_is_a_fifth_unless_told_otherwise(lora_policy: Any) -> None:
    """Check 7.1.12: the default rate; out of range is refused."""
    assert DiffusionDPO(lora_policy).config.caption_dropout == 0.2
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        DiffusionDPO(lora_policy, caption_dropout=1.1)


def test_18_cached_moments_give_what_encoding_on_the_fly_gives(lora_policy: Any, batches: Batches) -> None:
    """Check 7.1.18: moments rounded to bfloat16, as cached, change the batch's latents by less than their rounding."""
    images = torch.rand(2, 3, 8, 8, generator=Draw(0, 0, "images").generator("pixels"))
    moments: Moments = lora_policy.encode(images)
    noise = Draw(0, 0, "pair").normal("posterior/chosen", moments.mean.shape)
    cached = moments.mean.bfloat16().float() + moments.std.bfloat16().float() * noise
    direct = moments.mean + moments.std * noise
    bound = 2**-8 * (moments.mean.abs() + moments.std * noise.abs())
    assert bool(((cached - direct).abs() <= bound).all())
    trainer, batch = DiffusionDPO(lora_policy), batches(2)
    batch = dataclasses.replace(batch, chosen=direct, rejected=direct.flip(0))
    near = dataclasses.replace(batch, chosen=cached, rejected=cached.flip(0))
    a, b = trainer.loss(batch).metrics["model_mse"], trainer.loss(near).metrics["model_mse"]
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


# --- 14, 15: accumulation, overfitting -------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [True, False], ids=["float64", "float32"])
@pytest.mark.slow
def test_14_eight_micro_batches_of_one_are_a_batch_of_eight(
    double: bool, tiny_pipeline: Path, batches: Batches, policies: Any
) -> None:
    """Check 7.1.14: loss, and weights after one SGD step, agree to 1e-6 in float32 (1e-12 in float64)."""
    lora, tolerance = LoRA(rank=2), 1e-12 if double else 1e-6
    policy = policies.double(tiny_pipeline, lora=lora) if double else load_policy(str(tiny_pipeline), lora=lora)
    policies.move_away(policy)
    dtype = torch.float64 if double else torch.float32
    trainer = DiffusionDPO(policy, beta=100.0)
    singles = [batches(1, first=i, dtype=dtype) for i in range(8)]
    whole = gradients(trainer, batches(8, dtype=dtype))
    parts = [gradients(trainer, single) for single in singles]
    for name, gradient in whole.items():
        mean = torch.stack([part[name] for part in parts]).mean(0)
        torch.testing.assert_close(0.1 * mean, 0.1 * gradient, rtol=0, atol=tolerance)
    assert max(float(0.1 * gradient.abs().max()) for gradient in whole.values()) > 1e-3
    mean_loss = sum(trainer.loss(single).loss.item() for single in singles) / 8
    assert trainer.loss(batches(8, dtype=dtype)).loss.item() == pytest.approx(mean_loss, rel=0, abs=tolerance)


@pytest.mark.slow
def test_15_one_pair_can_be_learnt_by_heart(full_policy: Any, batches: Batches) -> None:
    """Check 7.1.15: 50 steps at 1e-3 on one pair: loss < 0.05, accuracy 1; swapped afterwards: accuracy 0."""
    trainer, batch = DiffusionDPO(full_policy, beta=2000.0), batches(1)
    optimizer = torch.optim.AdamW(full_policy.trainable_parameters(), lr=1e-3)
    for _ in range(50):
        optimizer.zero_grad()
        trainer.loss(batch).loss.backward()
        optimizer.step()
    with torch.no_grad():
        learnt, swapped = trainer.loss(batch), trainer.loss(swap(batch))
    assert learnt.loss.item() < 0.05
    assert float(learnt.metrics["implicit_accuracy"]) == 1
    assert float(swapped.metrics["implicit_accuracy"]) == 0


# --- 16: alarms ------------------------------------------------------------------------------------------------------


def test_16_a_saturated_trainer_raises_the_alarm(caplog: pytest.LogCaptureFixture) -> None:
    """Check 7.1.16: the gate of a trainer far beyond its pairs, for 100 steps. More in tests/test_monitor.py."""
    output = golden_trainer(beta=2000.0).loss(golden_batch())
    metrics = {name: float(value) for name, value in output.metrics.items()}
    assert metrics["gate"] < 0.02
    alarms = EarlyWarnings()
    with caplog.at_level(logging.WARNING, logger="diffalign"):
        given = [text for _ in range(100) for text in alarms.observe(metrics)]
    assert len(given) == 1
    assert "saturated" in given[0]
    assert given[0] in caplog.text


def test_16_a_rising_chosen_error_raises_the_alarm() -> None:
    """Check 7.1.16: both errors 20 % above the reference's, though the margin is 0."""
    policy = TablePolicy(TARGETS + 0.3 * math.sqrt(1.2), TARGETS + 0.3)
    metrics = {k: float(v) for k, v in DiffusionDPO(policy).loss(golden_batch()).metrics.items()}
    alarms = EarlyWarnings()
    given = [text for _ in range(30) for text in alarms.observe(metrics)]
    assert len(given) == 1
    assert "20 % above" in given[0]


# --- 17: adapter gradients -------------------------------------------------------------------------------------------


def test_17_every_adapter_tensor_has_a_gradient(lora_policy: Any, batches: Batches) -> None:
    """Check 7.1.17: none is None; A's are zero while B = 0, B's are not; no base weight has one."""
    found = gradients(DiffusionDPO(lora_policy), batches(2))
    assert len(found) == 2 * 4 * 8  # A and B of four projections in eight attention layers
    for name, gradient in found.items():
        assert bool(gradient.any()) == ("lora_B" in name), name
    trained = {id(p) for p in lora_policy.trainable_parameters()}
    assert all(p.grad is None for p in lora_policy.denoiser.parameters() if id(p) not in trained)


def test_17_every_weight_has_a_gradient_in_full_fine_tuning(full_policy: Any, batches: Batches) -> None:
    """Check 7.1.17: every weight of the UNet is reached."""
    found = gradients(DiffusionDPO(full_policy), batches(2))
    assert found.keys() == {name for name, _ in full_policy.denoiser.named_parameters()}


def leave_off(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter is switched off for the reference and not on again."""
    switch = policy._switch_adapter
    monkeypatch.setattr(policy, "_switch_adapter", lambda on: None if on else switch(on))


def test_17_an_adapter_left_off_fails_loudly(
    lora_policy: Any, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check 7.1.17: with the switch-back removed the loss has no gradient at all, and backward says so."""
    leave_off(lora_policy, monkeypatch)
    with pytest.raises(RuntimeError, match="does not require grad"):
        DiffusionDPO(lora_policy).loss(batches(2)).loss.backward()


def test_17_the_reference_pass_must_not_come_between_forward_and_backward(
    lora_policy: Any, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check 7.1.17, the trap the order avoids: policy first, reference left off, and all gradients are gone."""
    trainer = DiffusionDPO(lora_policy)
    states = trainer.noisy_states(batches(2))
    arguments = (states.noisy_latents, states.timesteps, states.conditioning)
    error = per_sample_error(lora_policy.predict(*arguments), states.target)
    leave_off(lora_policy, monkeypatch)
    reference_error = per_sample_error(trainer.reference.predict(*arguments), states.target)
    margin = trainer.margin(trainer.log_ratio(error, reference_error), states)
    trainer.objective(margin, states).mean().backward()
    assert all(parameter.grad is None for parameter in lora_policy.trainable_parameters())


def test_17_the_adapter_comes_back_on_when_the_reference_pass_fails(lora_policy: Any, batches: Batches) -> None:
    """Check 7.1.17: an error in the reference pass leaves policy and gradients as they were."""
    batch = batches(1)
    with pytest.raises(RuntimeError):
        lora_policy.frozen().predict(batch.chosen[:, :3], torch.tensor([3]), batch.conditioning)
    assert all(parameter.requires_grad for parameter in lora_policy.trainable_parameters())


# --- 20: Turbo --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_20_pure_noise_teaches_nothing(lora_policy: Any, batches: Batches, policies: Any) -> None:
    """Check 7.1.20: under Turbo's law a pair at t = 999 has loss ln 2 and exactly no gradient."""
    policies.move_away(lora_policy)
    trainer = DiffusionDPO(lora_policy, beta=2000.0, timestep_sampling="turbo")
    batch = batches(40)
    at_999 = trainer.noisy_states(batch).timesteps[:40] == 999
    assert 3 <= int(at_999.sum()) <= 20
    picked = rows(batch, at_999.nonzero()[:2, 0].tolist())
    states = trainer.noisy_states(picked)
    assert torch.equal(*states.noisy_latents.chunk(2))
    assert torch.equal(states.noisy_latents, states.noise)
    assert trainer.loss(picked).losses.tolist() == [float(torch.tensor(math.log(2)))] * 2
    largest = max(float(g.abs().max()) for g in gradients(trainer, picked).values())
    other = rows(batch, (~at_999).nonzero()[:2, 0].tolist())
    scale = max(float(g.abs().max()) for g in gradients(trainer, other).values())
    assert scale > 0
    assert largest <= 1e-5 * scale  # the two halves cancel up to the order of summation
