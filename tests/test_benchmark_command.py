"""`diffalign evaluate MODEL --benchmark`: what is drawn, scored and printed, after every kind of interruption."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign import benchmark_models, benchmarking
from diffalign.backbones import load_policy
from diffalign.eval import Report, Shapes, read_rows
from diffalign.generation import to_png
from diffalign.picture_cache import PictureCache
from tests.echo import Echo, contents

LIMIT = 6
ARGUMENTS: dict[str, Any] = {"limit": LIMIT, "num_inference_steps": 2, "guidance_scale": 2.0, "batch_size": 4}
ECHO = "tests.echo:Echo"


def evaluate(model: Path | str, output: Path, names: Sequence[str] = ("shapes",), **more: Any) -> str:
    return benchmarking.evaluate_benchmarks(str(model), names, output=str(output), **{**ARGUMENTS, **more})


def side_of(output: Path, benchmark: str = "shapes") -> Path:
    [folder] = [f for f in output.glob(f"{benchmark}*/*") if f.is_dir() and "-against-" not in f.name]
    return folder


@pytest.fixture(scope="module")
def inner(tiny_pipeline: Path) -> Any:
    return load_policy(str(tiny_pipeline))


@pytest.fixture(scope="module")
def finished(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "out"
    text = evaluate(tiny_pipeline, output)
    assert "judge_score" in text
    assert f"6 of {LIMIT}" in text
    return output


@pytest.fixture(autouse=True)
def _loaded_once(inner: Any, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model is loaded once; others are loaded as ever."""
    load = benchmark_models.load_model

    def loading(section: Any, *args: Any, **options: Any) -> Any:
        known = section.pretrained_model_name_or_path == str(tiny_pipeline)
        return inner if known else load(section, *args, **options)

    monkeypatch.setattr(benchmark_models, "load_model", loading)


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Seeds of every batch that a policy draws from now on."""
    batches: list[list[int]] = []
    load = benchmark_models.load_model

    def loading(*args: Any, **options: Any) -> Any:
        policy: Any = copy.copy(load(*args, **options))
        sample = policy.sample

        def counting(prompts: Sequence[str], seeds: Sequence[int], **how: Any) -> Tensor:
            batches.append(list(seeds))
            return sample(prompts, seeds, **how)

        policy.sample = counting
        return policy

    monkeypatch.setattr(benchmark_models, "load_model", loading)
    return batches


def test_pictures_manifest_rows_and_report(finished: Path, inner: Any, tiny_pipeline: Path) -> None:
    benchmark = Shapes(num_prompts=LIMIT)
    cases = benchmark.cases()
    side = side_of(finished)
    manifest = [json.loads(line) for line in (side / "manifest.jsonl").read_text().splitlines()]
    assert [(row["id"], row["prompt"], row["seed"]) for row in manifest] == [(c.id, c.prompt, c.seed) for c in cases]
    files = [side / row["image"] for row in manifest]
    images = [
        image
        for batch in (cases[:4], cases[4:])
        for image in inner.sample(
            [c.prompt for c in batch], [c.seed for c in batch], guidance_scale=2.0, num_inference_steps=2
        )
    ]
    assert [file.read_bytes() for file in files] == [to_png(image) for image in images]
    rows = read_rows(side / "rows.jsonl")
    judged = benchmark.score(torch.stack(images), cases)
    assert [replace(row, image=None) for row in rows] == judged
    report = Report.from_dict(json.loads((side / "report.json").read_text()))
    assert report.scores == benchmark.aggregate(judged).scores
    assert report.sampling["guidance_scale"] == 2.0
    assert report.sampling["size"] == [8, 8]
    assert report.model["path"] == str(tiny_pipeline)
    assert report.model["scheduler"] == "DDIMScheduler"
    [cache] = (finished / "pictures").iterdir()
    assert side.name.endswith(cache.name[:10])
    assert sorted(f.name for f in cache.iterdir()) == ["images", "settings.json"]


def test_what_is_done_is_not_done_again(
    copied: Path, finished: Path, tiny_pipeline: Path, drawn: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Shapes, "score", lambda *args: pytest.fail("scored again"))
    evaluate(tiny_pipeline, copied)
    assert drawn == []
    assert contents(copied) == contents(finished)


@pytest.mark.parametrize(("lost", "lines", "torn"), [(5, 0, 0), (0, 0, 9), (2, 4, 20)])
@pytest.mark.slow
def test_every_state_a_kill_can_leave_is_completed(
    copied: Path, finished: Path, tiny_pipeline: Path, lost: int, lines: int, torn: int
) -> None:
    """The last `lost` pictures are not there, `lines` whole rows and `torn` bytes of the next are."""
    side = side_of(copied)
    (side / "report.json").unlink()
    files = [side / json.loads(line)["image"] for line in (side / "manifest.jsonl").read_text().splitlines()]
    for file in files[LIMIT - lost :]:
        file.unlink()
        file.with_name(file.name + ".tmp").write_bytes(b"half a picture")
    rows = (side / "rows.jsonl").read_bytes().splitlines(keepends=True)
    (side / "rows.jsonl").write_bytes(b"".join(rows[:lines]) + rows[lines][:torn])
    (files[0].parents[1] / "drawing.jsonl").write_bytes(b'{"id": "torn')
    evaluate(tiny_pipeline, copied)
    assert {k: v for k, v in contents(copied).items() if not k.endswith(".tmp")} == contents(finished)


@pytest.mark.slow
def test_benchmarks_share_pictures_and_show_what_others_published(
    tiny_pipeline: Path, tmp_path: Path, drawn: list[list[int]]
) -> None:
    Echo.slices.clear()
    text = evaluate(tiny_pipeline, tmp_path, ["shapes", ECHO])
    assert [len(batch) for batch in drawn] == [4, 2]
    assert Echo.slices == [[case.id for case in Echo(LIMIT).cases()]]  # 15 of 16 fit, and there are 6
    shown = text[text.index("published") :]
    assert "another" in shown
    assert "a paper" in shown
    assert "> " in shown
    assert shown.index("another") < shown.index("> ")  # the better one first
    rows = {name: read_rows(side_of(tmp_path, name) / "rows.jsonl") for name in ("shapes", "echo")}
    assert [row.image for row in rows["shapes"]] == [row.image for row in rows["echo"]]


@pytest.mark.slow
def test_stages_one_by_one(
    tiny_pipeline: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="holds no pictures of .* draw them first, with --stage generate"):
        evaluate(tiny_pipeline, tmp_path, stage="score")
    assert f"6 of {LIMIT} cases have a picture" in evaluate(tiny_pipeline, tmp_path, stage="generate")
    assert not list(tmp_path.rglob("rows.jsonl"))
    monkeypatch.setattr(benchmark_models, "load_model", lambda *args, **options: pytest.fail("loaded the model"))
    with pytest.raises(ValueError, match=r"holds no rows\.jsonl; score the pictures first"):
        evaluate(tiny_pipeline, tmp_path, stage="aggregate")
    assert f"6 of {LIMIT} scored" in evaluate(tiny_pipeline, tmp_path, stage="score")
    assert not list(tmp_path.rglob("report.json"))
    shutil.rmtree(tmp_path / "pictures")
    assert "judge_score" in evaluate(tiny_pipeline, tmp_path, stage="aggregate")
    assert contents(side_of(tmp_path)) == contents(side_of(finished))
    with pytest.raises(ValueError, match="none of 6 pictures is there"):
        evaluate(tiny_pipeline, tmp_path, stage="score")


@pytest.mark.slow
def test_what_is_missing_is_never_final(copied: Path, tiny_pipeline: Path) -> None:
    side = side_of(copied)
    files = [side / row.image for row in read_rows(side / "rows.jsonl") if row.image]
    content = files[1].read_bytes()
    files[1].write_bytes(content[: len(content) // 2])
    files[2].unlink()
    (side / "rows.jsonl").unlink()
    text = evaluate(tiny_pipeline, copied, stage="score")
    assert "4 of 6 scored, 1 could not be scored" in text
    broken = read_rows(side / "rows.jsonl")[1]
    assert broken.correct is None
    assert files[1].name in str(broken.reason)
    assert str(copied) not in (side / "rows.jsonl").read_text()
    text = evaluate(tiny_pipeline, copied, stage="aggregate")
    assert "4 of 6 PARTIAL" in text
    assert "PARTIAL" in next(line for line in text.splitlines() if line.startswith("judge_score"))
    assert "2 of 6 pictures are missing" in text
    assert json.loads((side / "report.json").read_text())["partial"] is True
    files[1].write_bytes(content)  # a row that failed is tried again
    assert "5 of 6 scored" in evaluate(tiny_pipeline, copied, stage="score")


@pytest.mark.slow
def test_other_arguments_have_rows_of_their_own_and_share_pictures(
    copied: Path, finished: Path, tiny_pipeline: Path, drawn: list[list[int]]
) -> None:
    evaluate(tiny_pipeline, copied, samples=2)
    seeds = [case.seed for case in Shapes(num_prompts=LIMIT, samples=2).cases()]
    assert drawn == [seeds[4:8], seeds[8:]]
    before = contents(finished)
    assert {name: content for name, content in contents(copied).items() if name in before} == before
    sides = {len(read_rows(f / "rows.jsonl")) for f in copied.glob("shapes*/*") if f.is_dir()}
    assert sides == {6, 12}


@pytest.mark.slow
def test_against_another_model(tiny_pipeline: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_pipeline, other)
    with pytest.raises(ValueError, match="have the same weights, so there is nothing to compare"):
        evaluate(tiny_pipeline, tmp_path / "out", against=str(other))
    from safetensors.torch import load_file, save_file

    weights = next((other / "unet").glob("*.safetensors"))
    save_file({k: v * 1.5 for k, v in load_file(weights).items()}, weights, {"format": "pt"})
    text = evaluate(tiny_pipeline, tmp_path / "out", [ECHO], against=str(other))
    assert "win rate" in text
    assert "base against aligned: 6 pairs" in text
    [folder] = (tmp_path / "out").glob("echo*/*-against-*")
    comparison = json.loads((folder / "comparison.json").read_text())
    rows = {side: read_rows(folder / f"{side}.jsonl") for side in ("base", "aligned")}
    means = {side: [row.scores["mean"] for row in found] for side, found in rows.items()}
    wins = sum(a > b for a, b in zip(means["aligned"], means["base"], strict=True))
    assert comparison["scores"]["win_rate/mean"]["value"] == pytest.approx(wins / 6)
    assert comparison["model"]["base"]["path"] == str(other)
    assert (folder / str(rows["base"][0].image)).is_file()
    assert json.loads((folder / "base_echo.json").read_text())["model"]["path"] == str(other)
    with pytest.raises(ValueError, match=r"would be sampled with different settings \(size: \[8, 8\], \[16, 16\]\)"):
        benchmark_models._check_comparable(*(_side(size) for size in ([8, 8], [16, 16])))


def _side(size: list[int]) -> benchmark_models.Side:
    cache = PictureCache(Path("pictures"), str(size))
    return benchmark_models.Side("side", cache, {"path": "model"}, {"size": size})


def test_pictures_made_elsewhere(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_models, "load_model", lambda *args, **options: pytest.fail("loaded a model"))
    rows = read_rows(side_of(finished) / "rows.jsonl")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for row in rows[1:]:
        shutil.copyfile(side_of(finished) / str(row.image), folder / f"{row.id.replace('/', '-')}.png")
    text = evaluate("some/model", tmp_path / "out", imported=str(folder))
    assert "5 of 6 PARTIAL" in text
    side = side_of(tmp_path / "out")
    assert [replace(row, image=None) for row in read_rows(side / "rows.jsonl")] == [
        replace(row, image=None) for row in rows[1:]
    ]
    assert (side / str(read_rows(side / "rows.jsonl")[0].image)).resolve().parent == folder.resolve()
    index = [{"id": f"{n}", "prompt": r.prompt, "seed": r.seed, "image": f"images/{n}.png"} for n, r in enumerate(rows)]
    (folder / "images").mkdir()
    for n, row in enumerate(rows):
        shutil.copyfile(side_of(finished) / str(row.image), folder / "images" / f"{n}.png")
    (folder / "index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in index))
    text = evaluate("some/model", tmp_path / "listed", imported=str(folder))
    assert "6 of 6 (" in text
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds none of the 6 pictures of benchmark 'shapes'"):
        evaluate("some/model", tmp_path / "out", imported=str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="leave out --against and --stage generate"):
        evaluate("some/model", tmp_path / "out", imported=str(folder), against="other")


def test_training_prompts_are_told(finished: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    prompts = [case.prompt for case in Shapes(num_prompts=LIMIT).cases()]
    (tmp_path / "train.txt").write_text(f"{prompts[0]}\nsomething else\n{prompts[3]}\n")
    text = evaluate(tiny_pipeline, finished, stage="aggregate", training_prompts=str(tmp_path / "train.txt"))
    assert "warning: 2 of 6 prompts are among the training prompts" in text


# --- the whole command -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_with_the_embedded_model_and_gone_on(tmp_path: Path) -> None:
    """A process is killed while it draws; this one goes on, and ends with the bytes of an uninterrupted run."""
    how: dict[str, Any] = {"limit": 8, "num_inference_steps": 2, "batch_size": 2}
    words = ["--limit", "8", "--num-inference-steps", "2", "--batch-size", "2", "--output", str(tmp_path / "killed")]
    command = [sys.executable, "-m", "diffalign", "evaluate", "diffalign://shapes", "--benchmark", "shapes", *words]
    until = time.monotonic() + 500
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        while process.poll() is None and time.monotonic() < until:
            if list((tmp_path / "killed").rglob("*.png")):
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert 0 < len(list((tmp_path / "killed").rglob("*.png"))) < 8
    text = benchmarking.evaluate_benchmarks("diffalign://shapes", ["shapes"], output=str(tmp_path / "killed"), **how)
    again = benchmarking.evaluate_benchmarks("diffalign://shapes", ["shapes"], output=str(tmp_path / "whole"), **how)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert text.replace("/killed/", "/whole/") == again


@pytest.mark.slow
def test_two_processes_of_a_launcher_leave_what_one_does(tiny_pipeline: Path, finished: Path, forks: Any) -> None:
    output = finished.with_name("shared")
    words = ["--limit", str(LIMIT), "--num-inference-steps", "2", "--guidance-scale", "2", "--batch-size", "4"]
    command = ["evaluate", str(tiny_pipeline), "--benchmark", "shapes", *words, "--output", str(output)]
    first, second = forks.command(*command, processes=2)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert f"6 of {LIMIT}" in first.out
    assert second.out == ""
    assert contents(output) == contents(finished)


@pytest.mark.slow
def test_videos(tmp_path: Path) -> None:
    pytest.importorskip("av")
    text = benchmarking.evaluate_benchmarks(
        "diffalign://shapes_video", ["shapes_video"], output=str(tmp_path), limit=1, num_inference_steps=2
    )
    assert "1 of 1 (" in text
    side = side_of(tmp_path, "shapes_video")
    rows = read_rows(side / "rows.jsonl")
    assert all((side / str(row.image)).suffix == ".mp4" and (side / str(row.image)).is_file() for row in rows)
    assert "fps" in json.loads((side / "report.json").read_text())["sampling"]
