"""`diffalign score`: several models, every column, both kinds of output, and what it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from diffalign.cli import cli
from diffalign.reward_models import RewardInfo, RewardModel, ShapesScore, load_reward_model, score_index
from diffalign.reward_models.base import Scores
from diffalign.reward_models.media import Media, to_rgb


class Judge(RewardModel):
    """Two dimensions, an uncertainty and an answer, all of the mean colour; dark pictures have no answer."""

    info = RewardInfo(name="judge", license="none", weights=(), dims=("red", "overall"), needs_prompt=False)

    def __init__(self, name: str = "judge"):
        super().__init__()
        self.info = replace(self.info, name=name)

    def preprocess(self, item: Media) -> torch.Tensor:
        return torch.from_numpy(np.asarray(to_rgb(item)).mean((0, 1))).float()

    def score_prepared(self, prepared: list[torch.Tensor], texts: list[str]) -> Scores:
        colors = torch.stack(list(prepared))
        mean = colors.mean(-1)
        dark = mean < 1
        return Scores(
            dims={"red": colors[:, 0], "overall": mean.masked_fill(dark, float("nan"))},
            uncertainty=mean / 10,
            raw=[f"it is {value:.0f}" for value in mean],
            errors=["no answer in the dark" if d else None for d in dark],
        )


@pytest.fixture
def folder(tmp_path, make_photo) -> Path:
    """Seven pictures with their prompts, one of them without."""
    media = tmp_path / "media"
    media.mkdir()
    for i in range(7):
        Image.fromarray(make_photo(40, 50 + i, seed=i)).save(media / f"{i}.png")
        if i != 4:
            (media / f"{i}.txt").write_text(f"prompt ü {i // 3}", encoding="utf-8")
    return media


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["score", *map(str, arguments)])


def rows_of(path: Path) -> dict[str, dict]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["id"]: row for row in rows}


@pytest.mark.slow
def test_folder_with_several_models(folder, shapes_folder, clip_folder, tmp_path):
    out = tmp_path / "scores.jsonl"
    result = run(folder, "--reward", f"shapes={shapes_folder}", f"clipscore={clip_folder}", "--output", out)
    assert result.exit_code == 0, result.output
    rows = rows_of(out)
    model = ShapesScore(shapes_folder)
    valid = [i for i in range(7) if i != 4]
    expected = model([folder / f"{i}.png" for i in valid], [f"prompt ü {i // 3}" for i in valid])
    assert [rows[f"{i}.png"]["scores"]["shapes"] for i in valid] == pytest.approx(expected.tolist(), rel=1e-5)
    assert rows["4.png"]["valid"] is False
    assert rows["4.png"]["scores"] == {"shapes": None, "clipscore": None}
    assert rows["4.png"]["errors"]["shapes"] == "there is no prompt for it, and shapes cannot score without"
    assert re.search(r"7 rows: 12 scores computed, 0 reused, \d+\.\d images per second\n", result.output), result.output
    table = next(line for line in result.output.splitlines() if line.startswith("shapes")).split()
    numbers = expected.double().numpy()
    wanted = [
        numbers.mean(),
        numbers.std(ddof=1),
        numbers.min(),
        *np.percentile(numbers, [5, 25, 50, 75, 95]),
        numbers.max(),
    ]
    assert [float(cell) for cell in table[2:]] == pytest.approx(wanted, abs=1e-4)
    assert table[1] == "6"
    with Image.open(tmp_path / "scores.histograms.png") as picture:
        assert picture.format == "PNG"
    again = run(folder, "--reward", f"shapes={shapes_folder}", "--reward", f"clipscore={clip_folder}", "--output", out)
    assert "7 rows: 0 scores computed, 12 reused\n" in again.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "shapes=WEIGHTS", "INPUT", "--output", "OUT"],
        ["--reward", "shapes=WEIGHTS", "--output", "OUT", "INPUT", "--batch-size", "2"],
        ["INPUT", "--output", "OUT", "--no-histograms", "--reward=shapes=WEIGHTS"],
    ],
)
@pytest.mark.slow
def test_names_and_input_in_any_order(arguments, folder, shapes_folder, tmp_path):
    places = {"WEIGHTS": str(shapes_folder), "INPUT": str(folder), "OUT": str(tmp_path / "o.jsonl")}
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert sum(row["valid"] for row in rows_of(tmp_path / "o.jsonl").values()) == 6


def test_every_column_in_both_kinds_of_output(folder, tmp_path):
    Image.new("RGB", (8, 8)).save(folder / "dark.png")
    models = [Judge(), Judge("judge.2")]  # a name that looks like a column of the other
    lines, table = tmp_path / "o.jsonl", tmp_path / "o.parquet"
    for out in (lines, table):
        summary = score_index(folder, models, out, batch_size=3, progress=False)
        assert (summary.rows, summary.computed, summary.failed) == (8, 14, 1)
    assert [c.name for c in summary.columns[:3]] == ["judge", "judge/red", "judge/overall"]
    rows = rows_of(lines)
    assert rows["dark.png"]["errors"] == dict.fromkeys(("judge", "judge.2"), "no answer in the dark")
    assert "dims" not in rows["dark.png"]
    for row in pq.read_table(table).to_pylist():
        expected = rows[row["id"]]
        assert row["valid"] is expected["valid"]
        assert row["judge"] == expected["scores"]["judge"]
        assert row["judge/error"] == expected["errors"].get("judge")
        if row["valid"]:
            assert row["judge/overall"] == row["judge"]
            assert row["judge/uncertainty"] == pytest.approx(row["judge"] / 10)
            assert row["judge/uncertainty"] == expected["uncertainty"]["judge"]
            assert row["judge/raw"] == expected["raw"]["judge"] == f"it is {row['judge']:.0f}"
    whole = {out: out.read_bytes() for out in (lines, table)}
    for out in (lines, table):
        again = score_index(folder, models, out, batch_size=3, progress=False)
        assert (again.computed, again.reused) == (0, 14)
    assert lines.read_bytes() == whole[lines]
    assert pq.read_table(table).equals(pq.read_table(pa.BufferReader(whole[table])))
    table.write_bytes(whole[table][:500])
    assert score_index(folder, models, table, batch_size=3, progress=False).computed == 14


def test_scores_do_not_depend_on_where_the_bytes_are(folder, shapes_folder, tmp_path):
    model = ShapesScore(shapes_folder)
    paths = [folder / f"{i}.png" for i in range(7)]
    prompts = [f"prompt {i}" for i in range(7)]
    images = [{"bytes": path.read_bytes(), "path": None} for path in paths]
    pq.write_table(pa.table({"image": images, "prompt": prompts}), tmp_path / "in.parquet")
    score_index(tmp_path / "in.parquet", [model], tmp_path / "o.parquet", batch_size=3, progress=False, workers=3)
    found = pq.read_table(tmp_path / "o.parquet")["shapes"].to_pylist()
    assert found == pytest.approx(model(paths, prompts).tolist(), rel=1e-5)


def test_threads_change_nothing(folder, shapes_folder):
    paths = [*folder.glob("*.png"), folder / "missing.png"]
    model = ShapesScore(shapes_folder)
    alone = model.score(paths, "a", on_invalid="nan")
    model.workers = 3
    together = model.score(paths, "a", on_invalid="nan")
    torch.testing.assert_close(together.score, alone.score, rtol=0, atol=0, equal_nan=True)
    assert together.errors == alone.errors
    with pytest.raises(ValueError, match="medium 7: .*no such file"):
        model.score(paths, "a")


def test_models_that_compare_media_are_refused_before_weights(folder, tmp_path):
    for name, what in {
        "win_rate(shapes)": "the media of one prompt against each other",
        "group_rank(shapes)": "the media of one prompt against each other",
        "unified_reward-pair_image": "pairs",
    }.items():
        result = run(folder, "--reward", name, "--output", tmp_path / "o.jsonl")
        assert result.exit_code == 2
        assert f"{name} scores {what}, not media one by one" in result.output


def test_groups_are_not_torn_by_batches(folder, shapes_folder, tmp_path):
    """A rank among seven pictures of a prompt is another one than a rank among two of them."""
    ranked = load_reward_model("grouped", of=[{"model": "shapes", "path": shapes_folder}], normalise="rank")
    pair = Judge()
    pair.info = replace(pair.info, pairwise_native=True)
    for model in (ranked, pair):
        with pytest.raises(ValueError, match=r"not media one by one, as rows are scored here; score what it is made"):
            score_index(folder, [Judge("first"), model], tmp_path / "o.jsonl", batch_size=2, progress=False)
    assert not list(tmp_path.glob("o.jsonl*"))


def test_outputs_of_other_kinds_are_refused(folder, tmp_path):
    result = run(folder, "--reward", "shapes", "--output", tmp_path / "o.csv")
    assert result.exit_code == 2
    assert "scores are written as .jsonl or .parquet, got 'o.csv'" in result.output


@pytest.mark.slow
def test_default_output_is_beside_the_folder(folder, shapes_folder):
    for _ in range(2):  # what it leaves is not scored by the next run
        result = run(folder, "--reward", f"shapes={shapes_folder}")
        assert result.exit_code == 0, result.output
    assert len(rows_of(folder.with_name("media.scores.jsonl"))) == 7


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path):
    """Python's own objects, at the peak, for thirteen times as many rows: a few numbers each, not the rows."""
    import tracemalloc

    def peak(count: int) -> int:
        index = tmp_path / f"{count}.jsonl"
        with index.open("w") as stream:
            stream.writelines(
                json.dumps({"id": f"row{i}", "prompt": "p", "image": "x.png"}) + "\n" for i in range(count)
            )
        tracemalloc.start()
        score_index(index, [Judge()], tmp_path / f"o{count}.jsonl", progress=False)
        _, top = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return top

    Image.new("RGB", (2, 2), "red").save(tmp_path / "x.png")
    peak(10)  # imports
    assert peak(1300) - peak(100) < 1200 * 250
