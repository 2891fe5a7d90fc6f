from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from diffalign import loop
from diffalign.backbones import LoRA, inspect_model, load_policy
from diffalign.backbones.sd import StableDiffusionPolicy
from diffalign.batches import PairBatch
from diffalign.checkpoints import CheckpointError, CheckpointFolder, load
from diffalign.config import RunConfig, TrainingConfig
from diffalign.data import DataConfig, EncodedPairs, PairSource, encode_pairs, load_pairs
from diffalign.loop import NonFiniteLossError, fit
from diffalign.trainers.diffusion_dpo import DiffusionDPO

RUNS = Path(__file__).with_name("runs.py")
MANDATORY = {
    "loss",
    "model_mse",
    "ref_mse",
    "error_chosen",
    "error_rejected",
    "ref_error_chosen",
    "ref_error_rejected",
    "z_mean",
    "z_std",
    "implicit_accuracy",
    "gate",
    "grad_norm",
    "lr",
}


@pytest.fixture(autouse=True)
def _own_accelerator() -> Iterator[None]:
    """Accelerate keeps precision and devices for the whole process; each test starts anew."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def pair_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pairs of PNG files with an index: the chosen ones reddish, the rejected ones bluish."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for i in range(8):
        for side, tint in (("chosen", (200, 60, 40)), ("rejected", (40, 60, 200))):
            noise = np.random.default_rng([i, side == "chosen"]).integers(0, 50, (8, 8, 3))
            Image.fromarray((noise + tint).astype(np.uint8)).save(folder / f"{i}-{side}.png")
        prompt = f"a photo of {('one', 'two', 'three', 'four')[i % 4]} circles"
        rows.append({"id": f"p{i}", "prompt": prompt, "chosen": f"{i}-chosen.png", "rejected": f"{i}-rejected.png"})
    (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def encoded(tiny_pipeline: Path, pair_folder: Path, cache: Path) -> EncodedPairs:
    config = DataConfig(train_data_dir=pair_folder)
    return encode_pairs(load_pairs(config), load_policy(str(tiny_pipeline)), config, cache)


@pytest.fixture
def start(tiny_pipeline: Path, encoded: EncodedPairs, tmp_path: Path, policies: Any) -> Callable[..., Any]:
    """(trainer, source, config) of a small run."""

    def start(
        name: str = "run",
        *,
        lora: LoRA | None = LoRA(rank=2),  # noqa: B008 - frozen
        double: bool = False,
        beta: float = 500.0,
        dropout: float = 0.2,
        output_dir: Path | None = None,
        **training: Any,
    ) -> tuple[DiffusionDPO, PairSource, TrainingConfig]:
        settings = {"max_train_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3, **training}
        config = TrainingConfig(output_dir=str(output_dir or tmp_path / name), **settings)
        policy: Any
        if double:
            policy = policies.double(tiny_pipeline, lora=lora)
        else:
            policy = load_policy(str(tiny_pipeline), lora=lora, train=True)
        source = PairSource(
            encoded,
            seed=5,
            batch_size=config.per_device_train_batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            caption_dropout=dropout,
        )
        return DiffusionDPO(policy, beta=beta), source, config

    return start


def rows(folder: Path | str, kind: str = "train") -> list[dict[str, float]]:
    """The lines of one kind in metrics.jsonl, without the prefix and the time they took."""
    found = []
    for line in (Path(folder) / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        named = {k.removeprefix(f"{kind}/"): v for k, v in row.items() if k.startswith(f"{kind}/")}
        if named:
            named.pop("seconds", None)
            found.append({"step": row["step"], **named})
    return found


def column(folder: Path | str, name: str, kind: str = "train") -> list[float]:
    return [row[name] for row in rows(folder, kind)]


def trained_file(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "pytorch_lora_weights.safetensors")


def weights_file(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Changed:
    """A source with one change made to what another one gives."""

    def __init__(self, source: PairSource, change: Callable[[int, int, PairBatch], PairBatch]) -> None:
        self.source, self.change = source, change

    def batch(self, step: int, micro_step: int) -> PairBatch:
        return self.change(step, micro_step, self.source.batch(step, micro_step))

    def update(self, step: int) -> None:
        self.source.update(step)


# --- what a run does -------------------------------------------------------------------------------------------------


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


def test_scale_lr_multiplies_by_the_pairs_of_a_step(start: Any) -> None:
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "learning_rate": 1e-6}
    folder = fit(*start(max_train_steps=1, scale_lr=True, **options))
    assert column(folder, "lr") == pytest.approx([6e-6])


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
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


def test_full_fine_tuning_saves_the_unet(start: Any, tiny_pipeline: Path) -> None:
    trainer, source, config = start(lora=None, max_train_steps=2, learning_rate=1e-4)
    folder = fit(trainer, source, config)
    again: Any = load_policy(str(tiny_pipeline), adapter=folder)
    assert same(again.denoiser.state_dict(), trainer.policy.denoiser.state_dict())
    assert not same(again.denoiser.state_dict(), trainer.policy._frozen.state_dict())


def test_half_precision_trains_with_single_precision_weights(start: Any) -> None:
    trainer, source, config = start(max_train_steps=2, mixed_precision="bf16")
    folder = fit(trainer, source, config)
    assert {p.dtype for p in trainer.policy.trainable_parameters()} == {torch.float32}
    assert column(folder, "loss")[0] == float(torch.tensor(math.log(2)))


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


def scaled_run(trainer: Any, source: Any, config: TrainingConfig, scaler: torch.amp.GradScaler) -> Any:
    """A run with a gradient scaler, which accelerate gives to GPUs only; the arithmetic stays float32."""
    accelerator = loop.make_accelerator(config)
    accelerator.scaler = scaler
    run = loop._Run(trainer, source, config, {}, accelerator)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    return run


def test_steps_that_a_gradient_scaler_skips_move_nothing(start: Any) -> None:
    """A scale so large that the first gradients overflow: it shrinks, and only real steps count for lr and average."""
    trainer, source, config = start(max_train_steps=4, use_ema=True, lr_scheduler="linear", lr_warmup_steps=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-60)
    run = scaled_run(trainer, source, config, scaler)
    averaged: list[int] = []
    run.ema.step = lambda parameters: averaged.append(run.step)
    run.go(None)
    real = 4 - sum(row["grad_norm"] is None for row in rows(config.output_dir))
    assert 0 < real < 4
    assert len(averaged) == real
    lrs = column(config.output_dir, "lr")
    assert lrs == pytest.approx([0.0] * (4 - real) + [1e-3 * i / 4 for i in range(real)])
    state = load(Path(config.output_dir) / "checkpoint-4", {})
    assert state["scaler"]["scale"] == scaler.get_scale() < 2.0**127


def test_a_gradient_scaler_that_skips_for_ever_stops_the_run(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "MAX_SKIPPED_STEPS", 2)
    trainer, source, config = start(max_train_steps=8)
    trainer.policy.trainable_parameters()[0].register_hook(lambda g: torch.full_like(g, math.nan))
    with pytest.raises(NonFiniteLossError, match="the gradient of step 3 is not finite"):
        scaled_run(trainer, source, config, torch.amp.GradScaler("cpu")).go(None)


def test_methods_without_pairs_have_fewer_metrics(start: Any) -> None:
    trainer, source, config = start(max_train_steps=2)
    loss = trainer.loss

    def unpaired(batch: PairBatch) -> Any:
        output = loss(batch)
        output.metrics = {"loss": output.metrics["loss"]}
        return output

    trainer.loss = unpaired
    assert len(column(fit(trainer, source, config), "loss")) == 2


def test_trainer_and_source_are_told_of_every_step(start: Any) -> None:
    trainer, source, config = start(gradient_accumulation_steps=2, per_device_train_batch_size=1)
    told: list[tuple[str, int]] = []
    trainer.update = lambda step: told.append(("trainer", step))
    source.update = lambda step: told.append(("source", step))
    fit(trainer, source, config)
    assert told == [(who, step) for step in (1, 2, 3, 4) for who in ("trainer", "source")]


def test_trackers_get_the_same_numbers(start: Any) -> None:
    folder = fit(*start(max_train_steps=2, report_to="tensorboard"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = [p.parent for p in folder.rglob("events.out.*") if p.parent.name == "diffalign"]
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    values = [event.value for event in accumulator.Scalars("train/grad_norm")]
    assert values == pytest.approx(column(folder, "grad_norm"), rel=1e-6)


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


def test_lost_gradients_stop_the_run_at_once(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check 7.1.17 in the loop: a reference pass after the policy's that leaves the adapter off."""
    trainer, source, config = start()
    denoiser = trainer.policy.denoiser
    errors = trainer.errors

    def wrong(states: Any) -> Any:
        found = errors(states)
        denoiser.disable_adapters()
        return found

    trainer.errors = wrong
    with pytest.raises(RuntimeError, match="64 of 64 trained tensors got no gradient, .*lora_A.* among them"):
        fit(trainer, source, config)


