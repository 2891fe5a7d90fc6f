"""Self-NPO: the walk, the noise that is added, the teacher's guidance and average, and runs that were killed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.backbones import LoRA, load_policy
from diffalign.batches import Conditioning
from diffalign.config import ConfigError, TrainingConfig
from diffalign.loop import fit
from diffalign.predictions import Prediction
from diffalign.schedules import DiscreteSchedule
from diffalign.trainers.self_npo import SelfNPO, grid, noise_between, renoise

SCHEDULE = DiscreteSchedule.scaled_linear()
EMPTY = Conditioning({"hidden": torch.full((1, 5, 16), 0.3)})


class Images:
    """A source of the same pairs at every step, of which the chosen halves count."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def batch(self, step: int, micro_step: int) -> Any:
        return self.batches(2, first=2 * step)

    def update(self, step: int) -> None:
        pass


def trainer_of(policy: Any, **options: Any) -> SelfNPO:
    trainer = SelfNPO(policy, **options)
    trainer._unconditional = EMPTY
    return trainer


# --- check 7.5.6: the noise ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "then", "ratio", "added"), [(199, 599, 0.462790, 0.886468), (0, 1, 0.999573, 0.029235)]
)
def test_the_noise_that_is_added_between_two_levels(now: int, then: int, ratio: float, added: float) -> None:
    found = noise_between(SCHEDULE, torch.tensor([now]), torch.tensor([then]))
    assert [round(float(value), 6) for value in found] == [ratio, added]


def test_a_state_becomes_a_noisier_state_of_the_same_picture() -> None:
    """Its mean is alpha_s x0 and its deviation sigma_s, for every pair of levels."""
    now, then = torch.tensor([0, 39, 199, 799, 998]), torch.tensor([1, 999, 599, 800, 999])
    ratio, added = noise_between(SCHEDULE, now, then)
    (alpha, sigma), (alpha_then, sigma_then) = SCHEDULE.scales(now), SCHEDULE.scales(then)
    torch.testing.assert_close(ratio * alpha, alpha_then)
    torch.testing.assert_close((ratio * sigma).square() + added.square(), sigma_then.square())
    clean, noise, more = (torch.randn(5, 4, dtype=torch.float64) for _ in range(3))
    state = SCHEDULE.add_noise(clean, noise, now)
    together = (ratio[:, None] * sigma[:, None] * noise + added[:, None] * more) / sigma_then[:, None]
    expected = SCHEDULE.add_noise(clean, together, then)
    torch.testing.assert_close(renoise(SCHEDULE, state, more, now, then), expected)


# --- checks 7.5.7 and 7.5.8: guidance and walk -----------------------------------------------------------------------


def test_the_grid_has_25_levels() -> None:
    assert grid(1000).tolist() == list(range(39, 1000, 40))


