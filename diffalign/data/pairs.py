"""Raw preference pairs, what was dropped while reading them, and the sets they come in."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

from diffalign.data.images import ImageSource

State = dict[str, Any]
"""Where a reader stands, as JSON."""

Verdict = Literal["keep", "tie", "unlabelled", "identical"]


@dataclass(frozen=True)
class Pair:
    """Two images or clips of one prompt, one of them preferred; nothing is decoded yet.

    Attributes:
        pair_id: The pair's name in its data set; stable over runs, it seeds every random draw.
        prompt: What both were made for.
        chosen: The preferred one (x^w).
        rejected: The other one (x^l); `chosen` itself in a set of winners.
        weight: Weight in the loss, >= 0.
        rewards: Numbers of `data.reward_columns`; those of `chosen` itself in a set of scored images.
    """

    pair_id: str
    prompt: str
    chosen: ImageSource
    rejected: ImageSource
    weight: float = 1.0
    rewards: tuple[float, ...] = ()


@dataclass(frozen=True)
class ReadReport:
    """What became of the rows: `rows` is the sum of all the others.

    Attributes:
        rows: Rows looked at.
        kept: Pairs that can be trained on.
        ties: Rows without a preference.
        unlabelled: Rows without a label or without a prompt.
        identical: Rows with the same picture twice, if these are dropped.
        corrupt: Names of the pairs with an unreadable image or clip; known once these have been decoded.
    """

    rows: int = 0
    kept: int = 0
    ties: int = 0
    unlabelled: int = 0
    identical: int = 0
    corrupt: tuple[str, ...] = ()

    @staticmethod
    def of(verdicts: Mapping[Verdict, int]) -> ReadReport:
        """The report on rows of which so many got each verdict."""
        return ReadReport(
            rows=sum(verdicts.values()),
            kept=verdicts.get("keep", 0),
            ties=verdicts.get("tie", 0),
            unlabelled=verdicts.get("unlabelled", 0),
            identical=verdicts.get("identical", 0),
        )

    def verdicts(self) -> dict[Verdict, int]:
        """How many rows got each verdict, while no image has been decoded."""
        return {"keep": self.kept, "tie": self.ties, "unlabelled": self.unlabelled, "identical": self.identical}

    def with_corrupt(self, pair_ids: Sequence[str]) -> ReadReport:
        """The report after some of the kept pairs turned out to be unreadable."""
        return replace(self, kept=self.kept - len(pair_ids), corrupt=(*self.corrupt, *pair_ids))

    def summary(self) -> str:
        """One line for a log."""
        dropped = {
            "ties": self.ties,
            "without label or prompt": self.unlabelled,
            "identical": self.identical,
            "with an unreadable image or clip": len(self.corrupt),
        }
        details = ", ".join(f"{count} {name}" for name, count in dropped.items() if count) or "none dropped"
        return f"{self.kept} pairs of {self.rows} rows ({details})"

    def to_json(self) -> State:
        """The counts as plain numbers and lists."""
        return {**asdict(self), "corrupt": list(self.corrupt)}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> ReadReport:
        """The report that `to_json` wrote."""
        return ReadReport(**{**values, "corrupt": tuple(values.get("corrupt", ()))})


class PairReader(Iterator[Pair], Protocol):
    """One pass over a set of pairs that can be taken up again later."""

    @property
    def report(self) -> ReadReport:
        """What became of the rows so far."""
        ...

    def skip(self, count: int) -> int:
        """Passes over the next pairs, as far as there are so many; gives their number."""
        ...

    def state(self) -> State:
        """What `PairSet.reader` needs to go on behind the last pair given out."""
        ...


class PairSet(ABC):
    """Preference pairs in a fixed order.

    Attributes:
        name: For messages: the data set or folder.
        fingerprint: A hash that changes whenever the pairs could be others.
        size: Number of pairs, None where it is not known before the end.
        winners_only: Whether nothing is known of rejected images, so that each pair's `rejected` is its `chosen`.
    """

    name: str
    fingerprint: str
    size: int | None
    winners_only: bool = False

    @abstractmethod
    def reader(self, state: State | None = None) -> PairReader:
        """A pass from the start, or from where another reader's `state` was taken."""

    @property
    @abstractmethod
    def report(self) -> ReadReport:
        """What became of the rows; of a stream, of those read in the latest pass."""

    def __iter__(self) -> Iterator[Pair]:
        return self.reader()


class PairList(PairSet):
    """Pairs that are already in memory.

    Raises:
        ValueError: If there is none, or if two share a name.
    """

    def __init__(self, pairs: Sequence[Pair], name: str = "list of pairs") -> None:
        refuse_duplicates([pair.pair_id for pair in pairs], name)
        if not pairs:
            raise ValueError(f"{name} is empty; expected at least one pair")
        self._pairs = tuple(pairs)
        self.name = name
        self.size = len(pairs)
        self.fingerprint = content_fingerprint(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, position: int) -> Pair:
        return self._pairs[position]

    @property
    def report(self) -> ReadReport:
        """All rows kept: a list has no ties."""
        return ReadReport(rows=len(self), kept=len(self))

    def reader(self, state: State | None = None) -> PairReader:
        """See `PairSet.reader`."""
        return PositionReader(self, state)


class _Indexed(Protocol):
    @property
    def report(self) -> ReadReport: ...

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> Pair: ...


class PositionReader(Iterator[Pair]):
    """A pass over pairs that can be asked for by position."""

    def __init__(self, pairs: _Indexed, state: State | None) -> None:
        self._pairs = pairs
        self._position = 0 if state is None else int(state["position"])

    def __next__(self) -> Pair:
        if self._position >= len(self._pairs):
            raise StopIteration
        pair = self._pairs[self._position]
        self._position += 1
        return pair

    @property
    def report(self) -> ReadReport:
        """That of the whole set: the rows were judged before the first pair was read."""
        return self._pairs.report

    def skip(self, count: int) -> int:
        """See `PairReader.skip`; reads nothing."""
        count = min(count, len(self._pairs) - self._position)
        self._position += count
        return count

    def state(self) -> State:
        """The position of the next pair."""
        return {"position": self._position}


def content_fingerprint(pairs: Iterable[Pair]) -> str:
    """A hash of names, prompts, weights and the images' own bytes; files may move without changing it."""
    total = hashlib.blake2b(digest_size=16)
    for pair in pairs:
        images = [pair.chosen] if pair.rejected is pair.chosen else [pair.chosen, pair.rejected]
        entry = [pair.pair_id, pair.prompt, pair.weight, *pair.rewards, *(image.digest() for image in images)]
        total.update(json.dumps(entry).encode() + b"\n")
    return total.hexdigest()


def refuse_duplicates(pair_ids: Iterable[str], name: str) -> None:
    """Raises ValueError if two pairs share a name: they would share every random draw."""
    seen: set[str] = set()
    for pair_id in pair_ids:
        if pair_id in seen:
            raise ValueError(f"{name} has two pairs with the id {pair_id!r}; expected each id once")
        seen.add(pair_id)
