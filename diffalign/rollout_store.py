"""Rounds of rollouts on disk: `rollouts/round-000/` in a run's folder, one file of trajectories for each prompt.

A round is a function of the weights at its start, which a checkpoint in its middle does not hold any more; the round on
disk is what a killed run goes on with. It is also where people find images to label.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from diffalign.batches import Conditioning
from diffalign.checkpoints import CheckpointFolder
from diffalign.generation import INDEX_FILE
from diffalign.randomness import Draw
from diffalign.resumable import write_atomically
from diffalign.rollouts import Rollouts

__all__ = ["FOLDER", "RoundFolder", "drop_rounds", "fingerprint", "rounds_in_use"]

FOLDER = "rollouts"
"""Where a run keeps its rounds, in its output folder."""
_TRAJECTORIES = "trajectories"
_FACTS = "rollout"
_NAME = re.compile(r"^round-(\d+)$")


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """A hash of trained weights, as `Policy.trained_state` gives them."""
    return blake2b(save(dict(state)), digest_size=16).hexdigest()


class RoundFolder:
    """One round's folder.

    Args:
        root: The run's `rollouts` folder.
        number: Of the round, from 0.
        settings: What its trajectories depend on beside the weights, as JSON values; files of other settings are not
            read.
    """

    def __init__(self, root: Path, number: int, settings: Mapping[str, Any]) -> None:
        self.number, self.settings = number, dict(settings)
        self.path = root / f"round-{number:03d}"
        self._digest = blake2b(json.dumps(self.settings, sort_keys=True).encode(), digest_size=16).hexdigest()

    @property
    def index(self) -> Path:
        """Rows {prompt_id, prompt, id, image or video}; there when every image is."""
        return self.path / INDEX_FILE

    def image_id(self, group: int, image: int) -> str:
        """Name of an image: the round's number, its prompt's in the round, and its own among the prompt's."""
        return f"r{self.number}-{group:05d}-{image:02d}"

    def file(self, group: int) -> Path:
        """The trajectories of a prompt's images."""
        return self.path / _TRAJECTORIES / f"{group:05d}.safetensors"

    def write(self, group: int, rollouts: Rollouts, weights: str, scores: Tensor | None = None) -> None:
        """Writes the trajectories of one prompt, whole or not at all.

        Args:
            group: Number of the prompt in the round.
            rollouts: Of this prompt alone.
            weights: Fingerprint of what drew them.
            scores: Of the K images, NaN where one was dropped; None where people judge.
        """
        path = self.file(group)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"path": rollouts.path, "grid": rollouts.grid, "log_probs": rollouts.log_probs}
        tensors |= {f"conditioning.{name}": value for name, value in rollouts.conditioning.tensors.items()}
        tensors |= {f"unconditional.{name}": value for name, value in rollouts.unconditional.tensors.items()}
        if scores is not None:
            tensors["scores"] = scores
        draw = rollouts.draws[0]
        facts = {
            "settings": self._digest,
            "weights": weights,
            "prompt": rollouts.prompts[0],
            "draw": [draw.seed, draw.epoch, draw.pair_id],
        }
        # One entry: safetensors writes several in any order, and the same round should have the same bytes.
        packed = {_FACTS: json.dumps(facts)}
        write_atomically(path, save({name: value.contiguous() for name, value in tensors.items()}, packed))

    def weights(self, group: int) -> str | None:
        """Fingerprint of the weights that drew a prompt's images; None if there is no file of these settings."""
        try:
            facts = _facts(self.file(group))
        except ValueError:
            return None
        return facts.get("weights") if facts.get("settings") == self._digest else None

    def read(self, group: int) -> tuple[Rollouts, Tensor | None]:
        """What `write` was given; pages of the file are read when they are used.

        Raises:
            ValueError: If the file is missing, damaged, or of other settings.
        """
        path = self.file(group)
        facts = _facts(path)
        if facts.get("settings") != self._digest:
            raise ValueError(f"{path} was drawn with other settings; go back to those, or use another output_dir")
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        rollouts = Rollouts(
            prompts=(facts["prompt"],),
            draws=(Draw(*facts["draw"]),),
            conditioning=_named(tensors, "conditioning."),
            unconditional=_named(tensors, "unconditional."),
            path=tensors["path"],
            grid=tensors["grid"],
            log_probs=tensors["log_probs"],
        )
        return rollouts, tensors.get("scores")

    def read_all(self, groups: Iterable[int]) -> tuple[list[Rollouts], list[Tensor | None], str]:
        """Several prompts, and the fingerprint of the weights that drew them all.

        Raises:
            ValueError: If a file is missing, damaged, of other settings, or of other weights than the first.
        """
        groups = list(groups)
        found = [self.read(group) for group in groups]
        weights = {self.weights(group) for group in groups}
        if len(weights) != 1:
            raise ValueError(f"{self.path} holds images of {len(weights)} states of the weights; delete it and go back")
        return [rollouts for rollouts, _ in found], [scores for _, scores in found], str(weights.pop())


def rounds_in_use(output_dir: Path, steps_per_round: int) -> set[int]:
    """The rounds in whose middle a checkpoint of the run lies, which a resumed run will ask for."""
    steps = CheckpointFolder(output_dir).steps()
    return {step // steps_per_round for step in steps if step % steps_per_round}


def drop_rounds(root: Path, keep: set[int]) -> None:
    """Removes the rounds of a run but those."""
    for path in root.glob("round-*"):
        name = _NAME.match(path.name)
        if name and int(name.group(1)) not in keep:
            shutil.rmtree(path, ignore_errors=True)


def _facts(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            facts: dict[str, Any] = json.loads((file.metadata() or {}).get(_FACTS, "{}"))
            return facts
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); delete it") from error


def _named(tensors: Mapping[str, Tensor], prefix: str) -> Conditioning:
    return Conditioning(
        {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    )