@pytest.mark.parametrize(("w", "forwards"), [(-1.0, ["empty"]), (0.0, ["prompt"]), (-5.0, ["prompt", "empty"])])
def test_the_teachers_guidance(
    lora_policy: Any, batches: Any, w: float, forwards: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """w = -1 is the unconditional output, 0 the conditional one, -5 is 5 uncond - 4 cond; none is computed in vain."""
    trainer, batch, timesteps = trainer_of(lora_policy, w=w), batches(2), torch.tensor([39, 759])
    seen: list[str] = []
    predict = trainer.reference.predict

    def counted(latents: Tensor, steps: Tensor, conditioning: Conditioning) -> Tensor:
        seen.append("prompt" if conditioning is batch.conditioning else "empty")
        return predict(latents, steps, conditioning)

    cond, uncond = (predict(batch.chosen, timesteps, c) for c in (batch.conditioning, EMPTY.repeat(2)))
    monkeypatch.setattr(trainer.reference, "predict", counted)
    clean, noise = trainer.guided(batch.chosen, timesteps, batch.conditioning)
    expected = {-1.0: uncond, 0.0: cond, -5.0: 5 * uncond - 4 * cond}[w]
    assert seen == forwards
    torch.testing.assert_close(noise, expected, rtol=1e-5, atol=1e-5)
    alphas, sigmas = (s.float().reshape(-1, 1, 1, 1) for s in SCHEDULE.scales(timesteps))
    torch.testing.assert_close(clean, (batch.chosen - sigmas * expected) / alphas, rtol=1e-4, atol=1e-5)


def test_where_walks_end(lora_policy: Any, batches: Any) -> None:
    """From 39 to 0 in one move, where it stays; from 999 to 799 in five; s is always above, up to 999."""
    batch = batches(64)
    trainer = trainer_of(lora_policy)
    drawn = [int(draw.uniform("level") * 25) for draw in batch.draws]
    assert {0, 4, 5, 24} <= set(drawn)
    with torch.no_grad():
        _, reached = trainer.walk(batch)
        assert reached.tolist() == [0 if k < 5 else 40 * (k - 4) - 1 for k in drawn]
        assert int(reached[drawn.index(24)]) == 799
        _, short = trainer_of(lora_policy, teacher_steps=1).walk(batch)
        assert short.tolist() == [0 if k == 0 else 40 * k - 1 for k in drawn]


def test_one_move_is_ddims(lora_policy: Any, batches: Any) -> None:
    """Against diffusers' DDIM step on the guided output, from real and from pure noise."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(lora_policy.pipeline.scheduler.config, timestep_spacing="trailing")
    scheduler.set_timesteps(25)
    assert scheduler.timesteps.tolist() == list(range(999, 0, -40))
    first = next(i for i in range(99) if int(batches(1, first=i).draws[0].uniform("level") * 25) == 22)
    batch = batches(1, first=first)
    noise = batch.draws[0].normal("noise", (4, 4, 4))[None]
    for start, level, state in (
        ("real", 22, SCHEDULE.add_noise(batch.chosen, noise, torch.tensor([919]))),
        ("noise", 24, noise),
    ):
        trainer = trainer_of(lora_policy, start=start, teacher_steps=2)
        with torch.no_grad():
            for place in range(level, 20, -1):
                output = trainer.reference.predict(state, torch.tensor([40 * place + 39]), EMPTY)
                state = scheduler.step(output, 40 * place + 39, state).prev_sample
            found, reached = trainer.walk(batch)
        assert reached.tolist() == [839]
        torch.testing.assert_close(found, state, rtol=1e-4, atol=1e-4)


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["huber", "l2"])
@pytest.mark.slow
def test_the_loss_compares_the_students_clean_image_with_the_teachers(
    lora_policy: Any, policies: Any, batches: Any, loss_type: Any
) -> None:
    policies.move_away(lora_policy, 0.1)
    trainer, batch = trainer_of(lora_policy, loss_type=loss_type, teacher="frozen", w=-2.0), batches(3)
    output = trainer.loss(batch)
    with torch.no_grad():
        state, reached = trainer.walk(batch)
        target, _ = trainer.guided(state, reached, batch.conditioning)
        pairs = zip(reached, batch.draws, strict=True)
        later = [int(t) + 1 + int(d.uniform("student") * (999 - int(t))) for t, d in pairs]
        assert all(int(t) < s <= 999 for t, s in zip(reached, later, strict=True))
        noise = torch.stack([draw.normal("student noise", (4, 4, 4)) for draw in batch.draws])
        noisy = renoise(SCHEDULE, state, noise, reached, torch.tensor(later))
        guess = lora_policy.predict(noisy, torch.tensor(later), batch.conditioning)
        alphas, sigmas = (s.reshape(-1, 1, 1, 1).float() for s in SCHEDULE.scales(torch.tensor(later)))
        difference = (noisy - sigmas * guess) / alphas - target
    each = difference.square() if loss_type == "l2" else (difference.square() + 1e-6).sqrt() - 1e-3
    torch.testing.assert_close(output.losses, each.flatten(1).mean(1), rtol=1e-4, atol=1e-5)
    assert float(output.loss.detach()) == pytest.approx(float(output.losses.mean()))
    output.loss.backward()
    assert all(p.grad is not None for p in lora_policy.trainable_parameters())


@pytest.mark.slow
def test_pure_noise_needs_no_image(lora_policy: Any, batches: Any) -> None:
    import dataclasses

    batch = batches(1)
    other = dataclasses.replace(batch, chosen=batch.chosen + 1, rejected=batch.rejected + 1)
    for start in ("noise", "real"):
        trainer = trainer_of(lora_policy, start=start, teacher_steps=1)
        with torch.no_grad():
            walks = [trainer.walk(b)[0] for b in (batch, other)]
        assert torch.equal(*walks) is (start == "noise")


def test_flows_are_refused() -> None:
    with pytest.raises(ValueError, match="SelfNPO cannot train a model that predicts 'velocity'"):
        SelfNPO.check_prediction(Prediction.VELOCITY)


def test_a_flow_is_refused_before_its_weights_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from diffalign import commands

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    overrides = [f"output_dir={tmp_path / 'run'}", "model.pretrained_model_name_or_path=diffalign://shapes_flow"]
    with pytest.raises((ValueError, ConfigError), match="SelfNPO cannot train a model that predicts 'velocity'"):
        commands.train("configs/shapes_self_npo.yaml", overrides)


# --- check 7.5.9: the teacher ----------------------------------------------------------------------------------------


def test_the_teacher_follows_at_its_rate(lora_policy: Any, policies: Any, batches: Any) -> None:
    """With a student that stands still, the distance shrinks by decay ** n: 0.3677 after 1000 steps of 0.999."""
    assert 0.999**1000 == pytest.approx(0.3677, abs=1e-4)
    trainer = trainer_of(lora_policy, teacher_decay=0.9)
    start = lora_policy.trained_state()
    trainer.loss(batches(1))
    policies.move_away(lora_policy, 0.1)
    student = lora_policy.trained_state()
    for step in range(1, 8):
        trainer.update(step)
    teacher = trainer.state()["teacher"]
    for name, tensor in teacher.items():
        torch.testing.assert_close(tensor, student[name] + 0.9**7 * (start[name] - student[name]), rtol=0, atol=1e-6)
    arguments = (batches(2).chosen, torch.tensor([10, 700]), batches(2).conditioning)
    found = trainer.reference.predict(*arguments)
    with torch.no_grad():
        for name, parameter in lora_policy.named_trainable():
            parameter.copy_(teacher[name])
        torch.testing.assert_close(found, lora_policy.predict(*arguments))  # the reference is the teacher


def test_a_frozen_teacher_stays(lora_policy: Any, policies: Any, batches: Any) -> None:
    trainer, arguments = trainer_of(lora_policy, teacher="frozen"), (batches(1).chosen, torch.tensor([9]))
    before = trainer.reference.predict(*arguments, batches(1).conditioning)
    trainer.loss(batches(1))
    policies.move_away(lora_policy, 0.1)
    trainer.update(1)
    assert torch.equal(trainer.reference.predict(*arguments, batches(1).conditioning), before)
    assert trainer.state() == {}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [LoRA(rank=2), None], ids=["lora", "full"])
def test_a_resumed_run_has_the_same_teacher(
    lora: LoRA | None, tiny_pipeline: Path, tmp_path: Path, batches: Any
) -> None:
    """Weights and teacher of a run in two parts are those of the run in one, to the bit."""
    states = []
    for name, parts in (("whole", (4,)), ("parts", (2, 4))):
        for steps in parts:
            policy: Any = load_policy(str(tiny_pipeline), lora=lora, train=True)
            trainer = trainer_of(policy, teacher_decay=0.5, teacher_steps=2)
            config = TrainingConfig(
                output_dir=str(tmp_path / name),
                max_train_steps=steps,
                per_device_train_batch_size=2,
                learning_rate=1e-2,
                lr_scheduler="constant",
                checkpointing_steps=2,
                resume_from_checkpoint="latest",
            )
            fit(trainer, Images(batches), config, settings={"seed": 0})
        states.append((policy.trained_state(), trainer.state()["teacher"]))
    for one, other in zip(*states, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    weights, teacher = states[0]
    assert any(not torch.equal(weights[name], teacher[name]) for name in weights)


def test_it_learns_from_images_alone_and_says_what_it_does(lora_policy: Any) -> None:
    trainer = SelfNPO(lora_policy)
    assert SelfNPO.learns_from == "winners"
    assert SelfNPO.trains_negative
    said = "Self-NPO: teacher moving average 0.999, w -1, 5 moves on 25 levels from noised images, loss huber"
    assert trainer.describe() == said
    assert math.isclose(trainer.config.huber_scale, 1e-3)
