"""What reward models there are, as `diffalign rewards` shows it; nothing is loaded or downloaded."""

from __future__ import annotations

import json
from dataclasses import dataclass

from diffalign.reward_models import reward_model_info, reward_model_names
from diffalign.reward_models.base import RewardInfo
from diffalign.reward_models.scoring_report import aligned
from diffalign.reward_models.wire import info_to_json

__all__ = ["CatalogueEntry", "catalogue", "render_catalogue", "render_json"]


@dataclass(frozen=True)
class CatalogueEntry:
    """One reward model.

    Attributes:
        name: For `load_reward_model` and `--reward`.
        variants: Further names, of its versions and variants.
        info: What is known about the default one.
    """

    name: str
    variants: tuple[str, ...]
    info: RewardInfo


def catalogue() -> list[CatalogueEntry]:
    """Every reward model of this package, by name."""
    return [
        CatalogueEntry(name, tuple(variants), reward_model_info(name))
        for name, variants in reward_model_names().items()
    ]


def render_catalogue(entries: list[CatalogueEntry]) -> str:
    """A table for people; below it the further names and where the weights are."""
    head = ("name", "kind", "dimensions", "licence", "memory", "differentiable", "generative")
    rows = [head]
    for entry in entries:
        info = entry.info
        rows.append(
            (
                entry.name,
                ", ".join(sorted(info.kind)),
                ", ".join(info.dims),
                info.license,
                f"{info.min_vram_gb:g} GB" if info.min_vram_gb else "-",
                "yes" if info.differentiable else "no",
                "yes" if info.generative else "no",
            )
        )
    weights = [(entry.name, _weights(entry.info)) for entry in entries]
    names = [(entry.name, ", ".join(entry.variants)) for entry in entries if entry.variants]
    parts = [aligned(rows, left=len(head)), "weights\n" + aligned(weights, left=2)]
    return "\n\n".join([*parts, "further names\n" + aligned(names, left=2)] if names else parts)


def render_json(entries: list[CatalogueEntry]) -> str:
    """The same for programs: a list of objects with every field of `RewardInfo`."""
    content = [info_to_json(e.info) | {"name": e.name, "variants": list(e.variants)} for e in entries]
    return json.dumps(content, indent=2, ensure_ascii=False)


def _weights(info: RewardInfo) -> str:
    """Where the published files are."""
    places = [f"{w.repo or w.url or 'in this package or local'}: {w.filename}" for w in info.weights]
    return "; ".join(dict.fromkeys(places)) or "none"
