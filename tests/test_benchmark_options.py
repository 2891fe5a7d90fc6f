"""What `diffalign evaluate MODEL --benchmark` takes on the command line, and what it refuses before it draws."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from diffalign import benchmarking
from diffalign.benchmark_options import open_benchmarks
from diffalign.cli import cli
from tests.eval.suite_data import published

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


LACKING = {
    "questions": ("dpg", ("dpg_bench", "dpgbench_prompts.json"), {}, "download dpg_bench/dpg_bench.csv of github.com/"),
    "a judge": (
        "unigenbench",
        ("unigenbench", "test_prompts_en.csv"),
        {"form": "each"},
        "none was named: --option unigenbench.judge.server=URL",
    ),
    "another tool": (
        "t2i_compbench",
        ("t2i_compbench", "spatial_val.txt"),
        {"categories": "[spatial]"},
        "draw with --stage generate, write its pictures with --export",
    ),
}


@pytest.mark.parametrize("name", LACKING)
def test_what_scoring_lacks_is_asked_for_before_anything_is_drawn(name: str, tmp_path: Path) -> None:
    benchmark, files, given, message = LACKING[name]
    options = [f"{benchmark}.{key}={value}" for key, value in {"data": published(*files), **given}.items()]
    with pytest.raises(ValueError, match=re.escape(message)):
        benchmarking.evaluate_benchmarks("diffalign://shapes", [benchmark], output=str(tmp_path), options=options)
    assert not list(tmp_path.iterdir())


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
