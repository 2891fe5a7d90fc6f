"""The embedded world's judges as rewards: exact on what the renderer draws, and a reason where there is no verdict."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffalign.reward_models import load_reward_model
from diffalign.shapes.clips import draw_clip, make_clip_prompt, render_clip
from diffalign.shapes.scenes import draw_scene, prompts, render, spoil_scene


def test_pictures_are_right_or_wrong() -> None:
    generator = np.random.default_rng(0)
    asked = prompts("held_out")[::40]
    scenes = [draw_scene(prompt, generator) for prompt in asked]
    right = [render(scene) for scene in scenes]
    wrong = [render(spoil_scene(prompt, scene, generator)) for prompt, scene in zip(asked, scenes, strict=True)]
    judge = load_reward_model("shapes_judge")
    texts = [prompt.text for prompt in asked]
    assert judge(right, texts).tolist() == [1.0] * len(asked)
    assert judge(wrong, texts).mean() < 0.2


def test_clips_have_a_verdict_on_object_and_motion() -> None:
    generator = np.random.default_rng(0)
    asked, other = make_clip_prompt("circle", "red", "left"), make_clip_prompt("star", "red", "left")
    good = render_clip(draw_clip(asked, generator))
    clips = [good, render_clip(draw_clip(asked, generator, motion="up")), render_clip(draw_clip(other, generator)),
             np.concatenate([good[:3], np.full_like(good[:3], 240)])]  # fmt: skip
    output = load_reward_model("shapes_video_judge").score(clips, asked.text)
    assert output.dims["object"].tolist() == pytest.approx([1.0, 1.0, 0.0, 0.5])
    assert output.dims["motion"].tolist() == [1.0, 0.0, 1.0, 0.0]
    assert output.score.tolist() == pytest.approx([1.0, 0.5, 0.5, 0.25])


def test_what_cannot_be_judged_has_a_reason_and_no_score() -> None:
    judge = load_reward_model("shapes_judge")
    picture = torch.rand(3, 64, 64)
    output = judge.score(
        [picture, torch.rand(3, 32, 32), picture], ["a photo of a red circle", "a photo of a red circle", "a cat"],
        on_invalid="nan",
    )  # fmt: skip
    assert output.valid.tolist() == [True, False, False]
    assert output.score.isnan().tolist() == [False, True, True]
    assert "64x64 pixels, got 32x32" in str(output.errors[1])
    assert "'a cat' is not a prompt of the embedded world" in str(output.errors[2])
    with pytest.raises(ValueError, match="has no weights"):
        load_reward_model("shapes_video_judge", path="somewhere")
