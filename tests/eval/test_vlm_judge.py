"""The judge of a benchmark: who is asked, what it costs, what an answer is, and how far it agrees with itself."""

from __future__ import annotations

import logging

import pytest

from diffalign.eval.vlm_judge import CHARACTERS_PER_TOKEN, Cost, VLMJudge, agreement, read_picture, read_yes_no
from diffalign.reward_models.answering import Question
from diffalign.reward_models.base import WeightsError
from diffalign.reward_models.judge_answers import UnreadableAnswerError
from tests.reward_models.judge_files import Say, completion, noise, server  # noqa: F401


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("yes", True), ("Yes.", True), ("YES, there is a dog", True), ("**Yes**", True), (' "yes"\nIt is red.', True),
        ("no", False), ("No, it is blue", False), ("No.\n", False), ("`no`", False), ("no;", False),
    ],
)  # fmt: skip
def test_yes_and_no_are_read(text, verdict):
    assert read_yes_no(text) is verdict


@pytest.mark.parametrize("text", ["", "No idea", "yesterday", "Not sure", "I think yes", "Yes or no?", "maybe", "y"])
def test_anything_else_is_no_answer(text):
    with pytest.raises(UnreadableAnswerError, match="neither yes nor no"):
        read_yes_no(text)


def questions(count):
    return [Question(f"question {k}", (noise(seed=k),), 8, template="t") for k in range(count)]


def test_a_share_of_the_questions_is_asked_twice_always_the_same_ones():
    judge = VLMJudge(answerer=Say(lambda question: question.text + question.template), repeat=0.3)
    keys = [f"key {k}" for k in range(200)]
    answers, again = judge.ask(questions(200), keys)
    assert [answer.text for answer in answers] == [f"question {k}t" for k in range(200)]
    assert 40 <= len(again) <= 80
    assert all(answer.text == f"question {place}t (again)" for place, answer in again.items())
    _, part = judge.ask(questions(200)[50:100], keys[50:100])
    assert sorted(part) == [place - 50 for place in sorted(again) if 50 <= place < 100]
    assert VLMJudge(answerer=Say(str), repeat=0).ask(questions(9), keys[:9])[1] == {}


def test_second_answers_of_a_server_do_not_come_from_its_cache(server, tmp_path):  # noqa: F811
    server.reply = lambda request, number: completion("yes" if number == 0 else "no")
    judge = VLMJudge(
        server=server.url, served_model="org/some-vlm", server_options={"cache": tmp_path, "concurrency": 1}, repeat=1
    )
    answers, again = judge.ask(questions(1), ["a"])
    assert (answers[0].text, again[0].text) == ("yes", "no")
    assert judge.ask(questions(1), ["a"])[0][0].text == "yes"
    assert len(server.requests) == 2
    assert server.requests[0]["messages"] == server.requests[1]["messages"]
    assert judge.name == "org/some-vlm"
    assert judge.identity.startswith("org/some-vlm server")


def test_only_servers_are_asked_twice_by_default():
    assert VLMJudge(server="http://localhost:1/v1", served_model="m").repeat == 0.1
    assert VLMJudge("folder").repeat == VLMJudge().repeat == 0.0


def test_an_estimate_counts_calls_tokens_and_money(caplog):
    judge = VLMJudge(answerer=Say(str), repeat=1, price=(2.0, 10.0), budget=0.01, image_tokens=1000)
    cost = judge.estimate([("a", "x" * 4 * CHARACTERS_PER_TOKEN, 5), ("b", "两只", 7)])
    assert cost == Cost(4, 2 * (1000 + 4 + 1000 + 2), 2 * 12, (2.0 * 4012 + 10.0 * 24) / 1e6)
    with caplog.at_level(logging.INFO, logger="diffalign"):
        judge.announce("dpg", cost)
    assert "4 calls, about 4 thousand tokens in and 24 out, about 0.01 to pay" in caplog.text
    with pytest.raises(ValueError, match=r"would cost about 0\.02 .*more than the budget of 0\.01"):
        judge.announce("dpg", Cost(1, 1, 1, 0.02))
    assert VLMJudge(answerer=Say(str)).estimate([("a", "b", 1)]).price is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeat": 1.5}, "repeat is a share"),
        ({"price": (1.0,)}, "prices of a million"),
        ({"price": (1.0, -1.0)}, "prices of a million"),
        ({"budget": 3.0}, "needs the price"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VLMJudge(answerer=Say(str), **options)


def test_nobody_is_loaded_before_the_first_question(tmp_path):
    judge = VLMJudge.of({"path_or_id": tmp_path / "nothing"})
    assert judge.given
    with pytest.raises(WeightsError, match="no folder or file"):
        judge.ask(questions(1), ["a"])
    assert not VLMJudge.of(None).given
    with pytest.raises(WeightsError, match="needs a vision-language model"):
        _ = VLMJudge.of(None).identity
    with pytest.raises(TypeError, match="modle"):
        VLMJudge.of({"modle": "x"})


def test_agreement_is_the_share_of_equal_pairs_and_unreadable_ones_are_missing():
    score = agreement([("p", True, True), ("p", False, False), ("q", True, False), ("q", True, None)])
    assert (score.value, score.n, score.n_missing) == (pytest.approx(2 / 3), 3, 1)
    assert score.ci95 is not None
    assert agreement([]).value is None


def test_a_picture_that_cannot_be_read_says_why(tmp_path):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG")
    assert "torn.png" in read_picture(tmp_path / "torn.png")
    assert read_picture(noise()).size == (60, 40)
