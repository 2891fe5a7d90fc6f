"""Training runs in processes of their own, for tests that kill them or share them out; no test by itself.

`chains` forks a child per attempt; the attempts of a chain train in the same folder, one after another, until they are
killed, terminated or done. `together` is for processes that were started together: several runs of the same ones. Both
are called in a process of their own; see tests/forks.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from diffalign.backbones import LoRA, load_policy
from diffalign.config import TrainingConfig
from diffalign.data import DataConfig, PairSource, encode_pairs, load_pairs
from diffalign.loop import NonFiniteLossError, fit, make_accelerator
from diffalign.monitor import MetricsFile
from diffalign.trainers.diffusion_dpo import DiffusionDPO
from tests.forks import launcher_environment

torch.set_num_threads(1)

CHAIN: dict[str, Any] = {
    "max_train_steps": 10,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 3,
    "use_ema": True,
    "checkpointing_steps": 3,
    "checkpoints_total_limit": 2,
    "validation_steps": 4,
    "resume_from_checkpoint": "latest",
}
"""Settings of the runs that are killed: everything that has a state is in use."""


LOADED: dict[tuple[str, int | None, bool], Any] = {}
"""Policies that a parent has loaded for the children it forks; each child trains its own copy of the memory."""


def load(model: str, rank: int | None, double: bool) -> Any:
    """The policy that a run trains: adapters of a rank, or all weights if it is None."""
    policy: Any = load_policy(model, lora=LoRA(rank=rank) if rank else None, train=True)
    if double:
        for module in (policy.denoiser, policy._frozen):
            if module is not None:
                module.double()
    return policy


def shard(policy: Any) -> None:
    """FSDP2 by torch's own hand, which accelerate offers on accelerators only: every block by itself, then the rest."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for block in (*policy.denoiser.down_blocks, policy.denoiser.mid_block, *policy.denoiser.up_blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(policy.denoiser, mesh=mesh)


def train(
    model: str,
    data: str,
    cache: str,
    training: dict[str, Any],
    double: bool = False,
    hook: Any = None,
    rank: int | None = 2,
    sharded: bool = False,
    spoil: Any = None,
    accelerator: Any = None,
) -> Path:
    """A run on a folder of pairs, as `diffalign train` makes it."""
    config = TrainingConfig(**training)
    accelerator = accelerator or make_accelerator(config)
    policy: Any = LOADED.get((model, rank, double)) or load(model, rank, double)
    data_config = DataConfig(train_data_dir=Path(data))
    encoded = encode_pairs(load_pairs(data_config), policy, data_config, Path(cache))
    policy.free_encoders()
    if sharded:
        shard(policy)
    trainer = DiffusionDPO(policy, beta=500.0)
    source: Any = PairSource(
        encoded,
        seed=5,
        batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        caption_dropout=0.3,
    )
    if hook is not None:
        trainer.update = hook  # type: ignore[method-assign]
    fixed = source.fixed_batches(2)
    if spoil is not None:
        give = source.batch
        source.batch = lambda step, micro: spoil(step, give(step, micro))

    def validate(step: int) -> dict[str, float]:
        with torch.no_grad():
            outputs = [trainer.loss(batch.to(accelerator.device)) for batch in fixed]
        return {"loss": sum(float(output.loss) for output in outputs) / len(outputs)}

    done = fit(trainer, source, config, accelerator=accelerator, validate=validate)
    if accelerator.is_main_process:
        facts = {
            "num_processes": accelerator.num_processes,
            "wrapped": [kind.__name__ for kind in type(policy.wrapped).__mro__],
            "reference": [kind.__name__ for kind in type(policy._frozen).__mro__],
        }
        (done / "facts.json").write_text(json.dumps(facts))
    return done


