"""The reward model `geneval`: colours told by CLIP, the three scores, prompts that are looked up, bad input."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from diffalign.reward_models import InvalidMediaError, WeightsError, load_reward_model
from diffalign.reward_models.geneval import GenEval
from diffalign.reward_models.geneval_colors import ColorNamer, cut_out
from diffalign.reward_models.geneval_prompts import COLORS
from diffalign.reward_models.geneval_rules import Detection, Rules
from tests.reward_models.geneval_files import PaintedDetector, geneval_data, paint, save_detector

CAT, DOG = 15, 16
ONE, TWO, LEFT, RED = "one cat", "a cat and a dog", "a dog left of a cat", "a red cat"
ROWS = [
    {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": ONE},
    {"tag": "two_object", "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1}], "prompt": TWO},
    {
        "tag": "position",
        "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
        "prompt": LEFT,
    },
    {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}], "prompt": RED},
]


@pytest.fixture(scope="module")
def clip(make_clip, tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("vit_l"), act="quick_gelu", seed=3)


@pytest.fixture(scope="module")
def make(clip, tmp_path_factory):
    file = tmp_path_factory.mktemp("metadata") / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def build(**options):
        settings = {"detector": PaintedDetector(), "clip": clip, "metadata": file, "device": "cpu"} | options
        return GenEval(data=geneval_data(), **settings)

    return build


@pytest.fixture(scope="module")
def model(make):
    return make()


ONE_CAT = paint([(CAT, (4, 4, 20, 20))])
TWO_CATS = paint([(CAT, (4, 4, 20, 20)), (CAT, (30, 4, 50, 20))])
DOG_LEFT = paint([(DOG, (2, 10, 14, 22)), (CAT, (40, 10, 52, 22))])


def test_colours_equal_clip_computed_in_numpy(clip, numpy_clip, numpy_crop):
    reference = numpy_clip(load_file(clip / "model.safetensors"), heads=(2, 2), act="quick_gelu")
    tokenizer = CLIPTokenizer.from_pretrained(clip)
    classes = []
    for color in COLORS:
        sentences = [f"a photo of a {color} bear", f"a photo of a {color}-colored bear", f"a photo of a {color} object"]
        mean = np.mean([reference.text(tokenizer(s)["input_ids"]) for s in sentences], axis=0)
        classes.append(mean / np.linalg.norm(mean))
    namer = ColorNamer(clip, device="cpu")
    torch.testing.assert_close(
        namer.classes("bear"), torch.tensor(np.array(classes), dtype=torch.float32), rtol=1e-5, atol=1e-5
    )
    draw = np.random.default_rng(0)
    image = Image.fromarray(draw.integers(0, 256, (90, 120, 3), dtype=np.uint8))
    found = []
    for x1, y1, x2, y2 in [(0, 0, 50, 50), (30, 20, 110, 80), (60, 10, 66, 18)]:
        mask = np.zeros((90, 120), dtype=bool)
        mask[y1:y2, x1:x2] = draw.random((y2 - y1, x2 - x1)) < 0.7
        found.append(Detection(21, 0.9, (x1, y1, x2, y2), mask))
    expected = []
    for detection in found:
        pixels = np.where(detection.mask[..., None], np.asarray(image), 153).astype(np.uint8)
        x1, y1, x2, y2 = detection.box
        cosines = np.array(classes) @ reference.image(numpy_crop(Image.fromarray(pixels[y1:y2, x1:x2])))
        expected.append(COLORS[int(cosines.argmax())])
    assert namer.name(image, "bear", found) == expected
    assert [namer.name(image, "bear", [d])[0] for d in found] == expected
    assert namer.name(image, "bear", []) == []


def test_a_cut_out_has_grey_around_the_object_unless_the_background_is_kept():
    image = Image.new("RGB", (8, 6), (10, 20, 30))
    mask = np.zeros((6, 8), dtype=bool)
    mask[2, 3] = True
    detection = Detection(0, 0.9, (2.0, 1.0, 5.0, 4.0), mask)
    expected = np.full((3, 3, 3), 153)
    expected[1, 1] = (10, 20, 30)
    np.testing.assert_array_equal(np.asarray(cut_out(image, detection)), expected)
    kept = np.asarray(cut_out(image, detection, "original"))
    assert kept.shape == (3, 3, 3)
    assert (kept == (10, 20, 30)).all()


def test_another_clip_is_refused(make_clip, tmp_path):
    with pytest.raises(WeightsError, match="has quick_gelu; this CLIP has 'gelu'"):
        ColorNamer(make_clip(tmp_path), device="cpu")
    with pytest.raises(ValueError, match="background must be 'grey' or 'original', got 'red'"):
        ColorNamer(tmp_path, background="red")


@pytest.mark.parametrize(
    ("image", "prompt", "official", "strict", "dense"),
    [
        (ONE_CAT, ONE, 1, 1, 1),
        (TWO_CATS, ONE, 1, 0, 0),
        (ONE_CAT, TWO, 0, 0, 0.5),
        (DOG_LEFT, TWO, 1, 1, 1),
        (DOG_LEFT, LEFT, 1, 1, 1),
        (DOG_LEFT.transpose(Image.Transpose.FLIP_LEFT_RIGHT), LEFT, 0, 0, 2 / 3),
    ],
)
def test_the_three_scores(model, image, prompt, official, strict, dense):
    found = model.score([image], [prompt])
    assert {name: pytest.approx(float(v)) for name, v in found.dims.items()} == {
        "official": official, "strict": strict, "dense": dense,
    }  # fmt: skip
    assert float(found.score) == pytest.approx(dense)
    assert (found.raw[0] == "") == bool(strict)


def test_the_colour_of_a_prompt_is_the_one_that_clip_tells(model):
    (color,) = model.colors.name(ONE_CAT, "cat", model.detector.detect([ONE_CAT], [0.3])[0])
    found = model.score([ONE_CAT], [RED])
    assert float(found.dims["official"]) == float(color == "red")
    assert float(found.score) == (1 + (color == "red")) / 2


def test_other_primary_scores_have_names_of_their_own(make):
    for kind in ("official", "strict"):
        model = make(score=kind)
        assert (model.info.name, model.info.dims[-1]) == (f"geneval-{kind}", kind)
        assert float(model([TWO_CATS], ONE)) == float(kind == "official")
    with pytest.raises(ValueError, match="unknown score 'soft'"):
        make(score="soft")


def test_scores_do_not_depend_on_the_others_in_the_batch(model):
    images, prompts = [ONE_CAT, TWO_CATS, DOG_LEFT, ONE_CAT], [ONE, ONE, LEFT, RED]
    together = model.score(images, prompts).dims
    for name, values in together.items():
        alone = [float(model.score([i], [p]).dims[name]) for i, p in zip(images, prompts, strict=True)]
        assert values.tolist() == alone


def test_what_cannot_be_judged_is_invalid_and_never_zero(model, tmp_path):
    nan = torch.full((3, 8, 8), float("nan"))
    torn = tmp_path / "torn.png"
    ONE_CAT.save(torn)
    torn.write_bytes(torn.read_bytes()[:60])
    found = model.score([ONE_CAT, nan, torn, ONE_CAT], [ONE, ONE, ONE, "a zebu"], on_invalid="nan")
    assert found.valid.tolist() == [True, False, False, False]
    assert found.score.isnan().tolist() == [False, True, True, True]
    assert "prompt 'a zebu' is not in the metadata" in found.errors[3]
    with pytest.raises(InvalidMediaError, match="'a zebu' is not in the metadata"):
        model.score([ONE_CAT], ["a zebu"])


def test_a_thread_of_pixels_is_invalid_for_its_colour_alone(model):
    thread = paint([(CAT, (5, 0, 6, 1010))], size=(16, 1010))
    found = model.score([thread, thread], [RED, ONE], on_invalid="nan")
    assert found.valid.tolist() == [False, True]
    assert "1000:1" in found.errors[0]


def test_pictures_are_turned_as_their_exif_data_say(model, tmp_path):
    turned = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    DOG_LEFT.transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
    assert model.preprocess(turned).size == DOG_LEFT.size
    assert float(model.score([turned], [LEFT]).score) == 1.0
    assert float(model.score([DOG_LEFT.transpose(Image.Transpose.ROTATE_90)], [LEFT]).score) < 1.0


def test_options_that_change_scores_change_the_fingerprint(model, make):
    others = [
        make(rules=Rules(threshold=0.5)),
        make(released_position=True),
        make(background="original"),
        make(metadata=None),
    ]
    assert len({m.fingerprint() for m in (model, *others)}) == 5
    flipped = DOG_LEFT.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert float(others[1].score([flipped], [LEFT]).score) == pytest.approx(3 / 4)
    assert float(make(detector=PaintedDetector(0.4), rules=Rules(threshold=0.5)).score([ONE_CAT], ONE).score) == 0.0


def test_options_that_contradict_each_other_are_refused(make, tmp_path):
    with pytest.raises(ValueError, match="were set on float32 scores"):
        make(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="either a detector or a path"):
        make(path_or_id=tmp_path)


def test_it_is_loaded_by_name_with_the_published_layouts(clip, tmp_path):
    detector = save_detector(tmp_path / "detector")
    model = load_reward_model(
        "geneval-strict", path=detector, clip=clip, data=geneval_data(), device="cpu", local_files_only=True
    )
    assert isinstance(model, GenEval)
    assert re.fullmatch(r"detector:[0-9a-f]{8}@800x1333", model.settings()["detector"])
    with pytest.raises(WeightsError, match=r"there is no 'object_names.txt' in"):
        load_reward_model("geneval", path=detector, clip=clip, data=tmp_path)
