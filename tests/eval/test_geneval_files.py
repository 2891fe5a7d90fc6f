"""Folders and results files of the original GenEval: read, judged, written, and read again."""

from __future__ import annotations

import json
import logging
import shutil

import pytest

from diffalign.eval.base import Row
from diffalign.eval.geneval import GenEval
from diffalign.eval.geneval_files import read_folder, read_results, score_folder, write_folder, write_results
from diffalign.reward_models.geneval import GenEval as Judge
from diffalign.reward_models.geneval_prompts import by_prompt
from tests.reward_models.conftest import save_hf_clip
from tests.reward_models.geneval_files import PaintedDetector, geneval_data, paint

BENCH = 13  # COCO's number of the first prompt's class


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    clip = save_hf_clip(tmp_path_factory.mktemp("vit_l"), act="quick_gelu", seed=3)
    judge = Judge(detector=PaintedDetector(), clip=clip, data=geneval_data(), device="cpu")
    return GenEval(judge=judge, samples=2, seed=0, data=geneval_data())


@pytest.fixture
def root(tmp_path):
    """What the original's generator leaves: two prompts, two samples each, and things to pass over."""
    lines = (geneval_data() / "evaluation_metadata.jsonl").read_text().splitlines()
    folder = tmp_path / "outputs"
    for number in (0, 1):
        (folder / f"{number:05d}" / "samples").mkdir(parents=True)
        (folder / f"{number:05d}" / "metadata.jsonl").write_text(lines[number])
        for sample in (0, 1):
            label = BENCH if (number, sample) == (0, 1) else 0
            paint([(label, (4, 4, 30, 30))]).save(folder / f"{number:05d}" / "samples" / f"{sample:04d}.png")
    paint([]).save(folder / "00000" / "grid.png")
    (folder / "notes").mkdir()
    return folder


def test_a_folder_of_the_original_is_read_and_judged(bench, root):
    samples = read_folder(root)
    assert [(s.number, s.sample, s.wanted.prompt) for s in samples] == [
        (0, 0, "a photo of a bench"), (0, 1, "a photo of a bench"), (1, 0, "a photo of a cow"),
        (1, 1, "a photo of a cow"),
    ]  # fmt: skip
    rows = score_folder(bench, root, batch_size=3)
    assert [r.correct for r in rows] == [False, True, False, False]
    assert [r.image for r in rows[:2]] == ["00000/samples/0000.png", "00000/samples/0001.png"]
    report = bench.aggregate(rows)
    assert report.groups["single_object"]["correct"].value == 0.25
    assert report.scores["prompts"].value == 0.5
    assert (report.n_missing, report.partial) == (2 * 553 - 4, True)


def test_a_damaged_picture_has_a_row_without_a_verdict(bench, root):
    file = root / "00000" / "samples" / "0001.png"
    file.write_bytes(file.read_bytes()[:50])
    rows = score_folder(bench, root)
    assert [r.correct for r in rows] == [False, None, False, False]
    assert "0001.png" in rows[1].reason


def test_pictures_that_the_original_passes_over_are_named(root, caplog):
    paint([]).save(root / "00001" / "samples" / "0002.jpg")
    with caplog.at_level(logging.WARNING, logger="diffalign"):
        assert len(read_folder(root)) == 4
    assert "0002.jpg" in caplog.text


def test_folders_that_are_not_whole_are_refused(root, tmp_path):
    with pytest.raises(ValueError, match=r"nothing holds no pictures; expected 00000/samples/0000.png"):
        read_folder(tmp_path / "nothing")
    (root / "00001" / "metadata.jsonl").write_text('{"tag": "colors"}')
    with pytest.raises(ValueError, match=r"00001.metadata.jsonl: .* found no prompt, include"):
        read_folder(root)
    (root / "00001" / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match="there is no .*metadata.jsonl"):
        read_folder(root)
    shutil.rmtree(root / "00000" / "samples")
    with pytest.raises(ValueError, match="has no folder 'samples'"):
        read_folder(root)


def test_pictures_go_into_the_originals_layout_and_come_back(bench, root, tmp_path):
    rows = score_folder(bench, root)
    copy = tmp_path / "copy"
    assert write_folder(copy, rows[::-1], root, bench.wanted) == 4
    written = sorted(f.relative_to(copy).as_posix() for f in copy.rglob("*") if f.is_file())
    assert written == [
        f"{n:05d}/{name}" for n in (0, 1) for name in ("metadata.jsonl", "samples/00000.png", "samples/00001.png")
    ]
    row = json.loads((copy / "00001" / "metadata.jsonl").read_text())  # one object, as the original loads it
    assert row == bench.wanted[1].to_dict()
    again = score_folder(bench, copy)
    assert [(r.id, r.correct, r.evidence["objects"]) for r in again] == [
        (r.id, r.correct, r.evidence["objects"]) for r in rows
    ]
    with pytest.raises(ValueError, match="names no PNG file"):
        write_folder(copy, [Row("a", rows[0].prompt, 0, image="a.jpg")], root, bench.wanted)
    with pytest.raises(ValueError, match="is not among the 553 prompts"):
        write_folder(copy, [Row("a", "a zebu", 0, image="a.png")], root, bench.wanted)


def original_line(number, sample, correct, reason, metadata, details):
    """A row as the original's table of results has it: two of its fields are JSON inside JSON."""
    return {
        "filename": f"outputs/{number:05d}/samples/{sample:04d}.png", "tag": metadata["tag"],
        "prompt": metadata["prompt"], "correct": correct, "reason": reason, "metadata": json.dumps(metadata),
        "details": json.dumps(details),
    }  # fmt: skip


def test_the_originals_results_are_read_and_written(bench, tmp_path):
    metadata = [w.to_dict() for w in bench.wanted]
    reason = "expected bench>=1, found 0\nexpected red bench>=1, found 0 red; and 1 blue"
    lines = [
        original_line(0, 3, True, "", metadata[0], {"bench": [[1.0, 2.0, 3.0, 4.0, 0.9]]}),
        original_line(0, 1, False, reason, metadata[0], {}),
        original_line(1, 0, True, "", metadata[1], {"cow": [[1.0, 2.0, 3.0, 4.0, 0.5]]}),
    ]
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = read_results(file)
    assert [(r.id, r.seed, r.correct) for r in rows] == [
        ("00000-03", 1, True), ("00000-01", 0, False), ("00001-00", 0, True),
    ]  # fmt: skip
    assert rows[1].reason == "expected bench>=1, found 0 | expected red bench>=1, found 0 red; and 1 blue"
    report = bench.aggregate(rows)
    assert report.groups["single_object"]["correct"].value == pytest.approx(2 / 3)
    assert report.scores["prompts"].value == 1.0
    assert report.protocol["detector"] == "original tool"
    write_results(tmp_path / "again.jsonl", rows, by_prompt(bench.wanted), root="outputs")
    assert [json.loads(line) for line in (tmp_path / "again.jsonl").read_text().splitlines()] == lines
    with pytest.raises(ValueError, match="has no verdict"):
        write_results(file, [Row("a", metadata[0]["prompt"], 0)], by_prompt(bench.wanted))


@pytest.mark.parametrize("change", [{"metadata": "{}"}, {"correct": 1}, {"filename": "0000.png"}, {"details": "["}])
def test_malformed_results_name_the_row(bench, tmp_path, change):
    line = original_line(0, 0, True, "", bench.wanted[0].to_dict(), {}) | change
    file = tmp_path / "results.jsonl"
    file.write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=r"results.jsonl, row 1: not a row of GenEval's results"):
        read_results(file)
