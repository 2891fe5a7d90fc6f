"""Samples that a reference draws for the prompts of a training phase: drawn once, kept on disk, with their provenance.

Methods that compare a chosen image with what an earlier checkpoint makes of the same prompt (SePPO) need one sample for
each pair that a phase visits. `ReferenceSamples` draws them in latents, from the cached embeddings of the prompts, so
that neither text encoder nor autoencoder is needed, for images and videos alike.

A phase's list of samples is cut into files that do not depend on how many processes there are; each process draws its
share. A run that was killed goes on at the first file that is missing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from diffalign.batches import Conditioning, PairBatch
from diffalign.policy import Predictor
from diffalign.processes import Processes, launched
from diffalign.randomness import Draw
from diffalign.resumable import write_atomically
from diffalign.rollouts import DeterministicSampler

if TYPE_CHECKING:
    from diffalign.data import EncodedPairs

__all__ = ["Provenance", "ReferenceSamples", "SampledPairs"]

logger = logging.getLogger("diffalign")

SAMPLES_PER_FILE = 64
"""At most so many are lost when a process is killed."""
VIDEOS_PER_FILE = 8


@dataclass(frozen=True)
class SampledPairs(PairBatch):
    """Pairs whose rejected half was drawn by a reference.

    Attributes:
        reference: Name of the checkpoint that drew `rejected`.
        sample_draws: Where the samples' initial noise came from, with the pairs that they were drawn for, B entries.
    """

    reference: str
    sample_draws: tuple[Draw, ...]


@dataclass(frozen=True)
class Provenance:
    """Where the samples of a phase come from.

    Attributes:
        phase: Number of the phase, from 1.
        reference: Name of the checkpoint.
        weights: A hash of its weights.
        seed: Of the run.
        data: Fingerprint of the encoded pairs.
        num_inference_steps: Of the sampler.
        guidance_scale: Likewise.
        batch_size: Samples drawn at once, which changes the last digits.
    """

    phase: int
    reference: str
    weights: str
    seed: int
    data: str
    num_inference_steps: int
    guidance_scale: float
    batch_size: int

    def draw_of(self, pair_id: str) -> Draw:
        """Where the initial noise of a pair's sample comes from."""
        return Draw(self.seed, self.phase, pair_id)


class ReferenceSamples:
    """The samples of one phase, one for each pair that it visits.

    Args:
        folder: Of the phase's files.
        encoded: The pairs.
        rows: Which of them, each once, in the order of their first visit.
        provenance: Where samples come from; also how they are drawn.
    """

    def __init__(self, folder: Path, encoded: EncodedPairs, rows: Sequence[int], provenance: Provenance) -> None:
        self.folder, self.provenance = folder, provenance
        self._encoded, self._rows = encoded, list(rows)
        self._places: dict[str, tuple[Path, int]] = {}
        self._open: dict[Path, Any] = {}

    @torch.no_grad()
    def draw(self, sampler: DeterministicSampler, predictor: Predictor, processes: Processes | None = None) -> None:
        """Draws what is not there yet; every process calls it, and goes on when all samples are there.

        Args:
            sampler: Draws.
            predictor: The reference.
            processes: Who shares the work; None takes those that the launcher started.

        Raises:
            ValueError: If a file is there that was drawn otherwise.
        """
        processes = processes if processes is not None else launched()
        if processes.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
        size = VIDEOS_PER_FILE if sampler.policy.is_video else SAMPLES_PER_FILE
        files = [
            (self.folder / f"{number:05d}.safetensors", self._rows[start : start + size])
            for number, start in enumerate(range(0, len(self._rows), size))
        ]
        for path, rows in files:
            self._places |= {self._encoded.pair_id(row): (path, place) for place, row in enumerate(rows)}
        missing = processes.on_first(lambda: [number for number, file in enumerate(files) if not self._is_there(*file)])
        share = processes.share(missing)
        empty = sampler.policy.unconditional(self._encoded.empty_conditioning())
        label = f"phase {self.provenance.phase}: samples of {self.provenance.reference}"
        total = sum(len(files[number][1]) for number in share)
        hidden = not processes.is_first or not total
        with tqdm(total=total, desc=processes.label(label), unit="sample", disable=hidden, leave=False) as bar:
            for number in share:
                self._write(*files[number], sampler, predictor, empty, bar)
        processes.wait()
        self._open.clear()

    def latents(self, pair_ids: Sequence[str]) -> Tensor:
        """Samples of B pairs, [B, C, ...], float32.

        Raises:
            ValueError: If none was drawn for one of them.
        """
        rows = []
        for pair_id in pair_ids:
            if pair_id not in self._places:
                raise ValueError(f"no sample was drawn for pair {pair_id!r} in phase {self.provenance.phase}")
            path, place = self._places[pair_id]
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt")
            rows.append(self._open[path].get_slice("latents")[place : place + 1])
        return torch.cat(rows)

    # --- files -------------------------------------------------------------------------------------------------------

    def _header(self, rows: Sequence[int]) -> dict[str, Any]:
        return {**asdict(self.provenance), "pairs": [self._encoded.pair_id(row) for row in rows]}

    def _is_there(self, path: Path, rows: Sequence[int]) -> bool:
        """Whether a file holds the samples of these pairs.

        Weights of the checkpoint's name may have changed honestly: where arithmetic is not repeatable, a run that
        resumes before the phase gets there with other last digits. Its samples are drawn again.
        """
        if not path.is_file():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                found: dict[str, Any] = json.loads(file.metadata()["provenance"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no samples with a provenance; remove {self.folder}") from error
        expected = self._header(rows)
        wrong = [name for name in expected if found.get(name) != expected[name]]
        if wrong == ["weights"]:
            logger.warning("%s: the weights of %s are others now; drawn again", path, self.provenance.reference)
            return False
        if wrong:
            name = wrong[0]
            raise ValueError(
                f"the samples in {path} are of another origin: {name} {_short(found.get(name))}, expected "
                f"{_short(expected[name])}; remove {self.folder.parent}, or choose another output_dir"
            )
        return True

    def _write(
        self,
        path: Path,
        rows: Sequence[int],
        sampler: DeterministicSampler,
        predictor: Predictor,
        empty: Conditioning,
        bar: tqdm[Any],
    ) -> None:
        drawn, size = [], self.provenance.batch_size
        for start in range(0, len(rows), size):
            batch = list(rows[start : start + size])
            draws = [self.provenance.draw_of(self._encoded.pair_id(row)) for row in batch]
            drawn.append(sampler.draw(predictor, draws, self._encoded.conditioning(batch), empty))
            bar.update(len(batch))
        latents = torch.cat(drawn)
        bad = (~latents.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"{self.provenance.reference} draws values that are not finite for pair "
                f"{self._encoded.pair_id(rows[bad[0]])!r}; lower the learning rate or the guidance scale"
            )
        header = json.dumps(self._header(rows))
        write_atomically(path, save({"latents": latents}, metadata={"provenance": header}))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
