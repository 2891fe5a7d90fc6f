"""Pairs inverted by a reference that does not move: once, at the levels of a grid, kept on disk with their provenance.

DDIM-InPO with the reference (arXiv:2503.18454) walks every pair from its clean latents to the visit's timestep. All
but the last move of that walk are the same at every visit, as long as the clean latents and the caption are: then
`Inversions` holds where the walk is at each level, and a visit starts from the level below its timestep.

So the clean latents are kept too. They are the posterior sample of the pair's first visit, at all later ones as well;
without the cache each visit draws another one. The caption of the inversion is the pair's own, dropped in the loss or
not. All pairs of the data are inverted before the first step, in files that do not depend on how many processes there
are; a run that was killed goes on at the first file that is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from diffalign.batches import Conditioning, PairBatch
from diffalign.devices import rounding
from diffalign.policy import Policy
from diffalign.processes import Processes, launched
from diffalign.randomness import Draw
from diffalign.references import INITIAL
from diffalign.resumable import claim_folder, write_atomically
from diffalign.schedules import DiscreteSchedule
from diffalign.sharding import refuse_sharded
from diffalign.transitions import at_least_float32
from diffalign.weight_hashes import hash_weights

if TYPE_CHECKING:
    from diffalign.data import EncodedPairs, PairSource

__all__ = ["Inversions", "InvertedPairs", "InvertedSource", "check_kind"]

PAIRS_PER_FILE = 16
"""At most so many are lost when a process is killed."""
FIRST_VISIT = 0
"""The epoch whose posterior sample is kept."""

Invert = Callable[[Tensor, Conditioning], Tensor]
"""Latents [N, C, ...] with N captions to where they are at every level of the grid, [N, L, C, ...]."""


@dataclass(frozen=True)
class InvertedPairs(PairBatch):
    """Pairs with the point of their inversion that a visit starts from.

    Attributes:
        start_chosen: Latents of the chosen images at the visit's level, [B, C, ...].
        start_rejected: Of the others, likewise.
        start_levels: That level, the last one of the grid below the visit's timestep, [B], on the CPU.
        captions: The prompts that both were inverted with, never dropped, B rows.
    """

    stays_on_cpu: ClassVar[frozenset[str]] = frozenset({"start_levels"})

    start_chosen: Tensor
    start_rejected: Tensor
    start_levels: Tensor
    captions: Conditioning

    def last_move(self, grid: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """What is left of the walk to `timesteps` [2B]: its latents, chosen first, [2B, C, ...], and levels [2, 2B].

        Raises:
            ValueError: If no walk along this grid passes the kept levels last: the pairs were inverted with other
                settings, or for another visit.
        """
        levels, expected = self.start_levels.cpu().repeat(2), grid[below(grid, timesteps)]
        if not torch.equal(levels, expected):
            raise ValueError(
                f"the batch was inverted to levels {self.start_levels.tolist()}, expected "
                f"{expected[: len(self)].tolist()}; take batches from trainer.source(pair_source, seed)"
            )
        starts = at_least_float32(torch.cat([self.start_chosen, self.start_rejected]))
        return starts, torch.stack([levels, timesteps.cpu()])


class Inversions:
    """Where both images of every pair are at the levels of a grid.

    Args:
        encoded: The pairs.
        grid: Rising levels, the first one that of clean latents; [L].
        seed: Of the run, which draws the clean latents.
        policy: Whose reference inverts. Its weights are still those of the reference: no step has been taken, and no
            checkpoint read.

    Raises:
        ValueError: If images are shown mirrored too, of which a pair has more than one clean latent.
    """

    def __init__(self, encoded: EncodedPairs, grid: Tensor, seed: int, policy: Policy) -> None:
        if encoded.flipped:
            raise ValueError(
                "trainer.cache_inversion keeps one inversion of an image, and data.random_flip shows it mirrored too; "
                "set one of them to false"
            )
        self.encoded, self.grid, self.policy, self._seed = encoded, grid, policy, seed
        self._settings: dict[str, Any] = {
            "reference": INITIAL,
            "weights": _fingerprint(policy),
            "grid": grid.tolist(),
            "seed": seed,
            "data": encoded.fingerprint,
        }
        self._rows = {encoded.pair_id(row): row for row in range(len(encoded))}
        self._folder: Path | None = None

    @torch.no_grad()
    def fill(
        self, step: int, folder: Path, invert: Invert, batch_size: int, processes: Processes | None = None
    ) -> None:
        """Inverts what is not there yet; every process calls it, and goes on when all files are there.

        Args:
            step: Optimizer steps done.
            folder: Of the files.
            invert: By the reference.
            batch_size: Pairs that are inverted at once, which changes the last digits.
            processes: Who shares the work; None takes those that the launcher started.

        Raises:
            ValueError: If the folder holds inversions of another origin, latents become infinite or not a number, or
                the weights are spread over processes.
        """
        refuse_sharded(self.policy.denoiser, "trainer.cache_inversion: each process inverts pairs", "false")
        processes = processes if processes is not None else launched()
        spent = self.policy.forwards
        self._folder, self._settings["batch_size"] = folder, batch_size
        self._settings |= rounding(self.policy.autocast)  # which the loop decides, after this object was made
        share = processes.share(processes.on_first(self._missing))
        total = sum(len(self._rows_in(number)) for number in share)
        hidden = not processes.is_first or not total
        with tqdm(total=total, desc=processes.label("invert"), unit="pair", disable=hidden, leave=False) as bar:
            for number in share:
                self._write(number, invert, batch_size, bar)
        processes.wait()
        # Counted before the first step, done now or by a process that was killed; later checkpoints know of them.
        passes = 2 * len(self.encoded) * (len(self.grid) - 1) // processes.count
        self.policy.forwards = spent + (passes if step == 0 else 0)

    def latents(self, pair_ids: Sequence[str], indices: Sequence[int]) -> Tensor:
        """Both images of B pairs at their own entries of the grid, chosen first: [2, B, C, ...], float32."""
        found = []
        for pair_id, index in zip(pair_ids, indices, strict=True):
            number, place = divmod(self._row(pair_id), PAIRS_PER_FILE)
            # Opened anew, which is cheap: a large set of pairs has more files than a process may hold open.
            with safe_open(self._path(number), framework="pt") as file:
                found.append(file.get_slice("latents")[place, :, index])
        return torch.stack(found, dim=1)

    def captions(self, pair_ids: Sequence[str]) -> Conditioning:
        """Embeddings of the prompts of B pairs, none dropped, B rows."""
        return self.encoded.conditioning([self._row(pair_id) for pair_id in pair_ids])

    def clean_latents(self, rows: Sequence[int]) -> Tensor:
        """The posterior sample of the first visit, of both images of B pairs: [2, B, C, ...], float32."""
        draws = [Draw(self._seed, FIRST_VISIT, self.encoded.pair_id(row)) for row in rows]
        halves = []
        for half, moments in zip(("chosen", "rejected"), self.encoded.moments(rows), strict=True):
            noise = torch.stack([draw.normal(f"posterior/{half}", moments.mean.shape[1:]) for draw in draws])
            halves.append(moments.mean + moments.std * noise)
        return torch.stack(halves)

    # --- files -------------------------------------------------------------------------------------------------------

    def _row(self, pair_id: str) -> int:
        if pair_id not in self._rows:
            raise ValueError(f"pair {pair_id!r} was not inverted; take batches from trainer.source(pair_source, seed)")
        return self._rows[pair_id]

    def _rows_in(self, number: int) -> range:
        start = number * PAIRS_PER_FILE
        return range(start, min(start + PAIRS_PER_FILE, len(self.encoded)))

    def _path(self, number: int) -> Path:
        if self._folder is None:
            raise ValueError("no pair was inverted yet; call trainer.begin as fit does before asking for a batch")
        return self._folder / f"{number:06d}.safetensors"

    def _header(self, number: int) -> str:
        """What a file says of itself, so that one from another folder is not taken for it."""
        pairs = [self.encoded.pair_id(row) for row in self._rows_in(number)]
        return json.dumps({"settings": self._settings, "pairs": pairs}, sort_keys=True)

    def _missing(self) -> list[int]:
        """The files that are not there; those that are must be of this origin."""
        first = self._path(0)
        claim_folder(first.parent, self._settings, made_here=(first.name,))
        return [number for number in range(-(-len(self.encoded) // PAIRS_PER_FILE)) if not self._is_there(number)]

    def _is_there(self, number: int) -> bool:
        path = self._path(number)
        if not path.is_file():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                header = (file.metadata() or {}).get("provenance")
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file ({error}); remove it") from error
        if header != self._header(number):
            raise ValueError(
                f"{path} holds inversions of other pairs or settings; remove {path.parent}, or choose another "
                "output_dir"
            )
        return True

    def _write(self, number: int, invert: Invert, batch_size: int, bar: tqdm[Any]) -> None:
        rows, parts = self._rows_in(number), []
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            both = self.clean_latents(batch).flatten(0, 1)
            states = invert(both, self.encoded.conditioning(batch).repeat(2)).float().cpu()
            parts.append(states.reshape(2, len(batch), *states.shape[1:]).transpose(0, 1))
            bar.update(len(batch))
        latents = torch.cat(parts).contiguous()  # [P, 2, L, C, ...]
        bad = (~latents.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"the inversion of pair {self.encoded.pair_id(rows[bad[0]])!r} is infinite or not a number; try "
                "training.mixed_precision=no, or leave the pair out"
            )
        write_atomically(self._path(number), save({"latents": latents}, metadata={"provenance": self._header(number)}))


class InvertedSource:
    """Batches for `fit`: pairs as their inversions have them, with the point that each visit starts from.

    Args:
        pairs: Which pair is visited when, and whether its caption is dropped in the loss.
        inversions: Of these pairs.
        timesteps_of: The timesteps [B] that the trainer draws for a batch.
    """

    def __init__(
        self, pairs: PairSource, inversions: Inversions, timesteps_of: Callable[[Sequence[Draw]], Tensor]
    ) -> None:
        self.pairs, self.inversions, self._timesteps_of = pairs, inversions, timesteps_of

    def batch(self, step: int, micro_step: int) -> InvertedPairs:
        """This process's pairs of one micro step; on the CPU."""
        batch, grid = self.pairs.batch(step, micro_step), self.inversions.grid
        names = [draw.pair_id for draw in batch.draws]
        indices = below(grid, self._timesteps_of(batch.draws))
        clean = self.inversions.latents(names, [0] * len(names))
        start = self.inversions.latents(names, indices.tolist())
        return InvertedPairs(
            **vars(replace(batch, chosen=clean[0], rejected=clean[1])),
            start_chosen=start[0],
            start_rejected=start[1],
            start_levels=grid[indices],
            captions=self.inversions.captions(names),
        )

    def update(self, step: int) -> None:
        """Nothing of its own: what was inverted does not follow the policy."""
        self.pairs.update(step)


