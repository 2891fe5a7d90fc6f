"""`diffalign evaluate MODEL --benchmark`: what is drawn, scored and printed, after every kind of interruption."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

from diffalign import benchmark_models, benchmarking
from diffalign.backbones import load_policy
from diffalign.benchmark_options import open_benchmarks
from diffalign.cli import cli
from diffalign.eval import Case, Report, Row, Shapes, read_rows
from diffalign.eval.runner import BenchmarkRun, score_files
from diffalign.eval.tables import published_rows, render_reports, score_rows
from diffalign.generation import SamplingConfig, to_png
from diffalign.picture_cache import PictureCache, open_cache
from tests.threads import together

LIMIT = 6
ARGUMENTS: dict[str, Any] = {"limit": LIMIT, "num_inference_steps": 2, "guidance_scale": 2.0, "batch_size": 4}
ECHO = "tests.test_benchmark_command:Echo"


class Echo(Shapes):
    """Sees the pictures of three cases together, and keeps what it was shown."""

    name = "echo"
    together = 3
    reference = ({"model": "another", "judge_score": 0.5, "tasks": {"colors": 0.25}, "source": "a paper"},)
    slices: ClassVar[list[list[str]]] = []

    def score(self, media: Tensor, cases: Sequence[Case]) -> list[Row]:
        self.slices.append([case.id for case in cases])
        rows = super().score(media, cases)
        return [replace(row, scores={"mean": float(picture.mean())}) for row, picture in zip(rows, media, strict=True)]


def evaluate(model: Path | str, output: Path, names: Sequence[str] = ("shapes",), **more: Any) -> str:
    return benchmarking.evaluate_benchmarks(str(model), names, output=str(output), **{**ARGUMENTS, **more})


def contents(folder: Path) -> dict[str, bytes]:
    """All files; of reports without the time."""
    found = {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
    for name in found:
        if name.endswith("report.json"):
            found[name] = json.dumps(json.loads(found[name]) | {"created": "", "env": {}}).encode()
    return found


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


class _Batchy:
    """Draws grey pictures that tell which batch they were drawn in; a cache must not mind."""

    is_video = False

    def __init__(self, inner: Any) -> None:
        self.inner, self.batches = inner, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], **how: Any) -> Tensor:
        self.batches.append(list(seeds))
        value = (sum(seeds) * 37 + len(seeds)) % 251
        return torch.stack([torch.full((3, 8, 8), (value + seed) % 256 / 255) for seed in seeds])


WANTED = [(f"a photo of {n} circles", 100 + n) for n in range(10)]
SAMPLING = SamplingConfig(guidance_scale=2.0, num_inference_steps=2, batch_size=4)


def filled(policy: Any, root: Path, *lists: Sequence[tuple[str, int]]) -> dict[str, bytes]:
    cache = open_cache(root, policy, SAMPLING, {})
    for wanted in lists:
        cache.fill(policy, wanted, SAMPLING)
    return contents(root)


@pytest.mark.parametrize("there", [(0, 1, 2), (1, 6), (3, 4, 5, 6, 7), (9,)])
def test_a_batch_is_drawn_as_a_whole_and_nothing_is_written_twice(inner: Any, tmp_path: Path, there: list[int]) -> None:
    whole = filled(_Batchy(inner), tmp_path / "whole", WANTED)
    policy = _Batchy(inner)
    filled(policy, tmp_path / "again", WANTED)
    cache = open_cache(tmp_path / "again", policy, SAMPLING, {})
    for number in set(range(10)) - set(there):
        cache.file(*WANTED[number]).unlink()
    kept = {number: cache.file(*WANTED[number]).stat().st_mtime_ns for number in there}
    policy.batches.clear()
    cache.fill(policy, WANTED, SAMPLING)
    assert contents(tmp_path / "again") == whole
    assert all(batch in ([100, 101, 102, 103], [104, 105, 106, 107], [108, 109]) for batch in policy.batches)
    assert {number: cache.file(*WANTED[number]).stat().st_mtime_ns for number in there} == kept


def test_a_picture_of_an_earlier_list_stays_as_it_was(inner: Any, tmp_path: Path) -> None:
    policy = _Batchy(inner)
    first = filled(policy, tmp_path, WANTED[2:5])
    both = filled(policy, tmp_path, [*WANTED, WANTED[0]])
    assert {name: both[name] for name in first} == first
    assert len(both) == len(first) + 7
    assert policy.batches == [[102, 103, 104], [100, 101, 102, 103], [104, 105, 106, 107], [108, 109]]


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_fill_a_cache_like_one(inner: Any, tmp_path: Path, count: int) -> None:
    alone = filled(_Batchy(inner), tmp_path / "alone", WANTED[1:3], WANTED)
    policies = [_Batchy(inner) for _ in range(count)]

    def work(process: Any) -> None:
        cache = open_cache(tmp_path / "shared", policies[process.rank], SAMPLING, {}, process)
        for wanted in (WANTED[1:3], WANTED):
            cache.fill(policies[process.rank], wanted, SAMPLING, process)

    assert together(count, work) == [None] * count
    assert contents(tmp_path / "shared") == alone
    assert all(policy.batches for policy in policies)


def test_the_key_of_a_cache_is_all_that_pictures_depend_on(inner: Any, tmp_path: Path) -> None:
    key = open_cache(tmp_path, inner, SAMPLING, {}).key
    assert open_cache(tmp_path, inner, SAMPLING.model_copy(update={"batch_size": 1}), {}).key == key
    for change in ({"guidance_scale": 2.5}, {"num_inference_steps": 3}):
        assert open_cache(tmp_path, inner, SAMPLING.model_copy(update=change), {}).key != key
    assert open_cache(tmp_path, inner, SAMPLING, {"dtype": "bfloat16"}).key != key
    weight = next(inner.denoiser.parameters()).data.flatten()
    before = weight[0].clone()
    weight[0] += 1e-3
    assert open_cache(tmp_path, inner, SAMPLING, {}).key != key
    weight[0] = before
    cache = PictureCache(tmp_path, key)
    assert len({cache.file(p, s) for p in ("a", "b", "a ", "a1") for s in (0, 1, 11)}) == 12


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


# --- scoring -----------------------------------------------------------------------------------------------------


def pictures(folder: Path, sizes: Sequence[int]) -> list[Path]:
    folder.mkdir()
    for number, size in enumerate(sizes):
        Image.new("RGB", (size, size), (number, 0, 0)).save(folder / f"{number}.png")
    return [folder / f"{number}.png" for number in range(len(sizes))]


def test_slices_hold_whole_groups_of_one_size(tmp_path: Path) -> None:
    cases = Echo(num_prompts=12).cases()
    files = pictures(tmp_path / "p", [8, 8, 8, 8, 8, 8, 16, 16, 16, 8, 16, 8])
    files[4].write_bytes(b"no picture")
    Echo.slices.clear()
    rows = score_files(Echo(), cases, files)
    ids = [case.id for case in cases]
    assert Echo.slices == [ids[:3], ids[6:9]]
    assert [row.id for row in rows] == ids
    assert ["4.png" in str(row.reason) for row in rows[3:6]] == [True] * 3
    assert {row.reason for row in rows[9:]} == {"pictures that are scored together differ in size"}
    assert all(row.correct is None and row.evidence["unreadable"] for row in [*rows[3:6], *rows[9:]])


def run_of(benchmark: Shapes, folder: Path, files: Sequence[Path]) -> BenchmarkRun:
    named = {case.id: file for case, file in zip(benchmark.cases(), files, strict=True)}
    return BenchmarkRun(benchmark, folder, named, {}, {})


def test_a_group_waits_for_all_its_pictures(tmp_path: Path) -> None:
    files = pictures(tmp_path / "p", [8] * 6)
    files[5].unlink()
    Echo.slices.clear()
    progress = run_of(Echo(num_prompts=6), tmp_path / "run", files).score()
    assert (progress.rows, progress.cases, progress.failed) == (3, 6, 0)
    assert [len(ids) for ids in Echo.slices] == [3]


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_score_like_one(tmp_path: Path, count: int) -> None:
    class Slices(Shapes):
        score_batch_size = 2

    files = pictures(tmp_path / "p", [8] * 9)
    run_of(Slices(num_prompts=9), tmp_path / "alone", files).score()
    done = together(count, lambda p: run_of(Slices(num_prompts=9), tmp_path / "shared", files).score(p))
    assert [(progress.rows, progress.cases) for progress in done] == [(9, 9)] * count
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


BAD: dict[str, tuple[Callable[[list[Row]], list[Row]], str]] = {
    "too few": (lambda rows: rows[1:], "returned 5 rows for 6 cases"),
    "another order": (lambda rows: rows[::-1], "or other ids"),
    "not a number": (lambda rows: [replace(r, evidence={"x": float("nan")}) for r in rows], "cannot be written"),
}


@pytest.mark.parametrize("name", BAD)
def test_rows_that_were_not_asked_for_are_refused(tmp_path: Path, name: str) -> None:
    change, message = BAD[name]

    class Bad(Shapes):
        def score(self, media: Tensor, cases: Sequence[Case]) -> list[Row]:
            return change(super().score(media, cases))

    with pytest.raises(ValueError, match=message):
        run_of(Bad(num_prompts=6), tmp_path / "run", pictures(tmp_path / "p", [8] * 6)).score()


def test_rows_of_another_picture_do_not_count(tmp_path: Path) -> None:
    files = pictures(tmp_path / "p", [8] * 6)
    run_of(Shapes(num_prompts=6), tmp_path / "run", files).score()
    moved = pictures(tmp_path / "q", [8] * 6)
    assert run_of(Shapes(num_prompts=6), tmp_path / "run", moved).rows() == []
    run = run_of(Shapes(num_prompts=6), tmp_path / "run", moved)
    run.score()
    assert len(run.rows()) == 6


# --- tables ------------------------------------------------------------------------------------------------------


def a_report(**changes: Any) -> Report:
    cases = Shapes(num_prompts=6).cases()
    rows = [Row(c.id, c.prompt, c.seed, c.task, correct=n % 2 == 0) for n, c in enumerate(cases)]
    report = Shapes(num_prompts=6).aggregate(rows)
    return replace(report, **changes)


def test_different_protocols_share_no_column() -> None:
    one, other = a_report(), a_report(sampling={"guidance_scale": 5.0})
    assert list(score_rows({"a": one, "b": one})[0]) == ["score", "a", "b"]
    with pytest.raises(ValueError, match="reports of different protocols cannot share a table"):
        score_rows({"a": one, "b": other})
    assert list(score_rows({"a": one, "b": other}, force=True)[0]) == ["score", "a", "b"]
    text = render_reports({"a": one, "b": other})
    assert text.count("judge_score") == 2
    assert "their numbers cannot be compared" in text
    assert render_reports({"a": one, "b": one}).count("judge_score") == 1


def test_published_rows_stand_in_order() -> None:
    reference = (
        {"model": "low", "value": 0.2, "source": "paper 1"},
        {"model": "high", "value": 0.9, "tasks": {"colors": 0.7}, "source": "paper 2"},
        {"model": "unknown", "tasks": {"colors": 0.1}, "source": "paper 3"},
    )
    rows = published_rows({"mine": a_report(reference=reference)})
    assert [row["model"] for row in rows] == ["high", "> mine", "low", "unknown"]
    assert rows[0] == {"model": "high", "judge_score": "0.9", "colors": "0.7", "source": "paper 2"}
    assert rows[1]["judge_score"] == "0.5"
    assert rows[1]["source"] == "this run"
    assert rows[2]["colors"] == "-"
    assert published_rows({"mine": a_report()}) == []


# --- the command line --------------------------------------------------------------------------------------------

USER_ERRORS = {
    "no benchmark": (["somewhere"], "takes a CONFIG, or a MODEL with --benchmark NAME; found 'somewhere', which is no"),
    "an option of the other form": (["c.yaml", "--limit", "3"], "found --limit and no --benchmark"),
    "import without a benchmark": (["m", "--import", "x"], "found --import and no --benchmark"),
    "a config with a benchmark": (["c.yaml", "--benchmark", "shapes"], "judges a MODEL"),
    "overrides": (["m", "a.b=1", "--benchmark", "shapes"], "'a.b=1': only a CONFIG takes overrides"),
    "no output": (["m", "--benchmark", "shapes"], "--output is missing"),
    "half a size": (
        ["m", "--benchmark", "shapes", "--output", "o", "--height", "8"],
        "--height and --width go together",
    ),
    "unknown benchmark": (["m", "--benchmark", "shape", "--output", "o"], "did you mean 'shapes'?"),
    "a benchmark twice": (["m", "--benchmark", "shapes", "shapes", "--output", "o"], "twice; each is evaluated once"),
    "videos asked of images": (
        ["diffalign://shapes", "--benchmark", "shapes_video", "--output", "o"],
        "benchmark 'shapes_video' judges videos, and diffalign://shapes draws images",
    ),
    "no such model": (
        ["./nothing", "--benchmark", "shapes", "--output", "o"],
        "model folder './nothing' does not exist",
    ),
    "no such folder": (["m", "--benchmark", "shapes", "--output", "o", "--import", "x"], "there is no folder 'x'"),
}


@pytest.mark.parametrize("name", USER_ERRORS)
def test_user_errors_are_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, message = USER_ERRORS[name]
    result = CliRunner().invoke(cli, ["evaluate", *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.startswith("error: ")
    assert result.output.count("\n") == 1
    assert not list(tmp_path.rglob("*.png"))


OPTIONS = {
    "misspelt": ("shapes.spit=all", "unknown option 'shapes.spit'; did you mean 'split'? (available: num_prompts,"),
    "no value": ("shapes.split", "is not of the form benchmark.name=value"),
    "no benchmark": ("split=all", "is not of the form benchmark.name=value"),
    "another benchmark": ("geneval.mode=strict", "is for none of the benchmarks shapes"),
    "another type": ("shapes.samples=many", "option 'shapes.samples' must be of type int, found 'many'"),
    "true is no number": ("shapes.seed=true", "option 'shapes.seed' must be of type int, found True"),
    "no YAML": ("shapes.split={", "the value cannot be used"),
    "a date": ("shapes.split=2024-01-01", "the value cannot be used"),
    "inside of a value": ("shapes.seed.x=1", "option 'shapes.seed' must be of type int, found {'x': 1}"),
    "refused by the benchmark": ("shapes.samples=0", "samples must be at least 1, got 0"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_wrong_options(name: str) -> None:
    option, message = OPTIONS[name]
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        open_benchmarks(["shapes"], [option])
    assert "\n" not in str(caught.value)


def test_options_reach_the_benchmark() -> None:
    [plain] = open_benchmarks(["shapes"])
    [one] = open_benchmarks(["shapes"], ["shapes.split=train", "shapes.seed=7"], limit=3, samples=2)
    assert plain.folder == "shapes"
    assert one.folder.startswith("shapes-")
    assert one.folder != open_benchmarks(["shapes"], ["shapes.split=train"], limit=3, samples=2)[0].folder
    assert one.benchmark.cases()[0].seed >= 7
    assert len(one.benchmark.cases()) == 6
    assert one.settings()["arguments"] == {"num_prompts": 3, "samples": 2, "seed": 7, "split": "train"}


@pytest.mark.parametrize(
    "words",
    [["MODEL", "--benchmark", "a", "b", "--limit", "2"], ["--benchmark", "a", "b", "MODEL"],
     ["--benchmark", "a", "--benchmark", "b", "--option", "a.x=1", "MODEL"]],
)  # fmt: skip
def test_several_names_follow_one_flag(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr(benchmarking, "evaluate_benchmarks", lambda *args, **options: called.append(args) or "done")
    result = CliRunner().invoke(cli, ["evaluate", *words])
    assert result.exit_code == 0, result.output
    assert called == [("MODEL", ("a", "b"))]


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
