"""VideoScore: its frames, its text, the last token on either side of padding, and its files."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import Idefics2Config, PreTrainedTokenizerFast
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics2.processing_idefics2 import Idefics2Processor

from diffalign.reward_models import WeightsError, load_reward_model, video_score
from diffalign.reward_models.media import Video
from diffalign.reward_models.video_score import ASPECTS, VideoScorer, frame_numbers, last_kept
from tests.reward_models.qwen_files import PROMPTS, template_folder

SIZE = {"shortest_edge": 28, "longest_edge": 56}
PROMPT = "a cat that sleeps"


def tiny_config(rows: int, image_token: int) -> Idefics2Config:
    text = {"model_type": "mistral", "vocab_size": rows, "hidden_size": 24, "intermediate_size": 32,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0,
            "bos_token_id": None, "eos_token_id": None, "rms_norm_eps": 1e-5, "sliding_window": None}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 56, "patch_size": 14}  # fmt: skip
    perceiver = {"hidden_size": 24, "resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 2,
                 "resampler_head_dim": 8, "num_key_value_heads": 1, "rms_norm_eps": 1e-5}  # fmt: skip
    return Idefics2Config(
        text_config=text, vision_config=vision, perceiver_config=perceiver, image_token_id=image_token
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random model in the layout of transformers: two shards, tokenizer, preparation of images."""
    template_folder("videoscore_user_text.txt")
    folder = tmp_path_factory.mktemp("video_score")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = Tokenizer(models.BPE(vocab={"<unk>": 0, **{c: i for i, c in enumerate(alphabet, 1)}}, merges=[]))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>", pad_token="<unk>")
    tokenizer.add_tokens(
        [AddedToken(t, special=True) for t in ("<fake_token_around_image>", "<image>", "<end_of_utterance>")]
    )
    tokenizer.save_pretrained(folder)
    config = tiny_config(len(tokenizer), tokenizer.convert_tokens_to_ids("<image>"))
    config.save_pretrained(folder)
    Idefics2ImageProcessorPil(size=SIZE).save_pretrained(folder)
    scorer = VideoScorer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in scorer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.3))
            p.add_(1.0 if p.ndim == 1 else 0.0)
    state = scorer.state_dict()
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, some in shards.items():
        save_file({name: state[name] for name in some}, folder / file)
    index = ", ".join(f'"{name}": "{file}"' for file, some in shards.items() for name in some)
    (folder / "model.safetensors.index.json").write_text(f'{{"metadata": {{}}, "weight_map": {{{index}}}}}')
    return folder


def load(folder: Path, **options) -> video_score.VideoScore:
    return load_reward_model("video_score", path=folder, template=PROMPTS, device="cpu", **options)


@pytest.fixture(scope="module")
def model(folder) -> video_score.VideoScore:
    """No test may change it."""
    return load(folder)


@pytest.fixture
def clips(make_photo) -> list[Video]:
    return [
        Video(np.stack([make_photo(height, 56, seed=s + i) for i in range(length)]))
        for s, height, length in ((0, 56, 3), (20, 40, 2))
    ]


@pytest.mark.parametrize(
    ("total", "most", "expected"),
    [
        (3, 16, [0, 1, 2]),
        (16, 16, list(range(16))),
        (32, 16, list(range(0, 32, 2))),
        (7, 4, [0, 1, 3, 5]),  # 0, 1.75, 3.5, 5.25
        (49, 48, [int(i * 49 / 48) for i in range(48)]),
    ],
)
def test_which_frames_are_looked_at(total, most, expected):
    assert frame_numbers(total, most) == expected


def test_never_more_frames_than_asked_for():
    for most in (16, 48):
        for total in range(1, 700):
            found = frame_numbers(total, most)
            assert len(found) <= min(total, most)
            assert found == sorted(set(found))
            assert found[-1] < total


def test_last_token_of_either_padding():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1], [1, 0, 0, 0]])
    assert last_kept(mask).tolist() == [1, 3, 3, 0]


