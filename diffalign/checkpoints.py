"""Checkpoints of a run: written whole or not at all, kept in number, refused for another configuration."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors import SafetensorError

from diffalign.resumable import write_atomically

_NAME = re.compile(r"^checkpoint-(\d+)$")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or resumed; the message is for the user."""


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    write_atomically(path, text.encode("utf-8"))


WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""What a full disk looks like: torch.save reports its own RuntimeError, safetensors an error of another family."""


def write_problem(error: BaseException, folder: Path) -> str:
    """One line about a failed write: the operating system's own words if they are there, and the space left."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    reason = " ".join(str(cause or error).split())
    here = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return f"{reason} ({shutil.disk_usage(here).free / 1e6:.1f} MB free on this disk)"


class CheckpointFolder:
    """The checkpoints of one output folder, `checkpoint-<step>/`.

    Args:
        output_dir: The run's folder.
        total_limit: How many to keep; None keeps all.
    """

    def __init__(self, output_dir: Path, total_limit: int | None = None) -> None:
        self.output_dir = output_dir
        self.total_limit = total_limit

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, rising."""
        names = (_NAME.match(p.parent.name) for p in self.output_dir.glob("checkpoint-*/state.pt"))
        return sorted(int(m.group(1)) for m in names if m)

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.output_dir / f"checkpoint-{step}"

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        settings: Mapping[str, Any],
        save_weights: Callable[[Path], None],
    ) -> Path:
        """Writes a checkpoint under another name, renames it when it is complete, then drops the oldest.

        Args:
            step: Optimizer steps done.
            state: Everything to go on with, tensors included; read back by `load`.
            settings: The configuration it belongs to.
            save_weights: Writes the published weights into the folder it is given.

        Raises:
            CheckpointError: If the disk is full or not writable; earlier checkpoints stay as they were.
        """
        final = self.path(step)
        partial = final.with_name(final.name + ".partial")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            with (partial / "state.pt").open("wb") as file:
                torch.save(dict(state), file)
                file.flush()
                os.fsync(file.fileno())
            save_weights(partial)
            write_text(partial / "config.json", json.dumps(settings, indent=2, sort_keys=True) + "\n")
            _remove(final)
            os.replace(partial, final)
        except WRITE_ERRORS as error:
            problem = write_problem(error, self.output_dir)
            shutil.rmtree(partial, ignore_errors=True)
            kept = self.steps()
            last = f"the last good checkpoint is {self.path(kept[-1])}" if kept else "there is no earlier checkpoint"
            raise CheckpointError(f"could not save {final}: {problem}; {last}; free some space and resume") from error
        if self.total_limit is not None:
            for old in self.steps()[: -self.total_limit]:
                _remove(self.path(old))
        for rest in self.output_dir.glob("checkpoint-*.removed"):
            shutil.rmtree(rest, ignore_errors=True)
        return final

    def find(self, wanted: str) -> Path | None:
        """The checkpoint that `resume_from_checkpoint` means; None for "latest" in a new run.

        Raises:
            CheckpointError: If a named checkpoint does not exist.
        """
        if wanted == "latest":
            steps = self.steps()
            return self.path(steps[-1]) if steps else None
        for path in (Path(wanted), self.output_dir / wanted):
            if (path / "state.pt").is_file():
                return path
        found = ", ".join(f"checkpoint-{s}" for s in self.steps()) or "none"
        raise CheckpointError(f"resume_from_checkpoint: {wanted!r} is no checkpoint (in {self.output_dir}: {found})")


def _remove(folder: Path) -> None:
    """Takes a checkpoint's name away before its files: whoever is killed in between leaves no half of it behind."""
    if folder.exists():
        removed = folder.with_name(folder.name + ".removed")
        shutil.rmtree(removed, ignore_errors=True)
        os.replace(folder, removed)
        shutil.rmtree(removed)


FREE_TO_CHANGE = (
    "output_dir",
    "training.output_dir",
    "training.resume_from_checkpoint",
    "training.logging_steps",
    "training.sync_steps",
    "training.checkpointing_steps",
    "training.checkpoints_total_limit",
    "training.report_to",
    "training.validation_prompts",
    "training.reward_model",
    "training.validation_steps",
    "training.validation_draws",
    "evaluation",
    "sampling",
    "pairs",
    "data.check_source",
    "model.attention",
    "model.gradient_checkpointing",
    "model.torch_compile",
    "model.torch_compile_backend",
    "model.torch_compile_mode",
    "model.channels_last",
    "model.vae_slicing",
    "training.fused_optimizer",
    "training.cudnn_benchmark",
)
"""Settings that may differ when a run is resumed: they do not change the numbers of the steps to come, except for the
rounding of the fastest ones."""


def compare_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuses a checkpoint of another configuration.

    Raises:
        CheckpointError: If settings differ that change the steps to come; the message names them.
    """
    saved = json.loads((path / "config.json").read_text(encoding="utf-8"))
    old, new = flatten(saved), flatten(json.loads(json.dumps(settings)))
    old = {key: usual for key, usual in _usual_settings().items() if key in new} | old
    differing = [
        f"{key}: {old.get(key)!r} in the checkpoint, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not any(key == f or key.startswith(f + ".") for f in FREE_TO_CHANGE)
    ]
    if differing:
        raise CheckpointError(
            f"{path} belongs to another configuration ({'; '.join(differing)}); "
            "use the same settings, or another output_dir"
        )


def _usual_settings() -> dict[str, Any]:
    """What settings of the sections are that a checkpoint does not name: it was saved before there were any such."""
    from diffalign.config import ModelConfig, RewardConfig, TrainingConfig
    from diffalign.data import DataConfig
    from diffalign.rollout_config import RolloutConfig

    sections: dict[str, type[BaseModel]] = {
        "model": ModelConfig,
        "data": DataConfig,
        "training": TrainingConfig,
        "rollout": RolloutConfig,
        "reward": RewardConfig,
    }
    usual = {
        f"{section}.{name}": json.loads(json.dumps(field.get_default(call_default_factory=True), default=str))
        for section, schema in sections.items()
        for name, field in schema.model_fields.items()
        if not field.is_required()
    }
    return {key: part for name, value in usual.items() for key, part in flatten(value, name).items()}


def load(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Reads a checkpoint's state.

    Raises:
        CheckpointError: If it belongs to another configuration; the message names what differs.
    """
    compare_settings(path, settings)
    state: dict[str, Any] = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    return state


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of dotted keys."""
    if isinstance(value, dict):
        flat: dict[str, Any] = {}
        for key, item in value.items():
            flat |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: value}


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as trackers want them: one level, plain values."""
    flat = flatten(dict(settings))
    return {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in flat.items()}
