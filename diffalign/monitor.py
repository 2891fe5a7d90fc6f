"""metrics.jsonl, and the early warnings of a run that goes wrong."""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffalign.checkpoints import CheckpointError, write_problem, write_text

logger = logging.getLogger("diffalign")

SATURATED_GATE = 0.02
"""Mean gradient gate under which a pair loss has nothing left to teach."""
SATURATED_STEPS = 100
CHOSEN_ERROR_LIMIT = 1.10
"""Chosen error over the reference's beyond which likelihood is being displaced."""
CHOSEN_ERROR_WINDOW = 20
"""Steps over which the chosen errors are averaged, single steps being noisy."""
FLIPPED_RATE = 0.7
"""Share of samples that SePPO pulls in instead of pushing away, beyond which its loss has no counterweight."""
FLIPPED_STEPS = 100


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, always written, in step with the run when it is resumed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int) -> None:
        """Drops lines beyond `step` and a torn last line, which a killed run may have left."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if row["step"] <= step:
                kept.append(line)
        write_text(self.path, "".join(f"{line}\n" for line in kept))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line.

        Raises:
            CheckpointError: If the disk is full or not writable.
        """
        row = {"step": step, **{k: _finite(v) for k, v in values.items()}}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            problem = write_problem(error, self.path.parent)
            raise CheckpointError(f"could not write {self.path}: {problem}; free some space and resume") from error


def _finite(value: Any) -> Any:
    """JSON has no NaN: a number that is none becomes null, never zero."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class EarlyWarnings:
    """Watches the logs for a saturated loss, likelihood displacement and flipped samples; warns once for each.

    `state`/`restore` carry the counters through a checkpoint.
    """

    def __init__(self) -> None:
        self.saturated = 0
        self.flipped = 0
        self.ratios: deque[float] = deque(maxlen=CHOSEN_ERROR_WINDOW)
        self.given: set[str] = set()

    def observe(self, metrics: Mapping[str, float]) -> list[str]:
        """The warnings that this optimizer step's metrics call for; each kind at most once a run."""
        if "gate" in metrics:  # methods without pairs have no gate, those without a reference nothing to compare with
            self.saturated = self.saturated + 1 if metrics["gate"] < SATURATED_GATE else 0
        if "ref_error_chosen" in metrics:
            self.ratios.append(metrics["error_chosen"] / max(metrics["ref_error_chosen"], 1e-12))
        if "aaf_rate" in metrics:
            self.flipped = self.flipped + 1 if metrics["aaf_rate"] > FLIPPED_RATE else 0
        messages = {}
        if self.saturated >= SATURATED_STEPS:
            messages["saturation"] = (
                f"the loss is saturated: the mean gradient gate stayed below {SATURATED_GATE} for {SATURATED_STEPS} "
                "steps, so the pairs hardly move the model any more; stop here, or lower beta or the learning rate"
            )
        mean = sum(self.ratios) / max(len(self.ratios), 1)
        if len(self.ratios) == CHOSEN_ERROR_WINDOW and mean > CHOSEN_ERROR_LIMIT:
            messages["displacement"] = (
                f"the chosen error is {100 * (mean - 1):.0f} % above the reference's (mean of {CHOSEN_ERROR_WINDOW} "
                "steps): the model unlearns the preferred images too; lower the learning rate, raise beta, or stop"
            )
        if self.flipped >= FLIPPED_STEPS:
            messages["flipped"] = (
                f"the flipper counted more than {100 * FLIPPED_RATE:.0f} % of the samples as winners for "
                f"{FLIPPED_STEPS} steps (aaf_rate): almost nothing is pushed away any more; stop here, or lower the "
                "learning rate"
            )
        fresh = [text for kind, text in messages.items() if kind not in self.given]
        self.given |= messages.keys()
        for text in fresh:
            logger.warning(text)
        return fresh

    def state(self) -> dict[str, Any]:
        """The counters, for a checkpoint."""
        return {
            "saturated": self.saturated,
            "flipped": self.flipped,
            "ratios": list(self.ratios),
            "given": sorted(self.given),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Puts `state` back."""
        self.saturated = state["saturated"]
        self.flipped = state.get("flipped", 0)  # older checkpoints do not have it
        self.ratios = deque(state["ratios"], maxlen=CHOSEN_ERROR_WINDOW)
        self.given = set(state["given"])
