"""Losses and gradients that are no numbers, steps that a scaler skips, gradients that are lost."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign import failures, loop
from diffalign.batches import PairBatch
from diffalign.checkpoints import CheckpointFolder, load
from diffalign.config import TrainingConfig
from diffalign.loop import NonFiniteLossError, fit
from tests.loop.results import Changed, column, rows, same


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.slow
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
    assert PairBatch.from_state(saved["batch"]).draws[1].pair_id == spoilt[0]
    assert torch.equal(again.losses.isnan(), torch.tensor([False, True]))
    torch.testing.assert_close(again.losses, saved["losses"], rtol=0, atol=0, equal_nan=True)
    state = load(folder / "checkpoint-2", {"training": config.model_dump(mode="json")})
    assert same(state["weights"], {name: p.detach() for name, p in fresh.policy.named_trainable()})


@pytest.mark.slow
def test_a_gradient_that_is_no_number_never_reaches_the_weights(start: Any) -> None:
    trainer, source, config = start(checkpointing_steps=1)
    parameter = trainer.policy.trainable_parameters()[5]
    trainer.update = lambda step: parameter.register_hook(lambda g: torch.full_like(g, math.inf)) if step == 2 else None
    with pytest.raises(NonFiniteLossError, match="the gradient of step 3 is not finite"):
        fit(trainer, source, config)
    assert all(bool(torch.isfinite(p).all()) for p in trainer.policy.trainable_parameters())
    assert CheckpointFolder(Path(config.output_dir)).steps() == [1, 2]
    assert list((Path(config.output_dir) / "failures").iterdir())


def scaled_run(trainer: Any, source: Any, config: TrainingConfig, scaler: torch.amp.GradScaler) -> Any:
    """A run with a gradient scaler, which accelerate gives to GPUs only; the arithmetic stays float32."""
    accelerator = loop.make_accelerator(config)
    accelerator.scaler = scaler
    run = loop._Run(trainer, source, config, {}, accelerator)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    return run


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_gradient_scaler_that_skips_for_ever_stops_the_run(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "MAX_SKIPPED_STEPS", 2)
    trainer, source, config = start(max_train_steps=8)
    trainer.policy.trainable_parameters()[0].register_hook(lambda g: torch.full_like(g, math.nan))
    with pytest.raises(NonFiniteLossError, match="the gradient of step 3 is not finite"):
        scaled_run(trainer, source, config, torch.amp.GradScaler("cpu")).go(None)


def test_lost_gradients_stop_the_run_at_once(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check 7.1.17 in the loop: a reference pass after the policy's that leaves the adapter off."""
    trainer, source, config = start()
    denoiser = trainer.policy.denoiser
    errors = trainer.errors

    def wrong(*arguments: Any) -> Any:
        found = errors(*arguments)
        denoiser.disable_adapters()
        return found

    trainer.errors = wrong
    with pytest.raises(RuntimeError, match="64 of 64 trained tensors got no gradient, .*lora_A.* among them"):
        fit(trainer, source, config)
