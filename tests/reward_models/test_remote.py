"""Reward models over HTTP: the server and its limits, and the client in front of it."""

from __future__ import annotations

import base64
import http.client
import io
import json
import pickle
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from diffalign.cli import cli
from diffalign.reward_models import RewardInfo, RewardModel, ShapesScore, WeightsError, load_reward_model
from diffalign.reward_models.base import Scores
from diffalign.reward_models.media import Media, Video, read_clip
from diffalign.reward_models.remote import TOKEN_ENV
from diffalign.reward_models.server import Worker, _Refused, build_app, check_access
from diffalign.reward_models.wire import Limits

uvicorn = pytest.importorskip("uvicorn", reason="needs the extra `serve`")
TOKEN = "not a secret"


class Brightness(RewardModel):
    """The mean of a clip's pixels and their spread, which stands for any model of clips."""

    info = RewardInfo(
        name="brightness", license="none", weights=(), kind=frozenset({"video"}), dims=("spread", "mean"),
        needs_prompt=False, nominal_range=(0.0, 1.0),
    )  # fmt: skip
    item_ndim = 4

    def preprocess(self, item: Media) -> torch.Tensor:
        frames = read_clip(item, lambda count, fps: range(count))
        return torch.stack([torch.frombuffer(bytearray(f.tobytes()), dtype=torch.uint8) for f in frames]).float() / 255

    def score_prepared(self, prepared: list[torch.Tensor], texts: list[str]) -> Scores:
        if "fail" in texts:
            raise RuntimeError("a secret of the server")
        means = torch.stack([clip.mean() for clip in prepared])
        return Scores({"spread": means * 0, "mean": means}, uncertainty=means / 2, raw=[f"{m:.3f}" for m in means])


@contextmanager
def running(app: Any) -> Iterator[int]:
    """A real server on a free port."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def port(shapes_folder: Path) -> Iterator[int]:
    models = [ShapesScore(shapes_folder), Brightness()]
    limits = Limits(body=3_000_000, pixels=1_000_000, items=50, prompt=20_000)
    with running(build_app(models, token=TOKEN, limits=limits, batch_size=8)) as port:
        yield port


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_ENV, TOKEN)


def ask(port: int, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    """Status and content of an answer; `body` as JSON unless it is bytes or an iterator."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    if body is not None and not isinstance(body, bytes | Iterator):
        body = json.dumps(body).encode()
    connection.request(method, path, body, {"Authorization": f"Bearer {TOKEN}"} if headers is None else headers)
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    return response.status, content


def b64(image: Image.Image, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def test_remote_scores_are_the_local_ones(port, shapes_folder, photos, tmp_path):
    local = ShapesScore(shapes_folder)
    remote = load_reward_model("remote", path=f"http://127.0.0.1:{port}", model="shapes")
    assert remote.info == local.info
    assert remote.fingerprint() == local.fingerprint()
    media = [*photos, tmp_path / "no.png", photos[0].convert("RGBA")]
    prompts = ["a red circle", "ü", "x", "y", "word " * 2000]
    expected = local.score(media, prompts, on_invalid="nan")
    for size in (2, 32):
        found = remote.score(media, prompts, on_invalid="nan", batch_size=size)
        torch.testing.assert_close(found.score, expected.score, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert found.errors == expected.errors
    with pytest.raises(NotImplementedError, match="no gradient path"):
        remote.score_tensor(torch.zeros(1, 3, 8, 8), "x")


@pytest.mark.slow
def test_clips_travel_as_frames_or_files(port, tmp_path):
    from diffalign.videos import to_mp4

    clip = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    clip = (clip * 255).round() / 255
    (tmp_path / "clip.mp4").write_bytes(to_mp4(clip, 8))
    (tmp_path / "empty.mp4").write_bytes(b"")
    remote = load_reward_model("remote", path=f"http://127.0.0.1:{port}#brightness")
    assert remote.item_ndim == 4
    media = [clip, Video(clip, 8.0), tmp_path / "clip.mp4", tmp_path / "empty.mp4", tmp_path / "none.mp4"]
    expected = Brightness().score(media, on_invalid="nan")
    found = remote.score(media, on_invalid="nan")
    assert found.valid.tolist() == [True, True, True, False, False]
    torch.testing.assert_close(found.score, expected.score, equal_nan=True)
    torch.testing.assert_close(found.uncertainty, expected.uncertainty, equal_nan=True)
    assert found.dims.keys() == {"spread", "mean"}
    assert found.raw is not None
    assert found.raw[0] == f"{float(clip.mean()):.3f}"
    assert "the file is empty" in str(found.errors[3])


def test_many_clients_at_once_get_their_own_scores(port, shapes_folder, photos):
    local = ShapesScore(shapes_folder)
    remote = load_reward_model("remote", path=f"http://127.0.0.1:{port}", model="shapes")
    prompts = [f"prompt {i}" for i in range(12)]
    expected = [float(local(photos[i % 3], prompt)) for i, prompt in enumerate(prompts)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda i: float(remote(photos[i % 3], prompts[i])), range(12)))
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_token_is_asked_for_before_the_body(port, monkeypatch):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}):
        # 10 GB are announced and never sent: the answer comes without them.
        status, content = ask(port, "POST", "/v1/score", b"", headers | {"Content-Length": "10000000000"})
        assert (status, content) == (401, {"error": {"message": "the token is missing or wrong"}})
        assert ask(port, "GET", "/v1/models", headers=headers)[0] == 401
    assert ask(port, "GET", "/health", headers={}) == (
        200,
        {"status": "ok", "models": ["shapes", "brightness"], "waiting": 0},
    )
    monkeypatch.setenv(TOKEN_ENV, "wrong")
    with pytest.raises(
        WeightsError, match=rf"answered 401: the token is missing or wrong; set {TOKEN_ENV} to its token"
    ):
        load_reward_model("remote", path=f"http://127.0.0.1:{port}#shapes")