def test_a_policy_without_anything_to_train_is_refused(start: Any, tiny_pipeline: Path) -> None:
    _, source, config = start()
    with pytest.raises(ValueError, match=r"no trainable parameters; load it with lora=\.\.\. or train=True"):
        fit(DiffusionDPO(load_policy(str(tiny_pipeline))), source, config)


# --- validation ------------------------------------------------------------------------------------------------------


def test_validation_comes_before_the_first_step_then_regularly_and_at_the_end(start: Any) -> None:
    calls: list[int] = []

    def validate(step: int) -> dict[str, float]:
        calls.append(step)
        return {"score": step / 2}

    trainer, source, config = start(max_train_steps=5, validation_steps=2)
    folder = fit(trainer, source, config, validate=validate)
    assert calls == [0, 2, 4, 5]
    assert rows(folder, "validation") == [{"step": s, "score": s / 2} for s in calls]


@pytest.mark.slow
def test_validation_looks_at_the_same_triples_every_time(start: Any, encoded: EncodedPairs) -> None:
    from diffalign.commands import _Validation

    config = RunConfig.model_validate(
        {
            "output_dir": "x",
            "model": {"pretrained_model_name_or_path": "y"},
            "training": {"validation_draws": 3, "per_device_train_batch_size": 2},
        }
    )
    trainer, source, training = start(max_train_steps=2, validation_steps=1)
    view, _ = encoded.split(3, seed=0)
    validate = _Validation(trainer, config, view, torch.device("cpu"), True)
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


