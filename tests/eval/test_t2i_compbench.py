"""T2I-CompBench as a benchmark: BLIP-VQA and CLIP on tiny models, the detector's categories, aggregation, its files."""

from __future__ import annotations

import json
import logging
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from transformers import BertTokenizer, BlipConfig, BlipForQuestionAnswering, CLIPModel

from diffalign.eval.base import Case, Row, read_rows, write_rows
from diffalign.eval.t2i_compbench import T2ICompBench
from diffalign.eval.t2i_compbench_files import read_results, read_samples, score_samples, write_results, write_samples
from diffalign.eval.t2i_compbench_models import BlipVQA, ClipCosine
from diffalign.eval.t2i_compbench_rules import three_in_one
from diffalign.eval.t2i_compbench_table import PUBLISHED
from diffalign.eval.t2i_compbench_words import Rules
from diffalign.plugins import find
from diffalign.reward_models.base import WeightsError
from tests.reward_models.conftest import photo, save_hf_clip
from tests.reward_models.geneval_files import PaintedDetector, geneval_data, paint
from tests.reward_models.judge_files import data_folder, randomise

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no", "?", "a", "red", "green", "car", "bench"]


@pytest.fixture(scope="module")
def data():
    return data_folder("t2i_compbench", "color_val.txt", "spatial_val.txt", "new_objects.txt")