def test_bodies_over_the_limit_are_not_read(port):
    announced = {"Authorization": f"Bearer {TOKEN}", "Content-Length": "3000001"}
    status, content = ask(port, "POST", "/v1/score", b"", announced)
    assert status == 413
    assert "larger than 3000000 bytes" in content["error"]["message"]
    status, _ = ask(port, "POST", "/v1/score", iter([b" " * 1_000_000] * 4))  # in chunks, without a length
    assert status == 413


def test_pixels_over_the_limit_and_other_content_are_not_decoded(port):
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    huge = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")
    small = Image.new("RGB", (8, 8), "red")
    items = {
        "larger than the limit of 1000000 pixels": {"image_b64": base64.b64encode(huge).decode()},
        "1001x1000 is larger": {"image_b64": b64(Image.new("RGB", (1001, 1000)))},
        "not a picture in one of the formats PNG, JPEG, WEBP": {"image_b64": b64(small, "GIF")},
        "not a picture": {"image_b64": base64.b64encode(pickle.dumps({"a": 1})).decode()},
        "not base64": {"image_b64": "%%%"},
        "expected one of image_b64": {"uri": "file:///etc/passwd"},
        "cannot be read": {"image_b64": b64(small)[:60] + "=="},
        "there is no prompt": {"image_b64": b64(small), "prompt": None},
    }
    good = {"image_b64": b64(small), "prompt": "p"}
    body = {"model": "shapes", "items": [good, *({"prompt": "p"} | item for item in items.values()), good]}
    status, content = ask(port, "POST", "/v1/score", body)
    assert status == 200
    first, *bad, last = content["results"]
    assert first == last
    assert first["valid"] is True
    assert first["error"] is None
    for message, result in zip(items, bad, strict=True):
        assert result["valid"] is False
        assert result["dims"] == {"overall": None}
        assert message in result["error"], (message, result)


def test_all_frames_of_a_clip_share_the_limit(port):
    frame = b64(Image.new("RGB", (1000, 600), "white"))
    items = {
        "1000x600 is larger than the limit of 400000 pixels": {"frames_b64": [frame, frame]},
        "frames_b64 must be a list of pictures": {"frames_b64": []},
        "fps must be a positive number, got 0": {"frames_b64": [frame], "fps": 0},
        "fps must be a positive number, got '8'": {"frames_b64": [frame], "fps": "8"},
        "0.mp4: ": {"video_b64": base64.b64encode(b"no video").decode()},
        "expected one of image_b64, video_b64": {"frames_b64": [frame], "video_b64": ""},
    }
    body = {"model": "brightness", "items": [*items.values(), {"frames_b64": [frame], "fps": 8}]}
    status, content = ask(port, "POST", "/v1/score", body)
    *bad, fine = content["results"]
    assert (status, fine["valid"], fine["dims"]["mean"]) == (200, True, 1.0)
    for message, result in zip(items, bad, strict=True):
        assert (result["valid"], result["dims"]["mean"]) == (False, None)
        assert message in result["error"]


def test_a_client_that_does_not_send_what_it_announced_is_not_waited_for(port, monkeypatch):
    monkeypatch.setattr("diffalign.reward_models.server.BODY_SECONDS", 0.1)
    announced = {"Authorization": f"Bearer {TOKEN}", "Content-Length": "100"}
    started = time.monotonic()
    status, content = ask(port, "POST", "/v1/score", b"{", announced)
    assert (status, content["error"]["message"]) == (408, "the request did not arrive within 0.1 s")
    assert time.monotonic() - started < 10