# --- bad numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_names_the_pair_and_can_be_replayed(start: Any, value: float) -> None:
    spoilt: list[str] = []

    def spoil(step: int, micro: int, batch: PairBatch) -> PairBatch:
        if (step, micro) != (2, 1):
            return batch
        chosen = batch.chosen.clone()
        chosen[1, 0, 0, 0] = value
        spoilt.append(batch.draws[1].pair_id)
        return dataclasses.replace(batch, chosen=chosen)

    trainer, source, config = start(per_device_train_batch_size=2, gradient_accumulation_steps=2, checkpointing_steps=1)
    with pytest.raises(NonFiniteLossError) as error:
        fit(trainer, Changed(source, spoil), config)
    message, folder = str(error.value), Path(config.output_dir)
    assert message.startswith(f"the loss of step 3 is not finite for pair(s) {spoilt[0]}; ")
    assert "\n" not in message
    assert column(folder, "step") == [1, 2]
    assert CheckpointFolder(folder).steps() == [1, 2]
    (path,) = (folder / "failures").iterdir()
    assert str(path) in message

    fresh, _, _ = start("fresh")
    again = loop.replay(path, fresh)
    saved = torch.load(path, weights_only=True)
    assert [draw[2] for draw in saved["draws"]][1] == spoilt[0]
    assert torch.equal(again.losses.isnan(), torch.tensor([False, True]))
    torch.testing.assert_close(again.losses, saved["losses"], rtol=0, atol=0, equal_nan=True)
    state = load(folder / "checkpoint-2", {"training": config.model_dump(mode="json")})
    assert same(state["weights"], {name: p.detach() for name, p in fresh.policy.named_trainable()})


