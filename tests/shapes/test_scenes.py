import json
from dataclasses import replace
from importlib import resources

import numpy as np
import pytest

from diffalign.shapes import scenes
from diffalign.shapes.judge import judge
from diffalign.shapes.scenes import (
    COLORS,
    HELD_OUT,
    IMAGE_SIZE,
    RELATIONS,
    SHAPES,
    TASKS,
    Clause,
    Scene,
    Thing,
    choose_held_out,
    coverage,
    degrade,
    draw_scene,
    make_prompt,
    parse_prompt,
    prompts,
    related,
    render,
    spoil_scene,
)

AREAS = {  # of each shape in a square of side one, from its definition
    "circle": np.pi * 0.95**2 / 4,
    "square": 0.9**2,
    "triangle": 1.85 / 4,
    "diamond": 0.72 / 2,
    "cross": (4 * 0.64 - 0.64**2) / 4,
    "ring": np.pi * (1 - 0.52**2) / 4,
    "arrow": (1 * 0.6 + 1.8 * 1 / 2) / 4,
    "star": 10 * 0.42 * np.sin(np.pi / 5) / 2 / 4,
}


def sample(split, number, seed=0):
    """`number` prompts of a split, tasks in turn."""
    generator = np.random.default_rng(seed)
    by_task = [prompts(split, task) for task in TASKS]
    return [by_task[i % 6][int(generator.integers(len(by_task[i % 6])))] for i in range(number)]


# --- prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "clauses", "relation", "text"),
    [
        ("single_object", (Clause("arrow"),), None, "a photo of an arrow"),
        ("colors", (Clause("ring", 1, "orange"),), None, "a photo of an orange ring"),
        ("counting", (Clause("cross", 3),), None, "a photo of three crosses"),
        ("counting", (Clause("circle", 2, "red"),), None, "a photo of two red circles"),
        ("two_object", (Clause("moon"), Clause("arrow")), None, "a photo of a moon and an arrow"),
        ("position", (Clause("moon"), Clause("star")), "left of", "a photo of a moon left of a star"),
        (
            "color_attr",
            (Clause("heart", 1, "pink"), Clause("square", 1, "orange")),
            None,
            "a photo of a pink heart and an orange square",
        ),
    ],
)
def test_prompts_are_english_and_mean_what_they_say(task, clauses, relation, text):
    prompt = make_prompt(task, clauses, relation)
    assert prompt.text == text
    assert parse_prompt(f" {text}\n") == prompt


def test_every_prompt_is_unique_and_parses_to_itself():
    everything = prompts("all")
    assert len({p.text for p in everything}) == len(everything)
    assert all(parse_prompt(p.text) == p for p in everything)
    assert {p.task for p in everything} == set(TASKS)


@pytest.mark.parametrize("text", ["a photo of a dog", "", "a photo of two red circle", "A photo of a circle"])
def test_other_sentences_are_refused(text):
    with pytest.raises(ValueError, match="not a prompt of the embedded world"):
        parse_prompt(text)


def test_unknown_splits_and_tasks_are_refused():
    with pytest.raises(ValueError, match="unknown split 'test'"):
        prompts("test")
    with pytest.raises(ValueError, match="unknown task 'colour'"):
        prompts("train", "colour")


# --- the split -----------------------------------------------------------------------------------------------------


def test_the_committed_split_is_drawn_again_exactly():
    committed = json.loads(resources.files("diffalign.shapes").joinpath("split.json").read_text(encoding="utf-8"))
    assert choose_held_out() == committed
    assert {task: len(names) for task, names in committed.items()} == HELD_OUT


@pytest.mark.slow
def test_no_training_prompt_shares_a_combination_with_a_held_out_one():
    for task in TASKS:
        if task != "single_object":
            train = {p.combination for p in prompts("train", task)}
            assert train.isdisjoint(p.combination for p in prompts("held_out", task))


def test_combinations_see_through_the_order_of_words():
    one, other = Clause("moon", 1, "red"), Clause("star", 1, "blue")
    assert make_prompt("color_attr", (one, other)).combination == make_prompt("color_attr", (other, one)).combination
    swapped = make_prompt("color_attr", (replace(one, color="blue"), replace(other, color="red")))
    assert swapped.combination != make_prompt("color_attr", (one, other)).combination
    a, b = Clause("moon"), Clause("star")
    for relation, opposite in (("left of", "right of"), ("above", "below")):
        forward, backward = make_prompt("position", (a, b), relation), make_prompt("position", (b, a), opposite)
        assert forward.combination == backward.combination
        assert forward.combination != make_prompt("position", (b, a), relation).combination


def test_train_and_held_out_make_the_whole_world():
    train, held_out = set(prompts("train")), set(prompts("held_out"))
    assert train | held_out == set(prompts("all"))
    assert {p.task for p in train & held_out} == {"single_object"}


@pytest.mark.parametrize("task", [t for t in TASKS if t != "single_object"])
def test_each_task_holds_out_forty_prompts_and_no_word(task):
    held_out, train = prompts("held_out", task), prompts("train", task)
    assert len(held_out) >= 40
    for words in (SHAPES, COLORS):
        met = {w for p in train for c in p.clauses for w in words if w in (c.shape, c.color)}
        asked = {w for p in held_out for c in p.clauses for w in words if w in (c.shape, c.color)}
        assert asked <= met


