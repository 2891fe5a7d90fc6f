"""The command line: quick help, one-line errors with exit code 2, every command reachable."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from diffalign import __version__
from diffalign.cli import cli
from tests.forks import Forks

HEAVY = ("torch", "diffusers", "transformers", "open_clip", "datasets", "pydantic", "numpy")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in an empty folder: the configs must come from the package, and nothing lands in the checkout."""
    monkeypatch.chdir(tmp_path)


def test_help_answers_at_once(record_property: Callable[[str, object], None]) -> None:
    """Under half a second, best of three. Processor time is compared: on an idle machine it is what a user waits, and
    a busy machine cannot make it fail."""
    command = [sys.executable, "-m", "diffalign.cli", "--help"]
    cpu, wall = [], []
    for _ in range(3):
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        wall.append(time.perf_counter() - started)
        cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert "evaluate" in done.stdout
    record_property("help_cpu_seconds", min(cpu))
    record_property("help_wall_seconds", min(wall))
    assert min(cpu) < 0.5, f"{min(cpu):.3f} s of processor time, {min(wall):.3f} s of wall time"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom diffalign.cli import main\n"
        f"try:\n    main(['--help'])\nfinally:\n    print('heavy:', [m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_mistakes_and_reports_wait_for_nothing_heavy() -> None:
    """A key that does not exist is told before torch is there; reports and folders of pictures do not need it."""
    code = (
        "import importlib, sys\nfrom diffalign.cli import main\n"
        "for command in ('train', 'pairs', 'evaluate', 'rollout'):\n"
        "    try:\n        main([command, 'configs/demo.yaml', 'model.lora.rnk=3'])\n"
        "    except SystemExit as stop:\n        assert stop.code == 2\n"
        "for module in ('light_commands', 'eval.report', 'doctor', 'data.tables'):\n"
        "    importlib.import_module(f'diffalign.{module}')\n"
        f"print('heavy:', [m for m in {HEAVY[:5]} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.stderr.count("error: unknown config key 'model.lora.rnk'; did you mean 'rank'?") == 4, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_version() -> None:
    assert CliRunner().invoke(cli, ["--version"]).output.strip().endswith(__version__)


def test_commands_are_the_documented_ones() -> None:
    work = {"demo", "sample", "pairs", "rollout", "score", "train", "train-reward", "evaluate", "report", "doctor"}
    work |= {"evaluate-images", "evaluate-reward"}
    assert set(cli.commands) == work | {"export", "card", "push", "rewards", "serve-reward"}
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert [name for name in cli.commands if f"diffalign {name}" not in readme] == []


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_has_help(name: str) -> None:
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0
    assert result.output.startswith(f"Usage: cli {name}")
    assert cli.commands[name].help
    for parameter in cli.commands[name].params:
        if isinstance(parameter, click.Option) and parameter.name == "output":
            assert parameter.help, f"diffalign {name}: {parameter.opts[0]} has no help"


USER_ERRORS = {
    "config that is not there": (
        ["train", "nothing.yaml"],
        ["config file 'nothing.yaml' does not exist", "demo.yaml"],
    ),
    "unknown key": (
        ["train", "configs/demo.yaml", "training.learning_rat=1e-4"],
        ["unknown config key 'training.learning_rat'", "did you mean 'learning_rate'?"],
    ),
    "unknown section": (
        ["train", "configs/demo.yaml", "trainning.max_train_steps=1"],
        ["unknown config key 'trainning'", "did you mean 'training'?"],
    ),
    "value out of range": (
        ["train", "configs/demo.yaml", "training.max_train_steps=0"],
        ["training.max_train_steps", "greater than or equal to 1", "found 0"],
    ),
    "override without a value": (
        ["train", "configs/demo.yaml", "training.max_train_steps"],
        ["'training.max_train_steps' is not of the form section.key=value"],
    ),
    "unknown trainer": (
        ["train", "configs/demo.yaml", "trainer={name: difusion_dpo}"],
        ["unknown trainer 'difusion_dpo'", "did you mean 'diffusion_dpo'?"],
    ),
    "unknown key of a trainer": (
        ["train", "configs/demo.yaml", "trainer.betta=1"],
        ["unknown config key 'trainer.betta'", "did you mean 'beta'?"],
    ),
    "beta that is not positive": (
        ["train", "configs/demo.yaml", "trainer.beta=0"],
        ["beta must be positive and finite, got 0"],
    ),
    "model folder that is not there": (
        ["train", "configs/demo.yaml", "model.pretrained_model_name_or_path=./nothing"],
        ["model folder './nothing' does not exist", "Hub id"],
    ),
    "model folder to sample from": (
        ["sample", "./nothing", "--prompts", "p.txt", "--output", "out"],
        ["model folder './nothing' does not exist"],
    ),
    "unknown embedded model": (
        ["sample", "diffalign://shape", "--prompts", "p.txt", "--output", "out"],
        ["unknown embedded model 'diffalign://shape'", "did you mean diffalign://shapes?"],
    ),
    "model the Hub cannot be asked for": (
        ["sample", "no-such-owner/no-such-model", "--prompts", "p.txt", "--output", "out"],
        ["'no-such-owner/no-such-model' is neither a folder here nor to be had from the Hub"],
    ),
    "pairs without their section": (
        ["pairs", "configs/sd15_diffusion_dpo.yaml"],
        ["has no section 'pairs'"],
    ),
    "index that is not there": (
        ["score", "nothing.jsonl", "--model", "shapes"],
        ["index 'nothing.jsonl' does not exist"],
    ),
    "scores of an unknown kind": (
        ["score", "nothing.jsonl", "--reward", "shapes", "clipscore", "--output", "scores.csv"],
        ["scores are written as .jsonl or .parquet, got 'scores.csv'"],
    ),
    "unknown reward model among several": (
        ["score", "nothing.jsonl", "--reward", "shapes", "clipscor"],
        ["unknown reward model 'clipscor'; did you mean 'clipscore'?"],
    ),
    "server for others without a token": (
        ["serve-reward", "shapes", "--host", "0.0.0.0"],
        ["listening on 0.0.0.0 without a token would let everyone in", "--token-env"],
    ),
    "run folder that is not there": (
        ["report", "nothing"],
        ["run folder 'nothing' does not exist"],
    ),
}


@pytest.mark.parametrize("case", USER_ERRORS)
def test_user_errors_are_one_line(case: str, tmp_path: Path) -> None:
    arguments, expected = USER_ERRORS[case]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for text in expected:
        assert text in lines[0]
    assert not any(tmp_path.iterdir()), "a refused command left files behind"


def test_the_demo_is_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(cli, ["demo"])
    assert result.exit_code == 2
    assert "the demo runs in one process" in result.stderr


def test_debug_shows_where_a_user_error_comes_from() -> None:
    result = CliRunner().invoke(cli, ["--debug", "train", "nothing.yaml"])
    assert isinstance(result.exception, ValueError)
    assert "nothing.yaml" in str(result.exception)


@pytest.mark.slow
def test_process_ends_with_code_two_and_no_traceback(forks: Forks) -> None:
    (ended,) = forks.command("report", "nothing")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == "error: run folder 'nothing' does not exist; give the output_dir of a run\n"


def test_doctor_prints() -> None:
    result = CliRunner().invoke(cli, ["doctor"])
    assert result.exit_code == 0, result.output
    for section in ("system", "packages", "devices", "attention", "features", "disk", "embedded world"):
        assert f"\n{section}\n" in f"\n{result.output}"
