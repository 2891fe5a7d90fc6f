"""What every image reward model promises, on tiny random ones of each kind."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign import plugins
from diffalign.reward_models import (
    CLIPScore,
    HPSv2,
    InvalidMediaError,
    PickScore,
    RewardModel,
    ShapesScore,
    WeightsError,
    load_reward_model,
)

PROMPTS = ["a red circle", "two blue squares left of a green triangle", "x"]


@pytest.fixture(
    scope="module",
    params=[
        "pickscore",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("hpsv2.1", "clipscore", "clipscore-torchmetrics")),
        pytest.param("clipscore-logit", marks=pytest.mark.slow),
        "shapes",
    ],
)
def model(request, clip_folder, hps_folder, shapes_folder, hps_config) -> RewardModel:
    """No test may change it."""
    if request.param.startswith("hps"):
        return HPSv2(hps_folder, model_config=hps_config, device="cpu")
    folder = shapes_folder if request.param == "shapes" else clip_folder
    return load_reward_model(request.param, path=folder, device="cpu")


def test_call_gives_a_score_per_image(model, photos):
    scores = model(photos, PROMPTS)
    assert scores.shape == (3,)
    assert scores.dtype == torch.float32
    assert scores.unique().numel() == 3
    output = model.score(photos, PROMPTS)
    torch.testing.assert_close(output.score, scores, rtol=0, atol=0)
    torch.testing.assert_close(output.dims["overall"], scores, rtol=0, atol=0)
    assert output.valid.all()
    assert output.errors == (None, None, None)


def test_all_input_types_agree(model, make_photo, tmp_path):
    array = make_photo(100, 80)
    image = Image.fromarray(array)
    image.save(tmp_path / "a.png")
    chw = torch.from_numpy(array).permute(2, 0, 1)
    kinds = [
        image,
        array,
        array / 255.0,
        chw,
        chw / 255,
        (chw / 255).double(),
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
    ]
    scores = torch.stack([model(kind, "a thing")[0] for kind in kinds])
    torch.testing.assert_close(scores, scores[:1].expand(len(kinds)), rtol=0, atol=0)
    for batch in (chw[None].repeat(2, 1, 1, 1) / 255, np.stack([array, array])):
        torch.testing.assert_close(model(batch, "a thing"), scores[:1].repeat(2), rtol=1e-5, atol=1e-5)


def test_scores_do_not_depend_on_the_batch(model, photos):
    alone = torch.cat([model(p, t) for p, t in zip(photos, PROMPTS, strict=True)])
    for batch_size in (1, 2, 32):
        together = model.score([*photos, *reversed(photos)], [*PROMPTS, *reversed(PROMPTS)], batch_size=batch_size)
        torch.testing.assert_close(together.score, torch.cat([alone, alone.flip(0)]), rtol=1e-5, atol=1e-5)


def test_score_tensor_equals_score_at_the_models_size(model, make_photo):
    size = model.towers.image_size
    arrays = [make_photo(size, size, seed=s) for s in range(3)]
    pixels = torch.stack([torch.from_numpy(a).permute(2, 0, 1) for a in arrays]) / 255
    torch.testing.assert_close(model.score_tensor(pixels, PROMPTS), model(arrays, PROMPTS), rtol=0, atol=1e-4)


def test_score_tensor_is_near_score_at_other_sizes(model, make_photo):
    """Same geometry: only the 8-bit rounding of the resized picture differs."""
    arrays = [make_photo(301, 200, seed=s) // 2 + 64 for s in range(3)]  # PIL clips bicubic overshoot
    pixels = torch.stack([torch.from_numpy(a).permute(2, 0, 1) for a in arrays]) / 255
    tensor = model.preprocess_tensor(pixels)
    image = torch.stack([model.preprocess(a) for a in arrays])
    assert tensor.shape == image.shape
    assert (tensor - image).abs().max() < 1.2 / 255 / 0.26  # PIL rounds once per axis, and cubic weights amplify


def test_gradient_to_the_pixels_is_right(model, make_photo, clip_folder, hps_folder, shapes_folder, hps_config):
    """Central differences in float64 along random directions, through resize, crop or bars, towers and score."""
    options = {"model_config": hps_config} if isinstance(model, HPSv2) else {}
    options |= {"variant": model.variant} if isinstance(model, CLIPScore) else {}
    folder = hps_folder if isinstance(model, HPSv2) else clip_folder
    double = type(model)(folder, device="cpu", dtype=torch.float64, **options)
    pixels = torch.from_numpy(make_photo(90, 70)).permute(2, 0, 1)[None].double() / 255
    prompt = next(p for p in "abcdefgh" if float(double.score_tensor(pixels, p)) > 0)  # 2.5 max(cos, 0) is flat below
    pixels.requires_grad_(True)
    score = double.score_tensor(pixels, prompt)
    assert score.dtype == torch.float64
    (gradient,) = torch.autograd.grad(score.sum(), pixels)
    assert gradient.isfinite().all()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = torch.randn(pixels.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            up, down = (double.score_tensor(pixels + s * 1e-5 * direction, prompt) for s in (1, -1))
        expected = float((up - down) / 2e-5)
        assert abs(expected) > 1e-6
        assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_model_is_frozen(model):
    assert not any(p.requires_grad for p in model.parameters())
    holder = torch.nn.Sequential(model).train()
    assert not any(m.training for m in holder[0].modules())


def test_equal_prompts_are_encoded_once(model, photos, monkeypatch):
    seen: list[str] = []
    encode = model.towers.encode_texts
    monkeypatch.setattr(model.towers, "encode_texts", lambda texts: seen.extend(texts) or encode(texts))
    model.score(photos * 3, ["one", "two", "one"] * 3, batch_size=2)
    assert seen == [model.wrap_prompt("one"), model.wrap_prompt("two")]


def test_one_prompt_serves_all_media(model, photos):
    for prompt in ("a", ["a"]):
        torch.testing.assert_close(model(photos, prompt), model(photos, ["a"] * 3), rtol=0, atol=0)
    with pytest.raises(ValueError, match="got 2 prompts for 3 media"):
        model(photos, ["a", "b"])
    with pytest.raises(ValueError, match="needs prompts"):
        model.score(photos)
    with pytest.raises(TypeError, match="prompts must be strings, got int"):
        model(photos, ["a", "b", 3])


def test_matrix_equals_single_scores(model, photos, tmp_path):
    matrix = model.score_matrix(photos, [*PROMPTS, PROMPTS[0]], batch_size=2)
    expected = torch.stack([model(photos, p) for p in [*PROMPTS, PROMPTS[0]]], dim=1)
    torch.testing.assert_close(matrix, expected, rtol=1e-5, atol=1e-5)
    holed = model.score_matrix([tmp_path / "no.png", photos[0]], PROMPTS, on_invalid="nan")
    assert holed.isnan().all(dim=1).tolist() == [True, False]


def test_compare_is_a_logistic_of_the_difference(model, photos):
    a, b = photos[:2], photos[1:]
    output = model.compare(a, b, "a red circle")
    expected = 1 / (
        1 + np.exp(-(model(a, "a red circle") - model(b, "a red circle")).double().numpy() / model.info.tau)
    )
    np.testing.assert_allclose(output.p_a.numpy(), expected, rtol=1e-3)
    swapped = model.compare(b, a, "a red circle")
    torch.testing.assert_close(swapped.p_a, 1 - output.p_a, rtol=0, atol=1e-5)
    same = model.compare(a, a, "a red circle")
    assert same.tie.all()
    assert (same.p_a == 0.5).all()
    assert not output.tie.any()
    assert output.valid.all()
    with pytest.raises(ValueError, match="as many a as b, got 2 and 1"):
        model.compare(a, b[:1], "x")


def test_bad_media_raise_or_become_nan(model, photos, tmp_path):
    broken = tmp_path / "broken.png"
    photos[0].save(broken)
    broken.write_bytes(broken.read_bytes()[:2000])
    (tmp_path / "text.png").write_text("not a picture")
    bad = {
        "no such file": tmp_path / "missing.png",
        "cannot be read": broken,
        "cannot be read as": tmp_path / "text.png",
        "floats in \\[0, 1\\], got values from -1 to 1": torch.tensor([-1.0, 1.0]).expand(3, 2, 2),
        "got values from nan": np.full((4, 4, 3), np.nan),
        "got shape \\(5, 5, 3\\)": torch.zeros(5, 5, 3),
        "got int64": np.zeros((4, 4, 3), dtype=np.int64),
        "PIL mode I;16": Image.new("I;16", (4, 4)),
    }
    for message, item in bad.items():
        with pytest.raises(InvalidMediaError, match=f"medium 1: .*{message}"):
            model([photos[0], item], "a")
    media = [photos[0], *bad.values(), photos[1]]
    output = model.score(media, "a", batch_size=3, on_invalid="nan")
    assert output.valid.tolist() == [True, *[False] * len(bad), True]
    assert output.score.isnan().tolist() == [False, *[True] * len(bad), False]
    assert all(e is not None and "\n" not in e for e in output.errors[1:-1])
    torch.testing.assert_close(output.score[[0, -1]], model(photos[:2], "a"), rtol=1e-5, atol=1e-5)
    pair = model.compare([photos[0], photos[0]], [photos[1], bad["no such file"]], "a", on_invalid="nan")
    assert pair.valid.tolist() == [True, False]
    assert pair.p_a.isnan().tolist() == [False, True]


def test_a_score_that_is_not_finite_is_invalid(model, photos):
    model = copy.deepcopy(model)  # the other tests use it too
    with torch.no_grad():
        next(p for p in model.parameters() if p.ndim == 4).fill_(float("nan"))  # the patch embedding
    with pytest.raises(InvalidMediaError, match="not finite"):
        model(photos[0], "a")
    output = model.score(photos, "a", on_invalid="nan")
    assert not output.valid.any()
    assert output.score.isnan().all()


def test_unusual_modes_are_read_as_documented(model, make_photo, tmp_path, recwarn):
    rgb = Image.fromarray(make_photo(64, 64))
    alpha = Image.fromarray(make_photo(64, 64, channels=4, seed=3))
    palette = rgb.convert("P")
    palette.info["transparency"] = bytes(range(256))
    pairs = [
        (alpha, Image.fromarray(np.asarray(alpha)[..., :3])),
        (palette, palette.convert("RGBA").convert("RGB")),
        (rgb.convert("CMYK"), rgb.convert("CMYK").convert("RGB")),
        (rgb.convert("L"), Image.fromarray(np.repeat(np.asarray(rgb.convert("L"))[..., None], 3, axis=2))),
        (np.asarray(rgb.convert("L")), rgb.convert("L").convert("RGB")),
        (torch.from_numpy(np.array(alpha)).permute(2, 0, 1), Image.fromarray(np.asarray(alpha)[..., :3])),
    ]
    for given, plain in pairs:
        torch.testing.assert_close(model(given, "a"), model(plain, "a"), rtol=0, atol=0)
    assert not recwarn.list


def test_empty_input_gives_empty_scores(model):
    assert model([], "a").shape == (0,)
    assert model.score_matrix([], ["a"]).shape == (0, 1)


def test_fingerprint_follows_the_weights(model):
    model = copy.deepcopy(model)
    before = model.fingerprint()
    assert before == model.fingerprint()
    assert len(before) == 16
    with torch.no_grad():
        weight = next(p for p in model.parameters() if p.ndim == 2)
        weight.copy_(weight.flip(0))  # the same numbers in other places
    assert model.fingerprint() != before


def test_package_loads_no_heavy_module():
    code = (
        "import sys, diffalign.reward_models as r; assert 'HPSv2' in dir(r);"
        "heavy = {'torch', 'transformers', 'open_clip', 'PIL', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_models_are_found_by_name():
    for name, model_class in {
        "pickscore": PickScore,
        "hpsv2": HPSv2,
        "clipscore": CLIPScore,
        "shapes": ShapesScore,
    }.items():
        assert plugins.find("reward_models", name) is model_class


def test_unknown_names_and_options_are_named(clip_folder):
    with pytest.raises(ValueError, match="unknown reward model 'pikscore'; did you mean 'pickscore'"):
        load_reward_model("pikscore")
    with pytest.raises(ValueError, match="no option 'devise'; did you mean 'device'"):
        load_reward_model("PickScore", path=clip_folder, devise="cpu")
    with pytest.raises(ValueError, match=r"means version='2\.1', but version='2\.0'"):
        load_reward_model("hpsv2.1", version="2.0")
    with pytest.raises(ValueError, match=r"unknown HPSv2 version 2\.1 \(available: '2\.1', '2\.0'\)"):
        load_reward_model("hpsv2", version=2.1)
    with pytest.raises(ValueError, match="unknown CLIPScore variant 'x'"):
        load_reward_model("clipscore", variant="x")


@pytest.mark.parametrize(
    ("name", "where", "file"),
    [
        ("pickscore", "yuvalkirstain/PickScore_v1", "model.safetensors"),
        ("hpsv2.1", "xswu/HPSv2", "HPS_v2.1_compressed.pt"),
        ("hpsv2.0", "xswu/HPSv2", "HPS_v2_compressed.pt"),
        ("clipscore", "openai/clip-vit-base-patch32", "model.safetensors"),
        ("clipscore-logit", "openai/clip-vit-large-patch14", "model.safetensors"),
    ],
)
def test_offline_errors_say_where_the_weights_are(name, where, file, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for path in (None, tmp_path / "nowhere", tmp_path):
        with pytest.raises(WeightsError) as caught:
            load_reward_model(name, path=path, device="cpu", local_files_only=True)
        message = str(caught.value)
        assert repr(where) in message
        assert repr(file) in message
        assert "local folder" in message
        assert "\n" not in message