# --- scenes and pictures -------------------------------------------------------------------------------------------


def test_scenes_and_pictures_depend_on_the_generator_alone():
    for prompt in sample("all", 12):
        one, other = (draw_scene(prompt, np.random.default_rng(7)) for _ in range(2))
        assert one == other
        np.testing.assert_array_equal(render(one), render(other))
    assert draw_scene(prompt, np.random.default_rng(8)) != one


def test_a_known_picture_has_its_known_pixels():
    scene = Scene((Thing("square", "red", 20.0, 40.0, 20.0),), (230, 230, 230))
    image = render(scene)
    assert image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert image.dtype == np.uint8
    inside = np.zeros((IMAGE_SIZE, IMAGE_SIZE), bool)
    inside[32:48, 12:28] = True
    assert (image[inside] == COLORS["red"]).all()
    outside = np.ones_like(inside)
    outside[30:51, 10:31] = False
    assert (image[outside] == 230).all()


@pytest.mark.parametrize("shape", AREAS)
def test_shapes_cover_the_area_of_their_definition(shape):
    covered = coverage(shape, 32.0, 32.0, 40.0).sum()
    assert covered == pytest.approx(AREAS[shape] * 40**2, rel=0.03)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_stay_in_their_square_and_move_with_their_centre(shape):
    mask = coverage(shape, 24.0, 30.0, 20.0)
    rows, columns = np.nonzero(mask > 0.5)
    assert columns.min() >= 13
    assert columns.max() <= 34
    assert rows.min() >= 19
    assert rows.max() <= 40
    assert mask.min() == 0
    assert mask.max() == 1
    np.testing.assert_array_equal(coverage(shape, 34.0, 27.0, 20.0)[3:50, 20:54], mask[6:53, 10:44])


def test_drawn_scenes_show_what_was_asked_inside_the_picture_and_apart():
    generator = np.random.default_rng(1)
    for prompt in sample("all", 60, seed=1):
        scene = draw_scene(prompt, generator)
        wanted = sorted((c.shape, c.color) for c in prompt.clauses for _ in range(c.count))
        for thing, (shape, color) in zip(sorted(scene.things, key=lambda t: (t.shape, t.color)), wanted, strict=True):
            assert thing.shape == shape
            assert color in (None, thing.color)
        for i, thing in enumerate(scene.things):
            assert thing.size / 2 < thing.x < IMAGE_SIZE - thing.size / 2
            assert thing.size / 2 < thing.y < IMAGE_SIZE - thing.size / 2
            for other in scene.things[:i]:
                gap = max(abs(thing.x - other.x), abs(thing.y - other.y)) - (thing.size + other.size) / 2
                assert gap >= 4
        if prompt.relation:
            assert related(scene.things[0], scene.things[1], prompt.relation, clearly=True)


@pytest.mark.parametrize(
    ("dx", "dy", "expected"),
    [
        (20, 0, {"left of"}),
        (-20, 3, {"right of"}),
        (3, 20, {"above"}),
        (0, -20, {"below"}),
        (5, 0, {"left of"}),
        (4.9, 0, set()),
        (0, 0, set()),
        (12, 12, {"left of", "above"}),  # exactly diagonal: both are true
        (12, 12.1, {"above"}),
        (-12, -11.9, {"right of"}),
    ],
)
def test_relations_of_two_centres(dx, dy, expected):
    a, b = Thing("moon", "red", 30, 30, 16), Thing("star", "red", 30 + dx, 30 + dy, 16)
    assert {r for r in RELATIONS if related(a, b, r)} == expected
    assert {r for r in RELATIONS if related(b, a, scenes.OPPOSITE[r])} == expected


def test_what_is_clearly_related_is_related():
    generator = np.random.default_rng(2)
    for _ in range(200):
        a, b = (Thing("moon", "red", *generator.uniform(10, 54, 2), 16) for _ in "ab")
        for relation in RELATIONS:
            assert related(a, b, relation) or not related(a, b, relation, clearly=True)


# --- pictures that miss their prompt -------------------------------------------------------------------------------


def spoilt(number, seed):
    generator = np.random.default_rng(seed)
    for prompt in sample("all", number, seed):
        scene = draw_scene(prompt, generator)
        yield prompt, scene, spoil_scene(prompt, scene, generator)


@pytest.mark.slow
def test_a_spoilt_scene_is_never_what_the_prompt_asks():
    for prompt, scene, wrong in spoilt(48, seed=3):
        verdict = judge(render(wrong), prompt)
        assert not verdict.correct, (prompt.text, scene, wrong, verdict)


@pytest.mark.slow
def test_many_spoilt_scenes_are_never_what_the_prompt_asks():
    for prompt, scene, wrong in spoilt(600, seed=4):
        verdict = judge(render(wrong), prompt)
        assert not verdict.correct, (prompt.text, scene, wrong, verdict)


def test_a_degraded_picture_is_another_picture_of_the_same_form():
    generator = np.random.default_rng(5)
    changed = 0
    for prompt in sample("all", 40, seed=5):
        image = render(draw_scene(prompt, generator))
        worse = degrade(image, generator)
        assert worse.shape == image.shape
        assert worse.dtype == np.uint8
        changed += int(not np.array_equal(worse, image))
    assert changed == 40
