"""A chat VLM in this process: its answers and probabilities, and what it refuses to load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from diffalign.reward_models import VQAScore, WeightsError
from diffalign.reward_models.answering import Answerer, Question
from diffalign.reward_models.local_vlm import LocalVLM
from tests.reward_models.judge_files import noise, save_vlm

INFO = VQAScore.info


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_vlm(tmp_path_factory.mktemp("vlm"))


@pytest.fixture(scope="module")
def vlm(folder) -> LocalVLM:
    return LocalVLM(INFO, folder, device="cpu")


@pytest.fixture(scope="module")
def by_hand(folder):
    """Logits of the next token, from a prompt that is written out here."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
    processor = Qwen2_5_VLProcessor.from_pretrained(folder)

    @torch.no_grad()
    def logits(images, text, more=()):
        marks = "<|vision_start|><|image_pad|><|vision_end|>" * len(images)
        prompt = f"<|im_start|>user\n{marks}{text}<|im_end|>\n<|im_start|>assistant\n"
        inputs = dict(processor(text=[prompt], images=list(images), return_tensors="pt"))
        ids = torch.cat([inputs.pop("input_ids"), torch.tensor([list(more)], dtype=torch.long)], dim=1)
        kinds = inputs.pop("mm_token_type_ids", None)
        if kinds is not None:
            inputs["mm_token_type_ids"] = torch.cat([kinds, torch.zeros(1, len(more), dtype=kinds.dtype)], dim=1)
        inputs["attention_mask"] = torch.ones_like(ids)
        return model(input_ids=ids, use_cache=False, **inputs).logits[0, -1]

    return logits, processor.tokenizer


def test_probabilities_equal_a_plain_forward(vlm, by_hand):
    logits, tokenizer = by_hand
    for images in ((noise(),), (noise(seed=1), noise(60, 30, seed=2))):
        (answer,) = vlm.answer([Question("Is it red?", images, 1, ("Yes", "No", "perhaps"))])
        expected = logits(images, "Is it red?").softmax(-1)
        assert set(answer.probabilities) == {"Yes", "No"}  # "perhaps" is several tokens
        for word, value in answer.probabilities.items():
            assert value == pytest.approx(expected[tokenizer.convert_tokens_to_ids(word)].item(), rel=1e-4)
        assert answer.text == tokenizer.decode(expected.argmax())


def test_answers_are_greedy_although_the_published_settings_sample(vlm, by_hand):
    logits, tokenizer = by_hand
    images = (noise(seed=3),)
    given = vlm.answer([Question("What is it?", images, 5)])[0]
    tokens: list[int] = []
    while len(tokens) < 5 and not (tokens and tokens[-1] == tokenizer.eos_token_id):
        tokens.append(int(logits(images, "What is it?", tokens).argmax()))
    assert given.text == tokenizer.decode(tokens, skip_special_tokens=True)
    assert given.finished == (tokens[-1] == tokenizer.eos_token_id)


def test_answers_do_not_depend_on_their_neighbours(vlm):
    questions = [Question("a" * n, (noise(seed=n),), 1, ("Yes", "No")) for n in (1, 30, 7)]
    assert vlm.answer(questions) == [vlm.answer([question])[0] for question in questions]


CHECKLIST = ("Is it red?", "Is it round, and is it large?", "Is it red?", "Is", "")


@pytest.mark.parametrize("images", [(noise(),), (noise(seed=1), noise(60, 30, seed=2))], ids=["one", "two"])
def test_pictures_of_a_checklist_pass_the_model_once(vlm, images, request):
    """Equal to questions asked alone; the last is a part of the others, and one is asked twice."""
    seen: list[int] = []
    request.addfinalizer(vlm.model.model.visual.register_forward_hook(lambda *_: seen.append(1)).remove)
    for tokens, words in ((1, ("Yes", "No")), (4, ())):
        questions = [Question(text, images, tokens, words) for text in CHECKLIST]
        alone = [vlm.answer([question])[0] for question in questions]
        assert len(seen) == len(CHECKLIST)
        seen.clear()
        together = vlm.answer([Question("Is it red?", (noise(seed=9),), tokens, words), *questions])[1:]
        assert len(seen) == 2  # the other picture, and these
        seen.clear()
        assert [answer.text for answer in together] == [answer.text for answer in alone]
        assert [answer.finished for answer in together] == [answer.finished for answer in alone]
        for found, expected in zip(together, alone, strict=True):
            assert found.probabilities == pytest.approx(expected.probabilities, abs=1e-5)