def together(run: dict[str, Any], training: dict[str, Any], root: str) -> None:
    """Several runs of the processes that were started together, one after the other in `root/<name>`."""
    folder = Path(root)
    accelerator = make_accelerator(TrainingConfig(**training, output_dir=str(folder / "ddp"), report_to="tensorboard"))

    def one(name: str, options: dict[str, Any], **changed: Any) -> None:
        settings = {**training, **changed, "output_dir": str(folder / name)}
        train(**run, training=settings, accelerator=accelerator, **options)

    def spoil(step: int, batch: Any) -> Any:
        bad = step == 1 and accelerator.process_index == 1
        return dataclasses.replace(batch, chosen=batch.chosen * float("nan")) if bad else batch

    one("ddp", {})
    one("fsdp", {"sharded": True}, checkpointing_steps=2)
    one(
        "fsdp_resumed",
        {"sharded": True},
        checkpointing_steps=2,
        resume_from_checkpoint=str(folder / "fsdp" / "checkpoint-2"),
    )
    one("ddp_full", {"rank": None}, max_train_steps=2)
    one("fsdp_full", {"rank": None, "sharded": True}, max_train_steps=2)
    message = ""
    try:
        one("bad", {"spoil": spoil})
    except NonFiniteLossError as error:
        message = str(error)
    (folder / f"rank-{accelerator.process_index}.txt").write_text(message)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point: str, count: int) -> None:
    """Makes this process die at the `count`-th passage of a point in the writing of files."""
    left = [count]

    def now() -> bool:
        left[0] -= 1
        return left[0] == 0

    replace, rmtree, save, write = os.replace, shutil.rmtree, torch.save, MetricsFile.write

    def killing_replace(a: Any, b: Any) -> None:
        wanted = Path(b).name.startswith("metrics" if point == "rewinding metrics" else "checkpoint-")
        hit = wanted and now()
        if hit and point != "after rename":
            die()
        replace(a, b)
        if hit:
            die()

    def killing_rmtree(path: Any, *args: Any, **kwargs: Any) -> None:
        if (Path(path) / "config.json").exists() and now():
            (Path(path) / "state.pt").unlink()
            die()
        rmtree(path, *args, **kwargs)

    def killing_save(value: Any, file: Any) -> None:
        if now():
            file.write(b"half of a checkpoint")
            file.flush()
            die()
        save(value, file)

    def killing_write(self: MetricsFile, step: int, values: Any) -> None:
        write(self, step, values)
        if now():
            content = self.path.read_bytes()
            self.path.write_bytes(content[:-25])
            die()

    if point in ("before rename", "after rename", "rewinding metrics"):
        os.replace = killing_replace
    elif point == "removing an old one":
        shutil.rmtree = killing_rmtree  # type: ignore[assignment]
    elif point == "writing the state":
        torch.save = killing_save
    elif point == "writing metrics":
        MetricsFile.write = killing_write  # type: ignore[method-assign]
    else:
        raise ValueError(point)


def child(run: dict[str, Any], how: dict[str, Any], place: dict[str, str]) -> None:
    """One process of an attempt; never returns."""
    code = 1
    try:
        os.environ.update(place)
        main = place.get("RANK", "0") == "0"
        if "point" in how and main:
            arm(how["point"], how["count"])

        def hook(step: int) -> None:
            if step == how.get("terminate") and (main or how.get("anywhere", False)):
                os.kill(os.getpid(), signal.SIGTERM)

        train(**run, hook=hook)
        code = 0
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def attempt(run: dict[str, Any], how: dict[str, Any]) -> int:
    """One attempt of one or several processes; the status that `waitpid` gives for the first."""
    lines = Path(run["training"]["output_dir"]) / "metrics.jsonl"
    count = how.get("processes", 1)
    children = []
    for place in launcher_environment(count):
        pid = os.fork()
        if pid == 0:
            child(run, how, place)
        children.append(pid)
    status = killed_behind(lines, how["lines"], how["seconds"], children[0]) if "lines" in how else None
    if status is None:
        status = os.waitpid(children[0], 0)[1]
    for pid in children[1:]:
        if status:  # as the launcher does when one process is gone
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return status


def killed_behind(lines: Path, count: int, seconds: float, pid: int) -> int | None:
    """Kills a process so long after its metrics have so many lines; its status if it was done before."""
    while not lines.exists() or lines.read_bytes().count(b"\n") < count:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return None


def chains(run: dict[str, Any], root: str, attempts: dict[str, list[dict[str, Any]]], seed: int) -> None:
    """Trains in `root/<name>` for every named chain, and writes what became of the attempts to `root/statuses.json`.

    An attempt `{"lines": n}` is killed at a random moment: a few milliseconds after one of its first n lines.
    """
    generator = random.Random(seed)
    LOADED[run["model"], 2, False] = load(run["model"], 2, False)
    statuses: dict[str, list[int]] = {}
    for name, chain in attempts.items():
        here = {**run, "training": {**CHAIN, "output_dir": str(Path(root) / name)}}
        statuses[name] = []
        for how in chain:
            drawn: dict[str, Any] = {}
            if "lines" in how:
                drawn = {"lines": generator.randint(1, how["lines"]), "seconds": generator.uniform(0, 0.02)}
            statuses[name].append(attempt(here, {**how, **drawn}))
    (Path(root) / "statuses.json").write_text(json.dumps(statuses))