def test_more_than_can_wait_is_sent_away(monkeypatch):
    monkeypatch.setattr("diffalign.reward_models.server.WAITING_ITEMS", 3)
    worker = Worker({"brightness": Brightness()}, 8, Limits())
    item = {"frames_b64": [b64(Image.new("RGB", (8, 8), "white"))]}
    first = worker.submit("brightness", [item] * 2)
    with pytest.raises(_Refused, match="2 items are waiting; come back later") as caught:
        worker.submit("brightness", [item] * 2)
    assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "2"})
    second = worker.submit("brightness", [item])
    worker.start()
    assert [len(job.result(20)) for job in (first, second)] == [2, 1]
    big = worker.submit("brightness", [item] * 5)  # alone, a request may have more
    assert len(big.result(20)) == 5
    worker.stop()


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"\x80\x04 no JSON", 400, "the request is no JSON"),
        ([1], 400, "expected {"),
        ({"model": "shape", "items": [{}]}, 404, "there is no model 'shape' (available: shapes, brightness)"),
        ({"model": "shapes", "items": []}, 413, "expected 1 to 50 items, got 0"),
        ({"model": "shapes", "items": [{}] * 51}, 413, "got 51"),
        ({"model": "shapes", "items": [{"prompt": 3}]}, 400, "item 0 must be an object"),
        ({"model": "shapes", "items": [{"prompt": "x" * 20_001}]}, 413, "longer than 20000 characters"),
    ],
)
def test_requests_that_make_no_sense_are_refused(port, body, status, message):
    found, content = ask(port, "POST", "/v1/score", body)
    assert found == status
    assert message in content["error"]["message"]


def test_a_model_that_fails_takes_nobody_along(port):
    item = {"frames_b64": [b64(Image.new("RGB", (8, 8), "white"))]}
    status, content = ask(port, "POST", "/v1/score", {"model": "brightness", "items": [item | {"prompt": "fail"}]})
    assert status == 500
    assert content == {"error": {"message": "brightness failed: RuntimeError"}}
    status, content = ask(port, "POST", "/v1/score", {"model": "brightness", "items": [item]})
    assert (status, content["results"][0]["dims"]["mean"]) == (200, 1.0)


def test_a_job_that_fails_does_not_fail_those_scored_with_it():
    worker = Worker({"brightness": Brightness()}, 8, Limits())
    frame = {"frames_b64": [b64(Image.new("RGB", (8, 8), "white"))]}
    jobs = [worker.submit("brightness", [frame | {"prompt": prompt}]) for prompt in ("good", "fail", "fine")]
    gone = worker.submit("brightness", [frame])
    gone.cancel()
    worker.start()
    assert jobs[0].result(20)[0]["dims"]["mean"] == 1
    assert jobs[2].result(20)[0]["valid"] is True
    with pytest.raises(RuntimeError, match="a secret"):
        jobs[1].result(20)
    worker.stop()


def test_models_that_compare_media_are_not_served():
    model = Brightness()
    model.info = replace(model.info, groupwise=True)
    with pytest.raises(ValueError, match="brightness compares media"):
        build_app([model])
    with pytest.raises(ValueError, match=r"different names, got \['brightness', 'brightness'\]"):
        build_app([Brightness(), Brightness()])


def test_others_are_let_in_with_a_token_only():
    check_access("127.0.0.1", None)
    check_access("0.0.0.0", "token")
    with pytest.raises(ValueError, match=r"0\.0\.0\.0 without a token would let everyone in"):
        check_access("0.0.0.0", None)
    result = CliRunner().invoke(cli, ["serve-reward", "shapes", "--token-env", "NO_SUCH_VARIABLE"])
    assert result.exit_code == 2
    assert "'NO_SUCH_VARIABLE' is not set" in result.output


@pytest.mark.slow
def test_scores_of_a_folder_through_a_server(port, shapes_folder, photos, tmp_path):
    (tmp_path / "media").mkdir()
    for i, picture in enumerate(photos):
        picture.save(tmp_path / "media" / f"{i}.png")
        (tmp_path / "media" / f"{i}.txt").write_text(f"prompt {i}")
    for reward in (f"remote=http://127.0.0.1:{port}#shapes", f"shapes={shapes_folder}"):
        arguments = ["score", str(tmp_path / "media"), "--reward", reward, "--output", str(tmp_path / "o.jsonl")]
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 0, result.output
    assert "0 scores computed, 3 reused" in result.output, "the same weights give the same scores wherever they are"
