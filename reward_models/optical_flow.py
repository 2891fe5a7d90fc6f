"""Motion between frames: RAFT, how VBench reads it, and the picture half-way between two others.

RAFT is torchvision's (Teed & Deng 2020, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow",
arXiv:2003.12039), with the weights that torchvision ported from the authors' `raft-things`, the ones VBench uses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torchvision.models.optical_flow import raft_large
from torchvision.transforms.functional import pil_to_tensor

from diffalign.reward_models.base import RewardInfo, WeightSpec
from diffalign.reward_models.checkpoints import load_complete, read_tensors
from diffalign.reward_models.fetched_files import find_or_fetch
from diffalign.reward_models.media import InvalidMediaError

__all__ = [
    "RAFT_THINGS",
    "OpticalFlow",
    "enlarged",
    "halfway",
    "is_static",
    "motion_margin",
    "static_magnitudes",
    "to_bytes",
    "top_magnitude",
    "unpadded",
    "warp",
]

RAFT_THINGS = WeightSpec(
    "",
    "raft_large_C_T_V1-22a6c225.pth",
    "torch",
    url="https://download.pytorch.org/models/raft_large_C_T_V1-22a6c225.pth",
)
SMALLEST = 128
"""Short side below which torchvision's RAFT refuses frames: its coarsest correlation map would be one cell wide."""
UPDATES = 20
"""Refinements of the flow, as VBench asks for; torchvision's default is 12."""


class OpticalFlow(nn.Module):
    """RAFT on 8-bit frames.

    Frames whose shorter side is below `SMALLEST` are enlarged to it first (VBench has no such frames); sides that are
    no multiples of 8 are padded with their last pixels, on both ends alike, as in RAFT's own evaluation.

    Args:
        info: For the messages.
        path: The weights' file or a folder with it; None for torch's cache, or their home.
        local_files_only: Never ask the network; None follows HF_HUB_OFFLINE.
        pairs_at_once: Pairs of frames per forward pass.
        updates: Refinements of the flow.

    Raises:
        WeightsError: If the weights are missing, damaged or of another network.
    """

    def __init__(
        self,
        info: RewardInfo,
        path: str | Path | None = None,
        local_files_only: bool | None = None,
        pairs_at_once: int = 4,
        updates: int = UPDATES,
    ):
        super().__init__()
        file = find_or_fetch(info, path, RAFT_THINGS, local_files_only)
        with torch.device("meta"):
            network = raft_large(weights=None)
        load_complete(info, network, read_tensors(info, file), file)
        self.network = network.requires_grad_(False).eval()
        self.pairs_at_once, self.updates = pairs_at_once, updates

    @torch.no_grad()
    def pairs(self, frames: Tensor, pairs: Sequence[tuple[int, int]]) -> Iterator[tuple[int, Tensor]]:
        """The flow of pairs of a clip's frames, a few at a time.

        Args:
            frames: uint8 [T, 3, H, W]; see `enlarged`.
            pairs: Numbers of the first and the second frame.

        Yields:
            Place of the first pair of a few in `pairs`, and their flow, float32 [b, 2, H', W'] in pixels (x, then y)
            on the padded frames; `unpadded` cuts it to [b, 2, H, W].
        """
        weight = next(self.network.parameters())
        padding = _padding(*frames.shape[-2:])
        for start in range(0, len(pairs), self.pairs_at_once):
            chosen = pairs[start : start + self.pairs_at_once]
            first, second = (frames[[pair[side] for pair in chosen]].to(weight.device).float() for side in (0, 1))
            both = [
                F.pad(picture, padding, mode="replicate").div(127.5).sub(1).to(weight.dtype)
                for picture in (first, second)
            ]
            yield start, self.network(*both, num_flow_updates=self.updates)[-1].float()

    def magnitudes(self, frames: Tensor, pairs: Sequence[tuple[int, int]], share: float) -> list[float]:
        """Per pair of frames, the mean length in pixels of the `share` longest motions; arguments as in `pairs`."""
        return [float(top_magnitude(flow, share)) for _, flows in self.pairs(frames, pairs) for flow in flows]


def to_bytes(images: Sequence[Image.Image]) -> Tensor:
    """Frames of one clip as uint8 [T, 3, H, W]."""
    return torch.stack([pil_to_tensor(image) for image in images])


def enlarged(frames: Tensor) -> Tensor:
    """Frames uint8 [T, 3, H, W], bilinearly enlarged to a short side of `SMALLEST` where theirs is shorter."""
    height, width = frames.shape[-2:]
    short = min(height, width)
    if short >= SMALLEST:
        return frames
    size = [math.ceil(side * SMALLEST / short) for side in (height, width)]
    return F.interpolate(frames.float(), size, mode="bilinear", align_corners=False).round().to(torch.uint8)


