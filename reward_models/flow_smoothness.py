"""How well a clip's odd frames follow from their neighbours: smoothness of motion, by another measure than VBench's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.devices import resolve_device
from diffalign.reward_models.base import RewardInfo, RewardModel
from diffalign.reward_models.media import InvalidMediaError, Media, read_clip
from diffalign.reward_models.optical_flow import RAFT_THINGS, OpticalFlow, enlarged, halfway, to_bytes, unpadded

__all__ = ["FlowSmoothness"]


class FlowSmoothness(RewardModel):
    """(255 - mean absolute error) / 255 of odd frames that were made anew from their neighbours, in [0, 1].

    VBench's motion smoothness (Huang et al. 2023, arXiv:2311.17982) makes them with AMT-S, an interpolation network
    that no library here has. This takes RAFT's flow and plain warping instead (`optical_flow.halfway`): the same
    question to another network, so its numbers are *not* VBench's and must not stand under that name or be normalised
    with VBench's constants. A clip that stands still has 1, so watch `dynamic_degree-margin` beside it.
    """

    info = RewardInfo(
        name="flow_smoothness",
        license="BSD-3-Clause",
        weights=(RAFT_THINGS,),
        kind=frozenset({"video"}),
        dims=("flow_smoothness",),
        needs_prompt=False,
        differentiable=False,
        nominal_range=(0.0, 1.0),
        tau=0.01,
        min_vram_gb=2.0,
    )
    item_ndim = 4

    def __init__(
        self,
        path_or_id: str | Path | None = None,
        *,
        device: str | torch.device = "auto",
        dtype: torch.dtype | Literal["auto"] = "auto",
        local_files_only: bool | None = None,
    ):
        """Loads RAFT.

        Args:
            path_or_id: RAFT's .pth file in torchvision's layout, or a folder with it; None is the published one.
            device: As in `from_pretrained`.
            dtype: Of the network; "auto" is float32.
            local_files_only: As in `from_pretrained`.

        Raises:
            WeightsError: If the weights cannot be loaded.
        """
        super().__init__()
        device = resolve_device(device)
        self.flow = OpticalFlow(self.info, path_or_id, local_files_only)
        self.flow.to(device, torch.float32 if dtype == "auto" else dtype)

    def preprocess(self, item: Media) -> Tensor:
        """See `RewardModel`: all frames, uint8 [T, 3, H, W]."""
        frames = to_bytes(read_clip(item, lambda total, _: range(total)))
        if len(frames) < 3:
            raise InvalidMediaError(f"smoothness needs at least 3 frames, the clip has {len(frames)}")
        return frames

    def score_prepared(self, prepared: Sequence[Tensor], texts: Sequence[Any]) -> dict[str, Tensor]:
        """See `RewardModel`."""
        return {"flow_smoothness": torch.tensor([self.smoothness(frames) for frames in prepared])}

    @torch.no_grad()
    def smoothness(self, frames: Tensor) -> float:
        """The score of frames uint8 [T, 3, H, W], T >= 3; a last odd frame without a right neighbour is left out."""
        frames = enlarged(frames)
        odd = range(1, len(frames) - 1, 2)
        forward = self.flow.pairs(frames, [(i - 1, i + 1) for i in odd])
        backward = self.flow.pairs(frames, [(i + 1, i - 1) for i in odd])
        errors: list[float] = []
        for (start, there), (_, back) in zip(forward, backward, strict=True):
            there, back = (unpadded(flow, *frames.shape[-2:]) for flow in (there, back))
            middle = odd[start : start + len(there)]
            before, now, after = (frames[[i + d for i in middle]].to(there) for d in (-1, 0, 1))
            made = halfway(before, after, there, back)
            errors += (made - now).abs().mean(dim=(1, 2, 3)).tolist()
        return (255 - sum(errors) / len(errors)) / 255