@pytest.mark.parametrize("splitting", [False, True])
def test_scores_equal_the_classifier_of_transformers(folder, clips, tmp_path, splitting):
    """By its processor, a normal forward, and the head at the last token in NumPy."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    processor = Idefics2ImageProcessorPil(size=SIZE, do_image_splitting=splitting)
    processor.save_pretrained(tmp_path)
    model = load(tmp_path)
    text = (PROMPTS / "videoscore_user_text.txt").read_bytes().decode().replace("{text_prompt}", PROMPT)
    images = [Image.fromarray(frame) for frame in clips[0].frames]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    inputs = Idefics2Processor(processor, tokenizer, image_seq_len=3)(
        text=text + "<image> " * 3, images=[images], return_tensors="pt"
    )
    states = model.scorer.model(**inputs, use_cache=False).last_hidden_state[0, -1].double().numpy()
    head = {name: value.double().numpy() for name, value in model.scorer.score.state_dict().items()}
    expected = head["weight"] @ states + head["bias"]
    output = model.score(clips[0], PROMPT)
    np.testing.assert_allclose([output.dims[name].item() for name in ASPECTS], expected, rtol=1e-5, atol=1e-5)
    assert output.score.item() == pytest.approx(expected.mean(), abs=1e-5)
    assert len(set(expected)) == 5


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_do_not_depend_on_the_batch_or_the_side_of_padding(folder, model, clips, side):
    other = load(folder)
    other.tokenizer.padding_side = side
    prompts = [PROMPT, "x"]
    alone = torch.cat([model(clip, prompt) for clip, prompt in zip(clips, prompts, strict=True)])
    torch.testing.assert_close(other(clips, prompts), alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other(clips[::-1], prompts[::-1]), alone.flip(0), rtol=1e-5, atol=1e-5)
    assert (alone[0] - alone[1]).abs() > 1e-3


def test_control_tokens_in_a_prompt_are_text(model, clips):
    rude = "a <image><fake_token_around_image> cat"
    torch.testing.assert_close(model(clips[0], rude), model(clips[0], rude.replace("<", "< ")), rtol=0, atol=0)


def test_bfloat16_body_with_a_head_in_float32(folder, model, clips):
    half = load(folder, dtype=torch.bfloat16)
    assert half.scorer.score.weight.dtype == torch.float32
    torch.testing.assert_close(half(clips, "a"), model(clips, "a"), rtol=2e-2, atol=2e-2)


def test_versions_differ_in_frames_and_home(folder, model):
    assert model.info.name == "video_score-1.1"
    assert model.max_frames == 48
    old = load_reward_model("video_score-1.0", path=folder, template=PROMPTS, device="cpu")
    assert old.info.name == "video_score-1.0"
    assert old.max_frames == 16
    assert old.fingerprint() != model.fingerprint()
    with pytest.raises(ValueError, match=r"unknown VideoScore version '2' \(available: '1\.1', '1\.0'\)"):
        load(folder, version="2")
    with pytest.raises(ValueError, match="max_frames must be at least 1, got 0"):
        load(folder, max_frames=0)


def test_other_files_are_refused(folder, clips, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    shard = tmp_path / "model-00001-of-00002.safetensors"
    state = load_file(shard)
    some = next(name for name in state if "q_proj" in name)
    for message, changed in {
        f"1 tensors are missing, such as '{some}'": {k: v for k, v in state.items() if k != some},
        "1 tensors are not of this model, such as 'lm_head.weight'": {**state, "lm_head.weight": torch.ones(2)},
        f"'{some}' is \\[3\\] instead of": {**state, some: torch.ones(3)},
    }.items():
        save_file(changed, shard)
        with pytest.raises(WeightsError, match=message):
            load(tmp_path)
    shard.write_bytes(b"torn")
    with pytest.raises(WeightsError, match=r"cannot read .*model-00001-of-00002\.safetensors"):
        load(tmp_path)
    shard.unlink()
    with pytest.raises(WeightsError, match=r"has no 'model-00001-of-00002\.safetensors'"):
        load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"has no 'config\.json'.*'TIGER-Lab/VideoScore-v1\.1'"):
        load(tmp_path)
