"""What `diffalign score` reads: folders, JSONL, CSV and parquet, row by row and checked."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffalign.reward_models.inputs import open_input


def png(color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(buffer, "PNG")
    return buffer.getvalue()


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_folder_with_prompts_beside_the_pictures(tmp_path):
    for name in ("b.png", "a.JPG", "sub/c.webp", "sub/clip.mp4", ".hidden.png", "scores.histograms.png", "notes.md"):
        put(tmp_path / name, png())
    put(tmp_path / "a.txt", "\ufeffa red ü\n")
    put(tmp_path / "sub" / "c.txt", b"\xff\xfe")
    put(tmp_path / "sub" / "clip.txt", "  \n")
    rows = open_input(tmp_path)
    found = list(rows)
    assert rows.count == len(found) == 4
    assert rows.has_prompts
    assert [row.id for row in found] == ["a.JPG", "b.png", "sub/c.webp", "sub/clip.mp4"]
    assert [row.prompt for row in found] == ["a red ü", None, None, None]
    assert [row.is_video for row in found] == [False, False, False, True]
    assert found[2].media == tmp_path / "sub" / "c.webp"
    assert "c.txt cannot be read as UTF-8" in str(found[2].error)
    assert found[3].error == "clip.txt is empty"
    assert found[1].error is None
    assert list(rows) == found, "a source can be read again"


def test_folder_of_an_image_data_set(tmp_path):
    put(tmp_path / "train" / "0.png", png())
    put(tmp_path / "metadata.csv", 'file_name,text\ntrain/0.png,"a, b"\ntrain/1.png,\n')
    rows = open_input(tmp_path)
    assert [(row.id, row.prompt) for row in rows] == [("train/0.png", "a, b"), ("train/1.png", None)]
    put(tmp_path / "metadata.jsonl", json.dumps({"file_name": "train/0.png", "caption": "c"}))
    assert [(row.prompt, row.media) for row in open_input(tmp_path)] == [("c", tmp_path / "train" / "0.png")]
    put(tmp_path / "index.jsonl", json.dumps({"id": 7, "image": "train/0.png", "prompt": "p"}))
    assert [(row.id, row.prompt) for row in open_input(tmp_path)] == [("7", "p")]


def test_parquet_with_bytes_paths_or_both(tmp_path):
    images = [{"bytes": png(), "path": None}, {"bytes": None, "path": "b.png"}, None]
    table = pa.table({"image": images, "caption": ["x", None, "z"]})
    pq.write_table(table, tmp_path / "hub.parquet")
    rows = open_input(tmp_path / "hub.parquet")
    first, second, third = rows
    assert (rows.count, rows.has_prompts) == (3, True)
    assert (first.id, first.prompt, first.image, first.media, first.error) == ("0", "x", "", png(), None)
    assert (second.prompt, second.image, second.media) == (None, "b.png", tmp_path / "b.png")
    assert third.error == "row 2 has nothing in column 'image'"
    pq.write_table(pa.table({"id": ["p", "q"], "picture": [png(), png("blue")]}), tmp_path / "bytes.parquet")
    named = list(open_input(tmp_path / "bytes.parquet", image_column="picture"))
    assert [row.id for row in named] == ["p", "q"]
    assert named[1].media == png("blue")
    pq.write_table(pa.table({"path": ["v.mp4"], "say": ["p"]}), tmp_path / "paths.parquet")
    (row,) = open_input(tmp_path / "paths.parquet", prompt_column="say")
    assert (row.is_video, row.prompt, row.media) == (True, "p", tmp_path / "v.mp4")


def test_folder_of_parquet_shards(tmp_path):
    for number in range(3):
        table = pa.table({"image": [png()] * 70, "prompt": [f"{number}/{i}" for i in range(70)]})
        pq.write_table(table, tmp_path / f"{number}.parquet")
    rows = open_input(tmp_path)
    assert rows.count == 210
    assert [row.prompt for row in rows] == [f"{i // 70}/{i % 70}" for i in range(210)]
    assert [row.id for row in rows] == [str(i) for i in range(210)]
    put(tmp_path / "a.png", png())  # pictures beside a table: the table may be our own output
    assert [row.id for row in open_input(tmp_path)] == ["a.png"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no media to score; expected files like"),
        ({"x.parquet": b"junk"}, "x.parquet cannot be read as parquet"),
        ({"metadata.jsonl": b'{"file_name": "a", "text": "\xff"}\n'}, "metadata.jsonl, line 1: expected"),
        ({"metadata.jsonl": b'{"file_name": 3}\n'}, "line 1: prompt and image must be strings"),
        ({"metadata.jsonl": b'\n{"text": "t"}\n'}, r"line 2: expected .*KeyError\('image'\)"),
        ({"metadata.jsonl": b'{"image": "a"}\n\n{"image": "b"}\n{"image": "a"}\n'}, "line 4: id 'a' appears twice"),
        ({"metadata.csv": b"file_name,text\n\xff,a\n"}, "cannot be read as UTF-8 CSV"),
        ({"metadata.csv": b"file_name,text\n"}, "holds no rows"),
    ],
)
def test_what_cannot_be_read_is_named(files, message, tmp_path):
    for name, content in files.items():
        put(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as caught:
        list(open_input(tmp_path))
    assert "\n" not in str(caught.value)


def test_parquet_columns_are_named(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"picture": [png()], "say": ["p"]}), path)
    with pytest.raises(ValueError, match="no column of media: expected image or video .*found picture, say"):
        open_input(path)
    with pytest.raises(ValueError, match="no column of prompts: expected prompt, found picture, say; name it"):
        open_input(path, image_column="picture", prompt_column="prompt")
    pq.write_table(pa.table({"id": ["a", "b", "a"], "image": [png()] * 3}), path)
    with pytest.raises(ValueError, match="row 2: id 'a' appears twice"):
        open_input(path)
    content = bytearray(path.read_bytes())
    content[10:60] = bytes(50)  # pages damaged, footer whole
    path.write_bytes(content)
    with pytest.raises(ValueError, match="t.parquet is damaged"):
        list(open_input(path))


def test_an_output_may_not_take_the_place_of_the_input(tmp_path):
    put(tmp_path / "i.jsonl", json.dumps({"image": "a.png"}))
    rows = open_input(tmp_path / "i.jsonl")
    rows.check_output(tmp_path / "o.jsonl")
    with pytest.raises(ValueError, match="i.jsonl' would be part of the input"):
        rows.check_output(tmp_path / "sub" / ".." / "i.jsonl")
    (tmp_path / "i.jsonl").unlink()
    pq.write_table(pa.table({"image": [png()]}), tmp_path / "0.parquet")
    with pytest.raises(ValueError, match="o.parquet' would be part of the input"):
        open_input(tmp_path).check_output(tmp_path / "o.parquet")
    open_input(tmp_path / "0.parquet").check_output(tmp_path / "o.parquet")


def test_missing_source_says_what_is_expected(tmp_path):
    with pytest.raises(ValueError, match="does not exist; expected a folder of media, a JSONL file"):
        open_input(tmp_path / "nothing.jsonl")