def test_a_gradient_that_is_no_number_never_reaches_the_weights(start: Any) -> None:
    trainer, source, config = start(checkpointing_steps=1)
    parameter = trainer.policy.trainable_parameters()[5]
    trainer.update = lambda step: parameter.register_hook(lambda g: torch.full_like(g, math.inf)) if step == 2 else None
    with pytest.raises(NonFiniteLossError, match="the gradient of step 3 is not finite"):
        fit(trainer, source, config)
    assert all(bool(torch.isfinite(p).all()) for p in trainer.policy.trainable_parameters())
    assert CheckpointFolder(Path(config.output_dir)).steps() == [1, 2]
    assert list((Path(config.output_dir) / "failures").iterdir())


# --- stopping and going on -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sigterm_saves_leaves_quietly_and_goes_on_as_if_nothing_had_happened(start: Any) -> None:
    options = {"max_train_steps": 5, "lr_scheduler": "linear", "lr_warmup_steps": 2, "use_ema": True}
    whole = fit(*start("whole", **options))
    trainer, source, config = start("stopped", resume_from_checkpoint="latest", **options)
    trainer.update = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        fit(trainer, source, config)
    assert stop.value.code == 0
    assert signal.getsignal(signal.SIGTERM) is before
    folder = Path(config.output_dir)
    assert CheckpointFolder(folder).steps() == [2]
    assert column(folder, "step") == [1, 2]
    assert not (folder / "pytorch_lora_weights.safetensors").exists()
    fit(*start("stopped", resume_from_checkpoint="latest", **options))
    assert rows(folder) == rows(whole)
    assert same(trained_file(folder), trained_file(whole))
    assert same(trained_file(folder / "ema"), trained_file(whole / "ema"))


def test_a_finished_run_resumed_changes_nothing(start: Any) -> None:
    folder = fit(*start(resume_from_checkpoint="latest"))
    before = trained_file(folder), rows(folder)
    (folder / "pytorch_lora_weights.safetensors").unlink()  # killed between its last checkpoint and its last file
    fit(*start(resume_from_checkpoint="latest"))
    assert same(trained_file(folder), before[0])
    assert rows(folder) == before[1]


def test_a_named_checkpoint_can_be_resumed(start: Any) -> None:
    folder = fit(*start(checkpointing_steps=1))
    before = rows(folder)
    fit(*start(checkpointing_steps=1, resume_from_checkpoint="checkpoint-2"))
    assert rows(folder) == before


@pytest.mark.slow
def test_other_settings_are_refused_before_anything_is_touched(start: Any) -> None:
    folder = fit(*start())
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"training.learning_rate: 0.001 in the checkpoint, 0.002 now"):
        fit(*start(resume_from_checkpoint="latest", learning_rate=2e-3))
    with pytest.raises(CheckpointError, match="'checkpoint-3' is no checkpoint"):
        fit(*start(resume_from_checkpoint="checkpoint-3"))
    with pytest.raises(CheckpointError, match=r"already holds checkpoints of a run; resume it with .*=latest, or"):
        fit(*start())
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_run_in_a_thread_cannot_listen_for_signals_and_runs_all_the_same(start: Any) -> None:
    parts, done = start(max_train_steps=1), []
    thread = threading.Thread(target=lambda: done.append(fit(*parts)))
    thread.start()
    thread.join()
    assert column(done[0], "step") == [1]


