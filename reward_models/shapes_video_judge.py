"""The exact judge of the moving world as a reward: the right object in how many frames, and the right motion."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from diffalign.reward_models.base import RewardInfo
from diffalign.reward_models.media import Media, read_clip
from diffalign.reward_models.shapes_judge import WorldJudge, as_scene
from diffalign.shapes.clips import judge_clip, object_share, parse_clip_prompt

__all__ = ["ShapesVideoJudge"]


class ShapesVideoJudge(WorldJudge):
    """Two verdicts and their mean: `object`, the share of frames that show the object only, and `motion`, 0 or 1.

    Reads clips of 64x64 pixels. It is denser than the judge of `eval/shapes_video.py`, which says right or wrong, and
    reads the same things: a model that was trained on it has no held-out judge any more, only held-out prompts.
    """

    info = RewardInfo(
        name="shapes_video_judge",
        license="no weights",
        weights=(),
        kind=frozenset({"video"}),
        dims=("object", "motion", "overall"),
        differentiable=False,
        nominal_range=(0.0, 1.0),
    )
    item_ndim = 4

    def preprocess(self, item: Media) -> npt.NDArray[np.uint8]:
        """See `RewardModel`: RGB [T, 64, 64, 3]."""
        return np.stack([as_scene(frame) for frame in read_clip(item, lambda total, _: range(total))])

    def verdict(self, medium: npt.NDArray[np.uint8], prompt: str) -> Mapping[str, float]:
        """See `WorldJudge`."""
        asked = parse_clip_prompt(prompt)
        shown, moves = object_share(medium, asked), float(judge_clip(medium, asked).motion_correct)
        return {"object": shown, "motion": moves, "overall": (shown + moves) / 2}