def test_the_last_token_of_equal_questions_is_not_shared(vlm):
    """Its logits are the first of the answer, and a cache holds none."""
    question = Question("Is it red?", (noise(),), 1, ("Yes", "No"))
    (alone,) = vlm.answer([question])
    for found in vlm.answer([question, question]):
        assert found.text == alone.text
        assert found.probabilities == pytest.approx(alone.probabilities, abs=1e-5)


def test_pictures_behind_the_text_are_looked_at_for_each_question(folder, vlm, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    template = (copy / "chat_template.jinja").read_text()
    before = "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}"
    start = template.index("{% for c in m['content'] %}")
    (copy / "chat_template.jinja").write_text(template[:start] + before + template[start:])
    other = LocalVLM(INFO, copy, device="cpu")
    images = (noise(),)
    questions = [Question(text, images, 1, ("Yes", "No")) for text in CHECKLIST]
    assert other.answer(questions) == [other.answer([question])[0] for question in questions]
    assert other.answer(questions) != vlm.answer(questions)


def test_the_end_is_noticed(folder, vlm, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    end = vlm.tokenizer.eos_token_id
    tensors["lm_head.weight"] = torch.zeros_like(tensors["lm_head.weight"])
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    silent = LocalVLM(INFO, copy, device="cpu")
    (cut,) = silent.answer([Question("x", (noise(),), 3)])
    assert not cut.finished
    assert len(cut.text) == 3  # all logits are equal: the first token, again and again
    silent.model.generation_config.eos_token_id = [end, 0]
    (done,) = silent.answer([Question("x", (noise(),), 3)])
    assert done.finished


def test_logits_that_are_not_finite_are_no_answer(folder):
    broken = LocalVLM(INFO, folder, device="cpu")
    with torch.no_grad():
        broken.model.lm_head.weight.fill_(torch.nan)
    (answer,) = broken.answer([Question("x", (noise(),), 1, ("Yes",))])
    assert answer.error == "the model's logits are not finite"


@pytest.mark.slow
def test_bfloat16_is_near(folder, vlm):
    half = LocalVLM(INFO, folder, device="cpu", dtype=torch.bfloat16)
    question = Question("Is it red?", (noise(),), 1, ("Yes", "No"))
    (rounded,), (exact,) = half.answer([question]), vlm.answer([question])
    assert rounded.probabilities["Yes"] == pytest.approx(exact.probabilities["Yes"], abs=2e-2)
    assert half.identity != vlm.identity
    assert isinstance(half, Answerer)


def _drop(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _add(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "rm_head.weight": torch.ones(1)}, folder / "model.safetensors", metadata={"format": "pt"})


def _reshape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _truncate(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def _mute(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def _other(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "cogvlm2"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop, r"1 tensors are missing \(the model has \d+\), such as 'lm_head.weight'"),
        (_add, r"1 tensors are not of this model .*, such as 'rm_head.weight'"),
        pytest.param(_reshape, "lm_head.weight|mismatch|size", marks=pytest.mark.slow),
        (_truncate, "SafetensorError"),
        (_mute, "no chat template"),
        pytest.param(_other, "cogvlm2", marks=pytest.mark.slow),
    ],
)
def test_incomplete_folders_are_refused(folder, tmp_path, damage, message):
    copy = shutil.copytree(folder, tmp_path / "copy")
    damage(copy)
    with pytest.raises(WeightsError, match=message) as caught:
        LocalVLM(INFO, copy, device="cpu")
    assert "\n" not in str(caught.value)
    assert "config.json, model.safetensors" in str(caught.value)


def test_questions_are_checked():
    with pytest.raises(ValueError, match="max_tokens must be >= 1, and 1 if words"):
        Question("x", (noise(),), 4, ("Yes",))
    with pytest.raises(ValueError, match="at least one picture"):
        Question("x", (), 4)
