"""Steps whose numbers are read several at once: the same run, the same failures, and no look at the device between."""

from __future__ import annotations

import dataclasses
import json
import math
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffalign import loop
from diffalign.batches import PairBatch
from diffalign.checkpoints import CheckpointFolder, load
from diffalign.failures import NonFiniteLossError
from diffalign.loop import fit
from tests.loop.results import Changed, column, same, trained_file
from tests.methods import METHODS, learn

TOGETHER = {"fused_optimizer": True, "sync_steps": 4}
ON_THE_CPU = ("randomness.py", "schedules.py", "timesteps.py", "encoded.py", "source.py")
"""Files that read numbers of tensors which never leave the CPU."""


class Looks(TorchDispatchMode):
    """Notes where a tensor's value is asked for, which on an accelerator would wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.note()
        return func(*args, **(kwargs or {}))

    def note(self) -> None:
        """Who asked, unless it was for a tensor that is on the CPU on any machine."""
        frames = [f for f in traceback.extract_stack() if "/diffalign/" in f.filename or "/trainers/" in f.filename]
        if frames and not frames[-1].filename.endswith(ON_THE_CPU):
            self.places.append(f"{Path(frames[-1].filename).name}:{frames[-1].name}")


class Counted:
    """A source that notes how often values were asked for before each step."""

    def __init__(self, source: Any, looks: Looks) -> None:
        self.source, self.looks, self.before = source, looks, []  # type: ignore[var-annotated]

    def batch(self, step: int, micro: int) -> PairBatch:
        self.before.append(len(self.looks.places))
        return self.source.batch(step, micro)  # type: ignore[no-any-return]

    def update(self, step: int) -> None:
        self.source.update(step)


def looks_before_each_step(start: Any, patch: pytest.MonkeyPatch, **settings: Any) -> list[int]:
    trainer, source, config = start(max_train_steps=8, checkpointing_steps=100, **settings)
    looks = Looks()
    counted = Counted(source, looks)
    tolist = torch.Tensor.tolist

    def noted(tensor: torch.Tensor) -> Any:
        looks.note()
        return tolist(tensor)

    with patch.context() as local, looks:
        local.setattr(torch.Tensor, "tolist", noted)  # which reads memory and goes through no operator
        fit(trainer, counted, config)
    return counted.before


@pytest.mark.slow
def test_between_two_readings_nothing_asks_for_a_value(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    together = looks_before_each_step(start, monkeypatch, **TOGETHER)
    assert together[:4] == [together[0]] * 4
    assert together[4:] == [together[4]] * 4
    assert together[4] > together[0]
    each = looks_before_each_step(start, monkeypatch, name="each", fused_optimizer=True)
    assert each == sorted(set(each)), "without sync_steps every step is looked at"


@pytest.mark.slow
@pytest.mark.parametrize("logging_steps", [1, 3])
def test_a_run_that_is_read_rarely_logs_and_learns_the_same(start: Any, logging_steps: int) -> None:
    settings = {
        "max_train_steps": 10,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "validation_steps": 3,
        "checkpointing_steps": 5,
        "logging_steps": logging_steps,
        "fused_optimizer": True,
        "use_ema": True,
    }
    found = []
    for sync_steps in (1, 4):
        parts = start(f"run{sync_steps}", sync_steps=sync_steps, **settings)
        folder = fit(*parts, validate=lambda step: {"step": float(step)})
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found.append((folder, [{k: v for k, v in line.items() if "seconds" not in k} for line in lines]))
    (one, each), (other, together) = found
    assert together == each
    assert [line["step"] for line in each if "train/loss" in line] == list(range(logging_steps, 11, logging_steps))
    assert same(trained_file(one), trained_file(other))
    assert same(trained_file(one / "ema"), trained_file(other / "ema"))
    assert CheckpointFolder(one).steps() == CheckpointFolder(other).steps() == [5, 10]


def spoilt(source: Any, at: tuple[int, int], names: list[str]) -> Changed:
    """The source with one value that is no number in the second pair of one micro-batch."""

    def spoil(step: int, micro: int, batch: PairBatch) -> PairBatch:
        if (step, micro) != at:
            return batch
        chosen = batch.chosen.clone()
        chosen[1, 0, 0, 0] = math.nan
        names.append(batch.draws[1].pair_id)
        return dataclasses.replace(batch, chosen=chosen)

    return Changed(source, spoil)


@pytest.mark.slow
def test_a_bad_loss_that_is_seen_late_is_reported_as_if_it_had_been_seen_at_once(start: Any) -> None:
    settings = {
        "max_train_steps": 8,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "checkpointing_steps": 1000,
        "fused_optimizer": True,
    }
    files, messages, states = [], [], []
    for sync_steps in (1, 8):
        trainer, source, config = start(f"run{sync_steps}", sync_steps=sync_steps, **settings)
        names: list[str] = []
        with pytest.raises(NonFiniteLossError) as error:
            fit(trainer, spoilt(source, (2, 1), names), config)
        assert f"the loss of step 3 is not finite for pair(s) {names[0]}; " in str(error.value)
        (path,) = (Path(config.output_dir) / "failures").iterdir()
        files.append(path.name)
        messages.append(str(error.value).replace(str(path), ""))
        states.append(torch.load(path, weights_only=True))
        fresh, _, _ = start("fresh")
        again = loop.replay(path, fresh)
        assert torch.equal(again.losses.isnan(), torch.tensor([False, True]))
    assert files[0] == files[1]
    assert messages[0] == messages[1]
    at_once, late = states
    assert same(at_once["weights"], late["weights"]), "the weights before the bad step"
    torch.testing.assert_close(at_once["losses"], late["losses"], rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
def test_a_bad_gradient_that_is_seen_late_never_reached_the_weights(start: Any) -> None:
    trainer, source, config = start(max_train_steps=8, checkpointing_steps=2, **TOGETHER)
    parameter = trainer.policy.trainable_parameters()[5]
    trainer.update = lambda step: parameter.register_hook(lambda g: torch.full_like(g, math.inf)) if step == 2 else None
    with pytest.raises(NonFiniteLossError, match="the gradient of step 3 is not finite"):
        fit(trainer, source, config)
    state = load(Path(config.output_dir) / "checkpoint-2", {"training": config.model_dump(mode="json")})
    assert same(state["weights"], {name: p.detach() for name, p in trainer.policy.named_trainable()})


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_with_steps_that_are_read_together(name: str, tmp_path: Path) -> None:
    """What tests/gpu runs where waiting is refused; that no loss waits, `tests/trainers/test_no_waiting.py` says."""
    losses = learn(name, tmp_path, 3)
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_several_steps_at_once_need_an_optimizer_that_can_be_stopped(start: Any, optimizer: str) -> None:
    with pytest.raises(ValueError, match="sync_steps: 4 steps at once need training.fused_optimizer=true"):
        fit(*start(sync_steps=4, fused_optimizer=False, optimizer=optimizer))


@pytest.mark.slow
@pytest.mark.parametrize("fused", [(False, True), (True, False)], ids=["to fused", "from fused"])
def test_a_resumed_run_computes_its_steps_as_it_was_told(start: Any, fused: tuple[bool, bool]) -> None:
    before, after = fused
    fit(*start(max_train_steps=4, checkpointing_steps=2, fused_optimizer=before))
    settings = {"fused_optimizer": after, "sync_steps": 2 if after else 1, "resume_from_checkpoint": "checkpoint-2"}
    trainer, source, config = start(max_train_steps=4, checkpointing_steps=2, **settings)
    run = loop._Run(
        trainer, source, config, {"training": config.model_dump(mode="json")}, loop.make_accelerator(config)
    )
    run.go(None)
    assert [bool(group["fused"]) for group in run.optimizer.param_groups] == [after]
    assert run.step == 4


@pytest.mark.slow
def test_finished_steps_are_logged_when_a_later_one_fails(start: Any) -> None:
    def fail(step: int, micro: int, batch: PairBatch) -> PairBatch:
        if step == 3:
            raise OSError("the disk is gone")
        return batch

    trainer, source, config = start(max_train_steps=8, fused_optimizer=True, sync_steps=8)
    with pytest.raises(OSError, match="the disk is gone"):
        fit(trainer, Changed(source, fail), config)
    assert column(config.output_dir, "step") == [1, 2, 3]
