"""Runs that are killed and runs that are shared out, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.checkpoints import CheckpointFolder
from diffalign.data import EncodedPairs
from tests.forks import Forks
from tests.loop import runs
from tests.loop.results import MANDATORY, column, optimizer_state, rows, same, trained_file, weights_file


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_a_run_is_the_uninterrupted_one(
    tiny_pipeline: Path, pair_folder: Path, encoded: EncodedPairs, cache: Path, forks: Forks, tmp_path: Path
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
        "random": [{"lines": 4}, {"lines": 8}, {"lines": 12}, {}],
        "whole of two": [two],
        "killed of two": [
            {**two, "point": "writing the state", "count": 2},
            {**two, "terminate": 5, "anywhere": True},
            {**two, "point": "after rename", "count": 1},
            two,
        ],
    }
    forks.run(
        runs.chains,
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
    tiny_pipeline: Path, pair_folder: Path, encoded: EncodedPairs, cache: Path, forks: Forks, tmp_path: Path
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
    forks.run(runs.together, run=run, training=training, root=str(tmp_path), processes=2)
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
