"""VideoReward: frames, layouts of its files, LoRA, z-scores, and its full size."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen2Tokenizer, Qwen2VLConfig

from diffalign.reward_models import InvalidMediaError, WeightsError, load_reward_model, video_reward
from diffalign.reward_models.media import Video
from diffalign.reward_models.qwen_heads import QWEN2_VL_2B, QwenScorer, patchify, published_name
from diffalign.reward_models.video_reward import frame_numbers
from tests.reward_models.qwen_decoder import decode
from tests.reward_models.qwen_files import (
    CONFIG,
    PROMPTS,
    published,
    random_model,
    rows_of,
    save_published,
    save_tokenizer,
    template_folder,
)
from tests.reward_models.test_hpsv3 import qwen2_vl_shapes

TOKENS = ["<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS = {
    "data_config": {"max_frame_pixels": 56 * 56, "fps": 2.0, "num_frames": None, "meta_data": "x"},
    "peft_lora_config": {"lora_r": 2, "lora_alpha": 8},
    "inference_config": {"VQ_mean": 0.5, "VQ_std": 2.0},
}


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    """Frames of four tokens."""
    monkeypatch.setattr(video_reward, "MIN_PIXELS", 56 * 56)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The tokenizer, and checkpoints of one model with LoRA in both published layouts."""
    template_folder("videoreward_user_text.txt")
    root = tmp_path_factory.mktemp("video_reward")
    save_tokenizer(root / "tokenizer")
    save_checkpoints(root, outputs=1)
    return root


