from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.eval import shapes
from diffalign.eval.base import read_rows, write_rows
from diffalign.eval.shapes import Shapes, to_judge_pixels
from diffalign.plugins import find
from diffalign.shapes.scenes import TASKS, draw_scene, parse_prompt, prompts, render, spoil_scene


def drawn(cases, right=None, seed=0):
    """Pictures [B, 3, 64, 64] of the cases' prompts; those where `right` is false are spoilt."""
    generator = np.random.default_rng(seed)
    images = []
    for i, case in enumerate(cases):
        prompt = parse_prompt(case.prompt)
        scene = draw_scene(prompt, generator)
        if right is not None and not right[i]:
            scene = spoil_scene(prompt, scene, generator)
        images.append(render(scene))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255.0


@pytest.fixture(scope="module")
def benchmark_and_rows():
    bench = Shapes(num_prompts=24, samples=2, seed=100)
    cases = bench.cases()
    right = [i % 4 != 0 for i in range(len(cases))]
    return bench, bench.score(drawn(cases, right), cases), right


def test_it_is_found_by_its_name():
    assert find("eval", "shapes") is Shapes


def test_cases_are_the_held_out_prompts_task_by_task():
    cases = Shapes().cases()
    assert {c.prompt for c in cases} == {p.text for p in prompts("held_out")}
    assert list(dict.fromkeys(c.task for c in cases)) == list(TASKS)
    assert len({c.id for c in cases}) == len({(c.prompt, c.seed) for c in cases}) == len({c.seed for c in cases})


def test_a_part_covers_every_task_and_keeps_each_cases_seed():
    whole, part = Shapes(seed=7, samples=2).cases(), Shapes(num_prompts=20, seed=7, samples=2).cases()
    assert all(case in whole for case in part)
    counts = Counter(c.task for c in part)
    assert sum(counts.values()) == 40
    assert set(counts) == set(TASKS)
    assert max(counts.values()) - min(counts.values()) <= 2
    assert len(Shapes(num_prompts=10_000).cases()) == len(prompts("held_out"))


@pytest.mark.parametrize("options", [{"num_prompts": 0}, {"samples": 0}])
def test_empty_benchmarks_are_refused(options):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        Shapes(**options)


def test_verdicts_follow_the_pictures_and_carry_evidence(benchmark_and_rows):
    bench, rows, right = benchmark_and_rows
    assert [r.correct for r in rows] == right
    assert all(r.reason == "shows what was asked" for r, good in zip(rows, right, strict=True) if good)
    assert all(len(r.reason) > 5 and isinstance(r.evidence["read"], list) for r in rows)
    assert [(r.id, r.seed) for r in rows] == [(c.id, c.seed) for c in bench.cases()]


def test_the_judge_score_is_the_mean_of_the_six_task_means(benchmark_and_rows):
    bench, rows, right = benchmark_and_rows
    report = bench.aggregate(rows)
    means = {t: np.mean([good for r, good in zip(rows, right, strict=True) if r.task == t]) for t in TASKS}
    assert {t: s["correct"].value for t, s in report.groups.items()} == pytest.approx(means)
    score = report.scores["judge_score"]
    assert score.value == pytest.approx(np.mean(list(means.values())))
    assert score.ci95.low < score.value < score.ci95.high
    assert (report.n_expected, report.n_missing, report.partial) == (48, 0, False)


@pytest.mark.slow
def test_aggregation_needs_nothing_but_the_rows_in_any_order(benchmark_and_rows, tmp_path):
    bench, rows, _ = benchmark_and_rows
    write_rows(tmp_path / "rows.jsonl", rows[::-1])
    assert bench.aggregate(read_rows(tmp_path / "rows.jsonl")) == bench.aggregate(rows)


@pytest.mark.slow
def test_missing_pictures_are_counted(benchmark_and_rows):
    bench, rows, _ = benchmark_and_rows
    report = bench.aggregate([r for r in rows if r is not rows[0]])
    assert (report.n_expected, report.n_missing) == (48, 1)
    assert report.groups[rows[0].task]["correct"].n_missing == 1
    assert report.warnings == ("1 of 48 pictures are missing",)


def test_a_task_without_pictures_leaves_no_score(benchmark_and_rows):
    bench, rows, _ = benchmark_and_rows
    report = bench.aggregate([r for r in rows if r.task != "counting"])
    assert report.scores["judge_score"].value is None
    assert report.groups["counting"]["correct"].value is None
    assert report.groups["counting"]["correct"].n_missing == 8


def test_rows_of_another_benchmark_are_refused(benchmark_and_rows):
    bench, rows, _ = benchmark_and_rows
    with pytest.raises(ValueError, match="1 rows are no case of this benchmark"):
        bench.aggregate([*rows, replace(rows[0], seed=1)])
    with pytest.raises(ValueError, match="carries no verdict"):
        bench.aggregate([replace(rows[0], correct=None), *rows[1:]])


def test_as_many_pictures_as_cases():
    cases = Shapes(num_prompts=6).cases()
    with pytest.raises(ValueError, match="one picture per case, got 5 for 6"):
        Shapes().score(torch.zeros(5, 3, 64, 64), cases)


def test_a_picture_in_memory_and_its_file_are_the_same_to_the_judge(tmp_path):
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    pixels = to_judge_pixels(image)
    Image.fromarray((image[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()).save(tmp_path / "a.png")
    np.testing.assert_array_equal(pixels[0], np.asarray(Image.open(tmp_path / "a.png")))


@pytest.mark.parametrize("factor", [2, 4])
def test_larger_pictures_are_read_as_well(factor):
    cases = Shapes(num_prompts=12).cases()
    large = drawn(cases).repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    assert all(r.correct for r in Shapes().score(large, cases))


def test_a_fine_pattern_turns_grey_instead_of_aliasing():
    x = torch.arange(256) % 4
    stripes = ((x == 1) | (x == 2)).float().expand(1, 3, 256, 256)  # the middle of every 4 pixels is white
    assert np.abs(to_judge_pixels(stripes)[0, :, 4:-4].astype(int) - 127).max() <= 12


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 4, 64, 64), "expected floating-point RGB"),
        (torch.zeros(3, 64, 64), "expected floating-point RGB"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "expected floating-point RGB"),
        (torch.full((1, 3, 64, 64), -1.0), r"expected values in \[0, 1\], found \[-1, -1\]"),
        (torch.full((1, 3, 64, 64), float("nan")), "not finite"),
    ],
)
def test_what_is_no_picture_is_refused(images, message):
    with pytest.raises(ValueError, match=message):
        to_judge_pixels(images)


def test_the_protocol_names_the_judge_and_its_thresholds():
    protocol = Shapes(num_prompts=6).aggregate([]).protocol
    assert protocol["judge"] == "diffalign.shapes.judge"
    assert protocol["min_overlap"] == shapes.MIN_OVERLAP
    assert Shapes(num_prompts=6).aggregate([]).protocol_hash != Shapes(num_prompts=12).aggregate([]).protocol_hash
