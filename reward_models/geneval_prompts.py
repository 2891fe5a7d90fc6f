"""GenEval's prompts with what their pictures must show, and the names of the detector's classes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffalign.reward_models.geneval_rules import Wanted
from diffalign.reward_models.published_texts import PublishedText, read_text

__all__ = ["LONG_METADATA", "METADATA", "OBJECT_NAMES", "by_prompt", "read_metadata", "read_names"]

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
