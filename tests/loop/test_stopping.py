"""Stopping and going on: signals, resuming, refusals, full disks."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffalign.checkpoints import CheckpointError, CheckpointFolder
from diffalign.loop import fit
from tests.loop.results import column, rows, same, trained_file


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


@pytest.mark.slow
def test_a_finished_run_resumed_changes_nothing(start: Any) -> None:
    folder = fit(*start(max_train_steps=2, resume_from_checkpoint="latest"))
    before = trained_file(folder), rows(folder)
    (folder / "pytorch_lora_weights.safetensors").unlink()  # killed between its last checkpoint and its last file
    fit(*start(max_train_steps=2, resume_from_checkpoint="latest"))
    assert same(trained_file(folder), before[0])
    assert rows(folder) == before[1]


@pytest.mark.slow
def test_a_named_checkpoint_can_be_resumed(start: Any) -> None:
    folder = fit(*start(max_train_steps=3, checkpointing_steps=1))
    before = rows(folder)
    fit(*start(max_train_steps=3, checkpointing_steps=1, resume_from_checkpoint="checkpoint-2"))
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


@pytest.mark.slow
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


@pytest.mark.slow
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
