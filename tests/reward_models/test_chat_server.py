"""The client of OpenAI-compatible servers, against a real server on this machine."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffalign.reward_models.answering import Answerer, Question
from diffalign.reward_models.chat_server import ChatServer
from tests.reward_models.judge_files import FakeServer, completion, noise, server  # noqa: F401

PICTURE = noise(4, 5)


def ask(text: str = "q", **changes) -> Question:
    return Question(**{"text": text, "images": (PICTURE,), "max_tokens": 16, "template": "t", **changes})


def client(server: FakeServer, **options) -> ChatServer:  # noqa: F811
    return ChatServer(server.url, "judge", **{"backoff": 0.0, "timeout": 5.0, **options})


def test_request(server, monkeypatch):  # noqa: F811
    monkeypatch.setenv("JUDGE_TOKEN", " secret\n")
    asked = client(server, token_env="JUDGE_TOKEN", chat_template_options={"enable_thinking": False})
    assert isinstance(asked, Answerer)
    (answer,) = asked.answer([ask("is it? ä", images=(PICTURE, noise(3, 3, seed=1)))])
    assert (answer.text, answer.finished, answer.error) == ("yes", True, None)
    (request,) = server.requests
    assert server.paths == ["/v1/chat/completions"]
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("judge", 0, 16)
    assert request["chat_template_kwargs"] == {"enable_thinking": False}
    assert "do_sample" not in request
    assert "logprobs" not in request
    (message,) = request["messages"]
    *pictures, text = message["content"]
    assert text == {"type": "text", "text": "is it? ä"}
    assert len(pictures) == 2
    kind, _, data = pictures[0]["image_url"]["url"].partition(";base64,")
    assert kind == "data:image/png"
    sent = Image.open(io.BytesIO(base64.b64decode(data)))
    np.testing.assert_array_equal(np.asarray(sent), np.asarray(PICTURE))


def test_jpeg_is_smaller_and_not_exact(server):  # noqa: F811
    client(server, image_format="jpeg").answer([ask()])
    url = server.requests[0]["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/jpeg;base64,")
    sent = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert sent.size == PICTURE.size
    assert client(server, image_format="jpeg").identity != client(server).identity


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Ünïcode 画像 🙂",
        '```json\n{"winner": "Image 1"}\n```',
        "<think>a</think>\n<answer>Image 1 is better</answer>",
    ],
)
def test_answers_come_as_they_are(server, text):  # noqa: F811
    server.reply = lambda request, number: completion(text)
    assert client(server).answer([ask()])[0].text == text


def test_half_a_surrogate_pair_is_replaced(server, tmp_path):  # noqa: F811
    server.reply = lambda request, number: (200, rb'{"choices": [{"message": {"content": "a\ud83d"}}]}')
    for _ in range(2):
        assert client(server, cache=tmp_path).answer([ask()])[0].text == "a?"


def test_a_cut_answer_says_so(server):  # noqa: F811
    server.reply = lambda request, number: completion("Final Sc", reason="length")
    assert not client(server).answer([ask()])[0].finished


BAD = {
    "no JSON": b"<html>busy</html>",
    "half of it": completion("a long answer")[1][:30],
    "no object": b"[]",
    "no choices": b'{"object": "chat.completion"}',
    "empty choices": b'{"choices": []}',
    "no message": b'{"choices": [{}]}',
    "no content": completion(None)[1],
    "content that is no text": b'{"choices": [{"message": {"content": [1]}}]}',
    "no UTF-8": b'{"choices": [{"message": {"content": "\xff"}}]}',
    "nested": b"[" * 100_000,
    "nothing": b"",
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD)
def test_a_malformed_response_is_no_answer(server, body, tmp_path):  # noqa: F811
    server.reply = lambda request, number: (200, body)
    (answer,) = client(server, cache=tmp_path).answer([ask()])
    assert answer.error
    assert "\n" not in answer.error
    assert len(answer.error) < 400
    assert answer.text == ""
    assert len(server.requests) == 1
    assert not list(tmp_path.rglob("*.json"))


def test_a_body_that_ends_early_is_no_answer(server):  # noqa: F811
    server.promised = 5000
    (answer,) = client(server, retries=1).answer([ask()])
    assert "failed" in answer.error
    assert len(server.requests) == 2


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_servers_are_asked_again(server, status):  # noqa: F811
    server.reply = lambda request, number: (status, b"busy") if number < 2 else completion("no")
    assert client(server, retries=2).answer([ask()])[0].text == "no"
    assert len(server.requests) == 3
    server.reply = lambda request, number: (status, b'{"error": {"message": "out of\\nmemory"}}')
    (answer,) = client(server, retries=1).answer([ask("again")])
    assert f"{status}: out of memory (2 attempts)" in answer.error
    assert len(server.requests) == 5


@pytest.mark.parametrize("status", [302, 400, 401, 404, 413])
def test_refusals_are_final(server, status):  # noqa: F811
    server.reply = lambda request, number: (status, b'{"error": {"message": "too many images"}}')
    (answer,) = client(server).answer([ask()])
    assert f"{status}: too many images" in answer.error
    assert len(server.requests) == 1


def test_a_server_that_hangs_costs_its_timeouts(server):  # noqa: F811
    server.reply = server.hang
    start = time.monotonic()
    (answer,) = client(server, timeout=0.15, retries=1).answer([ask()])
    assert time.monotonic() - start < 3
    assert answer.error.startswith("no answer from 127.0.0.1 within 0.15 s")
    assert len(server.requests) == 2


def test_a_server_that_is_not_there_is_not_asked_again(server):  # noqa: F811
    url = server.url
    server.close()
    (answer,) = ChatServer(url, "judge", timeout=2.0).answer([ask()])
    assert "failed" in answer.error
    assert "attempts" not in answer.error


def test_one_failure_leaves_the_others(server):  # noqa: F811
    def reply(request, number):
        text = request["messages"][0]["content"][-1]["text"]
        return (400, b"no") if text == "2" else completion(text * 2)

    server.reply = reply
    answers = client(server).answer([ask(str(n)) for n in range(5)])
    assert [answer.text for answer in answers] == ["00", "11", "", "33", "44"]
    assert [answer.error is None for answer in answers] == [True, True, False, True, True]


def test_concurrency_is_bounded_and_used(server):  # noqa: F811
    def reply(request, number):
        time.sleep(0.03)
        return completion("yes")

    server.reply = reply
    client(server, concurrency=3).answer([ask(str(n)) for n in range(12)])
    assert len(server.requests) == 12
    assert 2 <= server.most <= 3


def test_equal_questions_are_asked_once(server):  # noqa: F811
    answers = client(server).answer([ask(images=(noise(4, 5),)), ask(), ask("other")])
    assert len(answers) == 3
    assert len(server.requests) == 2


def test_probabilities(server):  # noqa: F811
    logprobs = {"Yes": float(np.log(0.6)), "No": float(np.log(0.3)), "Maybe": -5.0, " Yes": 0.1}
    server.reply = lambda request, number: completion("Yes", "length", logprobs)
    (answer,) = client(server).answer([ask(max_tokens=1, words=("Yes", "No", " Yes", "yes"))])
    assert (server.requests[0]["logprobs"], server.requests[0]["top_logprobs"]) == (True, 20)
    assert answer.probabilities == pytest.approx({"Yes": 0.6, "No": 0.3, " Yes": 1.0})
    server.reply = lambda request, number: completion("Yes")
    assert "no logprobs" in client(server).answer([ask(max_tokens=1, words=("Yes",))])[0].error


def test_cache_holds_answers_and_no_failures(server, tmp_path):  # noqa: F811
    server.reply = lambda request, number: completion("Yes", logprobs={"Yes": -0.5}) if number else (400, b"no")
    question = ask("ä", max_tokens=1, words=("Yes",))
    assert client(server, cache=tmp_path).answer([question])[0].error
    (first,) = client(server, cache=tmp_path).answer([question])
    (again,) = client(server, cache=tmp_path).answer([question])
    assert again == first
    assert len(server.requests) == 2
    (file,) = tmp_path.rglob("*.json")
    assert json.loads(file.read_text())["question"] == "ä"
    file.write_bytes(file.read_bytes()[:20])  # torn by a full disk, say
    assert client(server, cache=tmp_path).answer([question]) == [first]
    assert len(server.requests) == 3


def test_cache_knows_everything_that_matters(server, tmp_path):  # noqa: F811
    changes = [{}, {"text": "other"}, {"images": (noise(4, 5, seed=1),)}, {"images": (PICTURE, PICTURE)},
               {"images": (PICTURE.transpose(Image.Transpose.ROTATE_90),)}, {"max_tokens": 15}, {"template": "u"},
               {"max_tokens": 1}]  # fmt: skip
    for change in changes:
        client(server, cache=tmp_path).answer([ask(**change)])
    for options in ({"image_format": "jpeg"}, {"chat_template_options": {"a": 1}}):
        client(server, cache=tmp_path, **options).answer([ask()])
    ChatServer(server.url, "other", cache=tmp_path).answer([ask()])
    assert len(server.requests) == len(changes) + 3
    for change in changes:
        client(server, cache=tmp_path, concurrency=1, timeout=9.0).answer([ask(**change)])
    assert len(server.requests) == len(changes) + 3


@pytest.mark.slow
@pytest.mark.slow
def test_killed_while_asking_it_loses_no_answer_and_leaves_no_half_one(server, tmp_path):  # noqa: F811
    code = f"""
        from PIL import Image
        from diffalign.reward_models.answering import Question
        from diffalign.reward_models.chat_server import ChatServer
        picture = Image.new("RGB", (4, 4))
        questions = [Question(str(n), (picture,), 4) for n in range(40)]
        ChatServer({server.url!r}, "judge", concurrency=2, cache={str(tmp_path)!r}).answer(questions)
        print("done")
    """

    def reply(request, number):
        time.sleep(0.01)
        if number == 20:
            os.kill(process.pid, signal.SIGKILL)
        return completion("yes")

    server.reply = reply
    command = [sys.executable, "-c", textwrap.dedent(code)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL)
    try:
        assert process.wait(120) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
    files = list(tmp_path.rglob("*.json"))
    assert len(files) >= 18
    assert all(json.loads(file.read_text())["answer"] == "yes" for file in files)
    asked = len(server.requests)
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert done.stdout == "done\n"
    assert len(server.requests) - asked == 40 - len(files)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "localhost:8000"}, "expected an address such as http"),
        ({"base_url": "http://a:b@localhost/v1"}, "holds a password"),
        ({"model": ""}, "expected the name under which"),
        ({"concurrency": 0}, "concurrency must be at least 1, got 0"),
        ({"image_format": "gif"}, "image_format must be 'png' or 'jpeg', got 'gif'"),
        ({"timeout": 0.0}, "expected timeout > 0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ChatServer(**{"base_url": "http://localhost:8000/v1", "model": "judge", **options})
