"""The reward model `remote` in front of servers that fail, hang, refuse or answer something else."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from PIL import Image

from diffalign.reward_models import RewardModel, WeightsError, load_reward_model

ABOUT = {"name": "m", "license": "x", "weights": [], "kind": ["image"], "dims": ["overall"], "fingerprint": "f"}


@contextmanager
def answering(answer: Callable[[BaseHTTPRequestHandler, int], None]) -> Iterator[tuple[str, list[str]]]:
    """A server that lists one model and answers the n-th request for scores as told; its address and the requests."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            send(self, 200, {"models": [ABOUT]})

        def do_POST(self) -> None:
            seen.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            answer(self, len(seen))

        def log_message(self, *_: object) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def send(handler: BaseHTTPRequestHandler, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    handler.send_response(status)
    for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def good(score: float) -> dict[str, Any]:
    return {"results": [{"valid": True, "dims": {"overall": score}}]}


def connect(address: str, **options: Any) -> RewardModel:
    return load_reward_model("remote", path=address, **{"backoff": 0.01, "timeout": 0.3, "retries": 2, **options})


PICTURE = Image.new("RGB", (8, 8), "red")


@pytest.mark.slow
def test_a_server_that_hangs_gives_invalid_rows_in_time():
    release = threading.Event()

    def trickle(handler: BaseHTTPRequestHandler, number: int) -> None:
        """Nothing at first, then a byte now and then, which keeps a socket's timeout from striking."""
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        while number > 1 and not release.wait(0.05):
            try:
                handler.wfile.write(b" ")
                handler.wfile.flush()
            except OSError:
                return
        release.wait(20)

    with answering(trickle) as (address, seen):
        model = connect(address)
        started = time.monotonic()
        output = model.score([PICTURE, PICTURE], "p", on_invalid="nan")
        seconds = time.monotonic() - started
        release.set()
    assert output.valid.tolist() == [False, False]
    assert output.score.isnan().all()
    assert output.errors[0] == "medium 0: no answer from 127.0.0.1 within 0.3 s (3 attempts)"
    assert len(seen) == 3
    assert seconds < 5


@pytest.mark.parametrize("status", [429, 500, 503])
def test_retried_are_429_and_5xx(status):
    def answer(handler: BaseHTTPRequestHandler, number: int) -> None:
        send(
            handler,
            *((status, {"error": {"message": "later"}}, {"Retry-After": "0"}) if number < 3 else (200, good(3))),
        )

    with answering(answer) as (address, seen):
        assert float(connect(address)(PICTURE, "p")) == 3
        assert len(seen) == 3
        assert len(set(seen)) == 1


def reset(handler: BaseHTTPRequestHandler) -> None:
    """What a caller gets from a server whose queue is full."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


BREAKS: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {
    "reset": reset,
    "closed": lambda handler: None,
    "cut": lambda handler: send(handler, 200, good(5), {"Content-Length": "5000"}),
}


@pytest.mark.parametrize("how", BREAKS)
def test_connections_that_break_are_tried_again(how: str) -> None:
    def answer(handler: BaseHTTPRequestHandler, number: int) -> None:
        if number < 3:
            BREAKS[how](handler)
        else:
            send(handler, 200, good(3))

    with answering(answer) as (address, seen):
        assert float(connect(address)(PICTURE, "p")) == 3
        assert len(seen) == 3
        assert len(set(seen)) == 1
    with answering(lambda handler, _: BREAKS[how](handler)) as (address, seen):
        output = connect(address).score(PICTURE, "p", on_invalid="nan")
        assert len(seen) == 3
    assert not output.valid.any()
    assert "the connection to 127.0.0.1 failed: " in str(output.errors[0])
    assert "(3 attempts)" in str(output.errors[0])


@pytest.mark.parametrize(
    ("status", "content", "message"),
    [
        (400, {"error": {"message": "no\nthanks"}}, "answered 400: no thanks"),
        (413, b"<html>too large</html>", "answered 413: <html>too large</html>"),
        (200, b"<html>", "is no JSON: '<html>'"),
        (200, {"scores": [1]}, "sent no scores: KeyError('results')"),
        (200, {"results": []}, "0 results for 1 items"),
        (200, {"results": [{"valid": True, "dims": {"overall": "high"}}]}, "could not convert string to float"),
        (200, {"results": [{"valid": True, "dims": {}}]}, "m gave a score that is not finite"),
        (200, {"results": [{"valid": False, "dims": {}, "error": "bad picture"}]}, "bad picture"),
        (200, {"results": [{"valid": False, "dims": {"overall": 0}}]}, "no score and no reason"),
    ],
)
def test_other_answers_are_not_asked_for_again_and_are_no_score(status, content, message):
    with answering(lambda handler, _: send(handler, status, content)) as (address, seen):
        output = connect(address).score(PICTURE, "p", on_invalid="nan")
    assert output.score.isnan().all()
    assert not output.valid.any()
    assert message in str(output.errors[0])
    assert "\n" not in str(output.errors[0])
    assert len(seen) == 1


def test_an_answer_without_an_end_is_not_read_to_it(monkeypatch):
    with answering(lambda handler, _: send(handler, 200, good(3))) as (address, seen):
        model = connect(address)
        monkeypatch.setattr("diffalign.reward_models.http_json.LARGEST_ANSWER", 40)
        output = model.score(PICTURE, "p", on_invalid="nan")
    assert output.errors[0] == "medium 0: the answer of 127.0.0.1 is longer than 40 bytes"
    assert len(seen) == 1


def test_large_batches_are_several_requests(monkeypatch):
    monkeypatch.setattr("diffalign.reward_models.remote.LARGEST_REQUEST", 250)

    def answer(handler: BaseHTTPRequestHandler, number: int) -> None:
        items = json.loads(seen[-1])["items"]
        if number == 2:
            send(handler, 400, {"error": "not these"})
        else:
            send(handler, 200, {"results": [good(float(item["prompt"]))["results"][0] for item in items]})

    with answering(answer) as (address, seen):
        output = connect(address).score([PICTURE] * 5, ["0", "1", "2", "3", "4"], on_invalid="nan")
    sizes = [len(json.loads(body)["items"]) for body in seen]
    assert sum(sizes) == 5
    assert len(sizes) >= 3
    missing = range(sizes[0], sizes[0] + sizes[1])
    assert output.valid.tolist() == [i not in missing for i in range(5)]
    assert [value for value in output.score.tolist() if value == value] == [i for i in range(5) if i not in missing]


def test_a_server_that_is_not_there_or_another_is_named():
    with answering(lambda handler, _: None) as (address, _):
        with pytest.raises(WeightsError, match=r"there is no 'n' \(available: m\)"):
            connect(f"{address}#n")
        gone = address
    with pytest.raises(WeightsError, match="the connection to 127.0.0.1 failed: .*is `diffalign serve-reward` running"):
        connect(gone)
    for wrong in ("", "localhost:8000", "ftp://a"):
        with pytest.raises(ValueError, match="expected an address such as http://localhost:8000"):
            connect(wrong)
    with pytest.raises(ValueError, match="holds a password") as caught:
        connect("http://user:hunter2@host")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ValueError, match="expected timeout > 0"):
        connect("http://localhost", timeout=0)
