"""VBench's dynamic degree: whether a clip moves at all, read from optical flow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.devices import resolve_device
from diffalign.reward_models.base import RewardInfo, RewardModel
from diffalign.reward_models.media import InvalidMediaError, Media, read_clip
from diffalign.reward_models.optical_flow import RAFT_THINGS, OpticalFlow, enlarged, motion_margin, to_bytes

__all__ = ["DynamicDegree"]

RATE = 8.0
"""Frames per second at which VBench looks at a clip, about."""
SHARE = 0.05
"""Of a pair's pixels, those whose motion counts: the longest."""


class DynamicDegree(RewardModel):
    """1 where a clip moves and 0 where it does not; or by how much it passes the threshold.

    Source: Huang et al. 2023, "VBench: Comprehensive Benchmark Suite for Video Generative Models" (arXiv:2311.17982),
    dimension "dynamic degree", with the thresholds of the released code; see `optical_flow.motion_margin`. The prompt
    is not read. Every k-th frame is looked at, k = round(fps / 8).

    A verdict of 0 or 1 ties most pairs of clips. For training and for watching a run, "dynamic_degree-margin" is the
    same measurement before the threshold: above 1 means moving. As a reward it has no upper end: a model can please it
    by shaking the camera.
    """

    info = RewardInfo(
        name="dynamic_degree",
        license="BSD-3-Clause",
        weights=(RAFT_THINGS,),
        kind=frozenset({"video"}),
        dims=("margin", "dynamic_degree"),
        needs_prompt=False,
        differentiable=False,
        nominal_range=(0.0, 1.0),
        min_vram_gb=2.0,
    )
    item_ndim = 4

    def __init__(
        self,
        path_or_id: str | Path | None = None,
        *,
        score: Literal["official", "margin"] = "official",
        fps: float = RATE,
        device: str | torch.device = "auto",
        dtype: torch.dtype | Literal["auto"] = "auto",
        local_files_only: bool | None = None,
    ):
        """Loads RAFT.

        Args:
            path_or_id: RAFT's .pth file in torchvision's layout, or a folder with it; None is the published one.
            score: Which dimension is the primary score.
            fps: Frames per second of clips that do not say theirs, such as tensors.
            device: As in `from_pretrained`.
            dtype: Of the network; "auto" is float32.
            local_files_only: As in `from_pretrained`.

        Raises:
            ValueError: If `score` is none of these or `fps` not positive.
            WeightsError: If the weights cannot be loaded.
        """
        super().__init__()
        if score not in ("official", "margin"):
            raise ValueError(f"score must be 'official' or 'margin', got {score!r}")
        if not fps > 0:
            raise ValueError(f"fps must be positive, got {fps}")
        if score == "margin":
            dims = ("dynamic_degree", "margin")
            self.info = replace(self.info, name="dynamic_degree-margin", dims=dims, nominal_range=None)
        device = resolve_device(device)
        self.fps = fps
        self.flow = OpticalFlow(self.info, path_or_id, local_files_only)
        self.flow.to(device, torch.float32 if dtype == "auto" else dtype)

    def preprocess(self, item: Media) -> Tensor:
        """See `RewardModel`: the frames that are looked at, uint8 [n, 3, H, W]."""
        return to_bytes(read_clip(item, self.choose))

    def choose(self, total: int, fps: float | None) -> Sequence[int]:
        """The numbers of the frames that are looked at.

        Raises:
            InvalidMediaError: If that is one frame only.
        """
        step = max(1, round((fps or self.fps) / RATE))
        if total <= step:
            raise InvalidMediaError(f"motion needs 2 frames at {RATE:g} per second, the clip has {total} in all")
        return range(0, total, step)

    def score_prepared(self, prepared: Sequence[Tensor], texts: Sequence[Any]) -> dict[str, Tensor]:
        """See `RewardModel`."""
        margin = torch.tensor([self.margin(frames) for frames in prepared])
        return {"margin": margin, "dynamic_degree": (margin > 1).float()}

    def margin(self, frames: Tensor) -> float:
        """`motion_margin` of the frames uint8 [n, 3, H, W] that `choose` chose, n >= 2."""
        frames = enlarged(frames)
        pairs = [(i, i + 1) for i in range(len(frames) - 1)]
        magnitudes = self.flow.magnitudes(frames, pairs, SHARE)
        return motion_margin(magnitudes, len(frames), min(frames.shape[-2:]))

    def settings(self) -> dict[str, str]:
        """The rate of clips without one, and which dimension counts."""
        return {"fps": f"{self.fps:g}", "score": self.info.dims[-1]}
