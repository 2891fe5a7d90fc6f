"""`diffalign evaluate MODEL --against BASE` on prompts that only reward models judge: the protocol of papers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from diffalign.backbones import inspect_model
from diffalign.cli import cli
from diffalign.eval import HPDv2, read_rows, statistics
from diffalign.eval.compare import Comparison
from diffalign.eval.report import render_report
from diffalign.reward_models import load_reward_model
from diffalign.reward_models.hpsv2 import HPSv2
from tests.eval.suite_data import hpdv2_data, parti_data
from tests.reward_models.conftest import OPEN_CLIP_CONFIG, save_hps

REWARDS = ("shapes", "jpeg_compressibility")
DRAWN = ("--num-inference-steps", "2", "--guidance-scale", "2")


class TinyHPDv2(HPDv2):
    """The benchmark with a tiny HPS, whose weights are in the folder of its prompts, and one reward more."""

    def __init__(self, data: str, num_prompts: int | None = None) -> None:
        model = HPSv2(Path(data) / "hps", model_config=OPEN_CLIP_CONFIG, device="cpu")
        super().__init__(num_prompts, models=[model, load_reward_model("shapes")], data=data)


def moved(folder: Path, target: Path) -> Path:
    """A copy of a pipeline with other weights."""
    shutil.copytree(folder, target)
    weights = next((target / "unet").glob("*.safetensors"))
    save_file({k: v * 1.1 for k, v in load_file(weights).items()}, weights, {"format": "pt"})
    return target


def evaluate(*words: object) -> str:
    result = CliRunner().invoke(cli, ["evaluate", *map(str, words)])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def compared(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], str, Path]:
    """The command's words, its output, and the comparison's folder."""
    home = tmp_path_factory.mktemp("compared")
    (home / "mine.txt").write_text("".join(f"a cat number {i}\n" for i in range(5)))
    words = [moved(tiny_pipeline, home / "aligned"), "--benchmark", "prompt_file", "--against", tiny_pipeline]
    words += ["--option", f"prompt_file.data={home / 'mine.txt'}", "--option", f"prompt_file.rewards={list(REWARDS)}"]
    words += ["--samples", 2, *DRAWN, "--output", home / "out"]
    text = evaluate(*words, "--held-out", "shapes")
    [folder] = (home / "out").glob("prompt_file*/*-against-*")
    return words, text, folder


def test_the_table_has_what_papers_report(compared: tuple[list[Any], str, Path]) -> None:
    _, text, folder = compared
    comparison = Comparison.from_dict(json.loads((folder / "comparison.json").read_text()))
    rows = {side: read_rows(folder / f"{side}.jsonl") for side in ("base", "aligned")}
    assert [row.key for row in rows["base"]] == [row.key for row in rows["aligned"]]
    tests = []
    for name in REWARDS:
        base, aligned = (np.array([row.scores[name] for row in rows[side]]) for side in ("base", "aligned"))
        win, gain = comparison.win_rate(name), comparison.difference(name)
        outcomes = statistics.outcomes(aligned - base)
        assert win.value == pytest.approx(outcomes.mean())
        assert gain.details["aligned_median"] == pytest.approx(np.median(aligned))
        by_prompt = outcomes.reshape(5, 2).mean(1)
        tests.append(statistics.sign_test(int((by_prompt > 0.5).sum()), int((by_prompt < 0.5).sum())))
        assert win.details["held_out"] is (name == "shapes")
    corrected = statistics.holm(tests)
    assert [comparison.win_rate(n).details["prompt_sign_test_p_holm"] for n in REWARDS] == corrected
    lines = text[text.index("prompt_file, base against aligned: 10 pairs") :].splitlines()
    assert "guidance_scale 2.0" in lines[0]
    assert "num_inference_steps 2" in lines[0]
    heads = ["scorer", "base", "aligned", "medians", "difference [95 %]", "win rate [95 %]", "p (Holm)", "pairs"]
    assert [head for head in heads if head not in lines[2]] == []
    assert lines[4].startswith("shapes (held out) ")
    assert lines[5].startswith("jpeg_compressibility (used) ")
    assert lines[6].startswith("average, secondary ")
    assert "under shapes, which was held out" in text


@pytest.mark.slow
def test_another_mark_changes_no_row_and_the_page_shows_it(compared: tuple[list[Any], str, Path]) -> None:
    words, _, folder = compared
    before = (folder / "aligned.jsonl").read_bytes()
    text = evaluate(*words, "--stage", "aggregate", "--held-out", "jpeg_compressibility")
    assert "jpeg_compressibility (held out)" in text
    assert "shapes (used)" in text
    assert "(held out)" not in evaluate(*words, "--stage", "aggregate")
    evaluate(*words, "--stage", "aggregate", "--held-out", "shapes")
    assert (folder / "aligned.jsonl").read_bytes() == before
    page = render_report([folder.parents[1]])
    assert "shapes (held out)" in page
    assert "average, secondary" in page
    heads = render_report([folder.parents[1]], "markdown").splitlines()[2]
    wins = ["wins, shapes (held out)", "wins, jpeg\\_compressibility (used)"]
    assert heads.strip("| ").split(" | ") == ["model", *wins, "mean/shapes", "mean/jpeg\\_compressibility"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--held-out", "shapes"], "--held-out marks reward models in a comparison; name the other model"),
        (["--held-out", "hps", "--against", "m"], "no benchmark here is scored by 'hps' (available: shapes)"),
    ],
)
def test_a_mark_that_would_be_nowhere_is_refused(words: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("a cat\n")
    options = [f"prompt_file.data={tmp_path / 'mine.txt'}", "prompt_file.rewards=[shapes]"]
    options = [word for option in options for word in ("--option", option)]
    command = ["evaluate", "m", "--benchmark", "prompt_file", *options, "--output", str(tmp_path / "out"), *words]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.slow
def test_all_sets_of_papers_in_one_command_on_the_embedded_model(tmp_path: Path) -> None:
    """The embedded model against one with other weights, two prompts of each set."""
    data = tmp_path / "data"
    shutil.copytree(hpdv2_data(), data)
    save_hps(data / "hps")
    (data / "drawbench.json").write_text(json.dumps([f"drawing {i}" for i in range(200)]))
    (data / "test_unique.json").write_text(json.dumps([f"wish {i}" for i in range(500)]))
    rewards = f"rewards={list(REWARDS)}"
    options = [f"parti.data={parti_data()}", f"parti.{rewards}", f"pickapic.data={data}", f"pickapic.{rewards}"]
    options += [f"drawbench.data={data}", f"drawbench.{rewards}"]
    hpdv2 = "tests.test_benchmark_win_rates:TinyHPDv2"
    options += [f"{hpdv2}.data={data}"]
    base = "diffalign://shapes"
    aligned = moved(Path(inspect_model(base).location), tmp_path / "aligned")
    text = evaluate(
        aligned, "--against", base, "--benchmark", "parti", "pickapic", "drawbench", hpdv2, "--limit", 2,
        *(word for option in options for word in ("--option", option)),
        *DRAWN, "--output", tmp_path / "out", "--held-out", "shapes",
    )  # fmt: skip
    for name in ("parti", "pickapic", "drawbench", "hpdv2"):
        assert f"{name}, base against aligned: 2 pairs" in text
    table = text[text.rindex("win rate [95 %]") :].splitlines()
    sets = ["parti", "pickapic", "drawbench", "hpdv2", "mean of sets, secondary"]
    assert re.split(r"  +", table[0])[1:] == sets
    rows = {line.split()[0]: line for line in table[2:5]}
    assert list(rows) == ["shapes", "jpeg_compressibility", "hpsv2.1"]
    assert rows["shapes"].startswith("shapes (held out) ")
    comparisons = [json.loads(file.read_text()) for file in (tmp_path / "out").glob("*/*-against-*/comparison.json")]
    shares = [comparison["scores"]["win_rate/shapes"]["value"] for comparison in comparisons]
    assert f" {100 * np.mean(shares):.1f} % [" in rows["shapes"]
    assert rows["jpeg_compressibility"].count(" % ") == 3  # none of HPDv2, and so no mean
    assert rows["hpsv2.1"].count(" % ") == 1
