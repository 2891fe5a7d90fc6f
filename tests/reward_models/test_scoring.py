"""Scoring an index: results, failures, and going on after a kill at any moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from diffalign.reward_models import CLIPScore, ShapesScore, score_index

ROOT = Path(__file__).parents[2]


@pytest.fixture
def models(shapes_folder, clip_folder):
    return [ShapesScore(shapes_folder), CLIPScore(clip_folder, device="cpu")]


@pytest.fixture
def index(tmp_path, make_photo) -> Path:
    (tmp_path / "images").mkdir()
    rows = []
    for i in range(11):
        Image.fromarray(make_photo(40, 50 + i, seed=i)).save(tmp_path / "images" / f"{i}.png")
        rows.append({"id": f"row{i}", "prompt": f"prompt ü {i // 3}", "image": f"images/{i}.png"})
    write(tmp_path / "index.jsonl", rows)
    return tmp_path / "index.jsonl"


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_scores_are_the_models(index, models, tmp_path):
    summary = score_index(index, models, tmp_path / "deep" / "out.jsonl", batch_size=4, progress=False)
    rows = read(tmp_path / "deep" / "out.jsonl")
    given = read(index)
    assert [{k: r[k] for k in ("id", "prompt", "image")} for r in rows] == given
    for model in models:
        expected = model([tmp_path / str(r["image"]) for r in given], [str(r["prompt"]) for r in given])
        found = [r["scores"][model.info.name] for r in rows]
        assert found == pytest.approx(expected.tolist(), rel=1e-5)
        assert summary.means[model.info.name] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert (summary.rows, summary.computed, summary.reused, summary.failures) == (11, 22, 0, {})
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["out.jsonl"]


def test_bad_pictures_have_null_and_a_reason_and_are_tried_again(index, models, tmp_path, make_photo):
    (tmp_path / "images" / "2.png").write_bytes(b"junk")
    (tmp_path / "images" / "5.png").unlink()
    out = tmp_path / "out.jsonl"
    summary = score_index(index, models, out, batch_size=4, progress=False)
    rows = {r["id"]: r for r in read(out)}
    assert rows["row2"]["scores"] == {"shapes": None, "clipscore": None}
    assert "no such file" in rows["row5"]["errors"]["shapes"]
    assert "cannot be read" in rows["row2"]["errors"]["clipscore"]
    assert rows["row3"]["errors"] == {}
    assert set(summary.failures) == {"row2", "row5"}
    assert "row5: " in str(summary)
    valid = [r["scores"]["shapes"] for r in rows.values() if r["scores"]["shapes"] is not None]
    assert len(valid) == 9
    assert summary.means["shapes"] == pytest.approx(sum(valid) / 9)
    Image.fromarray(make_photo(40, 40, seed=5)).save(tmp_path / "images" / "5.png")
    again = score_index(index, models, out, batch_size=4, progress=False)
    assert (again.computed, again.reused, set(again.failures)) == (2, 18, {"row2"})


def test_only_what_changed_is_scored_again(index, models, tmp_path, make_photo):
    out = tmp_path / "out.jsonl"
    assert score_index(index, models[:1], out, progress=False).computed == 11
    first = out.read_bytes()
    assert score_index(index, models[:1], out, progress=False).reused == 11
    assert out.read_bytes() == first
    both = score_index(index, models, out, progress=False)
    assert (both.computed, both.reused) == (11, 11)
    Image.fromarray(make_photo(9, 9)).save(tmp_path / "images" / "0.png")  # another picture under the same name
    rows = read(index)
    rows[1]["prompt"] = "another prompt"
    write(index, rows)
    changed = score_index(index, models, out, progress=False)
    assert (changed.computed, changed.reused) == (4, 18)


@pytest.mark.slow
def test_other_weights_under_the_same_name_are_not_mixed(index, models, tmp_path, make_clip):
    out = tmp_path / "out.jsonl"
    score_index(index, models[:1], out, progress=False)
    other = ShapesScore(make_clip(tmp_path / "other", image_size=64, patch=16, seed=5))
    assert score_index(index, [other], out, progress=False).computed == 11


@pytest.mark.slow
def test_every_torn_journal_ends_in_the_same_output(index, models, tmp_path):
    """Cuts the journal of a whole run at many places, as a kill would, and goes on from there."""
    score_index(index, models, tmp_path / "whole.jsonl", batch_size=4, progress=False)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    rows = read(tmp_path / "whole.jsonl")
    lines = [
        json.dumps({"id": r["id"], "prompt": r["prompt"], "sha256": r["sha256"], "model": m, "fingerprint":
                    r["models"][m], "score": r["scores"][m]}, ensure_ascii=False)
        for start in range(0, 11, 4) for m in ("shapes", "clipscore") for r in rows[start : start + 4]
    ]  # fmt: skip
    journal = ("\n".join(lines) + "\n").encode()
    for cut in [0, 1, 100, len(journal) // 3, len(journal) // 2, len(journal) - 1, len(journal)]:
        out = tmp_path / f"cut{cut}.jsonl"
        out.with_name(out.name + ".journal").write_bytes(journal[:cut])
        summary = score_index(index, models, out, batch_size=4, progress=False)
        assert summary.reused == journal[:cut].count(b"\n")
        assert out.read_bytes() == whole


CHILD = """
import sys, time, torch
from diffalign.reward_models import ShapesScore, score_index
torch.set_num_threads(1)
class Slow(ShapesScore):
    def score(self, *args, **kwargs):
        time.sleep(0.3)
        return super().score(*args, **kwargs)
score_index(sys.argv[1], [Slow(sys.argv[2])], sys.argv[3], batch_size=2, progress=False)
"""


@pytest.mark.slow
def test_killed_in_the_middle_and_started_again(index, shapes_folder, tmp_path, capsys):
    out, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.journal"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(index), str(shapes_folder), str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 4) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    done = journal.read_bytes().count(b"\n")
    assert 4 <= done < 11
    assert not out.exists()
    model = ShapesScore(shapes_folder)
    summary = score_index(index, [model], out, batch_size=2)
    assert "11/11" in capsys.readouterr().err  # the progress bar
    assert (summary.computed, summary.reused) == (11 - done, done)
    score_index(index, [model], tmp_path / "straight.jsonl", batch_size=2, progress=False)
    assert out.read_bytes() == (tmp_path / "straight.jsonl").read_bytes()
    assert not journal.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no rows"),
        ('{"id": 1, "prompt": "a"}\n', r"line 1: expected .*KeyError\('image'\)"),
        ('{"id": 1, "prompt": "a", "image": "b"}\n{"id"', "line 2: expected"),
        ('{"id": 1, "prompt": null, "image": "b"}\n', "line 1: prompt and image must be strings"),
        ('{"id": 1, "prompt": "a", "image": "b"}\n' * 2, "line 2: id '1' appears twice"),
        ("[1]\n", "line 1: expected"),
    ],
)
def test_bad_index_is_named_by_line(text, message, models, tmp_path):
    (tmp_path / "index.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        score_index(tmp_path / "index.jsonl", models, tmp_path / "out.jsonl")


def test_models_must_differ(index, models, tmp_path):
    for wrong in ([], [models[0], models[0]]):
        with pytest.raises(ValueError, match="one or more models with different names"):
            score_index(index, wrong, tmp_path / "out.jsonl")
