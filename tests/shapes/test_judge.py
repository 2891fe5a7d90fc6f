import io

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from diffalign.shapes.judge import MIXED, judge, read_image
from diffalign.shapes.scenes import (
    COLORS,
    IMAGE_SIZE,
    SHAPES,
    TASKS,
    Clause,
    Scene,
    Thing,
    draw_scene,
    make_prompt,
    parse_prompt,
    prompts,
    related,
    render,
)


def blur(sigma):
    return lambda image, generator: ndimage.gaussian_filter(image / 255.0, (sigma, sigma, 0))


def noise(sd):
    return lambda image, generator: np.clip(image / 255.0 + generator.normal(0, sd, image.shape), 0, 1)


def jpeg(quality):
    def through_a_file(image, generator):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=quality)
        return np.asarray(Image.open(buffer))

    return through_a_file


def clean(image, generator):
    return image


CONDITIONS = [
    pytest.param(clean, 0.99, id="clean"),
    pytest.param(blur(0.5), 0.95, id="blur 0.5"),
    pytest.param(blur(1.0), 0.95, id="blur 1"),
    pytest.param(noise(0.05), 0.95, id="noise 0.05"),
    pytest.param(jpeg(50), 0.95, id="jpeg 50"),
]


def drawn(number, seed):
    """`number` training and held-out prompts, tasks in turn, each with a scene."""
    generator = np.random.default_rng(seed)
    by_task = [prompts("all", task) for task in TASKS]
    for i in range(number):
        prompt = by_task[i % 6][int(generator.integers(len(by_task[i % 6])))]
        yield prompt, draw_scene(prompt, generator), generator


def share_right(number, condition, seed):
    verdicts = [judge(condition(render(scene), rng), prompt) for prompt, scene, rng in drawn(number, seed)]
    return np.mean([v.correct for v in verdicts]), [v.reason for v in verdicts if not v.correct]


@pytest.mark.parametrize(("condition", "least"), CONDITIONS[:1])
def test_the_judge_reads_what_was_drawn(condition, least):
    share, reasons = share_right(48, condition, seed=10)
    assert share >= least, reasons


@pytest.mark.slow
@pytest.mark.parametrize(("condition", "least"), CONDITIONS)
def test_the_judge_reads_many_pictures(condition, least):
    share, reasons = share_right(240, condition, seed=11)
    assert share >= least, reasons


def satisfies(scene, prompt):
    """Whether a scene truly shows what another prompt asks, from its objects and not from its picture."""
    things = list(scene.things)
    if len(things) != sum(c.count for c in prompt.clauses):
        return False
    for clause in prompt.clauses:
        fitting = [t for t in things if t.shape == clause.shape and clause.color in (None, t.color)]
        if len(fitting) != clause.count:
            return False
        things = [t for t in things if t not in fitting]
    return prompt.relation is None or related(scene.things[0], scene.things[1], prompt.relation) == (
        scene.things[0].shape == prompt.clauses[0].shape
    )


def share_rejected(number, seed):
    """Pictures against prompts they do not satisfy, half of them of the same task."""
    generator = np.random.default_rng(seed)
    rejected = []
    for i, (prompt, scene, _) in enumerate(drawn(number, seed)):
        choices = prompts("all", prompt.task if i % 2 else None)
        other = choices[int(generator.integers(len(choices)))]
        if not satisfies(scene, other):
            rejected.append(not judge(render(scene), other).correct)
    assert len(rejected) > 0.9 * number
    return np.mean(rejected)


@pytest.mark.slow
def test_the_judge_rejects_scenes_of_other_prompts():
    assert share_rejected(60, seed=12) >= 0.99


@pytest.mark.slow
def test_the_judge_rejects_many_scenes_of_other_prompts():
    assert share_rejected(600, seed=13) >= 0.99


# --- single rules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", COLORS)
def test_every_shape_in_every_color_is_read_where_it_lies(shape, color):
    drawn_thing = Thing(shape, color, 29.3, 35.6, 21.0)
    [thing] = read_image(render(Scene((drawn_thing,)))).things
    assert (thing.shape, thing.color) == (shape, color)
    assert (thing.x, thing.y) == pytest.approx((29.3, 35.6), abs=1.0)
    assert thing.size == pytest.approx(21.0, rel=0.1)


def picture(*things):
    return render(Scene(tuple(Thing(shape, color, x, y, 16.0) for shape, color, x, y in things)))


CORNERS = [(14, 14), (50, 14), (14, 50), (50, 50), (32, 32)]