def save_blip(folder, *, image_size=32, words=WORDS, seed=0):
    """A random BLIP-VQA with its tokenizer, as transformers publishes it; its last two tokens are not in the files."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**size, "encoder_hidden_size": 16, "vocab_size": len(words) + 2, "bos_token_id": len(words),
            "sep_token_id": 3, "pad_token_id": 0, "projection_dim": 16}  # fmt: skip
    config = BlipConfig(text_config=text, vision_config={**size, "image_size": image_size, "patch_size": 16})
    model = BlipForQuestionAnswering(config)
    randomise(model, seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "crossattention" in name or "word_embeddings" in name:
                p.mul_(4)  # so that picture and question matter
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory):
    return save_blip(tmp_path_factory.mktemp("blip"))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return save_hf_clip(tmp_path_factory.mktemp("vit_b32"), act="quick_gelu", seed=2)


def bench_with(data, **options):
    return T2ICompBench(**{"data": data, "geneval_data": geneval_data(), "device": "cpu", **options})


# --- models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [32, pytest.param(48, marks=pytest.mark.slow)])
def test_blip_vqa_equals_transformers_own_answer(blip_folder, image_size):
    """One question at a time through `generate`, which is another path to the same first token."""
    picture = Image.fromarray(photo(40, 60))
    model = BlipVQA(blip_folder, image_size=image_size, device="cpu")
    questions = ["a red car?", "a green bench and a red car?", "?"]
    found = model.ask(picture, questions)
    other = BlipForQuestionAnswering.from_pretrained(blip_folder)
    tokenizer = BertTokenizer.from_pretrained(blip_folder)
    pixels = transforms.Compose([
        transforms.Resize((image_size, image_size), transforms.InterpolationMode.BICUBIC), transforms.ToTensor(),
        transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ])(picture)[None]  # fmt: skip
    for question, value in zip(questions, found, strict=True):
        ids = tokenizer(question, return_tensors="pt")["input_ids"]
        ids[:, 0] = len(WORDS) + 1
        output = other.generate(
            ids, pixels, interpolate_pos_encoding=image_size != 32, max_new_tokens=1, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        p = output.logits[0].softmax(-1)[0]
        assert value == pytest.approx((p[5] / (p[5] + p[6])).item(), abs=1e-5)
    assert len({round(value, 5) for value in found}) == 3
    assert model.ask(Image.fromarray(photo(40, 60, seed=5)), questions) != pytest.approx(found, abs=1e-5)
    assert model.ask(picture, []) == []


@pytest.mark.slow
def test_blip_vqa_refuses_other_weights(blip_folder, clip_folder, tmp_path):
    with pytest.raises(WeightsError, match="config.json is of a 'clip', expected a 'blip'"):
        BlipVQA(clip_folder)
    with pytest.raises(WeightsError, match="there is no folder or file"):
        BlipVQA(tmp_path / "none")
    with pytest.raises(ValueError, match="multiple of the patches' 16 pixels, got 100"):
        BlipVQA(blip_folder, image_size=100)
    with pytest.raises(WeightsError, match="no single tokens 'yes' and 'no'"):
        BlipVQA(save_blip(tmp_path / "b", words=[w for w in WORDS if w != "no"]), image_size=32)
    torn = save_blip(tmp_path / "torn") / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="cannot load BLIP-VQA"):
        BlipVQA(tmp_path / "torn")


@pytest.mark.slow
def test_weights_that_lack_a_tensor_are_refused(blip_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_blip(tmp_path / "part")
    tensors = load_file(folder / "model.safetensors")
    del tensors["text_encoder.encoder.layer.0.output.dense.bias"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"1 tensors are missing, such as 'text_encoder\.encoder"):
        BlipVQA(folder)


def test_the_cosine_is_clips_own(clip_folder):
    clip = ClipCosine(clip_folder, device="cpu")
    picture, prompt = Image.fromarray(photo(224, 224)), "A couple is stargazing in a field."
    model = CLIPModel.from_pretrained(clip_folder)
    ids = clip.towers.token_ids([prompt])
    pixels = clip.crop.image(picture)[None]
    with torch.no_grad():
        output = model(input_ids=ids, pixel_values=pixels)
    assert clip([picture], [prompt]).item() == pytest.approx(
        torch.cosine_similarity(output.image_embeds, output.text_embeds).item(), abs=1e-5
    )


# --- the benchmark -----------------------------------------------------------------------------------------------


def test_cases_are_the_published_prompts_ten_times_each(data):
    bench = find("eval", "t2i_compbench")(data=data)
    cases = bench.cases()
    assert Counter(c.task for c in cases) == dict.fromkeys(("color", "shape", "texture", "non_spatial"), 3000)
    assert len({(c.prompt, c.seed) for c in cases}) == len({c.id for c in cases}) == 12000
    lines = (data / "color_val.txt").read_text().split("\n")
    assert [c.prompt for c in cases[:3000:10]] == [line.strip() for line in lines]
    assert [(c.id, c.seed) for c in cases[9:11]] == [("color-000-09", 51), ("color-001-00", 42)]
    assert Counter(c.task for c in T2ICompBench(8, samples=1, data=data).cases()) == dict.fromkeys(
        ("color", "shape", "texture", "non_spatial"), 2
    )


def test_a_detector_judges_the_prompts_whose_things_it_knows(data):
    bench = bench_with(data, categories=["spatial_m2f", "numeracy_m2f"], samples=1, detector=PaintedDetector())
    prompts = [c.prompt for c in bench.cases()]
    assert Counter(c.task for c in bench.cases()) == {"spatial_m2f": 103, "numeracy_m2f": 68}
    assert not any("balloon" in prompt or "frog" in prompt for prompt in prompts)
    few = bench_with(data, categories=["spatial_m2f"], samples=1, detector=PaintedDetector(), classes=["person", "dog"])
    assert {w for c in few.cases() for w in c.prompt.split()} & {"cat", "horse", "sofa"} == set()
    assert few.protocol()["classes"] != bench.protocol()["classes"]


def test_attributes_are_asked_phrase_by_phrase(data, blip_folder):
    bench = bench_with(data, num_prompts=6, samples=1, categories=["color", "shape"], blip=blip_folder)
    pictures = [Image.fromarray(photo(40, 40, seed=k)) for k in range(6)]
    bench.blip.image_size = 32  # the tiny model's own, so that the test is fast
    rows = bench.score(pictures, bench.cases())
    for row, picture in zip(rows, pictures, strict=True):
        questions = [f"{phrase}?".lower() for phrase in Rules().noun_phrases(row.prompt)]
        product = np.prod([round(v, 4) for v in bench.blip.ask(picture, questions)])
        assert row.evidence["questions"] == questions
        assert row.scores[f"t2i_{row.task}"] == row.evidence["value"] == pytest.approx(product, abs=1e-4)
    report = bench.aggregate(rows)
    assert report.scores["t2i_color"].value == pytest.approx(np.mean([r.evidence["value"] for r in rows[:3]]))
    assert report.protocol["judges"]["shape"].endswith(", rules")
    assert (report.n_expected, report.n_missing) == (6, 0)


def test_relations_and_numbers_are_judged_by_what_the_detector_finds(data):
    bench = bench_with(data, categories=["spatial_m2f", "numeracy_m2f"], samples=1, detector=PaintedDetector(0.8))
    names = bench.classes
    place = next(c for c in bench.cases() if " on the left of " in c.prompt)
    first, last = (names.index(name) for name in bench._objects(place.prompt, is_complex=False))
    number = next(c for c in bench.cases() if c.prompt.startswith("two ") and c.prompt.count(" ") == 1)
    thing = names.index(bench._name(bench._singular[number.prompt.split()[1]]))
    left, right = (2, 10, 12, 20), (40, 10, 50, 20)
    pictures = [
        paint([(first, left), (last, right)]), paint([(first, right), (last, left)]), paint([(first, left)]),
        paint([(thing, left), (thing, right)]), paint([(thing, left)]), paint([]),
    ]  # fmt: skip
    rows = bench.score(pictures, [place] * 3 + [number] * 3)
    assert [row.scores[f"t2i_{row.task}"] for row in rows] == pytest.approx([0.9, 0.0, 0.0, 1.0, 0.5, 0.0])
    assert rows[0].evidence["objects"][names[first]] == [[*left, 0.8]]
    report = bench.aggregate([rows[0], rows[3]])
    assert report.scores["t2i_spatial_m2f"].value == pytest.approx(0.9)
    assert "spatial_m2f: another detector and 103 prompts; not the published spatial" in report.warnings
    dull = bench_with(data, categories=["spatial_m2f"], samples=1, detector=PaintedDetector(0.8), threshold=0.8)
    assert dull.score(pictures[:1], [place])[0].evidence["value"] == 0.0  # only a larger score counts


class Parser:
    """Stands for spaCy on prompts of one pattern: The <adjective> <noun> was <relation> the <adjective> <noun>."""

    name = "parser"

    def noun_phrases(self, prompt):
        return Rules().noun_phrases(prompt)

    def without_adjectives(self, prompt):
        return " ".join(word for word in prompt.rstrip(".").split() if word not in ("red", "green", "white", "black"))

    def objects(self, prompt, *, is_complex):
        words = prompt.rstrip(".").split()
        return words[2], words[-1]


@pytest.mark.slow
def test_complex_prompts_average_their_parts(data, blip_folder, clip_folder):
    bench = bench_with(
        data, categories=["complex_m2f"], samples=1, language=Parser(), blip=blip_folder, clip=clip_folder,
        detector=PaintedDetector(0.8),
    )  # fmt: skip
    bench.blip.image_size = 32
    cases = bench.cases()
    kinds = Counter(bench._kinds[case.prompt] for case in cases)
    assert kinds["action"] == 212
    picked = [next(c for c in cases if bench._kinds[c.prompt] == kind) for kind in kinds]
    rows = bench.score([paint([(0, (2, 2, 20, 20))])] * len(picked), picked)
    for row, case in zip(rows, picked, strict=True):
        parts, kind = row.evidence["parts"], bench._kinds[case.prompt]
        assert (parts["spatial"] is None, parts["action"] is None) == (kind == "action", kind == "spatial")
        assert row.evidence["value"] == three_in_one(kind, parts["attribute"], parts["spatial"], parts["action"])
    with pytest.raises(ValueError, match="complex_m2f needs a parser of sentences"):
        bench_with(data, categories=["complex_m2f"])


def test_pictures_that_cannot_be_read_or_scored_are_missing(data, clip_folder, tmp_path):
    bench = bench_with(data, num_prompts=2, samples=1, categories=["non_spatial"], clip=clip_folder)
    rows = bench.score([tmp_path / "none.png", np.zeros((40, 40, 3), np.uint8)], bench.cases())
    assert rows[0].reason == "none.png: no such file"
    assert rows[0].scores == {"t2i_non_spatial": None}
    report = bench.aggregate(rows)
    assert (report.n_missing, report.partial, report.scores["t2i_non_spatial"].n) == (1, True, 1)
    assert "1 of 2 pictures are missing, 1 of them could not be judged" in report.warnings
    with torch.no_grad():
        bench.clip.towers.model.visual_projection.weight.fill_(float("nan"))
    broken = bench.score([np.zeros((40, 40, 3), np.uint8)], bench.cases()[:1])
    assert broken[0].scores == {"t2i_non_spatial": None}
    assert broken[0].reason


def test_what_does_not_belong_is_refused(data, clip_folder):
    bench = bench_with(data, num_prompts=2, samples=1, categories=["non_spatial"], clip=clip_folder)
    row = Row("x", bench.cases()[0].prompt, 42, evidence={"judge": "a", "value": 0.3})
    second = Row("y", bench.cases()[1].prompt, 42, evidence={"judge": "b", "value": 0.3})
    with pytest.raises(ValueError, match="different judges cannot share a score: a, b"):
        bench.aggregate([row, second])
    with pytest.raises(ValueError, match="no case of this benchmark"):
        bench.aggregate([Row("x", "another", 42)])
    with pytest.raises(ValueError, match="is none of the 2 of this benchmark"):
        bench.score([np.zeros((4, 4, 3), np.uint8)], [Case("x", "another", 42)])
    with pytest.raises(ValueError, match="unknown category 'colour'"):
        T2ICompBench(categories=["colour"], data=data)
    with pytest.raises(ValueError, match="categories of different prompts"):
        bench_with(data, categories=["spatial", "spatial_m2f"])
    with pytest.raises(ValueError, match="threshold must lie"):
        T2ICompBench(threshold=2, data=data)
    with pytest.raises(ValueError, match="unknown language 'nltk'"):
        T2ICompBench(language="nltk", data=data)
    official = T2ICompBench(2, samples=1, categories=["spatial"], data=data)
    with pytest.raises(ValueError, match=r"'spatial' is judged by the original tool: .* or take 'spatial_m2f'"):
        official.score([np.zeros((4, 4, 3), np.uint8)], official.cases()[:1])


def test_rows_survive_their_file(data, tmp_path):
    bench = T2ICompBench(2, samples=2, categories=["color"], data=data)
    rows = [
        Row(c.id, c.prompt, c.seed, c.task, evidence={"judge": "j", "value": 0.25 * k})
        for k, c in enumerate(bench.cases())
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    score = bench.aggregate(read_rows(tmp_path / "rows.jsonl")).scores["t2i_color"]
    assert (score.value, score.n) == (0.375, 4)
    assert score.ci95 == (0.125, 0.625)


# --- files -------------------------------------------------------------------------------------------------------


def test_samples_go_out_and_come_back(data, tmp_path, caplog, clip_folder):
    bench = bench_with(data, num_prompts=2, samples=2, categories=["non_spatial"], clip=clip_folder)
    rows = []
    for k, case in enumerate(bench.cases()):
        Image.fromarray(photo(32, 32, seed=k)).save(tmp_path / f"{k}.png")
        rows.append(Row(case.id, case.prompt, case.seed, case.task, image=f"{k}.png"))
    assert write_samples(tmp_path / "out", rows, tmp_path, bench, "non_spatial") == 4
    names = sorted(file.name for file in (tmp_path / "out" / "samples").iterdir())
    first = bench.cases()[0]
    assert f"{first.prompt}_{10 * int(first.id.split('-')[1]):06d}.png" in names
    assert [case.id for case, _ in read_samples(bench, tmp_path / "out", "non_spatial")] == [
        c.id for c in bench.cases()
    ]
    assert bench.find_media(tmp_path / "out") == {
        c.id: f for c, f in read_samples(bench, tmp_path / "out", "non_spatial")
    }
    assert bench.find_media(tmp_path) == {}
    back = score_samples(bench, tmp_path / "out", "non_spatial", batch_size=3)
    direct = bench.score([tmp_path / f"{k}.png" for k in range(4)], bench.cases())
    assert [r.evidence["value"] for r in back] == pytest.approx([r.evidence["value"] for r in direct], abs=1e-6)
    write_results(tmp_path / "out", back, bench, "non_spatial")
    read = read_results(tmp_path / "out", bench, "non_spatial")
    assert [(r.id, r.evidence["value"]) for r in read] == [(r.id, r.evidence["value"]) for r in back]
    Image.new("RGB", (8, 8)).save(tmp_path / "out" / "samples" / "another prompt_000000.png")
    with caplog.at_level(logging.WARNING, logger="diffalign"):
        read_samples(bench, tmp_path / "out", "non_spatial")
    assert "1 pictures are no case of this benchmark" in caplog.text
    with pytest.raises(ValueError, match=r"expected samples/<prompt>_000000.png"):
        read_samples(bench, tmp_path, "non_spatial")
    with pytest.raises(ValueError, match="no row is a case of non_spatial"):
        write_samples(tmp_path / "x", [Row("a", "b", 0)], tmp_path, bench, "non_spatial")


def test_results_of_the_original_are_read_and_written(data, tmp_path):
    bench = T2ICompBench(12, categories=["spatial", "color"], data=data)
    place = tmp_path / "spatial" / "labels" / "annotation_obj_detection_2d"
    place.mkdir(parents=True)
    numbers = [10 * int(c.id.split("-")[1]) + int(c.id.split("-")[2]) for c in bench.cases() if c.task == "spatial"]
    (place / "vqa_result.json").write_text(json.dumps([{"question_id": k, "answer": 0.5 * (k % 2)} for k in numbers]))
    rows = read_results(tmp_path / "spatial", bench, "spatial")
    assert [(r.id, r.seed) for r in rows] == [(c.id, c.seed) for c in bench.cases() if c.task == "spatial"]
    assert numbers[:2] == [250, 251]
    report = bench.aggregate(rows)
    assert (report.scores["t2i_spatial"].value, report.scores["t2i_color"].value) == (0.25, None)
    assert report.protocol["judges"] == {"spatial": "original tool", "color": None}
    stored = {"judge": "original tool", "value": 0.1234}
    colors = [Row(c.id, c.prompt, c.seed, c.task, evidence=stored) for c in bench.cases() if c.task == "color"]
    path = write_results(tmp_path / "color", colors, bench, "color")
    assert json.loads(path.read_text())[:2] == [{"question_id": k, "answer": "0.1234"} for k in (250, 251)]
    assert [r.evidence for r in read_results(tmp_path / "color", bench, "color")] == [r.evidence for r in colors]
    with pytest.raises(ValueError, match="there is no .*annotation_blip"):
        read_results(tmp_path / "spatial", bench, "color")
    with pytest.raises(ValueError, match="the original has no results of '3d_spatial'"):
        read_results(tmp_path, bench, "3d_spatial")
    path.write_text('[{"question_id": 99999, "answer": "1"}]')
    with pytest.raises(ValueError, match="1 numbers are no case of the benchmark, such as 99999"):
        read_results(tmp_path / "color", bench, "color")
    path.write_text('[{"question_id": 0}')
    with pytest.raises(ValueError, match="expected a list of question_id and answer"):
        read_results(tmp_path / "color", bench, "color")


def test_published_scores_name_their_source():
    rows = {(row["model"], row["source"].split(",")[0]): row["categories"] for row in PUBLISHED}
    assert rows["SDXL", "paper of T2I-CompBench"]["t2i_color"] == 0.6369
    assert rows["SDXL", "paper of T2I-CompBench++"]["t2i_numeracy"] == 0.4988
    assert all("not confirmed here" in row["source"] for row in PUBLISHED)
