"""The LAION aesthetic heads on a tiny CLIP: score, crop, fusion, gradients and files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffalign.reward_models import InvalidMediaError, LaionAesthetic, WeightsError, load_reward_model
from diffalign.reward_models.laion_aesthetic import _layers, fused

FILES = {
    "sac+logos+ava1": "sac+logos+ava1-l14-linearMSE.pth",
    "ava+logos": "ava+logos-l14-linearMSE.pth",
    "ava+logos-relu": "ava+logos-l14-reluMSE.pth",
}
WIDTHS = (12, 1024, 128, 64, 16, 1)


def head_state(numbers: tuple[int, ...], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for number, width, out in zip(numbers, WIDTHS[:-1], WIDTHS[1:], strict=True):
        state[f"layers.{number}.weight"] = torch.randn(out, width, generator=generator) * width**-0.5
        state[f"layers.{number}.bias"] = torch.randn(out, generator=generator)
    return state


@pytest.fixture(scope="module")
def clip(make_clip, tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("vit_l"), act="quick_gelu", seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    torch.save(head_state((0, 2, 4, 6, 7)), folder / FILES["sac+logos+ava1"])
    torch.save(head_state((0, 2, 4, 6, 7), seed=1), folder / FILES["ava+logos"])
    torch.save(head_state((0, 3, 6, 9, 11), seed=2), folder / FILES["ava+logos-relu"])
    return folder


@pytest.fixture(scope="module")
def laion(folder, clip) -> LaionAesthetic:
    """No test may change it."""
    return LaionAesthetic(folder, clip=clip, device="cpu")


def torchvision_crop(image: Image.Image) -> np.ndarray:
    """Short side to 224 and a centre crop whose origin is rounded half to even; CLIP's statistics."""
    w, h = image.size
    size = (224, int(224 * h / w)) if w <= h else (int(224 * w / h), 224)
    array = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    top, left = round((array.shape[0] - 224) / 2), round((array.shape[1] - 224) / 2)
    array = array[top : top + 224, left : left + 224] / 255.0
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return ((array - mean) / std).transpose(2, 0, 1)


@pytest.mark.parametrize("variant", FILES)
def test_scores_equal_numpy(variant, folder, clip, numpy_clip, photos):
    state = {k: v.double().numpy() for k, v in torch.load(folder / FILES[variant], weights_only=True).items()}
    numbers = sorted({int(key.split(".")[1]) for key in state})
    towers = numpy_clip(load_file(clip / "model.safetensors"), heads=(2, 2), act="quick_gelu")
    assert (315 - 224) % 4 == 3, "one of the photos has a crop that two ways of rounding cut differently"
    expected = []
    for image in photos:
        x = towers.image(torchvision_crop(image))
        for number in numbers:
            x = state[f"layers.{number}.weight"] @ x + state[f"layers.{number}.bias"]
            if variant == "ava+logos-relu" and number != numbers[-1]:
                x = np.maximum(x, 0)
        expected.append(float(x[0]))
    model = LaionAesthetic(folder, variant=variant, clip=clip, device="cpu")
    np.testing.assert_allclose(model.score(photos).score.numpy(), expected, rtol=1e-5, atol=1e-5)
    assert model.info.name == ("laion_aesthetic" if variant == "sac+logos+ava1" else f"laion_aesthetic-{variant}")


def test_one_layer_equals_the_chain():
    chain = _layers(12, relu=False).eval()
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(fused(chain)(x.double()).float(), chain.float()(x), rtol=1e-5, atol=1e-5)


