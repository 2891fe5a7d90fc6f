"""VBench's prompts: which video is asked for, under which dimensions it counts, and what its file is called."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.reward_models.base import WeightsError
from diffalign.reward_models.published_texts import PublishedText, read_text

__all__ = ["DIMENSIONS", "FULL_INFO", "QUALITY", "SEMANTIC", "Entry", "file_name", "read_entries", "read_entry_rows"]

QUALITY = (
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "motion_smoothness",
    "aesthetic_quality",
    "imaging_quality",
    "dynamic_degree",
)
SEMANTIC = (
    "object_class",
    "multiple_objects",
    "human_action",
    "color",
    "spatial_relationship",
    "scene",
    "appearance_style",
    "temporal_style",
    "overall_consistency",
)
DIMENSIONS = (*QUALITY, *SEMANTIC)
"""The 16 dimensions."""

FULL_INFO = PublishedText(
    "VBench_full_info.json",
    "https://raw.githubusercontent.com/Vchitect/VBench/45e79ec/vbench/VBench_full_info.json",
    "5dd2de80ee43cda750b2b72ea7023657c0b90d3702041c7e4608c65dbe50dccd",
)
"""The 946 rows of the benchmark: 944 prompts with their dimensions."""

LONGEST_NAME = 255
"""Bytes of a file name that common file systems take."""


@dataclass(frozen=True)
class Entry:
    """One prompt.

    Attributes:
        prompt: What the model is asked for.
        dimensions: Under which its videos count.
        auxiliary: What a dimension must know beyond the prompt, by dimension: a style, a colour, a pair of objects.
    """

    prompt: str
    dimensions: tuple[str, ...]
    auxiliary: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def read_entries(
    text: PublishedText = FULL_INFO, folder: str | Path | None = None, local_files_only: bool | None = None
) -> list[Entry]:
    """The prompts of the benchmark in the order of its file; the two that stand there twice come once.

    Args:
        text: The file.
        folder: Local folder with the file; None is the cache, or its home.
        local_files_only: Never ask the network; None follows HF_HUB_OFFLINE.

    Raises:
        WeightsError: If the file is not at hand or not the published one.
    """
    return read_entry_rows(json.loads(read_text(text, folder, local_files_only)))


def read_entry_rows(rows: Iterable[Mapping[str, Any]]) -> list[Entry]:
    """The prompts of rows as in the benchmark's file; rows of one prompt are joined.

    Raises:
        WeightsError: If a row has no prompt or names a dimension that does not exist.
    """
    entries: dict[str, Entry] = {}
    for number, row in enumerate(rows, start=1):
        try:
            prompt, dimensions, more = row["prompt_en"], tuple(row["dimension"]), dict(row.get("auxiliary_info", {}))
        except (KeyError, TypeError, ValueError) as error:
            raise WeightsError(
                f"row {number} is none of VBench's ({error!r}); expected prompt_en and dimension"
            ) from error
        unknown = [name for name in dimensions if name not in DIMENSIONS]
        if unknown or not isinstance(prompt, str):
            raise WeightsError(f"row {number}: unknown dimension {unknown[:1]} or prompt {prompt!r}")
        old = entries.get(prompt, Entry(prompt, ()))
        joined = tuple(dict.fromkeys((*old.dimensions, *dimensions)))
        entries[prompt] = Entry(prompt, joined, {**old.auxiliary, **more})
    return list(entries.values())


def file_name(prompt: str, sample: int, suffix: str = ".mp4") -> str:
    """What VBench calls the video of a prompt: `<prompt>-<sample>.mp4`.

    A prompt becomes a name as it is, which the original tool relies on; one that would leave its folder, or that no
    file system takes, is refused.

    Raises:
        ValueError: If the prompt cannot be a file's name.
    """
    name = f"{prompt}-{sample}{suffix}"
    if not prompt.strip() or any(c in "/\\" or ord(c) < 32 for c in prompt) or len(name.encode()) > LONGEST_NAME:
        raise ValueError(
            f"prompt {prompt[:60]!r} cannot be the name of a file, as VBench's layout wants it; expected no slash, no "
            f"control character and at most {LONGEST_NAME} bytes"
        )
    return name
