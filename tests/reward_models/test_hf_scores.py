"""PickScore, CLIPScore and ShapesScore against CLIP computed in NumPy, and their loader."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTokenizer

from diffalign.reward_models import CLIPScore, PickScore, ShapesScore, WeightsError
from diffalign.reward_models.clip_towers import CropPreprocessing

PROMPT = "a red circle"


@pytest.fixture
def reference(clip_folder, numpy_clip):
    """cos(image, text) and exp(logit_scale), computed without torch."""
    clip = numpy_clip(load_file(clip_folder / "model.safetensors"), heads=(2, 2), act="gelu")
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)

    def cosine(pixels: np.ndarray, text: str) -> float:
        return float(clip.image(pixels) @ clip.text(tokenizer(text)["input_ids"]))

    return cosine, float(np.exp(clip.w["logit_scale"]))


def test_pickscore_equals_numpy(clip_folder, reference, numpy_crop, photos):
    cosine, scale = reference
    scores = PickScore(clip_folder, device="cpu").score(photos, PROMPT, batch_size=2).score
    expected = [scale * cosine(numpy_crop(p), PROMPT) for p in photos]
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-5)


def test_pickscore_equals_the_models_own_logits(clip_folder, photos):
    score = PickScore(clip_folder, device="cpu")
    model, tokenizer = CLIPModel.from_pretrained(clip_folder), CLIPTokenizer.from_pretrained(clip_folder)
    prompts = ["a", "two blue squares", "x y z"]
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs, pixel_values=torch.stack([score.preprocess(p) for p in photos])).logits_per_image
    torch.testing.assert_close(score.score_matrix(photos, prompts), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "size", [(300, 200), (224, 100), (224, 224), pytest.param((500, 1), marks=pytest.mark.slow), (401, 600), (33, 57)]
)
def test_crop_equals_the_published_processor(size, make_photo):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image = Image.fromarray(make_photo(*size))
    expected = CLIPImageProcessorPil()(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(CropPreprocessing(224).image(image), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(401, 600), (600, 401), (300, 200), (224, 225), (224, 227)])
def test_round_origin_equals_torchvision(size, make_photo):
    from torchvision import transforms as t

    crop = CropPreprocessing(224, origin="round")
    image = Image.fromarray(make_photo(*size))
    resized = t.Resize(224, t.InterpolationMode.BICUBIC)
    expected = t.Compose([resized, t.CenterCrop(224), t.ToTensor(), t.Normalize(crop.mean, crop.std)])(image)
    torch.testing.assert_close(crop.image(image), expected, rtol=1e-5, atol=1e-5)


def test_the_two_origins_are_one_pixel_apart():
    assert CropPreprocessing(224, origin="floor").geometry(600, 401) == (335, 224, 55, 0)
    assert CropPreprocessing(224, origin="round").geometry(600, 401) == (335, 224, 56, 0)


def test_absurd_shapes_are_invalid(clip_folder, photos):
    output = PickScore(clip_folder, device="cpu").score([Image.new("RGB", (5000, 2)), photos[0]], "a", on_invalid="nan")
    assert output.valid.tolist() == [False, True]
    assert "ratio up to 1000:1, got 5000x2" in str(output.errors[0])


def test_clipscore_variants(clip_folder, reference, numpy_crop, make_photo):
    cosine, scale = reference
    image = Image.fromarray(make_photo(224, 300))
    plain = cosine(numpy_crop(image), PROMPT)
    prefixed = cosine(numpy_crop(image), "A photo depicts " + PROMPT)
    scores = {v: CLIPScore(clip_folder, variant=v, device="cpu")(image, PROMPT).item() for v in
              ("hessel", "torchmetrics", "logit")}  # fmt: skip
    assert scores == pytest.approx(
        {"hessel": 2.5 * prefixed, "torchmetrics": 100 * plain, "logit": scale * plain}, rel=1e-5
    )


def test_hessel_is_never_negative(clip_folder):
    score = CLIPScore(clip_folder, device="cpu")
    assert score.score_cosine(torch.tensor([-0.3, 0.2])).tolist() == pytest.approx([0.0, 0.5])
    torchmetrics = CLIPScore(clip_folder, variant="torchmetrics", device="cpu")
    assert torchmetrics.score_cosine(torch.tensor([-0.3])).item() == pytest.approx(-30)


def test_shapes_equals_numpy_with_quick_gelu(shapes_folder, numpy_clip, make_photo):
    clip = numpy_clip(load_file(shapes_folder / "model.safetensors"), heads=(2, 2), act="quick_gelu")
    image = Image.fromarray(make_photo(50, 90))
    pixels = (np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC)) / 127.5 - 1).transpose(2, 0, 1)
    ids = CLIPTokenizer.from_pretrained(shapes_folder)(PROMPT)["input_ids"]
    expected = np.exp(clip.w["logit_scale"]) * (clip.image(pixels) @ clip.text(ids))
    assert ShapesScore(shapes_folder)(image, PROMPT).item() == pytest.approx(expected, rel=1e-5)


def test_shapes_reads_half_precision_in_float32(shapes_folder, tmp_path, photos):
    shutil.copytree(shapes_folder, tmp_path / "half")
    state = {k: v.half() for k, v in load_file(shapes_folder / "model.safetensors").items()}
    save_file(state, tmp_path / "half" / "model.safetensors", metadata={"format": "pt"})
    half = ShapesScore(tmp_path / "half")
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    torch.testing.assert_close(half(photos, PROMPT), ShapesScore(shapes_folder)(photos, PROMPT), rtol=0.02, atol=0.02)


def test_shapes_follows_a_preprocessor_file(shapes_folder, tmp_path, make_photo):
    folder = tmp_path / "own"
    shutil.copytree(shapes_folder, folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 4]}')
    array = make_photo(64, 64)
    expected = (torch.from_numpy(array) / 255 - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([1.0, 2.0, 4.0])
    torch.testing.assert_close(ShapesScore(folder).preprocess(array), expected.permute(2, 0, 1))
    (folder / "preprocessor_config.json").write_text('{"image_mean": 0.1}')
    with pytest.raises(WeightsError, match="cannot read image_mean and image_std"):
        ShapesScore(folder)


def test_scale_stays_exact_in_half_precision(clip_folder):
    exact = load_file(clip_folder / "model.safetensors")["logit_scale"].double().exp().item()
    assert PickScore(clip_folder, device="cpu", dtype=torch.bfloat16).towers.scale == exact


def test_bfloat16_scores_are_near(clip_folder, photos):
    half = PickScore(clip_folder, device="cpu", dtype=torch.bfloat16)(photos, PROMPT)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, PickScore(clip_folder, device="cpu")(photos, PROMPT), rtol=0.05, atol=0.5)


def test_long_prompts_are_cut_and_keep_their_end(clip_folder, reference, numpy_crop, photos, numpy_clip):
    clip = numpy_clip(load_file(clip_folder / "model.safetensors"), heads=(2, 2), act="gelu")
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    ids = tokenizer("a b c d " * 60)["input_ids"]
    assert len(ids) > 77
    cut = [*ids[:76], tokenizer.eos_token_id]
    expected = np.exp(clip.w["logit_scale"]) * (clip.image(numpy_crop(photos[0])) @ clip.text(cut))
    assert PickScore(clip_folder, device="cpu")(photos[0], "a b c d " * 60).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_tokenizer_may_lie_elsewhere(clip_folder, tmp_path, photos):
    (tmp_path / "weights").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(clip_folder / name, tmp_path / "weights")
    score = PickScore(tmp_path / "weights", processor=clip_folder, device="cpu")
    torch.testing.assert_close(score(photos, "a"), PickScore(clip_folder, device="cpu")(photos, "a"), rtol=0, atol=0)
    with pytest.raises(WeightsError, match="tokenizer of pickscore from 'laion/CLIP-ViT-H-14-laion2B-s32B-b79K'"):
        PickScore(tmp_path / "weights", device="cpu", local_files_only=True)
    with pytest.raises(WeightsError, match=r"cannot load the tokenizer of clipscore .*expected tokenizer\.json"):
        CLIPScore(tmp_path / "weights", device="cpu")


@pytest.mark.slow
def test_incomplete_or_foreign_weights_are_refused(clip_folder, tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    state = load_file(clip_folder / "model.safetensors")

    def save(tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    save({k: v for k, v in state.items() if "text_projection" not in k})
    with pytest.raises(WeightsError, match=r"1 tensors are missing .*'text_projection.weight'"):
        PickScore(folder, device="cpu")
    save({**state, "head.weight": torch.ones(2)})
    with pytest.raises(WeightsError, match=r"1 tensors are not of this model .*'head.weight'"):
        PickScore(folder, device="cpu")
    save({**state, "visual_projection.weight": torch.ones(3, 3)})
    with pytest.raises(WeightsError, match="cannot load pickscore"):
        PickScore(folder, device="cpu")
    (folder / "model.safetensors").write_bytes((clip_folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(WeightsError, match="cannot load pickscore"):
        PickScore(folder, device="cpu")
    save({**state, "text_model.embeddings.position_ids": torch.arange(77)[None]})
    assert PickScore(folder, device="cpu").info.name == "pickscore"


def test_pickle_weights_are_read_only_if_they_are_plain_tensors(clip_folder, tmp_path, photos):
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"holds no model.safetensors, only: config.json"):
        PickScore(folder, device="cpu")
    torch.save(load_file(clip_folder / "model.safetensors"), folder / "pytorch_model.bin")
    torch.testing.assert_close(
        PickScore(folder, device="cpu")(photos, "a"), PickScore(clip_folder, device="cpu")(photos, "a")
    )
    torch.save({"logit_scale": torch.nn.Identity()}, folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"cannot load pickscore .* holds more than plain tensors"):
        PickScore(folder, device="cpu")


def test_foreign_tokenizer_is_refused(clip_folder, tmp_path):
    CLIPTokenizer(vocab={"a</w>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}, merges=[]).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="does not belong to pickscore: it has 3 tokens"):
        PickScore(clip_folder, processor=tmp_path, device="cpu")
