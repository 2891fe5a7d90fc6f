"""What a run does: steps, logs, averages, precision, trackers, validation."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffalign.backbones import inspect_model, load_policy
from diffalign.backbones.sd import StableDiffusionPolicy
from diffalign.batches import PairBatch
from diffalign.config import RunConfig
from diffalign.data import EncodedPairs
from diffalign.loop import fit
from diffalign.trainers.diffusion_dpo import DiffusionDPO
from tests.loop.results import MANDATORY, Changed, column, rows, same, trained_file


@pytest.mark.slow
def test_a_run_learns_and_leaves_what_it_should(start: Any) -> None:
    """Pairs that differ as a whole, as the noise of this tiny autoencoder drowns its pictures."""

    def apart(step: int, micro: int, batch: PairBatch) -> PairBatch:
        return dataclasses.replace(batch, chosen=batch.chosen + 1, rejected=batch.rejected - 1)

    trainer, source, config = start(max_train_steps=25, checkpointing_steps=10, dropout=0.0, learning_rate=3e-3)
    folder = fit(trainer, Changed(source, apart), config)
    losses, accuracy = column(folder, "loss"), column(folder, "implicit_accuracy")
    assert losses[0] == float(torch.tensor(math.log(2)))
    assert accuracy[0] == 0.5
    assert sum(losses[-10:]) / 10 < 0.45
    assert sum(accuracy[-10:]) / 10 > 0.8
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoint-10",
        "checkpoint-20",
        "checkpoint-25",
        "metrics.jsonl",
        "pytorch_lora_weights.safetensors",
    ]
    assert same(trained_file(folder), trained_file(folder / "checkpoint-25"))


@pytest.mark.slow
def test_every_step_logs_everything_and_means_over_the_whole_step(start: Any) -> None:
    trainer, source, config = start(gradient_accumulation_steps=2, per_device_train_batch_size=2)
    seen: list[dict[str, float]] = []
    loss = trainer.loss

    def recording(batch: PairBatch) -> Any:
        output = loss(batch)
        seen.append({name: float(value) for name, value in output.metrics.items()})
        return output

    trainer.loss = recording
    folder = fit(trainer, source, config)
    logged = rows(folder)
    assert [row["step"] for row in logged] == [1, 2, 3, 4]
    for i, row in enumerate(logged):
        assert row.keys() >= MANDATORY
        assert "z_square" not in row
        micro = seen[2 * i : 2 * i + 2]
        for name in MANDATORY - {"z_std", "grad_norm", "lr"}:
            assert row[name] == pytest.approx(sum(m[name] for m in micro) / 2, rel=1e-6, abs=1e-9)
        mean, square = (sum(m[n] for m in micro) / 2 for n in ("z_mean", "z_square"))
        assert row["z_std"] == pytest.approx(math.sqrt(max(square - mean**2, 0)), abs=1e-6)
    assert logged[-1]["z_std"] > 0
    assert all(row["grad_norm"] > 0 for row in logged)


@pytest.mark.slow
def test_lines_are_written_every_so_many_steps(start: Any) -> None:
    folder = fit(*start(max_train_steps=5, logging_steps=2))
    assert column(folder, "step") == [2, 4]


@pytest.mark.slow
@pytest.mark.parametrize(("micro", "size"), [(4, 1), (2, 2)])
def test_accumulation_is_a_larger_batch(start: Any, micro: int, size: int) -> None:
    """In float64, where the order of summation is the only difference: losses, norms and weights to 1e-9."""
    whole = fit(*start("whole", double=True, beta=20.0))
    parts = fit(
        *start("parts", double=True, beta=20.0, per_device_train_batch_size=size, gradient_accumulation_steps=micro)
    )
    for name in MANDATORY:
        assert column(parts, name) == pytest.approx(column(whole, name), rel=1e-9, abs=1e-12)
    a, b = trained_file(whole), trained_file(parts)
    assert all(torch.allclose(a[name], b[name], rtol=0, atol=1e-7) for name in a)
    assert column(whole, "z_mean")[-1] != 0


@pytest.mark.slow
def test_gradients_are_clipped_at_the_norm_that_is_logged_before(start: Any) -> None:
    norms: list[float] = []
    trainer, source, config = start(max_train_steps=1, max_grad_norm=1e-3)
    trainer.policy.denoiser.register_forward_hook(lambda *_: None)
    step = torch.optim.AdamW.step

    def recording(self: Any, *args: Any, **kwargs: Any) -> Any:
        norms.append(float(torch.stack([p.grad.norm() for g in self.param_groups for p in g["params"]]).norm()))
        return step(self, *args, **kwargs)

    torch.optim.AdamW.step = recording  # type: ignore[method-assign]
    try:
        folder = fit(trainer, source, config)
        free = fit(*start("free", max_train_steps=1, max_grad_norm=0))
    finally:
        torch.optim.AdamW.step = step  # type: ignore[method-assign]
    logged = column(folder, "grad_norm")[0]
    assert logged > 1e-3
    assert norms[0] == pytest.approx(1e-3, rel=1e-3)
    assert norms[1] == pytest.approx(logged, rel=1e-5)
    assert column(free, "grad_norm") == [logged]


@pytest.mark.slow
def test_learning_rates_count_optimizer_steps(start: Any) -> None:
    trainer, source, config = start(
        max_train_steps=6,
        gradient_accumulation_steps=3,
        per_device_train_batch_size=1,
        lr_scheduler="constant_with_warmup",
        lr_warmup_steps=4,
    )
    assert column(fit(trainer, source, config), "lr") == pytest.approx([1e-3 * min(s / 4, 1) for s in range(6)])


@pytest.mark.slow
def test_scale_lr_multiplies_by_the_pairs_of_a_step(start: Any) -> None:
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "learning_rate": 1e-6}
    folder = fit(*start(max_train_steps=1, scale_lr=True, **options))
    assert column(folder, "lr") == pytest.approx([6e-6])


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("adafactor", marks=pytest.mark.slow)])
def test_one_step_is_the_optimizers_own(start: Any, optimizer: str) -> None:
    adam = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_weight_decay": 0.1, "adam_epsilon": 1e-3}
    trainer, source, config = start(max_train_steps=1, optimizer=optimizer, max_grad_norm=0, dropout=0.0, **adam)
    before = {name: p.detach().clone() for name, p in trainer.policy.named_trainable()}
    batch = source.batch(0, 0)
    trainer.loss(batch).loss.backward()
    parameters = trainer.policy.trainable_parameters()
    if optimizer == "adamw":
        other: Any = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.8, 0.95), weight_decay=0.1, eps=1e-3)
    else:
        from transformers.optimization import Adafactor

        options = {"relative_step": False, "scale_parameter": False, "clip_threshold": 1.0}
        other = Adafactor(parameters, lr=1e-3, weight_decay=0.1, **options)
    other.step()
    expected = {name: p.detach().clone() for name, p in trainer.policy.named_trainable()}
    with torch.no_grad():
        for name, parameter in trainer.policy.named_trainable():
            parameter.copy_(before[name])
            parameter.grad = None
    fit(trainer, source, config)
    assert same({n: p.detach() for n, p in trainer.policy.named_trainable()}, expected)
    assert not same(before, expected)


@pytest.mark.slow
def test_the_moving_average_is_the_average(start: Any) -> None:
    """Decay min(d, (1 + s) / (10 + s)) at the s-th later step, and the first step is taken whole."""
    trainer, source, config = start(use_ema=True, ema_decay=0.3)
    average: dict[str, torch.Tensor] = {}

    def follow(step: int) -> None:
        decay = 0.0 if step == 1 else min(0.3, step / (9 + step))
        for name, parameter in trainer.policy.named_trainable():
            value = parameter.detach().clone()
            average[name] = value if name not in average else decay * average[name] + (1 - decay) * value

    trainer.update = follow
    folder = fit(trainer, source, config)
    last = {name: p.detach().clone() for name, p in trainer.policy.named_trainable()}
    other, _, _ = start("other")
    other.policy.load_trained(folder / "ema")
    found = {name: p.detach() for name, p in other.policy.named_trainable()}
    assert found.keys() == average.keys()
    for name, value in average.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
    assert not all(torch.equal(found[name], last[name]) for name in last)
    other.policy.load_trained(folder)
    assert same({name: p.detach() for name, p in other.policy.named_trainable()}, last)


@pytest.mark.slow
def test_full_fine_tuning_saves_the_unet(start: Any, tiny_pipeline: Path) -> None:
    trainer, source, config = start(lora=None, max_train_steps=2, learning_rate=1e-4)
    folder = fit(trainer, source, config)
    again: Any = load_policy(str(tiny_pipeline), adapter=folder)
    assert same(again.denoiser.state_dict(), trainer.policy.denoiser.state_dict())
    assert not same(again.denoiser.state_dict(), trainer.policy._frozen.state_dict())


@pytest.mark.slow
def test_half_precision_trains_with_single_precision_weights(start: Any) -> None:
    trainer, source, config = start(max_train_steps=2, mixed_precision="bf16")
    folder = fit(trainer, source, config)
    assert trainer.policy.autocast == torch.bfloat16
    assert {p.dtype for p in trainer.policy.trainable_parameters()} == {torch.float32}
    assert column(folder, "loss")[0] == float(torch.tensor(math.log(2)))


@pytest.mark.slow
def test_a_reference_in_half_precision_is_the_policy_at_the_start(start: Any, tiny_pipeline: Path) -> None:
    """All weights trained under autocast: the frozen copy holds half the bytes and computes the very same errors."""
    _, source, config = start(max_train_steps=1, mixed_precision="bf16")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)
    with torch.no_grad():  # norms of a new network are ones and zeros, which no rounding changes
        for parameter in pipeline.unet.parameters():
            parameter.mul_(1.001).add_(0.01)
    inspected = inspect_model(str(tiny_pipeline))
    policy: Any = StableDiffusionPolicy(pipeline, inspected, train=True, reference_dtype=torch.bfloat16)
    folder = fit(DiffusionDPO(policy, beta=2000.0), source, config)
    kept = sum(p.numel() * p.element_size() for p in policy._frozen.parameters())
    assert kept < 0.55 * sum(p.numel() * p.element_size() for p in policy.denoiser.parameters())
    assert column(folder, "z_mean") == [0.0]
    assert column(folder, "z_std") == [0.0]
    assert column(folder, "loss")[0] == float(torch.tensor(math.log(2)))


@pytest.mark.slow
def test_methods_without_pairs_have_fewer_metrics(start: Any) -> None:
    trainer, source, config = start(max_train_steps=2)
    loss = trainer.loss

    def unpaired(batch: PairBatch) -> Any:
        output = loss(batch)
        output.metrics = {"loss": output.metrics["loss"]}
        return output

    trainer.loss = unpaired
    assert len(column(fit(trainer, source, config), "loss")) == 2


@pytest.mark.slow
def test_trainer_and_source_are_told_of_every_step(start: Any) -> None:
    trainer, source, config = start(max_train_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=1)
    told: list[tuple[str, int]] = []
    trainer.update = lambda step: told.append(("trainer", step))
    source.update = lambda step: told.append(("source", step))
    fit(trainer, source, config)
    assert told == [(who, step) for step in (1, 2) for who in ("trainer", "source")]


@pytest.mark.slow
def test_trackers_get_the_same_numbers(start: Any) -> None:
    folder = fit(*start(max_train_steps=2, report_to="tensorboard"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = [p.parent for p in folder.rglob("events.out.*") if p.parent.name == "diffalign"]
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    values = [event.value for event in accumulator.Scalars("train/grad_norm")]
    assert values == pytest.approx(column(folder, "grad_norm"), rel=1e-6)


@pytest.mark.slow
def test_warnings_go_into_the_metrics_and_their_counters_into_checkpoints(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffalign.monitor.SATURATED_GATE", 1.0)
    monkeypatch.setattr("diffalign.monitor.SATURATED_STEPS", 3)
    trainer, source, config = start(resume_from_checkpoint="latest")
    trainer.update = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None
    with pytest.raises(SystemExit):
        fit(trainer, source, config)
    folder = fit(*start(resume_from_checkpoint="latest"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (warning,) = [line for line in lines if line.get("event") == "warning"]
    assert warning["step"] == 3
    assert "saturated" in warning["message"]


@pytest.mark.slow
def test_a_policy_without_anything_to_train_is_refused(start: Any, tiny_pipeline: Path) -> None:
    _, source, config = start()
    with pytest.raises(ValueError, match=r"no trainable parameters; load it with lora=\.\.\. or train=True"):
        fit(DiffusionDPO(load_policy(str(tiny_pipeline))), source, config)


# --- validation ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_validation_comes_before_the_first_step_then_regularly_and_at_the_end(start: Any) -> None:
    calls: list[int] = []

    def validate(step: int) -> dict[str, float]:
        calls.append(step)
        return {"score": step / 2}

    trainer, source, config = start(max_train_steps=3, validation_steps=2)
    folder = fit(trainer, source, config, validate=validate)
    assert calls == [0, 2, 3]
    assert rows(folder, "validation") == [{"step": s, "score": s / 2} for s in calls]


@pytest.mark.slow
def test_validation_looks_at_the_same_triples_every_time(start: Any, encoded: EncodedPairs) -> None:
    from diffalign.validating import Validation

    config = RunConfig.model_validate(
        {
            "output_dir": "x",
            "model": {"pretrained_model_name_or_path": "y"},
            "training": {"validation_draws": 3, "per_device_train_batch_size": 2},
        }
    )
    trainer, source, training = start(max_train_steps=2, validation_steps=1)
    view, _ = encoded.split(3, seed=0)
    validate = Validation(trainer, config, view, torch.device("cpu"), True)
    draws = [draw for batch in validate.batches for draw in batch.draws]
    assert len(set(draws)) == len(draws) == 3 * len(view)
    assert {draw.epoch for draw in draws} == {-1, -2, -3}
    first = validate(0)
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert first["implicit_accuracy"] == pytest.approx(0.5, rel=1e-12)
    folder = fit(trainer, source, training, validate=validate)
    logged = rows(folder, "validation")
    assert {k: v for k, v in logged[0].items() if k != "step"} == first
    last = validate(99)
    assert {k: v for k, v in logged[-1].items() if k != "step"} == last == validate(2)
    assert last["ref_mse"] == first["ref_mse"]
    assert last["loss"] != first["loss"]


@pytest.mark.slow
def test_the_policy_knows_what_its_products_are_rounded_to(start: Any) -> None:
    """Caches of what the reference says have it in their names."""
    trainer, source, config = start(max_train_steps=1, mixed_precision="bf16")
    assert trainer.policy.autocast is None
    fit(trainer, source, config)
    assert trainer.policy.autocast == torch.bfloat16
