"""VBench's arithmetic: the published totals, the ranges, what a missing dimension does, and prompts as file names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffalign.eval.vbench_prompts import (
    DIMENSIONS,
    FULL_INFO,
    QUALITY,
    SEMANTIC,
    file_name,
    read_entries,
    read_entry_rows,
)
from diffalign.eval.vbench_table import (
    PUBLISHED,
    RANGES,
    WEIGHTS,
    normalised,
    quality_score,
    semantic_score,
    total_score,
)
from diffalign.reward_models.base import WeightsError

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "vbench"
needs_data = pytest.mark.skipif(not (DATA / FULL_INFO.filename).is_file(), reason="VBench's prompts are not at hand")


@pytest.mark.parametrize(
    ("quality", "semantic", "total"),
    [
        (82.20, 73.42, 80.444),
        (82.57, 74.76, 81.008),
        (82.75, 77.04, 81.608),
        (85.09, 75.82, 83.236),
        (85.51, 79.35, 84.278),
        (86.67, 84.44, 86.224),
    ],
)
def test_published_totals_follow_from_quality_and_semantic(quality, semantic, total):
    assert total_score(quality, semantic) == pytest.approx(total, abs=1e-9)


def test_the_table_agrees_with_itself():
    both = [row for row in PUBLISHED if "quality" in row]
    assert len(both) == 6
    for row in both:
        assert round(100 * total_score(row["quality"], row["semantic"]), 2) == round(100 * row["total"], 2)
    assert all(row["source"] for row in PUBLISHED)


def test_ends_of_the_ranges_and_no_clipping():
    low = {name: RANGES[name][0] for name in DIMENSIONS}
    high = {name: RANGES[name][1] for name in DIMENSIONS}
    assert (quality_score(low), semantic_score(low)) == (0, 0)
    assert quality_score(high) == pytest.approx(1)
    assert semantic_score(high) == pytest.approx(1)
    assert normalised("motion_smoothness", 1.0) > 1
    assert normalised("subject_consistency", 0.0) == pytest.approx(-0.1462 / 0.8538)


def test_dynamic_degree_has_half_the_weight():
    low = {name: RANGES[name][0] for name in DIMENSIONS}
    assert quality_score(low | {"dynamic_degree": 1.0}) == pytest.approx(0.5 / 6.5)
    assert quality_score(low | {"aesthetic_quality": 1.0}) == pytest.approx(1 / 6.5)
    assert semantic_score(low | {"color": 1.0}) == pytest.approx(1 / 9)


def test_a_missing_dimension_makes_no_number():
    high = {name: RANGES[name][1] for name in DIMENSIONS}
    for name in DIMENSIONS:
        part = {key: value for key, value in high.items() if key != name}
        quality, semantic = quality_score(part), semantic_score(part)
        assert (quality is None) == (name in QUALITY)
        assert (semantic is None) == (name in SEMANTIC)
        assert total_score(quality, semantic) is None


@needs_data
def test_constants_are_the_published_ones():
    constants = json.loads((DATA / "aggregation_constants.json").read_text(encoding="utf-8"))
    assert {name: list(ends) for name, ends in RANGES.items()} == constants["normalise"]
    assert (list(QUALITY), list(SEMANTIC)) == (constants["quality"], constants["semantic"])
    assert {name: constants["weights"].get(name, 1) for name in DIMENSIONS} == WEIGHTS


@needs_data
def test_the_published_prompts_and_how_many_each_dimension_has():
    entries = read_entries(folder=DATA)
    assert len(entries) == 944
    counts = {name: sum(name in entry.dimensions for entry in entries) for name in DIMENSIONS}
    assert counts == {
        **dict.fromkeys(("subject_consistency", "motion_smoothness", "dynamic_degree"), 72),
        **dict.fromkeys(("background_consistency", "scene"), 86),
        **dict.fromkeys(("overall_consistency", "aesthetic_quality", "imaging_quality"), 93),
        **dict.fromkeys(("human_action", "temporal_style"), 100),
        "appearance_style": 90,
        "color": 85,
        "spatial_relationship": 84,
        "multiple_objects": 82,
        "object_class": 79,
        "temporal_flickering": 75,
    }
    assert all(file_name(entry.prompt, 24) for entry in entries)
    twice = next(entry for entry in entries if entry.prompt == "The bund Shanghai, oil painting")
    assert twice.auxiliary["appearance_style"] == {"appearance_style": "oil painting"}
    assert set(twice.dimensions) > {"appearance_style", "aesthetic_quality"}


def test_rows_that_are_none_of_vbench():
    with pytest.raises(WeightsError, match="row 2 is none of VBench's"):
        read_entry_rows([{"prompt_en": "a cat", "dimension": ["color"]}, {"prompt": "a dog"}])
    with pytest.raises(WeightsError, match="unknown dimension"):
        read_entry_rows([{"prompt_en": "a cat", "dimension": ["colour"]}])


@pytest.mark.parametrize("prompt", ["../../etc/passwd", "a/b", "a\\b", "", " ", "a\0b", "a\nb", "é" * 130])
def test_a_prompt_that_cannot_be_a_name_is_refused(prompt):
    with pytest.raises(ValueError, match="cannot be the name of a file"):
        file_name(prompt, 0)


def test_names_are_the_prompt_as_it_is():
    assert file_name("In a still frame, a stop sign", 3) == "In a still frame, a stop sign-3.mp4"
    assert file_name("..", 0) == "..-0.mp4"
