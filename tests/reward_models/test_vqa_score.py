"""VQAScore: CLIP-FlanT5 against a slow calculation by hand, and the forms of score of chat VLMs."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, T5Config, T5ForConditionalGeneration

from diffalign.reward_models import InvalidMediaError, VQAScore, WeightsError
from diffalign.reward_models.answering import Answer
from tests.reward_models.judge_files import Say, completion, noise, save_clip_flant5, save_vlm, server  # noqa: F401

PROMPTS = ["a red cube", "two dogs, one of them {} asleep <image>", "x"]
QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
          "detailed, and polite answers to the user's questions. USER: ")  # fmt: skip
MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_clip_flant5(tmp_path_factory.mktemp("flant5"))


@pytest.fixture(scope="module")
def model(folder) -> VQAScore:
    return VQAScore(folder, device="cpu")


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    shards = sorted(folder.glob("*.bin"))
    return {name: value for shard in shards for name, value in torch.load(shard, weights_only=True).items()}


@torch.no_grad()
def by_hand(folder: Path, tokenizer, image: Image.Image, prompt: str) -> float:
    """sqrt(p(Yes) p(</s> | Yes)), one token after the other, from the modules of transformers."""
    state, config = state_of(folder), json.loads((folder / "config.json").read_text())
    keys = ("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "vocab_size", "feed_forward_proj")
    t5 = T5ForConditionalGeneration(T5Config(tie_word_embeddings=False, **{key: config[key] for key in keys})).eval()
    t5.lm_head.weight = torch.nn.Parameter(torch.empty(48, 16))
    t5.load_state_dict({name: value for name, value in state.items() if not name.startswith("mm_projector")})
    clip = CLIPModel.from_pretrained(folder / "tower").eval()
    side = max(image.size)
    square = np.empty((side, side, 3), dtype=np.uint8)
    square[:] = (122, 116, 104)
    top, left = (side - image.height) // 2, (side - image.width) // 2
    square[top : top + image.height, left : left + image.width] = np.asarray(image)
    small = np.asarray(Image.fromarray(square).resize((28, 28), Image.Resampling.BICUBIC)) / 255
    pixels = torch.from_numpy(((small - MEAN) / STD).transpose(2, 0, 1)).float()[None]
    seen = clip.vision_model(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
    hidden = torch.nn.functional.gelu(seen @ state["mm_projector.0.weight"].T + state["mm_projector.0.bias"])
    picture = hidden @ state["mm_projector.2.weight"].T + state["mm_projector.2.bias"]
    before = tokenizer(SYSTEM).input_ids
    behind = tokenizer("\n" + QUESTION.replace("{}", prompt, 1) + " ASSISTANT: ").input_ids
    table = state["shared.weight"]
    words = torch.cat([table[before], picture, table[behind]])[None]
    yes, end = tokenizer("Yes").input_ids
    first = t5(inputs_embeds=words, decoder_input_ids=torch.tensor([[0]])).logits[0, -1].double().softmax(-1)
    second = t5(inputs_embeds=words, decoder_input_ids=torch.tensor([[0, yes]])).logits[0, -1].double().softmax(-1)
    return math.sqrt(first[yes].item() * second[end].item())


def test_scores_equal_the_calculation_by_hand(folder, model):
    images = [noise(40, 60), noise(28, 28, seed=1), noise(90, 31, seed=2)]
    expected = [by_hand(folder, model.flant5.tokenizer, i, p) for i, p in zip(images, PROMPTS, strict=True)]
    assert len({round(value, 4) for value in expected}) == 3
    output = model.score(images, PROMPTS)
    assert output.score.tolist() == pytest.approx(expected, abs=1e-5)
    assert output.score.tolist() == pytest.approx(expected, rel=1e-3)
    alone = [model.score(i, p).score.item() for i, p in zip(images, PROMPTS, strict=True)]
    assert output.score.tolist() == pytest.approx(alone, abs=1e-6)
    assert model.info.differentiable
    assert not model.info.generative


def test_both_chunks_of_the_question_end(model):
    before, behind = model.flant5.encode_question("q" * 40)
    end = model.flant5.tokenizer.eos_token_id
    assert (before[-1], behind[-1]) == (end, end)
    assert [*before, *behind].count(end) == 2


@pytest.mark.slow
def test_tied_embeddings_are_tied(tmp_path):
    tied = save_clip_flant5(tmp_path, tied=True)
    model = VQAScore(tied, device="cpu")
    assert model.flant5.t5.lm_head.weight is model.flant5.t5.shared.weight
    assert model.flant5.t5.config.scale_decoder_outputs
    assert 0 < model([noise()], "x").item() < 1


def test_output_layer_is_not_the_embeddings(folder, model):
    """transformers 5 says of every T5 that they are tied."""
    t5 = model.flant5.t5
    torch.testing.assert_close(t5.lm_head.weight, state_of(folder)["lm_head.weight"])
    torch.testing.assert_close(t5.encoder.embed_tokens.weight, state_of(folder)["shared.weight"])
    assert not torch.equal(t5.lm_head.weight, t5.shared.weight)


def test_gradient_to_the_pixels_is_right(folder):
    """The T5 of transformers computes its norms and softmax in float32, which limits the differences."""
    double = VQAScore(folder, device="cpu", dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, 20, 33, generator=generator, dtype=torch.float64, requires_grad=True)
    score = double.score_tensor(pixels, ["a", "b"])
    assert score.dtype == torch.float64
    (gradient,) = torch.autograd.grad(score.sum(), pixels)
    assert gradient.isfinite().all()
    for _ in range(3):
        direction = torch.randn(pixels.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            up, down = (double.score_tensor(pixels + s * 3e-4 * direction, ["a", "b"]).sum() for s in (1, -1))
        expected = float((up - down) / 6e-4)
        assert abs(expected) > 1e-9
        assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-3, abs=1e-8)


def test_score_tensor_equals_score_at_the_models_size(model):
    images = [noise(28, 28, seed=i) for i in range(3)]
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in images])
    torch.testing.assert_close(model.score_tensor(pixels, PROMPTS), model(images, PROMPTS), rtol=0, atol=1e-6)
    assert model.score_tensor(pixels, "x").dtype == torch.float32


def test_bfloat16_is_near(folder, model):
    half = VQAScore(folder, device="cpu", dtype=torch.bfloat16)
    torch.testing.assert_close(half([noise()], "x"), model([noise()], "x"), rtol=0, atol=2e-2)
    assert half.flant5.t5.shared.weight.dtype == torch.bfloat16


def _change(folder: Path, change) -> None:
    shard = folder / "pytorch_model-00001-of-00002.bin"
    state = torch.load(shard, weights_only=True)
    change(state)
    torch.save(state, shard)


def _truncate(folder: Path) -> None:
    shard = folder / "pytorch_model-00001-of-00002.bin"
    shard.write_bytes(shard.read_bytes()[:2000])


def _config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


NAME = "decoder.block.0.layer.0.SelfAttention.k.weight"
DAMAGES = {
    "missing": (lambda f: _change(f, lambda s: s.pop(next(iter(s)))), "1 tensors are missing, such as 't5"),
    "unexpected": (lambda f: _change(f, lambda s: s.update(extra=torch.ones(1))), "1 tensors are not of this model"),
    "shape": (lambda f: _change(f, lambda s: s.update({next(iter(s)): torch.ones(1)})), r"is \[1\] instead of \["),
    "truncated": (_truncate, "cannot read .*pytorch_model-00001-of-00002.bin"),
    "no shard": (lambda f: (f / "pytorch_model-00002-of-00002.bin").unlink(), "no 'pytorch_model-00002-of-00002.bin'"),
    "no index": (lambda f: (f / "pytorch_model.bin.index.json").unlink(), "no 'pytorch_model.bin.index.json'"),
    "bad index": (lambda f: (f / "pytorch_model.bin.index.json").write_text("{}"), "cannot read .* as the index"),
    "bad config": (lambda f: (f / "config.json").write_text("{"), "cannot read .* as the config"),
    "no config": (lambda f: (f / "config.json").unlink(), "no 'config.json'"),
    "no tower": (lambda f: _config(f, mm_vision_tower=str(f / "none")), "the vision tower of vqa_score"),
    "projector": (lambda f: _config(f, mm_projector_type="linear"), "mm_projector_type='linear'; only 'mlp2x_gelu'"),
    "tokenizer": (lambda f: _config(f, vocab_size=20), "is|instead of"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_incomplete_files_are_refused(folder, tmp_path, damage, message):
    copy = shutil.copytree(folder, tmp_path / "copy")
    damage(copy)
    with pytest.raises(WeightsError, match=message) as caught:
        VQAScore(copy, device="cpu")
    assert "\n" not in str(caught.value)


def test_without_weights_the_published_ones_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match="zhiqiulin/clip-flant5-xxl") as caught:
        VQAScore(local_files_only=True)
    assert "\n" not in str(caught.value)


def test_pictures_that_cannot_be_scored(model):
    long = Image.new("1", (20_000, 10))
    output = model.score([noise(), long, "nowhere.png"], "x", on_invalid="nan")
    assert output.valid.tolist() == [True, False, False]
    assert "sides of at most 16384 pixels, got 20000x10" in output.errors[1]
    with pytest.raises(InvalidMediaError, match="medium 1"):
        model.score([noise(), long], "x")


def chat(probabilities, **options) -> VQAScore:
    return VQAScore(answerer=Say(lambda q: Answer("Yes", probabilities=probabilities)), **options)


@pytest.mark.parametrize(
    ("probabilities", "options", "value"),
    [
        ({"Yes": 0.6, "No": 0.2}, {}, 0.6),
        ({"Yes": 0.6, "No": 0.2}, {"form": "conditional"}, 0.75),
        ({"Yes": 0.6}, {"form": "conditional"}, 1.0),
        ({"No": 0.6}, {"form": "conditional"}, 0.0),
        ({"Yes": 0.3, "yes": 0.1, " Yes": 0.1, "No": 0.2, "no": 0.3}, {"form": "conditional"}, 0.6),
        ({"Yes": 0.3, "yes": 0.1, " Yes": 0.1, "No": 0.2, "no": 0.3}, {"all_spellings": True}, 0.5),
        (
            {"Yes": 0.3, "yes": 0.1, " Yes": 0.1, "No": 0.2, "no": 0.3},
            {"all_spellings": True, "form": "conditional"},
            0.5,
        ),
        ({}, {}, None),
        ({"yes": 0.9}, {"form": "conditional"}, None),
        ({"Yes": 0.0, "No": 0.0}, {"form": "conditional"}, None),
        ({"Yes": math.nan, "No": 0.1}, {}, None),
    ],
)
def test_forms(probabilities, options, value):
    output = chat(probabilities, **options).score([noise()], "a cat", on_invalid="nan")
    if value is None:
        assert output.score.isnan().all()
        assert output.errors[0]
    else:
        assert output.score.item() == pytest.approx(value, abs=1e-6)


def test_a_server_is_asked_for_one_token(server):  # noqa: F811
    logprobs = {"Yes": math.log(0.5), "No": math.log(0.3)}
    server.reply = lambda request, number: completion("Yes", "length", logprobs)
    judge = VQAScore(server=server.url, served_model="vlm")
    assert judge.score([noise()], 'a "cat"').score.item() == pytest.approx(0.625)
    (request,) = server.requests
    assert request["messages"][0]["content"][-1]["text"] == QUESTION.replace("{}", 'a "cat"')
    assert (request["max_tokens"], request["logprobs"]) == (1, True)
    server.reply = lambda request, number: completion("I", "length", {"I": -0.1, "The": -3.0})
    output = judge.score([noise()], "x", on_invalid="nan")
    assert output.errors[0] == "medium 0: neither 'Yes' nor 'No' is among the known first tokens; the answer was 'I'"
    assert not judge.info.differentiable
    with pytest.raises(NotImplementedError, match="no gradient path"):
        judge.score_tensor(torch.rand(1, 3, 8, 8), "x")


def test_a_chat_vlm_in_this_process(tmp_path):
    folder = save_vlm(tmp_path)
    judge = VQAScore(folder, device="cpu")
    assert judge.info.name == "vqa_score-chat"
    (answer,) = judge.answerer.answer([q for q in _asked(judge, "a cat")])
    output = judge.score([noise()], "a cat")
    assert output.score.item() == pytest.approx(answer.probabilities["Yes"], rel=1e-5)
    assert 0 < output.score.item() < 1
    before = judge.fingerprint()
    with torch.no_grad():
        judge.answerer.model.lm_head.weight.mul_(2)
    assert judge.fingerprint() != before


def _asked(judge: VQAScore, prompt: str):
    listener = Say(lambda question: Answer(probabilities={"Yes": 0.5}))
    VQAScore(answerer=listener).score([noise()], prompt)
    return listener.asked


def test_options_are_checked(folder):
    with pytest.raises(ValueError, match="expected a question with '{}'"):
        VQAScore(question="Is it good?")
    with pytest.raises(ValueError, match="form must be"):
        VQAScore(form="log")
    with pytest.raises(ValueError, match="CLIP-FlanT5 has one form of score"):
        VQAScore(folder, form="conditional")
    with pytest.raises(ValueError, match="vision_tower and tokenizer are those of CLIP-FlanT5"):
        VQAScore(answerer=Say(str), tokenizer="x")
