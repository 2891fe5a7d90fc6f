"""Several reward models as one: a weighted sum, each part with its own scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffalign.reward_models import load_reward_model, reward_model_info
from diffalign.reward_models.base import RewardInfo, RewardModel, Scores
from diffalign.reward_models.formulas import terms
from diffalign.reward_models.media import InvalidMediaError, Media, to_rgb

__all__ = ["Weighted", "Part", "combined_info", "read_parts", "shared_options"]


@dataclass(frozen=True)
class Part:
    """One summand: weight * clip((score - mean) / std, low, high).

    With the mean and deviation of a model's scores on some data set as constants this is its z-score there; any affine
    map can be written so, (score + 2) / 4 as `mean=-2, std=4`.

    Attributes:
        model: A reward model, or a name that `load_reward_model` knows.
        weight: Its weight; negative ones punish.
        dim: Which of its scores; None is the primary one.
        mean: Subtracted from the score.
        std: Divided by then, > 0.
        low: The least that counts, after these two; None for no bound.
        high: The most that counts; None for no bound.
        path: Of the weights, as in `load_reward_model`; only for a name.
        options: Further arguments of `load_reward_model`; only for a name.
    """

    model: RewardModel | str
    weight: float = 1.0
    dim: str | None = None
    mean: float = 0.0
    std: float = 1.0
    low: float | None = None
    high: float | None = None
    path: str | Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight) or not math.isfinite(self.mean):
            raise ValueError(f"weight and mean must be finite, got {self.weight} and {self.mean}")
        if not (self.std > 0 and math.isfinite(self.std)):
            raise ValueError(f"std must be positive, got {self.std}")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError(f"low must be less than high, got {self.low} and {self.high}")

    def transform(self, scores: Tensor) -> Tensor:
        """The scores on the scale on which they are weighted; NaN stays NaN."""
        scaled = (scores - self.mean) / self.std
        return scaled if self.low is None and self.high is None else scaled.clamp(self.low, self.high)

    def term(self, info: RewardInfo) -> str:
        """How a formula names it, without the weight."""
        return info.name if self.dim in (None, info.dims[-1]) else f"{info.name}[{self.dim}]"


class Weighted(RewardModel):
    """The weighted sum of several reward models; every part stays in `dims` under its name, on its own raw scale.

    `load_reward_model("hpsv2.1:0.7+pickscore:0.3")` is one. Scales differ much (PickScore about 22, HPSv2 0.28), so
    plain weights seldom mean what they say: give parts a `mean` and `std`, or see `group_zscore`.

    A medium that one part cannot score has no total, and the reason says which part. `compare` has the temperature 1,
    which was not fitted. Parts must read the same kind of medium; a picture is decoded once for all of them.
    """

    info = RewardInfo(name="weighted", license="those of its parts", weights=())
    parts: tuple[Part, ...]

    def __init__(
        self,
        path_or_id: str | Path | None = None,
        *,
        of: str | Sequence[Part | Mapping[str, Any]] = (),
        device: str | torch.device = "auto",
        dtype: torch.dtype | Literal["auto"] = "auto",
        local_files_only: bool | None = None,
    ):
        """Loads the parts.

        Args:
            path_or_id: Must be None: weights belong to parts.
            of: The parts: a formula such as "hpsv2.1:0.7+pickscore:0.3", or `Part`s, or dictionaries with the fields
                of one, as YAML gives them.
            device: Where those parts run that are given by name.
            dtype: Their type; "auto" is each one's own default.
            local_files_only: As in `RewardModel.from_pretrained`.

        Raises:
            ValueError: If there are no parts, or they do not go together.
            WeightsError: If the weights of a part cannot be loaded.
        """
        super().__init__()
        if path_or_id is not None:
            raise ValueError(f"{type(self).info.name} has no weights of its own: give parts a path, not {path_or_id!r}")
        parts = read_parts(of, type(self).info.name)
        for info in map(_info, parts):  # before any weights load
            _check_pointwise(info)
        settings = shared_options(device, dtype, local_files_only)
        # Two dimensions of one model are two parts, but one model.
        loaded: dict[tuple[Any, ...], RewardModel] = {}
        models: list[RewardModel] = []
        for part in parts:
            key = (part.model, str(part.path), repr(sorted(part.options.items())))
            if key not in loaded:
                loaded[key] = (
                    load_reward_model(part.model, path=part.path, **{**settings, **part.options})
                    if isinstance(part.model, str)
                    else part.model
                )
            models.append(loaded[key])
        self._numbers = [list(loaded.values()).index(model) for model in models]
        self.models = nn.ModuleList(loaded.values())
        self.parts = tuple(parts)
        infos = [model.info for model in models]
        self.names = [part.term(info) for part, info in zip(parts, infos, strict=True)]
        for part, info, name in zip(parts, infos, self.names, strict=True):
            _check_pointwise(info)
            if part.dim is not None and part.dim not in info.dims:
                raise ValueError(f"{info.name} has no dimension {part.dim!r} (available: {', '.join(info.dims)})")
            if self.names.count(name) > 1:
                raise ValueError(f"{name} is there twice; add its weights")
        self.info = self.combine(parts, infos)
        self.item_ndim = models[0].item_ndim
        if any(model.item_ndim != self.item_ndim for model in models):
            raise ValueError(f"{self.info.name} mixes models of pictures and of clips")
        self.train(False)

    @classmethod
    def describe(cls, of: str = "") -> RewardInfo:
        """The `info` of a formula, without loading anything; without one, what all sums have in common."""
        if not of:
            return cls.info
        parts = read_parts(of, cls.info.name)
        return cls.combine(parts, [_info(part) for part in parts])

    @classmethod
    def combine(cls, parts: Sequence[Part], infos: Sequence[RewardInfo]) -> RewardInfo:
        """The `info` of these parts together."""
        return combined_info(parts, infos)

    def preprocess(self, item: Media) -> tuple[Any, ...]:
        """See `RewardModel`: what each model reads."""
        decoded = to_rgb(item) if self.info.kind == {"image"} else item
        prepared = []
        for model in self._models():
            try:
                prepared.append(model.preprocess(decoded))
            except InvalidMediaError as error:
                raise InvalidMediaError(f"{model.info.name}: {error}") from error
        return tuple(prepared)

    def encode_text(self, prompts: Sequence[str], batch_size: int) -> list[tuple[Any, ...]]:
        """See `RewardModel`: for each prompt what each model made of it."""
        encoded = [model.encode_text(prompts, batch_size) for model in self._models()]
        return list(zip(*encoded, strict=True))

    def score_prepared(self, prepared: Sequence[tuple[Any, ...]], texts: Sequence[tuple[Any, ...]]) -> Scores:
        """See `RewardModel`."""
        found: list[Scores] = []
        for media, words in zip(zip(*prepared, strict=True), zip(*texts, strict=True), strict=True):
            model = self._models()[len(found)]
            scores = model.score_prepared(media, words)
            found.append(scores if isinstance(scores, Scores) else Scores(scores))
        columns: list[Tensor] = []
        errors: list[str | None] = [None] * len(prepared)
        for part, number, name in zip(self.parts, self._numbers, self.names, strict=True):
            model, scores = self._models()[number], found[number]
            column = scores.dims[part.dim or model.info.dims[-1]].detach().float().cpu()
            columns.append(column)
            for i, value in enumerate(column.isfinite().tolist()):
                reason = scores.errors[i] if scores.errors is not None else None
                if reason is None and not value:
                    reason = "the score is not finite"
                if reason is not None and errors[i] is None:
                    errors[i] = f"{name}: {reason}"
        return Scores({**dict(zip(self.names, columns, strict=True)), "overall": self._sum(columns)}, errors=errors)

    def score_tensor(self, pixels: Tensor, prompts: str | Sequence[str]) -> Tensor:
        """Totals [B] with a graph to `pixels` [B, 3, H, W]; only where every part is differentiable."""
        if not self.info.differentiable:
            return super().score_tensor(pixels, prompts)
        # A dimension of its own is never differentiable here, so that each part is a model.
        scores = [self._models()[number].score_tensor(pixels, prompts) for number in self._numbers]
        return self._sum([column.to(scores[0].device) for column in scores])

    def settings(self) -> dict[str, str]:
        """The parts with their constants, and the settings of their models."""
        said = {
            f"{i}": ", ".join(f"{n}={getattr(part, n)!r}" for n in ("weight", "mean", "std", "low", "high"))
            for i, part in enumerate(self.parts)
        }
        inner = {f"{i}.{key}": value for i, m in enumerate(self._models()) for key, value in m.settings().items()}
        return {**said, **inner, "names": repr(self.names)}

    def _sum(self, columns: Sequence[Tensor]) -> Tensor:
        terms = [part.weight * part.transform(column) for part, column in zip(self.parts, columns, strict=True)]
        return torch.stack(terms).sum(0)

    def _models(self) -> list[RewardModel]:
        return [model for model in self.models if isinstance(model, RewardModel)]


def combined_info(parts: Sequence[Part], infos: Sequence[RewardInfo]) -> RewardInfo:
    """What is known about a sum from what is known about its parts.

    Raises:
        ValueError: If no kind of medium suits all of them.
    """
    names = [part.term(info) for part, info in zip(parts, infos, strict=True)]
    kind = frozenset.intersection(*(info.kind for info in infos))
    if not kind:
        kinds = ", ".join(f"{info.name} scores {' or '.join(sorted(info.kind))}" for info in infos)
        raise ValueError(f"these do not go together: {kinds}")
    formula = "+".join(
        name + ("" if part.weight == 1 else f":{part.weight:.10g}") for name, part in zip(names, parts, strict=True)
    )
    whole = all(part.dim in (None, info.dims[-1]) for part, info in zip(parts, infos, strict=True))
    bounds = [_bounds(part, info) for part, info in zip(parts, infos, strict=True)]
    known = [b for b in bounds if b is not None]
    return RewardInfo(
        name=formula,
        license="; ".join(dict.fromkeys(info.license for info in infos)),
        weights=tuple(dict.fromkeys(spec for info in infos for spec in info.weights)),
        kind=kind,
        dims=(*names, "overall"),
        needs_prompt=any(info.needs_prompt for info in infos),
        differentiable=whole and all(info.differentiable for info in infos),
        generative=any(info.generative for info in infos),
        nominal_range=(sum(low for low, _ in known), sum(high for _, high in known)) if len(known) == len(bounds)
        else None,
        min_vram_gb=sum({info.name: info.min_vram_gb for info in infos}.values()),
    )  # fmt: skip


def _check_pointwise(info: RewardInfo) -> None:
    if info.pairwise_native or info.groupwise:
        raise ValueError(f"{info.name} gives no scores of single media, so it cannot be a part; see win_rate")


def _bounds(part: Part, info: RewardInfo) -> tuple[float, float] | None:
    if info.nominal_range is None or part.dim not in (None, info.dims[-1]):
        return None
    ends = sorted(part.weight * part.transform(torch.tensor(end, dtype=torch.float64)).item()
                  for end in info.nominal_range)  # fmt: skip
    return ends[0], ends[1]


def read_parts(of: str | Sequence[Part | Mapping[str, Any]], name: str) -> list[Part]:
    """The parts that a formula, or a list from Python or YAML, describes.

    Raises:
        ValueError: If there are none, or one cannot be read.
    """
    if isinstance(of, str) and of:
        return [Part(term.name, term.weight, term.dim) for term in terms(of)]
    if not of:
        raise ValueError(f"{name} needs parts: pass of='hpsv2.1:0.7+pickscore:0.3', or a list of them")
    known = {f.name for f in fields(Part)}
    parts = []
    for entry in of:
        if isinstance(entry, Mapping):
            unknown = sorted(set(entry) - known)
            if unknown or "model" not in entry:
                raise ValueError(
                    f"a part of {name} has the fields {sorted(known)}, model among them; got {dict(entry)}"
                )
            entry = Part(**entry)
        if not isinstance(entry, Part):
            raise ValueError(f"expected a Part or a dictionary as part of {name}, got {type(entry).__name__}")
        parts.append(entry)
    return parts


def shared_options(
    device: str | torch.device, dtype: torch.dtype | Literal["auto"], local_files_only: bool | None
) -> dict[str, Any]:
    """What a composed model passes on to the models inside it; defaults are left to each of them."""
    options: dict[str, Any] = {"device": device}
    options |= {} if dtype == "auto" else {"dtype": dtype}
    return options if local_files_only is None else {**options, "local_files_only": local_files_only}


def _info(part: Part) -> RewardInfo:
    """What is known about a part's model before it is loaded, under the name that was asked for."""
    return replace(reward_model_info(part.model), name=part.model) if isinstance(part.model, str) else part.model.info
