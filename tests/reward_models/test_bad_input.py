"""Bad input at the public door: each is a named row without a score, or one clear error; the rest is scored.

The table of files is `FILES`, that of servers and their answers `ANSWERS`.
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from diffalign.cli import cli
from diffalign.reward_models import FrameByFrame, ShapesScore, VQAScore, load_reward_model, score_index
from tests.reward_models.judge_files import completion, server  # noqa: F401


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG whose header promises 60,000 x 60,000 pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


LONG = "word " * 2000
"""A prompt of 10,000 characters."""

FILES: dict[str, tuple[Callable[[Image.Image], bytes], str | None]] = {
    "truncated.jpg": (lambda photo: encoded(photo, "JPEG")[:900], "cannot be read as a picture (image file is trunc"),
    "header.jpg": (lambda photo: b"\xff\xd8\xff\xe0junk", "cannot be read as a picture"),
    "bomb.png": (lambda photo: bomb(), "exceeds limit"),
    "grey16.png": (lambda photo: encoded(Image.new("I;16", (8, 8), 40_000)), "expected an 8-bit picture, got PIL mode"),
    "empty.png": (lambda photo: b"", "cannot be read as a picture"),
    "empty.mp4": (lambda photo: b"", "empty.mp4: shapes scores images, not videos"),
    "alpha.png": (lambda photo: encoded(photo.convert("RGBA")), None),
    "long.png": (encoded, None),
}
"""What the file holds, and what the reason of its row says; None where it has a score."""


@pytest.fixture
def folder(tmp_path: Path, make_photo: Any) -> Path:
    """Three good pictures and every bad one, each with its prompt; `long.png` has the long one."""
    media = tmp_path / "media"
    media.mkdir()
    for i in range(3):
        Image.fromarray(make_photo(40, 50 + i, seed=i)).save(media / f"{i}.png")
    photo = Image.fromarray(make_photo(64, 64))
    for name, (make, _) in FILES.items():
        (media / name).write_bytes(make(photo))
    for path in list(media.iterdir()):
        path.with_suffix(".txt").write_text(LONG if path.stem == "long" else "a prompt")
    return media


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["score", "--no-histograms", *map(str, arguments)])


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def test_files_in_a_folder(folder, shapes_folder, tmp_path):
    out = tmp_path / "o.jsonl"
    result = run(folder, "--reward", f"shapes={shapes_folder}", "--output", out, "--batch-size", 4)
    assert result.exit_code == 0, result.output
    rows = rows_of(out)
    assert len(rows) == 3 + len(FILES)
    for name, (_, reason) in FILES.items():
        assert rows[name]["valid"] is (reason is None), name
        assert (rows[name]["scores"]["shapes"] is None) is (reason is not None)
        assert reason is None or reason in rows[name]["errors"]["shapes"]
    assert "6 rows without a score" in result.output
    model = ShapesScore(shapes_folder)
    for name, prompt in {"0.png": "a prompt", "2.png": "a prompt", "long.png": LONG}.items():
        expected = model(folder / name, prompt).item()
        assert rows[name]["scores"]["shapes"] == pytest.approx(expected, rel=1e-5)


def test_bytes_in_parquet(folder, shapes_folder, tmp_path):
    names = [name for name in FILES if not name.endswith(".mp4")]
    images = [{"bytes": (folder / name).read_bytes(), "path": name} for name in names]
    pq.write_table(pa.table({"id": names, "image": images, "prompt": ["p"] * len(names)}), tmp_path / "in.parquet")
    result = run(tmp_path / "in.parquet", "--reward", f"shapes={shapes_folder}", "--output", tmp_path / "o.jsonl")
    assert result.exit_code == 0, result.output
    rows = rows_of(tmp_path / "o.jsonl")
    assert {name: row["valid"] for name, row in rows.items()} == {name: FILES[name][1] is None for name in names}


def test_video_files(tmp_path, shapes_folder):
    from diffalign.videos import to_mp4

    media = tmp_path / "media"
    media.mkdir()
    clip = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = to_mp4(clip, 8)
    reasons = {"empty.mp4": (b"", "empty.mp4: "), "torn.mp4": (whole[: len(whole) // 3], "torn.mp4: "),
               "text.mp4": (b"no video at all", "text.mp4: ")}  # fmt: skip
    for name, (content, _) in {**reasons, "whole.mp4": (whole, "")}.items():
        (media / name).write_bytes(content)
        (media / name).with_suffix(".txt").write_text("a prompt")
    model = FrameByFrame(model=ShapesScore(shapes_folder), num_frames=2)
    summary = score_index(media, [model], tmp_path / "o.jsonl", batch_size=4, progress=False)
    rows = rows_of(tmp_path / "o.jsonl")
    assert (summary.rows, summary.failed) == (4, 3)
    for name, (_, reason) in reasons.items():
        assert rows[name]["scores"] == {model.info.name: None}
        assert reason in rows[name]["errors"][model.info.name]
    assert np.isfinite(rows["whole.mp4"]["scores"][model.info.name])


def test_a_folder_without_prompts_is_refused_before_weights(folder, tmp_path):
    for path in folder.glob("*.txt"):
        path.unlink()
    result = run(folder, "--reward", "shapes=/no/such/weights", "--output", tmp_path / "o.jsonl")
    assert result.exit_code == 2
    assert "holds no prompts, and shapes cannot score without; put the prompt of a.png into a.txt" in result.output
    assert not (tmp_path / "o.jsonl").exists()
    without = [load_reward_model("jpeg_compressibility")]  # which needs none
    assert score_index(folder, without, tmp_path / "o.jsonl", progress=False).failed == 6


ANSWERS: dict[str, tuple[tuple[int, bytes] | None, str | None]] = {
    "good": (completion("Yes", logprobs={"Yes": -0.5, "No": -1.5}), None),
    "hangs": (None, "no answer from 127.0.0.1 within 0.3 s"),
    "html": ((200, b"<html>"), "is no JSON"),
    "other": ((200, b'{"scores": [1]}'), "not a chat completion (KeyError('choices'))"),
    "nothing": (completion(None, logprobs={"Yes": -0.5}), "not a chat completion"),
    "no logprobs": (completion("Yes"), "the server sent no logprobs"),
    "neither": (completion("Perhaps", logprobs={"Perhaps": -0.5}), "neither 'Yes' nor 'No' is among the known first"),
    "refuses": ((400, b'{"error": {"message": "no pictures"}}'), "answered 400: no pictures"),
    "fails": ((500, b""), "answered 500"),
    "good too": (completion("No", logprobs={"Yes": -1.5, "No": -0.5}), None),
}
"""By prompt, what the server answers (None: nothing), and what the reason of its row says."""


def test_servers_that_hang_or_answer_in_the_wrong_format(tmp_path, make_photo, server):  # noqa: F811
    def reply(request: dict[str, Any], number: int) -> tuple[int, bytes]:
        question = request["messages"][0]["content"][-1]["text"]
        answer = ANSWERS[question.split('"')[1]][0]
        return server.hang(request, number) if answer is None else answer

    server.reply = reply
    Image.fromarray(make_photo(16, 16)).save(tmp_path / "a.png")
    lines = [json.dumps({"id": prompt, "prompt": prompt, "image": "a.png"}) for prompt in ANSWERS]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    model = VQAScore(server=server.url, served_model="m", server_options={"timeout": 0.3, "retries": 0})
    summary = score_index(tmp_path / "in.jsonl", [model], tmp_path / "o.jsonl", batch_size=4, progress=False)
    rows = rows_of(tmp_path / "o.jsonl")
    assert list(rows) == list(ANSWERS)
    assert (summary.computed, summary.failed) == (2, 8)
    for prompt, (_, reason) in ANSWERS.items():
        score, errors = rows[prompt]["scores"][model.info.name], rows[prompt]["errors"]
        assert rows[prompt]["valid"] is (reason is None)
        if reason is None:
            assert score == pytest.approx(1 / (1 + np.exp(-1 if prompt == "good" else 1)), rel=1e-5)
        else:
            assert score is None
            assert reason in errors[model.info.name], errors
    # What failed, and only that, is asked again by the next run.
    asked = len(server.requests)
    server.reply = lambda request, number: completion("Yes", logprobs={"Yes": -0.5, "No": -1.5})
    again = score_index(tmp_path / "in.jsonl", [model], tmp_path / "o.jsonl", batch_size=4, progress=False)
    assert (again.computed, again.reused, again.failed) == (8, 2, 0)
    assert len(server.requests) > asked