def save_checkpoints(root: Path, outputs: int) -> None:
    """`full` with an older step beside it, `adapter` with `base` below it, and `merged` as PEFT merges it."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear

    plain = reference_model(root, outputs)
    save_published(plain, root / "base" / "model.safetensors")
    config = LoraConfig(r=2, lora_alpha=8, target_modules=rf".*language_model.*\.({'|'.join(LINEARS)})")
    wrapped = inject_adapter_in_model(config, plain)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    state = {f"base_model.model.{name}": value for name, value in published(wrapped).items()}
    for name in ("full/checkpoint-20", "full/checkpoint-100", "adapter/checkpoint-7"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in ("full", "adapter"):
        (root / name / "model_config.json").write_text(json.dumps(SETTINGS))
    torch.save(state, root / "full/checkpoint-100/model.pth")
    save_tokenizer(root / "full/checkpoint-100/tokenizer")
    (root / "full/checkpoint-20/model.pth").write_bytes(b"an older step")
    lora = {k.replace(".default", ""): v for k, v in state.items() if "lora_" in k}
    assert len(lora) == 2 * len(LINEARS) * 2
    save_file(lora, root / "adapter/checkpoint-7/adapter_model.safetensors")
    trained = ("visual.", "rm_head.", "embed_tokens")
    rest = {k: v for k, v in state.items() if any(part in k for part in trained)}
    torch.save(rest, root / "adapter/checkpoint-7/non_lora_state_dict.pth")
    for module in wrapped.modules():
        if isinstance(module, Linear):
            module.merge()
    merged = {k.replace(".base_layer", ""): v for k, v in published(wrapped).items() if "lora_" not in k}
    (root / "merged").mkdir(exist_ok=True)
    (root / "merged/model_config.json").write_text(json.dumps(SETTINGS))
    torch.save(merged, root / "merged/model.pth")


def reference_model(root: Path, outputs: int = 1) -> nn.Module:
    return random_model(rows_of(root / "tokenizer", 3), 3, nn.Linear(24, outputs, bias=False))


def load(root: Path, name: str, **options) -> video_reward.VideoReward:
    options = {"tokenizer": root / "tokenizer", "template": PROMPTS, "model_config": CONFIG, "device": "cpu", **options}
    return load_reward_model("video_reward", path=root / name, **options)


@pytest.fixture(scope="module")
def model(root) -> video_reward.VideoReward:
    """No test may change it."""
    return load(root, "merged")


@pytest.fixture
def clips(make_photo) -> list[Video]:
    return [
        Video(np.stack([make_photo(56, 56, seed=s + i) for i in range(length)]), fps)
        for s, length, fps in ((0, 9, 4.0), (20, 16, 8.0), (50, 5, 2.0))
    ]


@pytest.mark.parametrize(
    ("total", "rate", "expected"),
    [
        (81, 16.0, [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]),  # 10.1 frames at 2 per second
        (49, 8.0, [0, 4, 9, 13, 17, 22, 26, 31, 35, 39, 44, 48]),
        (40, 8.0, [0, 4, 9, 13, 17, 22, 26, 30, 35, 39]),
        (16, 24.0, [0, 5, 10, 15]),  # never fewer than 4 ...
        (3, 24.0, [0, 2]),  # ... but of a clip that has them
        (5, 1.0, [0, 1, 3, 4]),  # an even number of them
        (9, 2.0, [0, 1, 2, 3, 5, 6, 7, 8]),
        (22, 4.0, None),  # 11 / 2 = 5.5 pairs: 6 by rounding half to even, so 12 frames
        (18, 4.0, None),  # 4.5 pairs: 4
    ],
)
def test_which_frames_are_looked_at(total, rate, expected):
    found = frame_numbers(total, rate, 2.0)
    if expected is None:
        assert len(found) == {22: 12, 18: 8}[total]
    else:
        assert found == expected
    assert found[0] == 0
    assert found[-1] == total - 1


def test_long_clips_give_768_frames_and_single_frames_none():
    assert len(frame_numbers(5000, 2.0, 2.0)) == 768
    with pytest.raises(InvalidMediaError, match="at least 2 frames, got 1"):
        frame_numbers(1, 2.0, 2.0)


def expected_scores(root: Path, reference: nn.Module, clip: Video, prompt: str) -> np.ndarray:
    """Raw outputs [3, D]: features of transformers, its tokens, and a decoder in NumPy."""
    numbers = frame_numbers(len(clip.frames), clip.fps, 2.0)
    frames = torch.from_numpy(clip.frames[numbers]).permute(0, 3, 1, 2) / 255  # 56x56 already
    vision = patchify(frames)
    text = (PROMPTS / "videoreward_user_text.txt").read_bytes().decode().replace("{text_prompt}", prompt)
    whole = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        f"{'<|video_pad|>' * vision.count}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
    )
    tokenizer = Qwen2Tokenizer.from_pretrained(root / "tokenizer")
    tokenizer.add_tokens(TOKENS, special_tokens=True)
    ids = torch.tensor(tokenizer(whole)["input_ids"])
    grid = torch.tensor([vision.grid])
    embeddings = reference.model.language_model.embed_tokens(ids)
    pad = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    embeddings[ids == pad] = reference.model.visual(vision.patches, grid_thw=grid).pooler_output
    states = decode(reference.model.language_model, embeddings.double().numpy())
    places = [ids.tolist().index(i) for i in tokenizer.convert_tokens_to_ids(TOKENS)]
    return states[places] @ reference.rm_head.weight.double().numpy().T


def test_scores_are_z_scores_of_one_output_at_three_tokens(root, model, clips):
    reference = reference_model(root)
    reference.load_state_dict(
        {k if k == "lm_head.weight" else published_name(k): v
         for k, v in torch.load(root / "merged/model.pth", weights_only=True).items()}
    )  # fmt: skip
    output = model.score(clips[0], "a cat")
    raw = expected_scores(root, reference, clips[0], "a cat")[:, 0]
    # Means and deviations: of model_config.json where it has them, else the published ones.
    expected = [(raw[0] - 0.5) / 2.0, (raw[1] - 1.1646) / 1.3811, (raw[2] - 2.8105) / 2.5121]
    found = [output.dims[name].item() for name in ("VQ", "MQ", "TA")]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert output.score.item() == pytest.approx(sum(expected), abs=1e-5)
    plain = load(root, "merged", normalise=False).score(clips[0], "a cat")
    np.testing.assert_allclose([plain.dims[n].item() for n in ("VQ", "MQ", "TA")], raw, rtol=0, atol=1e-5)


def test_of_three_outputs_each_is_read_at_its_own_token(root, clips, tmp_path):
    reference = reference_model(root, outputs=3)
    torch.save(published(reference), tmp_path / "model.pth")
    model = load(tmp_path, "model.pth", tokenizer=root / "tokenizer", normalise=False, max_pixels=56 * 56)
    raw = expected_scores(root, reference, clips[2], "a dog")
    found = model.score(clips[2], "a dog").dims
    np.testing.assert_allclose([found[n].item() for n in ("VQ", "MQ", "TA")], np.diag(raw), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["full", "adapter"])
def test_lora_in_both_layouts_equals_the_merged_model(root, model, clips, name):
    other = load(root, name, **({"base": root / "base"} if name == "adapter" else {"tokenizer": None}))
    for scores, expected in zip(other.score(clips, "a cat").dims.values(), model.score(clips, "a cat").dims.values(),
                                strict=True):  # fmt: skip
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_lora_that_does_not_fit_is_refused(root, tmp_path):
    state = torch.load(root / "full/checkpoint-100/model.pth", weights_only=True)
    some = next(name for name in state if "lora_B" in name)
    for changed in ({k: v for k, v in state.items() if k != some}, {**state, some: state[some][:, :1]}):
        torch.save(changed, tmp_path / "model.pth")
        with pytest.raises(WeightsError, match=r"the LoRA of '.*_proj' does not fit"):
            load(tmp_path, ".", tokenizer=root / "tokenizer")


def test_quality_does_not_depend_on_the_prompt_and_alignment_does(model, clips):
    one, two = (model.score(clips, prompt).dims for prompt in ("a cat", "a dog that sleeps in the sun"))
    for name in ("VQ", "MQ"):
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-5)
    assert (one["TA"] - two["TA"]).abs().min() > 1e-3


def test_scores_do_not_depend_on_the_batch(model, clips):
    prompts = ["a", "a longer prompt than that", "x y z"]
    alone = torch.cat([model(clip, prompt) for clip, prompt in zip(clips, prompts, strict=True)])
    torch.testing.assert_close(model(clips[::-1], prompts[::-1]), alone.flip(0), rtol=1e-5, atol=1e-5)


def test_rate_is_needed_and_may_be_given_once_for_all(root, model, clips):
    with pytest.raises(InvalidMediaError, match="needs frames per second"):
        model(clips[0].frames, "a")
    given = load(root, "merged", source_fps=4.0)
    videos = torch.from_numpy(clips[0].frames).permute(0, 3, 1, 2)[None]
    torch.testing.assert_close(given(videos, "a"), model(clips[0], "a"), rtol=0, atol=0)
    pixels = (videos / 255).requires_grad_(True)
    score = given.score_tensor(pixels, "a")
    torch.testing.assert_close(score.detach(), model(clips[0], "a"), rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(score.sum(), pixels)
    assert gradient.isfinite().all()
    seen = gradient.abs().amax((0, 2, 3, 4)) > 0
    assert seen.nonzero().flatten().tolist() == frame_numbers(9, 4.0, 2.0)


def test_gradient_to_the_pixels_is_right(root, clips):
    """Central differences; see the test of HPSv3 for the step."""
    double = load(root, "merged", source_fps=4.0, dtype=torch.float64)
    pixels = torch.from_numpy(clips[0].frames).permute(0, 3, 1, 2)[None].double()[..., :50] / 255
    pixels.requires_grad_(True)
    (gradient,) = torch.autograd.grad(double.score_tensor(pixels, "a").sum(), pixels)
    direction = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        up, down = (double.score_tensor(pixels + s * 1e-3 * direction, "a") for s in (1, -1))
    expected = float((up - down) / 2e-3)
    assert abs(expected) > 1e-3
    assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-2)


def test_bad_files_are_named(root, tmp_path):
    with pytest.raises(WeightsError, match=r"'checkpoint-11352/model\.pth' of Hub id 'KwaiVGI/VideoReward'"):
        load(root, "tokenizer")
    state = torch.load(root / "merged/model.pth", weights_only=True)
    torch.save({**state, "rm_head.weight": torch.ones(2, 24)}, tmp_path / "model.pth")
    with pytest.raises(WeightsError, match=r"expected one rm_head\.weight \[1, n\] or \[3, n\], found \[\[2, 24\]\]"):
        load(tmp_path, ".", tokenizer=root / "tokenizer")
    (tmp_path / "model.pth").write_bytes((root / "merged/model.pth").read_bytes()[:5000])
    with pytest.raises(WeightsError, match=r"cannot read .*model\.pth"):
        load(tmp_path, ".", tokenizer=root / "tokenizer")
    (tmp_path / "model_config.json").write_text("{")
    with pytest.raises(WeightsError, match="no JSON file with the settings of video_reward"):
        load(tmp_path, ".", tokenizer=root / "tokenizer")
    with pytest.raises(ValueError, match="fps must be positive, got 0"):
        load(root, "merged", fps=0)


def test_settings_change_the_fingerprint(root, model):
    assert load(root, "merged", fps=4.0).fingerprint() != model.fingerprint()


def test_full_size_layout():
    """Names and shapes without LoRA; nothing is allocated."""
    config = Qwen2VLConfig(**{k: dict(v) for k, v in QWEN2_VL_2B.items()})
    config.text_config.vocab_size = 151660
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in QwenScorer(config, nn.Linear(1536, 1, bias=False)).state_dict().items()}
    expected = {**qwen2_vl_shapes(hidden=1536, key=256, mlp=8960, rows=151660), "rm_head.weight": (1, 1536)}
    assert {published_name(name): shape for name, shape in expected.items()} == shapes
    # With an lm_head of its own and LoRA of rank 64: 5,031,072,529 bytes as mirrors list the file.
    lora = 28 * 64 * sum(m + n for m, n in [(1536, 1536)] * 2 + [(1536, 256)] * 2 + [(1536, 8960)] * 3)
    parameters = sum(math.prod(shape) for shape in expected.values()) + 151660 * 1536 + lora
    assert 0 < 5_031_072_529 - 2 * parameters < 500_000
