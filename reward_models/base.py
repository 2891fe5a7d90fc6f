"""The protocol of every reward model: what it is, how it is called, and what it returns.

A trainer sees `model(images, prompts) -> scores [B]` and nothing else. A model of a new kind (video, several
dimensions, a language model that answers questions) overrides three steps, `preprocess`, `encode_text` and
`score_prepared`; reading media, broadcasting prompts, batching, invalid input and pairs are shared.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from diffalign.helper_threads import helper_threads
from diffalign.reward_models.media import InvalidMediaError, Media, MediaBatch, as_list

__all__ = [
    "OnInvalid",
    "PairOutput",
    "RewardInfo",
    "RewardModel",
    "RewardOutput",
    "Scores",
    "WeightSpec",
    "WeightsError",
]

OnInvalid = Literal["raise", "nan"]


class WeightsError(RuntimeError):
    """Weights that are missing, damaged or of another model; the message says where they are published."""


@dataclass(frozen=True)
class WeightSpec:
    """One published file with weights.

    Attributes:
        repo: Hub id, or "" for weights that are not on the Hub.
        filename: File inside the repository.
        format: "safetensors", or "torch" for a pickle of tensors, read with `weights_only=True`.
        md5: Checksum as hexadecimal digits, where one is recorded.
        gated: Whether the repository asks for an account.
        url: Home of a file that is not on the Hub; "" if it has none.
    """

    repo: str
    filename: str
    format: Literal["safetensors", "torch"] = "safetensors"
    md5: str | None = None
    gated: bool = False
    url: str = ""


@dataclass(frozen=True)
class RewardInfo:
    """What is known about a reward model without loading its weights.

    Attributes:
        name: Unique name, also the key in result files; includes version and variant.
        license: License of the weights.
        weights: The published files.
        kind: What it scores, of "image", "video", "multiview".
        dims: Names of the scores it gives; the last one is the primary score.
        needs_prompt: Whether the score depends on the prompt.
        differentiable: Whether `score_tensor` carries gradients to the pixels.
        pairwise_native: Whether it judges pairs itself instead of scoring single media.
        generative: Whether the score is read from generated text.
        groupwise: Whether a score exists only among the media of one prompt in the same call, as a rank does; then
            the media of a prompt must not be split over several calls.
        higher_is_better: Direction of the primary score.
        nominal_range: Usual values of the primary score on generated pictures, if known.
        tau: Temperature of `compare`: p(a beats b) = sigmoid((score_a - score_b) / tau).
        min_vram_gb: Memory for weights and a small batch in float32.
    """

    name: str
    license: str
    weights: tuple[WeightSpec, ...]
    kind: frozenset[str] = frozenset({"image"})
    dims: tuple[str, ...] = ("overall",)
    needs_prompt: bool = True
    differentiable: bool = True
    pairwise_native: bool = False
    generative: bool = False
    groupwise: bool = False
    higher_is_better: bool = True
    nominal_range: tuple[float, float] | None = None
    tau: float = 1.0
    min_vram_gb: float = 0.0


@dataclass(frozen=True)
class RewardOutput:
    """Scores of N media, on the CPU.

    Attributes:
        score: Primary score, float32 [N], raw scale of the original; NaN (never 0) where `valid` is False.
        dims: Every score by name, each float32 [N].
        valid: Whether the medium could be read and scored, bool [N].
        errors: Why not, per medium; None for valid ones.
        uncertainty: Standard deviation of the score [N], for models that estimate one.
        raw: Generated text per medium, for generative models.
    """

    score: Tensor
    dims: dict[str, Tensor]
    valid: Tensor
    errors: tuple[str | None, ...]
    uncertainty: Tensor | None = None
    raw: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Scores:
    """What `score_prepared` gives for B media, where scores alone do not say everything.

    Attributes:
        dims: Scores by name, each [B]; NaN for an item that has none.
        uncertainty: Standard deviation of the primary score [B], for models that estimate one.
        raw: Generated texts [B], for models that answer in words.
        errors: Why an item has no score, such as an answer that cannot be read; None for the others.
    """

    dims: Mapping[str, Tensor]
    uncertainty: Tensor | None = None
    raw: Sequence[str] | None = None
    errors: Sequence[str | None] | None = None


@dataclass(frozen=True)
class PairOutput:
    """Judgement of N pairs, on the CPU.

    Attributes:
        p_a: Probability that the first medium is better, float32 [N]; NaN where `valid` is False.
        tie: Pairs with exactly equal scores, bool [N].
        valid: Pairs of which both media could be scored, bool [N].
    """

    p_a: Tensor
    tie: Tensor
    valid: Tensor


class RewardModel(nn.Module, ABC):
    """A frozen scorer of media. Larger scores are better, on the raw scale of the original.

    The module stays in evaluation mode and its parameters ask for no gradient, whatever it is nested in.

    Attributes:
        info: Static description; the class attribute describes the default version.
        item_ndim: Dimensions of one medium given as a tensor; one more makes it a batch.
        workers: Threads in which `score` preprocesses the media of a batch.
    """

    info: RewardInfo
    item_ndim: int = 3
    workers: int = 1

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path | None = None,
        *,
        device: str | torch.device = "auto",
        dtype: torch.dtype | Literal["auto"] = "auto",
        local_files_only: bool | None = None,
        **options: Any,
    ) -> Self:
        """The model with published weights; the same as calling the class.

        Args:
            path_or_id: Local folder (or file) in the published layout, or a Hub id; None for the original's id.
            device: Where it runs; "auto" is the first accelerator, else the CPU.
            dtype: Type of the towers; "auto" is float32. Scores are computed in float32 at least.
            local_files_only: Never ask the Hub; None follows HF_HUB_OFFLINE.
            options: Further arguments of the model's constructor.

        Raises:
            WeightsError: If weights or tokenizer cannot be loaded, in one line that says what was expected.
        """
        return cls(path_or_id, device=device, dtype=dtype, local_files_only=local_files_only, **options)

    @classmethod
    def describe(cls, *args: Any, **options: Any) -> RewardInfo:
        """What is known about the version or variant that these options of the constructor make, without its weights.

        Classes with versions name the options that matter; the others have one `info`.
        """
        return cls.info

    @abstractmethod
    def preprocess(self, item: Media) -> Any:
        """What the network reads for one medium. The only place that touches pixels on the way of `score`.

        Raises:
            InvalidMediaError: If the medium cannot be read.
        """

    @abstractmethod
    def score_prepared(self, prepared: Sequence[Any], texts: Sequence[Any]) -> Mapping[str, Tensor] | Scores:
        """Scores by dimension, each [B], of B preprocessed media and their B encoded prompts; or these and more."""

    def encode_text(self, prompts: Sequence[str], batch_size: int) -> Sequence[Any] | Tensor:
        """What `score_prepared` needs of each prompt, one entry per prompt; called once with unique prompts."""
        return list(prompts)

    @torch.no_grad()
    def score(
        self,
        media: MediaBatch,
        prompts: str | Sequence[str] | None = None,
        *,
        batch_size: int = 32,
        on_invalid: OnInvalid = "raise",
    ) -> RewardOutput:
        """Scores of media of any accepted kind, without gradient.

        Each medium is a PIL image, a path, an array [H, W, 3] or a tensor [3, H, W]; arrays and tensors hold uint8
        or floats in [0, 1]. See `media.to_rgb` for alpha, palettes and CMYK. A tensor [N, 3, H, W] is a batch of N.
        For models of clips (`item_ndim` 4) each is a video file, a `media.Video`, a tensor [T, 3, H, W], an array
        [T, H, W, 3] or a list of pictures; see `media.as_list`.
        Media are read batch by batch, equal prompts are encoded once, and a score does not depend on the others in its
        batch (beyond rounding in the last float32 digits).

        Args:
            media: One medium or N of them.
            prompts: One prompt for all media, or N prompts.
            batch_size: How many media pass the network at once, >= 1.
            on_invalid: "raise" on a medium that cannot be scored, or "nan": give it NaN and say why in `errors`.

        Raises:
            InvalidMediaError: With "raise", on the first medium that cannot be scored.
            ValueError: If prompts are missing, or neither one nor as many as the media.
        """
        items = as_list(media, self.item_ndim)
        unique, rows = self._texts(prompts, len(items))
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if on_invalid not in ("raise", "nan"):
            raise ValueError(f"on_invalid must be 'raise' or 'nan', got {on_invalid!r}")
        encoded = self.encode_text(unique, batch_size) if items else []
        dims = {name: torch.full((len(items),), float("nan")) for name in self.info.dims}
        errors: list[str | None] = [None] * len(items)
        uncertainty: Tensor | None = None
        raw: list[str] | None = None
        for start in range(0, len(items), batch_size):
            good, prepared = self._prepare(items, range(start, min(start + batch_size, len(items))), errors, on_invalid)
            if not good:
                continue
            found = self.score_prepared(prepared, [encoded[rows[i]] for i in good])
            found = found if isinstance(found, Scores) else Scores(found)
            for name, values in found.dims.items():
                dims[name][good] = values.detach().float().cpu()
            if found.uncertainty is not None:
                uncertainty = torch.full((len(items),), float("nan")) if uncertainty is None else uncertainty
                uncertainty[good] = found.uncertainty.detach().float().cpu()
            for i, answer in zip(good, found.raw or (), strict=found.raw is not None):
                raw = [""] * len(items) if raw is None else raw
                raw[i] = answer
            for i, reason in zip(good, found.errors or (), strict=found.errors is not None):
                errors[i] = None if reason is None else f"medium {i}: {reason}"
        primary = dims[self.info.dims[-1]]
        for i, value in enumerate(primary.isfinite().tolist()):
            if not value and errors[i] is None:
                errors[i] = f"medium {i}: {self.info.name} gave a score that is not finite"
            if on_invalid == "raise" and errors[i] is not None:
                raise InvalidMediaError(errors[i])
        valid = torch.tensor([e is None for e in errors], dtype=torch.bool)
        dims = {name: values.masked_fill(~valid, float("nan")) for name, values in dims.items()}
        if uncertainty is not None:
            uncertainty = uncertainty.masked_fill(~valid, float("nan"))
        answers = None if raw is None else tuple(raw)
        return RewardOutput(dims[self.info.dims[-1]], dims, valid, tuple(errors), uncertainty, answers)

    def forward(self, images: MediaBatch, prompts: str | Sequence[str]) -> Tensor:
        """Primary scores [B], float32 on the CPU, without gradient: all that a trainer sees.

        For gradients to the pixels call `score_tensor`. Arguments and errors as in `score`.
        """
        return self.score(images, prompts).score

    def score_tensor(self, pixels: Tensor, prompts: str | Sequence[str]) -> Tensor:
        """Scores [B] with a graph to `pixels`; only differentiable models have it."""
        raise NotImplementedError(f"{self.info.name} has no gradient path to the pixels; use score()")

    def score_matrix(
        self, media: MediaBatch, prompts: Sequence[str], *, batch_size: int = 32, on_invalid: OnInvalid = "raise"
    ) -> Tensor:
        """Scores [M, N] of every medium with every prompt; only dual encoders have it."""
        raise NotImplementedError(f"{self.info.name} is no dual encoder; call score() on the pairs you need")

    def compare(
        self,
        a: MediaBatch,
        b: MediaBatch,
        prompts: str | Sequence[str],
        *,
        batch_size: int = 32,
        on_invalid: OnInvalid = "raise",
    ) -> PairOutput:
        """Probability that each `a` is better than the `b` beside it: sigmoid((score_a - score_b) / info.tau).

        This is the Bradley-Terry probability (Bradley & Terry 1952) at the temperature the model was trained with.
        Swapping a and b gives one minus the result.

        Raises:
            ValueError: If there are not as many `a` as `b`; otherwise as in `score`.
        """
        first, second = as_list(a, self.item_ndim), as_list(b, self.item_ndim)
        if len(first) != len(second):
            raise ValueError(f"compare needs as many a as b, got {len(first)} and {len(second)}")
        texts = broadcast(prompts, len(first))
        both = self.score([*first, *second], [*texts, *texts], batch_size=batch_size, on_invalid=on_invalid)
        score_a, score_b = both.score.chunk(2) if first else (both.score, both.score)
        sign = 1.0 if self.info.higher_is_better else -1.0
        deviation = None
        if both.uncertainty is not None and first:
            deviation = torch.hypot(*both.uncertainty.chunk(2))
        return PairOutput(
            p_a=self._preference(sign * (score_a - score_b), deviation),
            tie=score_a == score_b,
            valid=score_a.isfinite() & score_b.isfinite(),
        )

    def _preference(self, difference: Tensor, deviation: Tensor | None) -> Tensor:
        """Probability [N] that the first is better, from score differences and their standard deviations, if known."""
        return torch.sigmoid(difference / self.info.tau)

    def settings(self) -> dict[str, str]:
        """Options beside the weights that change the score, for `fingerprint`."""
        return {}

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when the weights or the settings do."""
        digest = sha256(repr((self.info.name, sorted(self.settings().items()))).encode())
        for name, tensor in sorted(self.state_dict().items()):
            flat = tensor.detach().double().flatten()
            # The second moment is weighted by position, so that swapping two rows is seen as well.
            weights = torch.linspace(1, 2, len(flat), dtype=torch.float64, device=flat.device)
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(f"{flat.sum().item():.9e}{(flat.square() * weights).sum().item():.9e}".encode())
        return digest.hexdigest()[:16]

    def train(self, mode: bool = True) -> Self:
        """Does nothing: a reward model never leaves evaluation mode."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Where the parameters are; the CPU for a model without any."""
        first = next(self.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    def _texts(self, prompts: str | Sequence[str] | None, count: int) -> tuple[list[str], list[int]]:
        """Unique prompts in order of appearance, and for each of `count` media the number of its prompt."""
        if prompts is None:
            if self.info.needs_prompt:
                raise ValueError(f"{self.info.name} needs prompts: pass one for all media, or one for each")
            prompts = ""
        texts = broadcast(prompts, count)
        unique = list(dict.fromkeys(texts))
        position = {text: i for i, text in enumerate(unique)}
        return unique, [position[text] for text in texts]

    def _prepare(
        self, items: Sequence[Media], rows: range, errors: list[str | None], on_invalid: OnInvalid
    ) -> tuple[list[int], list[Any]]:
        """The rows that could be preprocessed and what came of them; reasons for the others go into `errors`."""
        good, prepared = [], []
        with ExitStack() as stack:
            # One worker is this thread itself, which does not go on after the first failure.
            run = stack.enter_context(helper_threads(self.workers, "pictures")).map if self.workers > 1 else map
            for i, found in zip(rows, run(self._attempt, [items[i] for i in rows]), strict=True):
                if not isinstance(found, InvalidMediaError):
                    prepared.append(found)
                    good.append(i)
                    continue
                errors[i] = f"medium {i}: {found}"
                if on_invalid == "raise":
                    raise InvalidMediaError(errors[i]) from found
        return good, prepared

    def _attempt(self, item: Media) -> Any:
        """What came of a medium, or why nothing did."""
        try:
            return self.preprocess(item)
        except InvalidMediaError as error:
            return error


def broadcast(prompts: str | Sequence[str], count: int) -> list[str]:
    """`count` prompts: one prompt is repeated, `count` prompts are kept, anything else is an error."""
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"prompts must be strings, got {type(text).__name__}: {text!r:.80}")
    if len(texts) == 1:
        return texts * count
    if len(texts) != count:
        raise ValueError(f"got {len(texts)} prompts for {count} media; pass one prompt, or one for each")
    return texts