@pytest.mark.parametrize("found", range(6))
@pytest.mark.parametrize("asked", [2, 3, 4])
def test_counting_wants_the_exact_number(asked, found):
    image = picture(*[("star", "blue", *CORNERS[i]) for i in range(found)])
    verdict = judge(image, make_prompt("counting", (Clause("star", asked),)))
    assert verdict.correct == (asked == found)
    if found < asked:
        assert f"expected {asked} star, found {found}" in verdict.reason
    if found > asked:
        assert verdict.reason == "too much: " + ", ".join(["blue star"] * (found - asked))


def test_counting_a_color_does_not_count_the_others():
    prompt = parse_prompt("a photo of two red stars")
    assert judge(picture(("star", "red", 14, 14), ("star", "red", 50, 50)), prompt).correct
    assert not judge(picture(("star", "red", 14, 14), ("star", "blue", 50, 50)), prompt).correct
    extra = picture(("star", "red", 14, 14), ("star", "red", 50, 50), ("star", "blue", 14, 50))
    assert judge(extra, prompt).reason == "too much: blue star"


def test_colors_belong_to_their_objects():
    prompt = parse_prompt("a photo of a red moon and a blue star")
    assert judge(picture(("star", "blue", 14, 14), ("moon", "red", 50, 50)), prompt).correct
    assert not judge(picture(("star", "red", 14, 14), ("moon", "blue", 50, 50)), prompt).correct


@pytest.mark.parametrize(
    ("moon", "star", "relations"),
    [
        ((14, 32), (50, 32), {"left of"}),
        ((50, 32), (14, 34), {"right of"}),
        ((32, 14), (30, 50), {"above"}),
        ((32, 50), (32, 14), {"below"}),
        ((14, 20), (50, 44), {"left of"}),  # mainly along the axis, not only along it
    ],
)
def test_relations_follow_the_places(moon, star, relations):
    image = picture(("moon", "red", *moon), ("star", "red", *star))
    for relation in ("left of", "right of", "above", "below"):
        verdict = judge(image, make_prompt("position", (Clause("moon"), Clause("star")), relation))
        assert verdict.correct == (relation in relations)
        if not verdict.correct:
            assert verdict.reason == f"the moon is not {relation} the star"


def test_one_object_must_be_alone():
    prompt = parse_prompt("a photo of a circle")
    assert judge(picture(("circle", "pink", 32, 32)), prompt).correct
    assert judge(picture(("circle", "pink", 14, 14), ("star", "pink", 50, 50)), prompt).reason == "too much: pink star"
    assert "read: nothing" in judge(picture(), prompt).reason


def test_a_region_that_is_no_shape_spoils_a_picture():
    image = picture(("circle", "blue", 16, 16))
    image[40:46, 30:62] = COLORS["green"]  # a bar
    verdict = judge(image, parse_prompt("a photo of a circle"))
    assert not verdict.correct
    assert verdict.reason == "1 region(s) that are no shape of this world"


def test_a_color_that_has_no_name_is_right_only_where_none_is_asked():
    image = picture(("circle", "blue", 32, 32))
    image[(image == COLORS["blue"]).all(-1)] = (0, 255, 255)
    assert [thing.color for thing in read_image(image).things] == [MIXED]
    assert judge(image, parse_prompt("a photo of a circle")).correct
    assert not judge(image, parse_prompt("a photo of a blue circle")).correct


def test_an_object_of_two_colors_keeps_its_shape_and_loses_its_color():
    image = picture(("star", "blue", 32, 32))
    left = np.arange(IMAGE_SIZE)[None, :] < 32
    image[(image == COLORS["blue"]).all(-1) & left] = COLORS["red"]
    assert [(thing.shape, thing.color) for thing in read_image(image).things] == [("star", MIXED)]
    assert judge(image, parse_prompt("a photo of a star")).correct
    assert not judge(image, parse_prompt("a photo of a blue star")).correct


def test_specks_are_overlooked():
    image = picture(("circle", "blue", 20, 20))
    image[50:53, 50:53] = COLORS["red"]
    assert judge(image, parse_prompt("a photo of a circle")).correct


def test_empty_and_random_pictures_show_nothing():
    prompt = parse_prompt("a photo of a circle")
    static = np.random.default_rng(0).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    for image in (np.zeros_like(static), np.full_like(static, 255), static):
        assert not judge(image, prompt).correct


@pytest.mark.slow
def test_bytes_and_floats_are_read_alike():
    for prompt, scene, _ in drawn(12, seed=14):
        image = render(scene)
        assert judge(image, prompt) == judge(image.astype(np.float32) / 255, prompt)


@pytest.mark.parametrize("shape", [(64, 64), (32, 32, 3), (3, 64, 64), (64, 64, 4)])
def test_pictures_of_another_size_are_refused(shape):
    with pytest.raises(ValueError, match=r"the judge reads \[64, 64, 3\] pictures"):
        read_image(np.zeros(shape, np.uint8))
