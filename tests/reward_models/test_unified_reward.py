"""UnifiedReward: its templates, what is read from answers, and what both orders of a pair say together."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from diffalign.reward_models import InvalidMediaError, UnifiedReward, WeightsError, load_reward_model
from diffalign.reward_models import judge_answers as read
from diffalign.reward_models.answering import Answer
from diffalign.reward_models.judge_tasks import TASKS, read_template
from diffalign.reward_models.media import Video
from tests.reward_models.judge_files import Say, completion, data_folder, noise, server  # noqa: F401

NAMES = ("Alignment", "Coherence", "Style")
LINES = (
    "visual quality: 4\ntemporal consistency: 3\ndynamic degree: 2\ntext-to-video alignment: 1\nfactual consistency: 2"
)


@pytest.fixture(scope="module")
def texts():
    return data_folder("reward_prompts", "unifiedreward_templates.json")


@pytest.fixture(scope="module")
def templates(texts):
    return json.loads((texts / "unifiedreward_templates.json").read_bytes())


def model(texts, task, reply, **options) -> UnifiedReward:
    return UnifiedReward(task=task, texts=texts, answerer=Say(reply), **options)


UNREADABLE = None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a dog (animal): 1\nred (colour): 0\nFinal Score: 4", 0.8),
        ("Final Score: 3.5", 0.7),
        ("**Final Score:** 5\n", 1.0),
        ("**Final Score**: 2 out of 5", 0.4),
        ("final score:1", 0.2),
        ("Final Score: 2 ... no, Final Score: 3", 0.6),
        ("最终 🙂 Final Score: 4", 0.8),
        ("Final Score: 45", UNREADABLE),
        ("Final Score: 0", UNREADABLE),
        ("Final Score: -3", UNREADABLE),
        ("Final Score: X", UNREADABLE),
        ("Score: 4", UNREADABLE),
        ("", UNREADABLE),
    ],
)
def test_point_image(text, value):
    check(TASKS["point_image"].read, text, value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Image 1 is better.", 1.0),
        ("image 2 is better", 0.0),
        ("Both images are equally good.", 0.5),
        ("Image 1 is better in colour. All in all: Image 2 is better.", 0.0),
        ("Image 2 is better at first sight, but both images are equally good.", 0.5),
        ("Image 12 is better", UNREADABLE),
        ("Video 1 is better.", UNREADABLE),
        ("The first one.", UNREADABLE),
    ],
)
def test_pair_image(text, value):
    check(TASKS["pair_image"].read, text, value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>Image 2 is better</think><answer>Image 1 is better</answer>", 1.0),
        ("<answer>\nImage 2 is better.\n</answer>", 0.0),
        ("<answer>Image 1 is better</answer> wait <ANSWER>Image 2 is better</ANSWER>", 0.0),
        ("<answer>Image 1 is better, slightly</answer>", UNREADABLE),
        ("<answer></answer>", UNREADABLE),
        ("<answer>Image 1 is better", UNREADABLE),
        ("Image 1 is better", UNREADABLE),
    ],
)
def test_think(text, value):
    check(TASKS["think_pair_image"].read, text, value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"categories": [{"cat_winner": "Image 2"}], "winner": "Image 1"}', 1.0),
        ('```json\n{"reason": "a } in {text}", "winner": "Image 2"}\n```', 0.0),
        ('I compare {both}: {"winner": "1"} done', 1.0),
        ('{"reason": "bad "quotes"", "cat_winner": "Image 1",\n "winner": "Image 2"}', 0.0),
        ('{"winner": "Image 1/2"}', UNREADABLE),
        ('{"winner": "both"}', UNREADABLE),
        ('{"winner": null}', UNREADABLE),
        ('{"categories": [{"cat_winner": "Image 1"}', UNREADABLE),
        ("{" * 5000, UNREADABLE),
        ("[1, 2]", UNREADABLE),
    ],
)
def test_flex(text, value):
    check(TASKS["flex_pair_image"].read, text, value)


def check(reader, text, value):
    if value is UNREADABLE:
        with pytest.raises(read.UnreadableAnswerError) as caught:
            reader(text)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 250
    else:
        assert reader(text)["overall"] == pytest.approx(value)


def shares_text(values, noun="Image"):
    return "\n\n".join(f"{n} Score:\n {noun} 1: {x}\n {noun} 2: {y}" for n, (x, y) in zip(NAMES, values, strict=True))


def test_shares_of_a_pair_sum_to_one():
    generator = np.random.default_rng(0)
    for _ in range(50):
        values = generator.uniform(0, 1, (3, 2)).round(4)
        there = TASKS["pair_image_score"].read(shares_text(values))
        back = TASKS["pair_image_score"].read(shares_text(values[:, ::-1]))
        for i, name in enumerate(NAMES):
            assert there[name.lower()] == pytest.approx(values[i, 0] / values[i].sum())
            assert there[name.lower()] + back[name.lower()] == pytest.approx(1.0, abs=1e-12)
        assert there["overall"] == pytest.approx(np.mean(values[:, 0] / values.sum(1)))
    for bad in (shares_text([(0, 0)] * 3), shares_text([(2, 1)] * 3), shares_text([(-0.5, 0.5)] * 3),
                shares_text([(0.5, 0.5)] * 3, "Video"), shares_text([(0.5, 0.5)] * 3)[:-10]):  # fmt: skip
        check(TASKS["pair_image_score"].read, bad, UNREADABLE)


def test_scores_of_several_dimensions():
    found = TASKS["point_video"].read(f"{LINES}\nFinal Score: 6")
    assert found == {"visual_quality": 4, "temporal_consistency": 3, "dynamic_degree": 2,
                     "text_to_video_alignment": 1, "factual_consistency": 2, "overall": 0.6}  # fmt: skip
    check(TASKS["point_video"].read, "Final Score: 6", UNREADABLE)
    check(TASKS["point_video"].read, LINES, UNREADABLE)
    check(TASKS["point_video"].read, f"{LINES}\nFinal Score: 6".replace(": 4", ": 5"), UNREADABLE)
    graded = "Alignment Score (1-5): 4.5\n**Coherence Score (1-5):** 3\nStyle Score (1-5): 3"
    assert TASKS["point_image_acs"].read(graded) == {"alignment": 4.5, "coherence": 3, "style": 3, "overall": 0.7}
    check(TASKS["point_image_acs"].read, graded.replace("Style", "Physics"), UNREADABLE)
    assert TASKS["point_video_aps"].read(graded.replace("Coherence", "Physics"))["physics"] == 3


@pytest.mark.parametrize("task", TASKS)
def test_templates(texts, templates, task, tmp_path):
    """From the table as well as from scripts in the form of the official ones."""
    expected = templates[TASKS[task].key]["template"]
    assert templates[TASKS[task].key]["file"] == TASKS[task].script
    assert read_template(TASKS[task], texts) == expected
    script = tmp_path / TASKS[task].script
    script.parent.mkdir(parents=True)
    literal = expected.replace("{", "{{").replace("}", "}}").replace("{{prompt}}", "{caption}")
    before, behind = (repr(part) for part in (literal[:40], literal[40:]))
    script.write_text(f"raise SystemExit\nproblem = (\n    {before}\n    f{behind}\n)\nname = f'video_{{i}}'\n")
    if "{" in literal[:40]:
        script.write_text(f"problem = f{literal!r}\n")
    assert read_template(TASKS[task], tmp_path) == expected
    script.write_text(script.read_text().replace("Your task", "My task").replace("Output", "Input"))
    with pytest.raises(WeightsError, match="is not the published one"):
        read_template(TASKS[task], tmp_path)


def test_missing_templates_are_named(tmp_path, texts):
    with pytest.raises(WeightsError, match="clone https://github.com/CodeGoat24/UnifiedReward and pass its folder"):
        UnifiedReward(answerer=Say(str))
    with pytest.raises(WeightsError, match="has neither 'unifiedreward_templates.json' nor 'inference_qwen/image_gen"):
        UnifiedReward(texts=tmp_path, answerer=Say(str))
    (tmp_path / "unifiedreward_templates.json").write_text("{")
    with pytest.raises(WeightsError, match="cannot read the template 'unifiedreward_point_image'"):
        UnifiedReward(texts=tmp_path, answerer=Say(str))
    with pytest.raises(ValueError, match="unknown task 'point' of unified_reward \\(available: point_image, "):
        UnifiedReward(task="point", texts=texts)


def test_by_name(texts):
    for task in TASKS:
        loaded = load_reward_model(f"unified_reward-{task}", texts=texts, answerer=Say(str))
        assert loaded.info.name == f"unified_reward-{task}"
        assert loaded.info.pairwise_native == ("pair" in task)
        assert loaded.item_ndim == (4 if "video" in task else 3)


def test_point_scores_through_a_server(texts, templates, server):  # noqa: F811
    answers = [completion("Final Score: 4"), completion("I cannot."), (500, b"busy"), (200, b"{"),
               completion("Final Score: 3", reason="length"), completion("```\nFinal Score: 2\n```")]  # fmt: skip
    prompts = [f'{{"a"}} {n} {{prompt}}' for n in range(len(answers))]

    def reply(request, number):
        text = request["messages"][0]["content"][-1]["text"]
        return answers[int(re.search(r'\{"a"\} (\d)', text)[1])]

    server.reply = reply
    judge = UnifiedReward(texts=texts, server=server.url, served_model="UnifiedReward",
                          server_options={"retries": 1, "backoff": 0.0})  # fmt: skip
    output = judge.score([noise(seed=i) for i in range(len(answers))], prompts, on_invalid="nan")
    torch.testing.assert_close(output.score, torch.tensor([0.8, torch.nan, torch.nan, torch.nan, torch.nan, 0.4]),
                               equal_nan=True)  # fmt: skip
    assert output.valid.tolist() == [True, False, False, False, False, True]
    wanted = [None, "no 'Final Score: x' in 'I cannot.'", "500: busy", "no JSON", "cut at 4096 tokens", None]
    for error, part in zip(output.errors, wanted, strict=True):
        assert (error is None) if part is None else (part in error)
    assert output.raw[1] == "I cannot."
    sent = {request["messages"][0]["content"][-1]["text"] for request in server.requests}
    template = templates["unifiedreward_point_image"]["template"]
    assert sent == {template.replace("{prompt}", prompt) for prompt in prompts}
    assert {request["max_tokens"] for request in server.requests} == {4096}
    with pytest.raises(InvalidMediaError, match="medium 1: no 'Final Score: x'"):
        judge.score([noise(seed=0), noise(seed=1)], prompts[:2])


def by_width(first_bonus=0):
    """A judge who likes wide pictures, and the first place by so many pixels."""

    def reply(question):
        half = len(question.images) // 2
        first, second = question.images[0].width + first_bonus, question.images[half].width
        verdict = "Both images are equally good." if first == second else f"Image {1 + (first < second)} is better."
        return f"Because: {verdict}"

    return reply


def test_pairs_are_asked_in_both_orders(texts):
    narrow, wide = noise(8, 10), noise(8, 20)
    judge = model(texts, "pair_image", by_width())
    pairs = judge.compare([narrow, wide, wide], [wide, narrow, wide], "a cat")
    assert pairs.p_a.tolist() == [0.0, 1.0, 0.5]
    assert pairs.tie.tolist() == [False, False, True]
    assert pairs.position_bias.tolist() == [0.0, 0.0, 0.0]
    assert pairs.raw[0] == ("Because: Image 2 is better.", "Because: Image 1 is better.")
    assert [question.images[0].width for question in judge.answerer.asked] == [10, 20, 20, 20, 10, 20]
    assert all("[a cat]" in question.text for question in judge.answerer.asked)


def test_a_judge_who_likes_the_first_place_is_found_out(texts):
    pictures = [noise(8, width) for width in (10, 11, 30)]
    pairs = model(texts, "pair_image", by_width(5)).compare(pictures[:2], pictures[1:], "x")
    assert pairs.p_a.tolist() == [0.5, 0.0]
    assert pairs.tie.tolist() == [True, False]
    assert pairs.position_bias.tolist() == [1.0, 0.0]
    given = model(texts, "pair_image", by_width(5)).compare(pictures[:2], pictures[1:], "x", orders="given")
    assert given.p_a.tolist() == [1.0, 0.0]
    assert given.position_bias.isnan().all()
    assert [len(answers) for answers in given.raw] == [1, 1]


def test_swapping_a_pair_gives_one_minus_the_result(texts):
    def reply(question):
        first, second = question.images[0].width / 40, question.images[1].width / 50
        return shares_text([(round(first, 3), round(second, 3))] * 2 + [(0.2, 0.9)])

    left, right = [noise(4, 5 + i) for i in range(4)], [noise(4, 12 - 3 * i) for i in range(4)]
    judge = model(texts, "pair_image_score", reply)
    there, back = judge.compare(left, right, "x"), judge.compare(right, left, "x")
    torch.testing.assert_close(there.p_a, 1 - back.p_a)
    torch.testing.assert_close(there.position_bias, back.position_bias)
    assert torch.equal(there.tie, back.tie)
    for name in ("alignment", "coherence", "style", "overall"):
        torch.testing.assert_close(there.dims[name], 1 - back.dims[name])
    small = judge.compare(left, right, "x", batch_size=3)
    torch.testing.assert_close(small.p_a, there.p_a, rtol=0, atol=0)


def test_pairs_that_cannot_be_judged(texts, tmp_path):
    def reply(question):
        if question.images[0].width == 7:
            return Answer(error="no answer within 1 s")
        return "Image 1 is better." if question.images[0].width > question.images[1].width else "Image 2 is better."

    a, b = [noise(4, 5), noise(4, 7), tmp_path / "none.png", noise(4, 9)], [noise(4, 6) for _ in range(4)]
    judge = model(texts, "pair_image", reply)
    pairs = judge.compare(a, b, "x", on_invalid="nan", batch_size=2)
    assert pairs.valid.tolist() == [True, False, False, True]
    assert pairs.p_a[[0, 3]].tolist() == [0.0, 1.0]
    assert pairs.p_a[[1, 2]].isnan().all()
    assert not pairs.tie.any()
    assert pairs.errors[1] == "pair 1: no answer within 1 s"
    assert "no such file" in pairs.errors[2]
    with pytest.raises(InvalidMediaError, match="pair 1: no answer"):
        judge.compare(a[:2], b[:2], "x")
    with pytest.raises(InvalidMediaError, match="medium 2: .*no such file"):
        judge.compare(a, b, "x")
    with pytest.raises(ValueError, match="as many a as b, got 2 and 1"):
        judge.compare(a[:2], b[:1], "x")
    assert judge.compare([], [], "x").p_a.shape == (0,)


def test_win_rates(texts):
    widths = [10, 30, 20, 20]
    rates = model(texts, "pair_image", by_width()).win_rates([noise(4, w) for w in widths], "x")
    expected = [np.mean([(w > v) + 0.5 * (w == v) for j, v in enumerate(widths) if j != i])
                for i, w in enumerate(widths)]  # fmt: skip
    assert rates.tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match="two or more"):
        model(texts, "pair_image", by_width()).win_rates([noise()], "x")


def test_which_task_does_what(texts):
    judge = model(texts, "pair_image", by_width())
    with pytest.raises(NotImplementedError, match="judges pairs: call compare"):
        judge.score([noise()], "x")
    points = model(texts, "point_image", lambda q: f"Final Score: {q.images[0].width / 10}")
    pair = points.compare([noise(4, 40)], [noise(4, 20)], "x")
    assert pair.p_a.item() == pytest.approx(1 / (1 + np.exp(-0.4)))


@pytest.mark.parametrize("total", [1, 5, 8, 16, 49, 81, 300])
def test_frames(texts, total):
    two = model(texts, "point_video_aps", str)
    assert two.choose_frames(total, None) == [int(i * total / 16) for i in range(16)]
    assert len(model(texts, "pair_video_score", str).choose_frames(total, 8.0)) == 8
    flex = model(texts, "flex_pair_video", str)
    assert flex.choose_frames(total, 24.0) == np.linspace(0, total - 1, 8).astype(int).tolist()


def test_videos_of_a_pair_follow_each_other(texts):
    first, second = ([noise(8, 8, seed=10 * k + i) for i in range(16)] for k in (1, 2))
    judge = model(texts, "think_pair_video", lambda q: "<answer>Video 2 is better</answer>")
    pairs = judge.compare([Video(first)], [Video(second)], "x")
    assert pairs.position_bias.item() == -1.0
    forward, swapped = judge.answerer.asked
    assert len(forward.images) == 16
    assert [image.tobytes() for image in forward.images] == [i.tobytes() for i in first[::2] + second[::2]]
    assert [image.tobytes() for image in swapped.images] == [i.tobytes() for i in second[::2] + first[::2]]
