"""T2I-CompBench's categories, their prompts, and which of them a detector with given classes can judge."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from diffalign.eval.t2i_compbench_rules import PERSONS, RENAMED
from diffalign.reward_models.published_texts import PublishedText, read_text

__all__ = [
    "ATTRIBUTES",
    "CATEGORIES",
    "DETECTED",
    "TEXTS",
    "Category",
    "detector_name",
    "find_category",
    "read_kinds",
    "read_lines",
    "read_vocabulary",
]

_HOME = "https://raw.githubusercontent.com/Karine-Huang/T2I-CompBench/1b70949/examples/dataset"
TEXTS: Mapping[str, PublishedText] = {
    name: PublishedText(f"{name}.txt", f"{_HOME}/{name}.txt", digest)
    for name, digest in (
        ("color_val", "1634259756dbc77d13093d907d414480080ec9790a8c97ad09efaea7b2534f2d"),
        ("shape_val", "37e1a276906c7ea9516cbd7ac8501be896006c0c17ca7344f260562834455bae"),
        ("texture_val", "fbb5363515b4a28009e360afaaaf389d2dd2289e50dbb0c6ef4ea0c7fe4f3d4f"),
        ("spatial_val", "8707a1d7e42ce3002d95363cf55f74bd043c843ae27108f5125aaaa7840ca988"),
        ("3d_spatial_val", "c9953597315f36a5fcb41291bb19bdc6ab5f64a0fa760d691b4854a73f5d1fe9"),
        ("numeracy_val", "dad8df141604b70ba7554bec724e3db0a80023680769b5c514854ea2d2527bbe"),
        ("non_spatial_val", "04c56cc9ac441dc9ea6c5157652058bd1635b5308526dd31bb29a1caab9a758d"),
        ("complex_val", "1b808018b8d9916db3d47d5aa2ef18377a3549a56901a474156f799824cdf3b4"),
        ("complex_val_action", "d49ee4c7f99e3f3379fb8704a54ff5288b83bb412971edf616a4721c2473308e"),
        ("complex_val_spatial", "6c7ac0ab75c7c9080cfc7b421fb059b9b0febb98471707aeedf58771088abc02"),
        ("new_objects", "f39a3d2ff6067d7738673cbf465dc659ccc750776162989a5d9916f1d5f3e231"),
    )
}

ATTRIBUTES = ("color", "shape", "texture")
OFFICIAL = (*ATTRIBUTES, "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")
DETECTED = ("spatial_m2f", "numeracy_m2f", "complex_m2f")
"""Judged by another detector than the original's, on the prompts whose things it knows: never the official scores."""
ELSEWHERE = ("spatial", "3d_spatial", "numeracy", "complex")
"""Only the original tool judges these; its results can be read."""
ALIASES: Mapping[str, str] = {
    "television": "tv",
    "sofa": "couch",
    "phone": "cell phone",
    "table": "dining table",
    **dict.fromkeys(PERSONS, "person"),
    **RENAMED,
}
"""Names in prompts -> those of COCO's classes."""


@dataclass(frozen=True)
class Category:
    """One category.

    Attributes:
        name: Such as "color" or "spatial_m2f".
        official: The published category whose prompts it takes.
    """

    name: str
    official: str

    @property
    def needs_detector(self) -> bool:
        """Whether our detector judges it."""
        return self.name in DETECTED


CATEGORIES: Mapping[str, Category] = {
    name: Category(name, name.removesuffix("_m2f")) for name in (*OFFICIAL, *DETECTED)
}


def find_category(name: str) -> Category:
    """A category by its name.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in CATEGORIES:
        raise ValueError(f"unknown category {name!r} (available: {', '.join(CATEGORIES)})")
    return CATEGORIES[name]


def read_lines(name: str, folder: str | Path | None = None, local_files_only: bool | None = None) -> list[str]:
    """The lines of one of `TEXTS`; arguments as in `published_texts.read_text`."""
    return [line.strip() for line in read_text(TEXTS[name], folder, local_files_only).split("\n") if line.strip()]


def read_kinds(folder: str | Path | None = None, local_files_only: bool | None = None) -> dict[str, str]:
    """Prompt of the category complex -> "spatial", "action" or "spatialaction".

    As in the released code, prompts are compared by their first sentence, in small letters, the list "spatial" comes
    first, and what is in neither list has all three parts.
    """
    lists = {
        kind: {_first_sentence(line) for line in read_lines(f"complex_val_{kind}", folder, local_files_only)}
        for kind in ("spatial", "action")
    }
    prompts = read_lines("complex_val", folder, local_files_only)
    return {
        prompt: next((kind for kind, known in lists.items() if _first_sentence(prompt) in known), "spatialaction")
        for prompt in prompts
    }


def read_vocabulary(folder: str | Path | None = None, local_files_only: bool | None = None) -> str:
    """The things that prompts of the category numeracy count, as published."""
    return read_text(TEXTS["new_objects"], folder, local_files_only)


def detector_name(thing: str, classes: Collection[str]) -> str | None:
    """The class of a thing in a prompt, or None if the detector has none for it."""
    name = thing if thing in classes else ALIASES.get(thing, thing)
    return name if name in classes else None


def _first_sentence(prompt: str) -> str:
    return prompt.split(".")[0].lower()