def test_the_prompt_is_not_read(laion, photos):
    torch.testing.assert_close(laion(photos, ["a", "b", "c"]), laion.score(photos).score)
    pixels = torch.rand(2, 3, 40, 30, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(laion.score_tensor(pixels), laion.score_tensor(pixels, "a"))
    assert not laion.info.needs_prompt


def test_scores_do_not_depend_on_the_batch(laion, photos):
    alone = torch.cat([laion.score(photo).score for photo in photos])
    torch.testing.assert_close(laion.score(photos).score, alone, rtol=1e-5, atol=1e-5)
    assert laion.score([*photos, *photos], batch_size=2).score.unique().numel() >= 3


def test_score_tensor_equals_score_at_the_models_size(laion, make_photo):
    arrays = [make_photo(224, 224, seed=s) for s in range(2)]
    pixels = torch.stack([torch.from_numpy(a).permute(2, 0, 1) for a in arrays]) / 255
    torch.testing.assert_close(laion.score_tensor(pixels), laion.score(arrays).score, rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", ["sac+logos+ava1", pytest.param("ava+logos-relu", marks=pytest.mark.slow)])
def test_gradient_to_the_pixels_is_right(variant, folder, clip, make_photo, check_gradient):
    double = LaionAesthetic(folder, variant=variant, clip=clip, device="cpu", dtype=torch.float64)
    check_gradient(double.score_tensor, torch.from_numpy(make_photo(90, 70)).permute(2, 0, 1)[None] / 255)


def test_bfloat16_keeps_the_head_in_float32(laion, folder, clip, photos):
    half = LaionAesthetic(folder, clip=clip, device="cpu", dtype=torch.bfloat16)
    assert half.head.weight.dtype == torch.float32
    torch.testing.assert_close(half.score(photos).score, laion.score(photos).score, rtol=2e-2, atol=2e-2)


def test_an_embedding_of_length_zero_has_a_finite_score(folder, clip, photos):
    model = LaionAesthetic(folder, clip=clip, device="cpu")
    with torch.no_grad():
        model.visual_projection.weight.zero_()
    torch.testing.assert_close(model.score(photos).score, model.head.bias.expand(3))


def test_head_and_clip_may_lie_together(laion, folder, clip, tmp_path, photos):
    for source in (clip / "config.json", clip / "model.safetensors", folder / FILES["sac+logos+ava1"]):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    for path in (tmp_path, tmp_path / FILES["sac+logos+ava1"]):
        model = load_reward_model("laion_aesthetic", path=path, device="cpu")
        torch.testing.assert_close(model.score(photos).score, laion.score(photos).score)
    assert model.fingerprint() == laion.fingerprint()


def test_missing_damaged_or_foreign_files_are_refused(folder, clip, clip_folder, tmp_path):
    path = tmp_path / FILES["sac+logos+ava1"]
    home = "https://github.com/christophschuhmann/improved-aesthetic-predictor"

    def refused(match: str, source=path, towers=clip, **options) -> None:
        with pytest.raises(WeightsError, match=match) as caught:
            LaionAesthetic(source, clip=towers, device="cpu", **options)
        assert "\n" not in str(caught.value)

    refused(f"is not on the Hub; expected 'sac.logos.ava1-l14-linearMSE.pth' from {home}", source=None)
    refused(f"no 'ava.logos-l14-reluMSE.pth', only: nothing; .*{home}", source=tmp_path, variant="ava+logos-relu")
    state = head_state((0, 2, 4, 6, 7))
    path.write_bytes((folder / path.name).read_bytes()[:5000])
    refused("cannot read .* as weights of laion_aesthetic")
    torch.save({k: v for k, v in state.items() if k != "layers.7.bias"}, path)
    refused("1 tensors are missing, such as '7.bias'")
    torch.save({**state, "layers.8.bias": torch.ones(1)}, path)
    refused("1 tensors are not of this model, such as '8.bias'")
    torch.save({**state, "layers.0.weight": torch.ones(1024, 768)}, path)
    refused(r"'0.weight' is \[1024, 768\] instead of \[1024, 12\]")
    torch.save(head_state((0, 3, 6, 9, 11)), path)
    refused("tensors are missing")
    torch.save(state, path)
    refused("has quick_gelu; this CLIP has 'gelu'", towers=clip_folder)
    with pytest.raises(ValueError, match="unknown aesthetic head 'v3'"):
        LaionAesthetic(path, variant="v3")
    torch.save({**state, "layers.0.weight": torch.full((1024, 12), torch.nan)}, path)
    with pytest.raises(InvalidMediaError, match="gave a score that is not finite"):
        LaionAesthetic(path, clip=clip, device="cpu").score(torch.zeros(3, 8, 8))