def top_magnitude(flow: Tensor, share: float) -> Tensor:
    """Mean length of the int(share * H * W) longest vectors of a flow [2, H, W], a scalar in pixels."""
    lengths = flow.square().sum(0).sqrt().flatten()
    return lengths.topk(int(share * len(lengths))).values.mean()


def motion_margin(magnitudes: Sequence[float], num_frames: int, short_side: int) -> float:
    """How clearly a clip moves: above 1 exactly when VBench's dynamic degree counts it as moving.

    VBench wants round(4 * num_frames / 16) pairs of neighbouring frames with a magnitude above 6 * short_side / 256.
    So does the value here: the magnitude that many pairs reach, over that threshold. One pair at least is asked for,
    where VBench, for 2 frames, asks for none and calls every such clip moving.

    Args:
        magnitudes: Of `num_frames` - 1 pairs, each the mean of the longest 5 % of motions, in pixels.
        num_frames: Frames that were looked at, about 8 per second; at least 2.
        short_side: Of the frames, in pixels.
    """
    wanted = max(1, round(4 * num_frames / 16))
    return sorted(magnitudes, reverse=True)[wanted - 1] / (6.0 * short_side / 256)


def is_static(magnitudes: Sequence[float], around: Sequence[float], num_frames: int, short_side: int) -> bool:
    """VBench's filter before temporal flickering: whether a clip stands still.

    At most round(2 * num_frames / 16) pairs of neighbours may exceed 3 * short_side / 256 pixels, and neither way
    between the first frame and the last may exceed that threshold times twice that count.

    Args:
        magnitudes: Of the pairs of neighbours, each the mean of the longest 2 % of motions, in pixels.
        around: Likewise from the first frame to the last and back.
        num_frames: All frames of the clip.
        short_side: Of the frames, in pixels.
    """
    threshold, allowed = 3.0 * short_side / 256, round(2 * num_frames / 16)
    if sum(magnitude > threshold for magnitude in magnitudes) > allowed:
        return False
    return all(magnitude <= threshold * allowed * 2 for magnitude in around)


def static_magnitudes(flow: OpticalFlow, frames: Tensor) -> tuple[list[float], list[float]]:
    """What `is_static` reads, of all frames uint8 [T, 3, H, W] of a clip.

    Raises:
        InvalidMediaError: If there is one frame only.
    """
    last = len(frames) - 1
    if last < 1:
        raise InvalidMediaError("motion needs at least 2 frames, the clip has 1")
    pairs = [*((i, i + 1) for i in range(last)), (0, last), (last, 0)]
    found = flow.magnitudes(frames, pairs, 0.02)
    return found[:last], found[last:]


def warp(pictures: Tensor, flow: Tensor) -> Tensor:
    """Pictures [B, C, H, W] read at the places that a flow [B, 2, H, W] in pixels points to; beyond, the border."""
    height, width = pictures.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height, device=flow.device), torch.arange(width, device=flow.device), indexing="ij"
    )
    grid = torch.stack([(x + flow[:, 0]) / (width - 1), (y + flow[:, 1]) / (height - 1)], dim=-1) * 2 - 1
    return F.grid_sample(pictures, grid.to(pictures.dtype), padding_mode="border", align_corners=True)


def halfway(first: Tensor, second: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
    """The pictures half-way between two, from the flows between them.

    Eq. 4 of Jiang et al. 2018, "Super SloMo" (arXiv:1712.00080) at t = 1/2, without its networks: the flow from the
    middle to the first is (backward - forward) / 4 and to the second its opposite; the two warped pictures are
    averaged, so that what only one of them shows becomes transparent.

    Args:
        first: [B, C, H, W].
        second: [B, C, H, W].
        forward: Flow from the first to the second in pixels, [B, 2, H, W].
        backward: The other way.
    """
    to_first = (backward - forward) / 4
    return (warp(first, to_first) + warp(second, -to_first)) / 2


def unpadded(flow: Tensor, height: int, width: int) -> Tensor:
    """A flow [b, 2, H', W'] on padded frames without what was padded, [b, 2, H, W]."""
    return F.pad(flow, [-side for side in _padding(height, width)])


def _padding(height: int, width: int) -> tuple[int, int, int, int]:
    """Left, right, top and bottom, to multiples of 8."""
    wide, high = -width % 8, -height % 8
    return wide // 2, wide - wide // 2, high // 2, high - high // 2
