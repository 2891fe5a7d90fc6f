"""The moving world's benchmark: held-out prompts of clips, each frame read back and the object followed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from diffalign.eval.base import Case, Row
from diffalign.eval.shapes import Shapes, protocol, to_judge_pixels
from diffalign.shapes import clips
from diffalign.shapes.scenes import Split

__all__ = ["ShapesVideo"]


class ShapesVideo(Shapes):
    """The judge score on prompts of the moving world: the right object, and the right motion.

    Its tasks are the five motions. A row's evidence says whether the motion alone was right, and where the object was
    seen in every frame.
    """

    name = "shapes_video"
    tasks = tuple(clips.MOTIONS)
    is_video = True

    def _prompts(self, split: Split) -> Sequence[Any]:
        return clips.clip_prompts(split)

    def protocol(self) -> dict[str, Any]:
        """See `Shapes`."""
        return protocol() | {
            "judge": "diffalign.shapes.clips",
            "min_travel": clips.MIN_TRAVEL,
            "max_drift": clips.MAX_DRIFT,
            "min_frames": clips.MIN_FRAMES,
        }

    def score(self, media: Tensor, cases: Sequence[Case]) -> list[Row]:
        """The judge's verdict on each clip, RGB [B, T, 3, H, W] in [0, 1].

        Raises:
            ValueError: If the clips are not of that form, or not as many as the cases.
        """
        if media.ndim != 5 or len(media) != len(cases):
            raise ValueError(f"expected one clip [T, 3, H, W] per case, got {list(media.shape)} for {len(cases)} cases")
        return [_row(case, clip) for case, clip in zip(cases, media, strict=True)]


def _row(case: Case, clip: Tensor) -> Row:
    verdict = clips.judge_clip(to_judge_pixels(clip), clips.parse_clip_prompt(case.prompt))
    path = [None if place is None else [round(place[0], 1), round(place[1], 1)] for place in verdict.path]
    return Row(
        id=case.id,
        prompt=case.prompt,
        seed=case.seed,
        task=case.task,
        correct=verdict.correct,
        reason=verdict.reason,
        evidence={"motion": verdict.motion, "motion_correct": verdict.motion_correct, "path": path},
    )
