"""GenEval's prompts with what their pictures must show, and the names of the detector's classes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from diffalign.reward_models.published_texts import PublishedText, read_text

__all__ = [
    "COLORS",
    "LONG_METADATA",
    "METADATA",
    "OBJECT_NAMES",
    "RELATIONS",
    "TAGS",
    "Clause",
    "Wanted",
    "by_prompt",
    "read_metadata",
    "read_names",
]

_HOME = "https://raw.githubusercontent.com/djghosh13/geneval/af4902f"
METADATA = PublishedText(
    "evaluation_metadata.jsonl",
    f"{_HOME}/prompts/evaluation_metadata.jsonl",
    "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
)
"""The 553 prompts of the benchmark."""
LONG_METADATA = PublishedText(
    "evaluation_metadata_long_rewritten.jsonl",
    "https://raw.githubusercontent.com/PKU-YuanGroup/UniWorld-V1/main/univa/eval/geneval/eval_prompts/"
    "evaluation_metadata_long_rewritten.jsonl",
    "b14d4a8043104114ff5b03636fb55180cb0a545819c6e7a9589c2cc84451159d",
)
"""The same rows with prompts that a language model made longer. Its revision was not recorded; the checksum pins it."""
OBJECT_NAMES = PublishedText(
    "object_names.txt",
    f"{_HOME}/evaluation/object_names.txt",
    "608f6a0e5c8ca1c7a92b818430141fe268c85b7930b50f4160f1d65893b5bacd",
)
"""The 80 classes of COCO in the detector's order; three have other names than COCO's, so numbers count, not names."""


TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""The six tasks, in the order in which papers print them."""
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Clause:
    """One thing that a prompt asks for, or, among the excluded, one that must not be there.

    Attributes:
        name: Class of the objects.
        count: How many; of excluded ones the number from which on there are too many.
        color: Colour of all of them, or None.
        position: Relation to the objects of an earlier clause, and the number of that clause; or None.
    """

    name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Wanted:
    """A prompt and what its picture must show: one row of GenEval's metadata.

    Attributes:
        tag: Task, usually one of `TAGS`; "counting" has another threshold.
        prompt: The text.
        include: What must be there.
        exclude: What must not.
    """

    tag: str
    prompt: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Self:
        """From a metadata row.

        Raises:
            ValueError: If a field is missing or of another form.
        """
        lacking = [name for name in ("tag", "prompt", "include") if name not in row]
        if lacking:
            raise ValueError(f"a GenEval row needs tag, prompt and include; found no {', '.join(lacking)}")
        if not isinstance(row["tag"], str) or not isinstance(row["prompt"], str):
            raise ValueError(f"tag and prompt must be texts, found {row['tag']!r:.60} and {row['prompt']!r:.60}")
        include, exclude = (_clauses(row.get(name, []), name) for name in ("include", "exclude"))
        return cls(row["tag"], row["prompt"], include, exclude)

    def to_dict(self) -> dict[str, Any]:
        """The metadata row again, with its fields in the original's order."""
        row: dict[str, Any] = {"tag": self.tag, "include": [_clause_dict(clause) for clause in self.include]}
        if self.exclude:
            row["exclude"] = [_clause_dict(clause) for clause in self.exclude]
        return row | {"prompt": self.prompt}


def read_names(folder: str | Path | None = None, local_files_only: bool | None = None) -> tuple[str, ...]:
    """The class names by number; arguments and errors as in `published_texts.read_text`."""
    return tuple(read_text(OBJECT_NAMES, folder, local_files_only).split("\n")[:-1])


def read_metadata(
    source: PublishedText | str | Path = METADATA,
    names: Sequence[str] = (),
    folder: str | Path | None = None,
    local_files_only: bool | None = None,
) -> list[Wanted]:
    """The rows of a metadata file in its order.

    Args:
        source: A published file, or the path of another one in its format, JSON lines.
        names: Class names; a clause with another one is refused. Empty allows all.
        folder: As in `published_texts.read_text`, for published files.
        local_files_only: Likewise.

    Raises:
        ValueError: If the file is missing, empty or malformed; the message names file and line.
        WeightsError: If a published file is not at hand or not byte for byte the published one.
    """
    if isinstance(source, PublishedText):
        text, where = read_text(source, folder, local_files_only), source.filename
    else:
        where = str(source)
        if not Path(source).is_file():
            raise ValueError(f"there is no file {where!r}; expected GenEval metadata, JSON lines with tag and include")
        text = Path(source).read_text(encoding="utf-8")
    wanted = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"expected a JSON object, found {line[:60]!r}")
            wanted.append(Wanted.from_dict(row))
        except ValueError as error:
            raise ValueError(f"{where}, line {number}: {error}") from error
        for clause in (*wanted[-1].include, *wanted[-1].exclude):
            if names and clause.name not in names:
                raise ValueError(f"{where}, line {number}: the detector knows no class {clause.name!r}")
    if not wanted:
        raise ValueError(f"{where} is empty; expected GenEval metadata, JSON lines with tag and include")
    return wanted


def by_prompt(rows: Sequence[Wanted]) -> Mapping[str, Wanted]:
    """The rows by their prompt; equal rows count once.

    Raises:
        ValueError: If two rows of one prompt ask for different things.
    """
    found: dict[str, Wanted] = {}
    for row in rows:
        if found.setdefault(row.prompt, row) != row:
            raise ValueError(f"two rows with prompt {row.prompt!r} ask for different things")
    return found


def _clauses(rows: Any, what: str) -> tuple[Clause, ...]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{what} must be a list of clauses, found {rows!r:.80}")
    return tuple(_clause(row, number) for number, row in enumerate(rows))


def _clause(row: Mapping[str, Any], number: int) -> Clause:
    """A clause that comes after `number` others, which alone a position may point to."""
    name, count, color, position = (row.get(key) for key in ("class", "count", "color", "position"))
    if not isinstance(name, str) or type(count) is not int or count < 1:
        raise ValueError(f"a clause needs a class and a count of at least 1, found {dict(row)}")
    if color is not None and color not in COLORS:
        raise ValueError(f"unknown colour {color!r} in a clause (available: {', '.join(COLORS)})")
    if position is None:
        return Clause(name, count, color)
    if not (isinstance(position, list) and len(position) == 2 and position[0] in RELATIONS
            and type(position[1]) is int and 0 <= position[1] < number):  # fmt: skip
        raise ValueError(
            f"a position must be [relation, number of an earlier clause], found {position!r} in clause {number}"
        )
    return Clause(name, count, color, (position[0], position[1]))


def _clause_dict(clause: Clause) -> dict[str, Any]:
    row: dict[str, Any] = {"class": clause.name, "count": clause.count}
    if clause.color is not None:
        row["color"] = clause.color
    if clause.position is not None:
        row["position"] = list(clause.position)
    return row
