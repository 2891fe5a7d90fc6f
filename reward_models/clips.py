"""Clips scored by any image model: its scores of evenly spaced frames, averaged, the worst of them, or the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.reward_models.base import RewardInfo, RewardModel, Scores, WeightSpec
from diffalign.reward_models.media import InvalidMediaError, Media, read_clip

__all__ = ["FrameByFrame"]

Frames = Literal["mean", "min", "last"]


class FrameByFrame(RewardModel):
    """What an image model thinks of a clip's frames; it sees no motion.

    `frames` says which frames and how they become one number: "mean" and "min" look at `num_frames` evenly spaced ones
    from the first to the last, "last" at the last one, an integer k is the mean of k. A shorter clip gives all of its
    frames. Every dimension is treated alike; estimates of uncertainty are dropped.
    """

    info = RewardInfo(
        name="clips",
        license="that of the image model",
        weights=(WeightSpec("yuvalkirstain/PickScore_v1", "model.safetensors"),),
        kind=frozenset({"video"}),
    )
    item_ndim = 4

    def __init__(
        self,
        path_or_id: str | Path | None = None,
        *,
        model: RewardModel | str = "pickscore",
        frames: Frames | int = "mean",
        num_frames: int = 8,
        batch_size: int = 32,
        options: Mapping[str, Any] | None = None,
        device: str | torch.device = "auto",
        dtype: torch.dtype | Literal["auto"] = "auto",
        local_files_only: bool | None = None,
    ):
        """Loads the image model, unless it is given.

        Args:
            path_or_id: Weights of the image model; None are the published ones.
            model: An image model, or the name of one for `load_reward_model`.
            frames: "mean", "min", "last", or how many frames the mean is taken of.
            num_frames: How many frames "mean" and "min" look at, >= 1.
            batch_size: Frames per forward pass of the image model.
            options: Further options of the image model.
            device: As in `from_pretrained`.
            dtype: As in `from_pretrained`.
            local_files_only: As in `from_pretrained`.

        Raises:
            ValueError: If `frames` or a number is none of these, or the model is not one of images.
        """
        super().__init__()
        reduction, num_frames = ("mean", frames) if isinstance(frames, int) else (frames, num_frames)
        if reduction not in ("mean", "min", "last"):
            raise ValueError(f"frames must be 'mean', 'min', 'last' or a number of frames, got {frames!r}")
        if num_frames < 1 or batch_size < 1:
            raise ValueError(f"expected at least 1 frame, got {num_frames} per clip and {batch_size} at once")
        if isinstance(model, str):
            from diffalign.reward_models import load_reward_model

            loading = {"device": device, "dtype": dtype, "local_files_only": local_files_only}
            model = load_reward_model(model, path=path_or_id, **loading, **(options or {}))
        if "image" not in model.info.kind:
            raise ValueError(f"{model.info.name} scores {', '.join(sorted(model.info.kind))}, not the frames of clips")
        self.model = model
        self.reduction = reduction
        self.num_frames = 1 if reduction == "last" else num_frames
        self.batch_size = batch_size
        suffix = "last" if reduction == "last" else f"{reduction}{num_frames}"
        self.info = replace(model.info, name=f"{model.info.name}-clip-{suffix}", kind=frozenset({"video"}))
        self.requires_grad_(False).train(False)

    def preprocess(self, item: Media) -> list[Any]:
        """See `RewardModel`: what the image model makes of each chosen frame."""
        return [self.model.preprocess(image) for image in read_clip(item, lambda total, _: self.choose(total))]

    def choose(self, total: int) -> list[int]:
        """The numbers of the frames that are looked at, of `total`."""
        if self.reduction == "last":
            return [total - 1]
        return [int(number) for number in torch.linspace(0, total - 1, min(self.num_frames, total)).round()]

    def encode_text(self, prompts: Sequence[str], batch_size: int) -> Sequence[Any] | Tensor:
        """See `RewardModel`."""
        return self.model.encode_text(prompts, batch_size)

    def score_prepared(self, prepared: Sequence[list[Any]], texts: Sequence[Any]) -> Scores:
        """See `RewardModel`. A clip of which one frame has no score has none."""
        frames = [frame for clip in prepared for frame in clip]
        prompts = [text for clip, text in zip(prepared, texts, strict=True) for _ in clip]
        found: dict[str, list[Tensor]] = {}
        reasons: list[str | None] = []
        for start in range(0, len(frames), self.batch_size):
            part = slice(start, start + self.batch_size)
            scores = self.model.score_prepared(frames[part], prompts[part])
            scores = scores if isinstance(scores, Scores) else Scores(scores)
            reasons += scores.errors if scores.errors is not None else [None] * len(frames[part])
            for name, values in scores.dims.items():
                found.setdefault(name, []).append(values)
        lengths = [len(clip) for clip in prepared]
        errors = [
            next((reason for reason in reasons[sum(lengths[:i]) : sum(lengths[: i + 1])] if reason is not None), None)
            for i in range(len(lengths))
        ]
        dims = {
            name: torch.stack([self._reduce(clip) for clip in torch.split(torch.cat(values), lengths)])
            for name, values in found.items()
        }
        return Scores(dims, errors=errors)

    def _reduce(self, scores: Tensor) -> Tensor:
        """One score of those of a clip's frames [..., T]; the worst is the smallest, or largest if that is worse."""
        if self.reduction == "min":
            return scores.amin(-1) if self.info.higher_is_better else scores.amax(-1)
        return scores.mean(-1)

    def score_tensor(self, pixels: Tensor, prompts: str | Sequence[str]) -> Tensor:
        """Scores [B] with a graph to the pixels of clips [B, T, 3, H, W] in [0, 1], as of the image model.

        Raises:
            InvalidMediaError: If `pixels` has another shape.
        """
        if pixels.ndim != 5:
            raise InvalidMediaError(f"expected floats [B, T, 3, H, W], got {pixels.dtype} {tuple(pixels.shape)}")
        unique, rows = self._texts(prompts, len(pixels))
        chosen = pixels[:, self.choose(pixels.shape[1])]
        texts = [unique[row] for row in rows for _ in range(chosen.shape[1])]
        return self._reduce(self.model.score_tensor(chosen.flatten(0, 1), texts).reshape(chosen.shape[:2]))

    def settings(self) -> dict[str, str]:
        """Those of the image model, and the frames."""
        return {**self.model.settings(), "frames": self.reduction, "num_frames": str(self.num_frames)}