def check_kind(batch: PairBatch, inverted: bool) -> None:
    """Refuses pairs that were inverted where they should not have been, or the other way round.

    Raises:
        TypeError: If they are of the wrong kind.
    """
    if isinstance(batch, InvertedPairs) != inverted:
        wanted = "InvertedPairs" if inverted else "pairs that were not inverted before"
        raise TypeError(
            f"with cache_inversion={str(inverted).lower()} InPO learns from {wanted}, got a {type(batch).__name__}; "
            "take batches from trainer.source(pair_source, seed)"
        )


def below(grid: Tensor, timesteps: Tensor) -> Tensor:
    """Index of the last level of a rising grid that is less than each of the timesteps, [B]."""
    return torch.searchsorted(grid, timesteps.cpu()) - 1


def _fingerprint(policy: Policy) -> str:
    """A hash of what a denoiser's answers and their meaning come from, bit by bit; one tensor after the other."""
    digest = hashlib.blake2b(policy.prediction.value.encode(), digest_size=16)
    assert isinstance(policy.schedule, DiscreteSchedule)  # as the trainer found
    denoiser, levels = policy.denoiser, torch.arange(len(policy.schedule))
    scales = zip(("alphas", "sigmas"), policy.schedule.scales(levels), strict=True)
    named = chain(denoiser.named_parameters(), denoiser.named_buffers(), scales)
    hash_weights(digest, ((f"{name} {t.dtype} {tuple(t.shape)}", t) for name, t in named), exact=True)
    return digest.hexdigest()