@pytest.fixture(params=["a full disk", "a limit on file sizes"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Any, Any]]:
    """(folder, fill, empty): a folder that takes no more after `fill()` and takes all again after `empty()`."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param == "a full disk":
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True)
        if mounted.returncode:
            pytest.skip("only root can mount a small disk")
        filler = folder / "filler"

        def fill() -> None:
            with filler.open("wb", buffering=0) as file:
                for size in (1 << 16, 1 << 12):
                    try:
                        while file.write(b"x" * size) == size:
                            pass
                    except OSError:
                        continue

        try:
            yield folder, fill, filler.unlink
        finally:
            subprocess.run(["umount", folder], check=True)
    else:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            yield (
                folder,
                lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard)),
                lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)),
            )
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(sys.platform != "linux", reason="mounts and limits as Linux has them")
def test_a_full_disk_keeps_the_last_good_checkpoint(start: Any, small_disk: tuple[Path, Any, Any]) -> None:
    disk, fill, empty = small_disk
    options = {"output_dir": disk / "run", "checkpointing_steps": 2, "checkpoints_total_limit": 1}
    whole = fit(*start("whole", checkpointing_steps=2))
    trainer, source, config = start(resume_from_checkpoint="latest", **options)
    trainer.update = lambda step: fill() if step == 3 else None
    with pytest.raises(CheckpointError) as error:
        fit(trainer, source, config)
    message = str(error.value)
    assert message.startswith("could not ")
    assert "No space left on device" in message or "File too large" in message
    assert "free some space and resume" in message
    assert "\n" not in message
    assert CheckpointFolder(disk / "run").steps() == [2]
    empty()
    fit(*start(resume_from_checkpoint="latest", **options))
    assert rows(disk / "run") == rows(whole)
    assert same(trained_file(disk / "run"), trained_file(whole))


def launch(*command: str, **arguments: Any) -> None:
    """Runs tests/runs.py in a process of its own."""
    root = str(RUNS.parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *command, json.dumps(arguments)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


def optimizer_state(folder: Path) -> dict[int, dict[str, torch.Tensor]]:
    state: dict[int, dict[str, torch.Tensor]] = torch.load(folder / "state.pt", weights_only=True)["optimizer"]["state"]
    return state


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_a_run_is_the_uninterrupted_one(
    tiny_pipeline: Path, pair_folder: Path, encoded: EncodedPairs, cache: Path, tmp_path: Path
) -> None:
    """SIGKILL in the middle of every kind of write, at random moments, and SIGTERM: all numbers stay, bit for bit."""
    points = [
        {"point": "writing metrics", "count": 3},  # before the first checkpoint: it starts anew
        {"point": "writing the state", "count": 1},
        {"point": "before rename", "count": 1},
        {"point": "after rename", "count": 1},
        {"point": "rewinding metrics", "count": 1},
        {"terminate": 5},
        {"point": "writing metrics", "count": 1},
        {"point": "removing an old one", "count": 1},
    ]
    two = {"processes": 2}
    attempts: dict[str, list[dict[str, Any]]] = {
        "whole": [{}],
        "points": [*points, {}, {}],
        "random": [{"seconds": 0.8}] * 3 + [{}],
        "whole of two": [two],
        "killed of two": [
            {**two, "point": "writing the state", "count": 2},
            {**two, "terminate": 5, "anywhere": True},
            {**two, "point": "after rename", "count": 1},
            two,
        ],
    }
    launch(
        *(str(RUNS), "chains"),
        run={"model": str(tiny_pipeline), "data": str(pair_folder), "cache": str(cache)},
        root=str(tmp_path),
        attempts=attempts,
        seed=int.from_bytes(os.urandom(2), "big"),
    )
    statuses = json.loads((tmp_path / "statuses.json").read_text())
    assert statuses["whole"] == [0]
    assert statuses["points"] == [signal.SIGKILL] * 5 + [0] + [signal.SIGKILL] * 2 + [0, 0]
    assert statuses["random"][0] == signal.SIGKILL
    assert statuses["random"][-1] == 0
    assert statuses["whole of two"] == [0]
    assert statuses["killed of two"] == [signal.SIGKILL, 0, signal.SIGKILL, 0]
    whole, of_two = tmp_path / "whole", tmp_path / "whole of two"
    assert rows(of_two) != rows(whole)
    for name, expected in (("points", whole), ("random", whole), ("killed of two", of_two)):
        interrupted = tmp_path / name
        for kind in ("train", "validation"):
            assert rows(interrupted, kind) == rows(expected, kind)
            assert rows(interrupted, kind)[-1]["step"] == 10
        for folder in ("", "ema", "checkpoint-10"):
            assert same(trained_file(interrupted / folder), trained_file(expected / folder))
        found, wanted = optimizer_state(interrupted / "checkpoint-10"), optimizer_state(expected / "checkpoint-10")
        assert found.keys() == wanted.keys()
        assert all(same(found[key], wanted[key]) for key in wanted)
        assert CheckpointFolder(interrupted).steps() == [9, 10]
        assert not [*interrupted.glob("*.partial"), *interrupted.glob("*.removed")]
    assert json.loads((of_two / "facts.json").read_text())["num_processes"] == 2


@pytest.mark.slow
def test_two_processes_are_one_with_the_doubled_batch(
    tiny_pipeline: Path, pair_folder: Path, encoded: EncodedPairs, cache: Path, tmp_path: Path
) -> None:
    """DDP and FSDP2, adapters and all weights, float64 throughout: only the order of summation differs.

    The logs of four steps agree to 1e-9; the trained weights to 1e-7, AdamW dividing small gradients by their size.
    """
    training = {
        "max_train_steps": 4,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler": "linear",
        "lr_warmup_steps": 2,
        "use_ema": True,
    }
    run = {"model": str(tiny_pipeline), "data": str(pair_folder), "cache": str(cache), "double": True}
    launch(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(RUNS), "together"),
        run=run,
        training=training,
        root=str(tmp_path),
    )
    spec = importlib.util.spec_from_file_location("runs", RUNS)
    assert spec is not None
    assert spec.loader is not None
    runs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runs)
    doubled = {**training, "per_device_train_batch_size": 2}
    one, full = tmp_path / "one", tmp_path / "one_full"
    runs.train(**run, training={**doubled, "output_dir": str(one)})
    runs.train(**run, rank=None, training={**doubled, "max_train_steps": 2, "output_dir": str(full)})

    def facts(name: str) -> tuple[int, list[str], list[str]]:
        found = json.loads((tmp_path / name / "facts.json").read_text())
        return found["num_processes"], found["wrapped"], found["reference"]

    for name in ("ddp", "ddp_full"):
        assert (facts(name)[0], facts(name)[1][0]) == (2, "DistributedDataParallel")
    for name in ("fsdp", "fsdp_resumed", "fsdp_full"):
        assert facts(name)[0] == 2
        assert "FSDPModule" in facts(name)[1]
    assert "FSDPModule" in facts("fsdp_full")[2]
    assert facts("one")[0] == 1
    for name, expected in (("ddp", one), ("fsdp", one), ("ddp_full", full), ("fsdp_full", full)):
        for metric in MANDATORY:
            found, wanted = column(tmp_path / name, metric), column(expected, metric)
            assert found == pytest.approx(wanted, rel=1e-9, abs=1e-12), (name, metric)
        part = "" if expected is one else "unet"
        for folder in ("", "ema"):
            a, b = (weights_file(where / folder / part) for where in (tmp_path / name, expected))
            assert a.keys() == b.keys()
            for key, value in b.items():
                torch.testing.assert_close(a[key], value, rtol=0, atol=1e-7, msg=f"{name} {folder} {key}")
    assert column(one, "step") == [1, 2, 3, 4]
    assert column(one, "z_mean")[-1] != 0
    resumed, whole = tmp_path / "fsdp_resumed", tmp_path / "fsdp"
    assert rows(resumed) == rows(whole)[2:]
    for folder in ("", "ema"):
        assert same(weights_file(resumed / folder), weights_file(whole / folder))
    found_state, wanted_state = (optimizer_state(where / "checkpoint-4") for where in (resumed, whole))
    assert all(same(found_state[key], wanted_state[key]) for key in wanted_state)
    assert list((tmp_path / "ddp").rglob("events.out.*"))
    messages = [(tmp_path / f"rank-{i}.txt").read_text() for i in range(2)]
    assert "the loss of step 2 is not finite in another process" in messages[0]
    assert "the loss of step 2 is not finite for pair(s) p" in messages[1]
    assert column(tmp_path / "bad", "step") == [1]
    assert [p.name for p in (tmp_path / "bad" / "failures").iterdir()] == ["step-1-rank-1.pt"]
