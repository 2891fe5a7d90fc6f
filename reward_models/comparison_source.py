"""Batches of comparisons for the training of reward models, and which comparisons are left out."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffalign.batches import Conditioning, PairBatch
from diffalign.data.compared import Comparison, ComparisonList, Comparisons
from diffalign.data.images import CorruptImageError
from diffalign.data.source import PairSource
from diffalign.helper_threads import helper_threads
from diffalign.processes import Processes
from diffalign.randomness import Draw
from diffalign.resumable import write_atomically
from diffalign.reward_models.media import InvalidMediaError
from diffalign.reward_models.trainable import Trainable

__all__ = ["ComparisonBatch", "ComparisonSource", "drop_bad"]

logger = logging.getLogger("diffalign")

_CHUNK = 256


@dataclass(frozen=True)
class ComparisonBatch(PairBatch):
    """B comparisons: `chosen` and `rejected` hold the first and the second pictures as the network reads them.

    Attributes:
        preference: Probability, or share of votes, with which the first is better, [B].
    """

    preference: Tensor

    def __len__(self) -> int:
        return len(self.draws)


class ComparisonSource(PairSource):
    """`PairSource` over comparisons: the same order, the same shares of processes, pictures read when they are due.

    Args:
        comparisons: What to learn from.
        trainable: Prepares pictures and prompts.
        by_prompt: Weigh a comparison with 1 / the number of comparisons of its prompt.
        workers: Threads that read pictures.
        options: Further arguments of `PairSource`.
    """

    def __init__(
        self,
        comparisons: Comparisons,
        trainable: Trainable,
        *,
        by_prompt: bool = False,
        workers: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(comparisons, **options)  # type: ignore[arg-type]  # which asks for names and number only
        self._comparisons, self._trainable = comparisons, trainable
        self._pool = helper_threads(workers, "pictures")
        self._counts: Counter[str] | None = None
        if by_prompt:
            self._counts = Counter(comparisons[row].prompt for row in range(len(comparisons)))

    def _assemble(self, visits: Sequence[tuple[int, Draw]], *, training: bool) -> ComparisonBatch:
        return self.gather([row for row, _ in visits], tuple(draw for _, draw in visits))

    def gather(self, rows: Sequence[int], draws: tuple[Draw, ...]) -> ComparisonBatch:
        """These comparisons as a batch on the CPU."""
        items = list(self._pool.map(self._comparisons.__getitem__, rows))
        pictures = [source for item in items for source in (item.first, item.second)]
        prepared = list(self._pool.map(lambda source: self._trainable.prepare(source.decode()), pictures))
        first, second, more = self._trainable.collate(prepared[::2], prepared[1::2])
        counts = [1 if self._counts is None else self._counts[item.prompt] for item in items]
        batch = ComparisonBatch(
            conditioning=Conditioning({**self._trainable.read_texts(items), **more}),
            chosen=first,
            rejected=second,
            weight=1 / torch.tensor(counts, dtype=torch.float32),
            draws=draws,
            preference=torch.tensor([item.preference for item in items], dtype=torch.float32),
        )
        return batch.pin_memory() if torch.cuda.is_available() else batch


def drop_bad(
    comparisons: ComparisonList, trainable: Trainable, record: Path, limit: float, workers: int, processes: Processes
) -> ComparisonList:
    """The comparisons without those of which a picture cannot be read, or which show the same picture twice.

    Every picture is looked at once, by all processes together; what was found is kept in `record`, so that a run that
    goes on does not look again. A picture that breaks later stops the run with the picture's name.

    Args:
        comparisons: All that there are.
        trainable: Says which pictures it cannot read.
        record: The file.
        limit: More unreadable ones than this fraction are an error.
        workers: Threads.
        processes: Who shares the work.

    Raises:
        ValueError: If there are too many, or nothing is left.
    """
    names = [item.pair_id for item in comparisons.items]
    key = hashlib.blake2b(json.dumps([comparisons.name, names]).encode(), digest_size=16).hexdigest()
    found = processes.on_first(lambda: _recorded(record, key))
    if found is None:
        mine = processes.share(comparisons.items)
        own: dict[str, str] = {}
        with (
            helper_threads(workers, "pictures") as pool,
            tqdm(total=len(mine), desc=processes.label("look at pictures"), unit="pair", disable=not processes.is_first)
            as bar,
        ):  # fmt: skip
            for start in range(0, len(mine), _CHUNK):
                part = mine[start : start + _CHUNK]
                problems = pool.map(lambda item: _problem(item, trainable), part)
                own |= {item.pair_id: problem for item, problem in zip(part, problems, strict=True) if problem}
                bar.update(len(part))
        found = {name: problem for part in processes.gather(own) for name, problem in part.items()}
        if processes.is_first:
            record.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(record, (json.dumps({"key": key, "dropped": found}, indent=2) + "\n").encode())
    kept = comparisons.without({name: reason.partition(":")[0] for name, reason in found.items()})
    unreadable = {name: reason for name, reason in found.items() if reason.startswith("unreadable")}
    if len(unreadable) > limit * len(comparisons):
        name, reason = next(iter(unreadable.items()))
        raise ValueError(
            f"{len(unreadable)} of {len(comparisons)} comparisons of {comparisons.name} have a picture that cannot be "
            f"read, such as {name!r} ({reason}); repair them or raise data.max_corrupt_fraction (now {limit:g})"
        )
    if not len(kept):
        raise ValueError(f"no comparison of {comparisons.name} is left: {kept.left_out}")
    if kept.left_out and processes.is_first:
        logger.info("%s: %d comparisons, left out: %s", kept.name, len(kept), kept.left_out)
    return kept


def _recorded(record: Path, key: str) -> dict[str, str] | None:
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        return dict(content["dropped"]) if content["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _problem(item: Comparison, trainable: Trainable) -> str | None:
    """Why a comparison cannot be learnt from, or None."""
    pictures = []
    for which, source in (("first", item.first), ("second", item.second)):
        try:
            image = source.decode()
            trainable.prepare(image)
        except (CorruptImageError, InvalidMediaError) as error:
            return f"unreadable: {which} picture: {error}"
        pictures.append((image.size, image.tobytes()))
    return "identical" if pictures[0] == pictures[1] else None
