"""The moving world: its split, its clips, its judge, the files of its pairs and its benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from diffalign import plugins
from diffalign.prompts import read_prompts
from diffalign.shapes.clip_pairs import write_clip_pairs
from diffalign.shapes.clips import (
    FRAMES,
    MOTIONS,
    clip_prompts,
    draw_clip,
    judge_clip,
    make_clip_prompt,
    parse_clip_prompt,
    render_clip,
)
from diffalign.videos import read_all_frames


def test_the_split_holds_out_combinations() -> None:
    train, held_out = clip_prompts("train"), clip_prompts("held_out")
    assert (len(train), len(held_out), len(clip_prompts("all"))) == (320, 80, 400)
    assert not {p.text for p in train} & {p.text for p in held_out}
    assert {p.motion for p in held_out} == set(MOTIONS)
    assert [p.text for p in held_out[:2]] == [
        "a video of an orange circle moving left",
        "a video of a yellow circle moving down",
    ]
    with pytest.raises(ValueError, match="unknown split 'test'"):
        clip_prompts("test")  # type: ignore[arg-type]


def test_prompts_say_what_they_mean() -> None:
    assert make_clip_prompt("star", "orange", "still").text == "a video of an orange star standing still"
    assert parse_clip_prompt("a video of a red circle moving left").motion == "left"
    with pytest.raises(ValueError, match="is no prompt of the moving world"):
        parse_clip_prompt("a video of a dog")
    rows = read_prompts("diffalign://shapes_video/held_out", 10)
    assert len(rows) == 10
    assert {row.extras["task"] for row in rows} == set(MOTIONS)


@pytest.mark.slow
def test_the_judge_reads_what_was_drawn_and_nothing_else() -> None:
    generator = np.random.default_rng(0)
    for prompt in clip_prompts("train")[::23]:
        right = judge_clip(render_clip(draw_clip(prompt, generator, tidy=False)), prompt)
        assert right.correct, (prompt.text, right.reason)
        other = str(generator.choice([motion for motion in MOTIONS if motion != prompt.motion]))
        wrong = judge_clip(render_clip(draw_clip(prompt, generator, motion=other)), prompt)
        assert not wrong.correct
        assert not wrong.motion_correct
        assert wrong.motion == other


def test_the_judge_tells_object_and_motion_apart() -> None:
    prompt = make_clip_prompt("circle", "red", "left")
    frames = render_clip(draw_clip(prompt, np.random.default_rng(1)))
    blue = judge_clip(
        render_clip(draw_clip(make_clip_prompt("circle", "blue", "left"), np.random.default_rng(1))), prompt
    )
    assert (blue.correct, blue.motion_correct) == (False, True)
    assert blue.reason == "expected red circle, found blue circle"
    back = judge_clip(frames[::-1].copy(), prompt)
    assert (back.motion, back.reason) == ("right", "moves right, asked was left")
    jumping = judge_clip(frames[[0, 3, 1, 4, 2, 5]], prompt)
    assert jumping.motion is None
    empty = judge_clip(np.full_like(frames, 240), prompt)
    assert empty.reason == "one object can be read in 0 of 6 frames only"
    with pytest.raises(ValueError, match="the judge reads clips"):
        judge_clip(frames[0], prompt)


@pytest.mark.slow
def test_pairs_on_disk_keep_their_order(tmp_path: Path) -> None:
    pytest.importorskip("av")
    index = write_clip_pairs(tmp_path, 4, seed=3)
    rows = [json.loads(line) for line in index.read_text().splitlines()]
    assert len(rows) == 4
    for row in rows:
        clips = {}
        for side in ("chosen", "rejected"):
            with (tmp_path / row[side]).open("rb") as file:
                clips[side] = np.stack([np.asarray(frame) for frame in read_all_frames(file)])
        assert clips["chosen"].shape == (FRAMES, 64, 64, 3)
        assert judge_clip(clips["chosen"], parse_clip_prompt(row["prompt"])).correct
        assert not judge_clip(clips["rejected"], parse_clip_prompt(row["prompt"])).motion_correct
    assert index.read_bytes() == write_clip_pairs(tmp_path / "again", 4, seed=3).read_bytes()


def test_the_benchmark_counts_by_motion() -> None:
    benchmark = plugins.find("eval", "shapes_video")(num_prompts=10)
    cases = benchmark.cases()
    assert [case.task for case in cases] == [motion for motion in MOTIONS for _ in range(2)]
    generator = np.random.default_rng(2)
    drawn = [
        draw_clip(parse_clip_prompt(case.prompt), generator, motion="up" if case.task == "left" else None)
        for case in cases
    ]
    media = torch.stack([torch.from_numpy(render_clip(clip)).permute(0, 3, 1, 2).float() / 255 for clip in drawn])
    report = benchmark.aggregate(benchmark.score(media, cases))
    assert report.scores["judge_score"].value == pytest.approx(0.8)
    assert report.groups["left"]["correct"].value == 0.0
    assert report.groups["still"]["correct"].value == 1.0
    with pytest.raises(ValueError, match="expected one clip"):
        benchmark.score(media[:, 0], cases)
