"""How often reward models agree with people: formats, scoring that goes on, rules, the command."""

from __future__ import annotations

import csv
import io
import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from diffalign import cli
from diffalign.eval import pair_metrics
from diffalign.eval.base import Report
from diffalign.eval.judged_media import JudgedFile, MediaOf
from diffalign.eval.reward_accuracy import Calibration, accuracy_report, calibrate
from diffalign.eval.reward_accuracy_table import PUBLISHED, render
from diffalign.eval.reward_runs import evaluate_rewards, find_file
from diffalign.reward_models import load_reward_model
from diffalign.reward_models.base import RewardInfo, RewardModel
from diffalign.reward_models.media import to_rgb
from diffalign.reward_models.unified_reward import JudgedPairs
from tests.eval.suite_data import noise, published


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pictures(tmp_path):
    """Four pictures, a.png the smallest: `jpeg`, which wants small files, prefers a to b to c to d."""
    for i, name in enumerate("abcd"):
        noise(16 * (i + 1)).save(tmp_path / f"{name}.png")
    return tmp_path


@pytest.fixture(scope="module")
def jpeg():
    return load_reward_model("jpeg")


def pair(first, second, label, prompt="p", **more):
    return {"prompt": prompt, "media_a": f"{first}.png", "media_b": f"{second}.png", "label": label, **more}


# --- formats -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "form", "labels", "ranks"),
    [
        ({"prompt": "p", "media_a": "a", "media_b": "b", "label": "tie"}, "pairs", {"overall": 0.5}, None),
        ({"prompt": "p", "media_a": "a", "media_b": "b", "p_a": 0.7}, "pairs", {"overall": 0.7}, None),
        ({"prompt": "p", "image_path": ["a", "b"], "rank": [2, 1.5]}, "hpdv2_test", {}, (2.0, 1.5)),
        ({"prompt": "p", "generations": ["a", "b"], "ranking": [1, 1]}, "imagerewarddb", {}, (1.0, 1.0)),
        ({"prompt": "p", "file_path": ["a", "b"], "human_preference": [0, 1]}, "hpdv2", {"overall": 0.0}, None),
        ({"prompt": "p", "path1": "a", "path2": "b"}, "hpdv3", {"overall": 1.0}, None),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "chosen_rejected", {"overall": 1.0}, None),
        (
            {"prompt": "p", "path_A": "a", "path_B": "b", "VQ": "A", "MQ": "same", "TA": "", "Overall": "B"},
            "videogen", {"VQ": 1.0, "MQ": 0.5, "overall": 0.0}, None,
        ),
        ({"caption": "p", "jpg_0": "a", "jpg_1": "b", "label_0": 0.5}, "pickapic", {"overall": 0.5}, None),
    ],
)  # fmt: skip
def test_formats_are_told_apart_and_keep_ties(tmp_path, row, form, labels, ranks):
    file = JudgedFile(write_lines(tmp_path / "x.jsonl", [row]))
    (item,) = file.read()
    assert (file.format, item.prompt, item.media, item.labels, item.ranks) == (form, "p", ("a", "b"), labels, ranks)


def test_rows_without_a_label_are_left_out_and_counted(tmp_path):
    rows = [
        {"caption": "p", "jpg_0": "a", "jpg_1": "b", "label_0": 1.0, "has_label": True},
        {"caption": "p", "jpg_0": "a", "jpg_1": "b", "label_0": 1.0, "has_label": False},
        {"caption": "p", "jpg_0": "a", "jpg_1": "b", "label_0": None},
        {"caption": "p", "jpg_0": "a", "jpg_1": "b", "label_0": float("nan")},
    ]
    file = JudgedFile(write_lines(tmp_path / "x.jsonl", rows))
    assert (len(list(file.read())), file.left_out) == (1, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "p"}\n', r"has the columns prompt; expected one of: caption, jpg_0"),
        ('{"prompt": "p", "media_a": "a", "media_b": "b", "label": "both"}\n', r"row 0: .*label 'both'"),
        ('{"prompt": "p", "media_a": "a", "media_b": "b", "p_a": 1.5}\n', "row 0: .* a share in"),
        ('{"prompt": null, "media_a": "a", "media_b": "b", "label": "a"}\n', "row 0: .*the prompt is None"),
        ('{"prompt": "p", "generations": ["a"], "ranking": [1, 2]}\n', "row 0: .*1 generations"),
        ('{"prompt": "p", "generations": ["a", "b"], "ranking": [1, NaN]}\n', "row 0: .*ranking"),
        ('{"caption": "p", "jpg_0": "a", "jpg_1": "b", "label_0": 0.3}\n', r"row 0: .*label_0 is 0\.3"),
        ('{"prompt": "p", "media_a": "a", "media_b": "b", "label": "a"}\n{"prompt": "p", "me', "line 2 is no JSON"),
        ("[1]\n", "line 1 is no JSON object"),
        ("", "has the columns none"),
    ],
)
def test_bad_comparisons_are_named(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        list(JudgedFile(tmp_path / "x.jsonl").read())


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no"):
        JudgedFile(tmp_path / "none.jsonl")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(ValueError, match="cannot be read"):
        JudgedFile(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="unknown benchmark 'hpdv'; expected hpdv2, imagerewarddb"):
        find_file("hpdv")
    with pytest.raises(ValueError, match="hpdv2 needs its comparisons and media: pass --data"):
        find_file("hpdv2")
    write_lines(tmp_path / "test.json", [])
    (tmp_path / "test.json").write_text(json.dumps([{"prompt": "p", "generations": ["a", "b"], "ranking": [1, 2]}]))
    assert find_file("imagerewarddb", tmp_path)[1].format == "imagerewarddb"
    with pytest.raises(ValueError, match="of format 'imagerewarddb', benchmark hpdv2 of format 'hpdv2_test'"):
        find_file("hpdv2", tmp_path)


def test_a_medium_is_scored_once_wherever_it_stands(pictures):
    rows = [pair("a", "b", "a"), pair("a", "c", "a"), pair("a", "b", "b", prompt="q")]
    media = MediaOf(JudgedFile(write_lines(pictures / "x.jsonl", rows)))
    assert (media.count, media.comparisons) == (5, 3)  # a and b under q are scored again: the prompt is another one
    assert len({row.id for row in media}) == len(list(media)) == 5


def test_the_published_rankings_have_6399_pairs():
    folder = published("imagereward", "test_rankings_466.json")
    name, file = find_file("imagerewarddb", folder)
    items = list(file.read())
    assert (name, len(items), {len(item.media) for item in items}) == ("imagerewarddb", 466, {4, 5, 6, 7, 8, 9})
    different = sum(a != b for item in items for a, b in itertools.combinations(item.ranks, 2))
    assert different == 6399


# --- from files to numbers ---------------------------------------------------------------------------------------


def test_a_pair_file_by_hand(pictures, jpeg):
    rows = [
        pair("a", "b", "a", category="x"), pair("c", "b", "b", "q", category="x"),
        pair("a", "d", "b", "r", category="y"), pair("a", "b", "tie", "s", category="y"),
        pair("a", "a", "a", "t", category="y"),
    ]  # fmt: skip
    file = JudgedFile(write_lines(pictures / "x.jsonl", rows))
    report = evaluate_rewards([jpeg], file, pictures / "out")
    name = "jpeg_compressibility"
    strict = report.scores[f"accuracy/{name}"]
    # Right, right, wrong, (a human tie), and a tied prediction, which is wrong.
    assert (strict.value, strict.n) == (0.5, 4)
    assert (strict.details["ties"], strict.details["predicted_ties"]) == (1, 1)
    assert report.scores[f"accuracy_ties_half/{name}"].value == (1 + 1 + 0 + 0.5 + 0.5) / 5
    assert report.groups["x"][f"accuracy/{name}"].value == 1.0
    assert report.groups["y"][f"accuracy/{name}"].value == 0.0
    judged = [json.loads(line) for line in (pictures / "out" / "judged.jsonl").read_text().splitlines()]
    margins = [row["scores"][name]["overall"][0] - row["scores"][name]["overall"][1] for row in judged]
    expected = pair_metrics.log_losses([1, 0, 0, 0.5, 1], margins, jpeg.info.tau).mean()
    assert report.scores[f"log_loss/{name}"].value == pytest.approx(expected)
    assert report.scores[f"log_loss/{name}"].higher_is_better is False
    assert next(iter(report.scores)) == f"accuracy/{name}"
    assert (report.partial, report.protocol["models"][name]) == (False, jpeg.fingerprint())
    assert Report.from_dict(json.loads((pictures / "out" / "report.json").read_text())).scores == report.scores
    assert "jpeg_compressibility" in render(report)


def test_rankings_by_hpdv2s_rule_and_by_imagerewards(pictures, jpeg):
    files = ["c.png", "b.png", "a.png"]
    for columns, rule in ((("image_path", "rank"), "accuracy_inversions"), (("generations", "ranking"), "accuracy")):
        rows = [
            {"prompt": "p", columns[0]: files, columns[1]: [1, 1, 2]},  # predicted a, b, c: two inversions of three
            {"prompt": "q", columns[0]: files, columns[1]: [3, 2, 1]},  # none
        ]
        path = pictures / "x.json"
        path.write_text(json.dumps(rows))
        name, file = find_file(str(path))
        report = evaluate_rewards([jpeg], file, pictures / name, benchmark=name)
        main = report.scores[f"{rule}/jpeg_compressibility"]
        assert next(iter(report.scores)) == f"{rule}/jpeg_compressibility"
        if rule == "accuracy":
            assert (main.value, main.n) == (3 / 5, 5)  # pooled: 0 of 2 and 3 of 3
            assert report.scores["accuracy_macro/jpeg_compressibility"].value == 0.5
        else:
            assert main.value == pytest.approx((1 / 3 + 1) / 2)
            assert main.details["predicted_ties"] == 0
        assert report.reference
        assert {row["benchmark"] for row in report.reference} == {name}


def test_pick_a_pic_with_bytes_in_parquet(tmp_path, jpeg):
    def data(size):
        buffer = io.BytesIO()
        noise(size).save(buffer, format="PNG")
        return buffer.getvalue()

    rows = [
        {"caption": "p", "jpg_0": data(16), "jpg_1": data(32), "label_0": 1.0},
        {"caption": "p", "jpg_0": data(32), "jpg_1": data(16), "label_0": 0.5},
        {"caption": "q", "jpg_0": b"torn", "jpg_1": data(16), "label_0": 0.0},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test_unique.parquet")
    name, file = find_file("pickapic_v2", tmp_path)
    report = evaluate_rewards([jpeg], file, tmp_path / "out", benchmark=name)
    half = report.scores["accuracy_ties_half/jpeg_compressibility"]
    assert (half.value, half.n, half.n_missing) == (0.75, 2, 1)
    assert (report.n_missing, report.partial) == (1, True)  # the torn picture is missing, not a wrong prediction
    assert any("1 of 3 comparisons lack a score" in text for text in report.warnings)
    assert any("optimistic" in text for text in report.warnings)
    # Where ties begin comes from other pairs: here one with a margin of about a kilobyte, which must become a tie.
    held = write_lines(
        tmp_path / "held.jsonl", [{"caption": "p", "jpg_0": "16.png", "jpg_1": "32.png", "label_0": 0.5}]
    )
    for size in (16, 32):
        noise(size).save(tmp_path / f"{size}.png")
    report = evaluate_rewards([jpeg], file, tmp_path / "out", benchmark=name, calibration=JudgedFile(held))
    tuned = report.scores["accuracy_threshold/jpeg_compressibility"]
    assert (tuned.details["threshold"], tuned.value) == (0.5, 0.75)
    assert report.protocol["ties_chosen_on"] == "other pairs"
    assert not any("optimistic" in text for text in report.warnings)


class Columns(RewardModel):
    """A scorer of pictures with the dimensions of VideoReward: their brightness in each channel, and its sum."""

    info = RewardInfo("columns", "none", (), dims=("VQ", "MQ", "TA", "Overall"))

    def preprocess(self, item):
        return torch.from_numpy(np.asarray(to_rgb(item), dtype=np.float32).sum((0, 1)))

    def score_prepared(self, prepared, texts):
        values = torch.stack(list(prepared))
        return dict(zip(self.info.dims, [*values.T, values.sum(1)], strict=True))


def test_aspects_are_told_by_the_dimensions_of_their_names(pictures, jpeg):
    path = pictures / "videogen-rewardbench.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path_A", "path_B", "A_model", "B_model", "prompt", "VQ", "MQ", "TA", "Overall"])
        rows.writerow(["b.png", "a.png", "n", "m", "p", "A", "B", "same", "A"])
        rows.writerow(["a.png", "c.png", "m", "n", "q", "A", "B", "B", "same"])
    name, file = find_file("videogen_rewardbench", pictures)
    report = evaluate_rewards([Columns(), jpeg], file, pictures / "out", benchmark=name)
    values = {key: score.value for key, score in report.scores.items() if key.startswith("accuracy/")}
    # Larger pictures are brighter in every channel; jpeg prefers the smaller ones and knows no aspects.
    assert values == {
        "accuracy/columns": 1.0, "accuracy/columns/VQ": 0.5, "accuracy/columns/MQ": 0.5, "accuracy/columns/TA": 1.0,
        "accuracy/jpeg_compressibility": 0.0,
    }  # fmt: skip
    # Overall: h = (1, 0), |m| of the tie the larger one: only the smallest margin can be told as a tie.
    assert report.scores["accuracy_with_ties/columns"].value == 0.5
    assert list(report.groups) == ["m : n"]
    assert not report.partial


def test_scoring_goes_on_and_a_further_model_costs_only_its_own(pictures, jpeg):
    file = JudgedFile(write_lines(pictures / "x.jsonl", [pair("a", "b", "a"), pair("c", "d", "b")]))
    whole = evaluate_rewards([jpeg], file, pictures / "whole", batch_size=2)
    out = pictures / "out"
    evaluate_rewards([jpeg], file, out, batch_size=2)
    # What a kill leaves: a journal with a torn line, and no output.
    lines = (out / "scores.jsonl").read_text().splitlines()
    journal = []
    for line in map(json.loads, lines[:2]):
        model = "jpeg_compressibility"
        key = {"id": line["id"], "prompt": line["prompt"], "sha256": line["sha256"], "model": model}
        value = {"fingerprint": line["models"][model], "score": line["scores"][model]}
        journal.append(json.dumps(key | value) + "\n")
    (out / "scores.jsonl.journal").write_text("".join(journal) + '{"id": "torn')
    for name in ("scores.jsonl", "judged.jsonl", "report.json"):
        (out / name).unlink()
    assert evaluate_rewards([jpeg], file, out, batch_size=2).scores == whole.scores
    assert (out / "judged.jsonl").read_bytes() == (pictures / "whole" / "judged.jsonl").read_bytes()
    both = evaluate_rewards([jpeg, Columns()], file, out)
    assert both.scores["accuracy/jpeg_compressibility"] == whole.scores["accuracy/jpeg_compressibility"]
    other = JudgedFile(write_lines(pictures / "y.jsonl", [pair("a", "b", "b")]))
    with pytest.raises(ValueError, match="holds results of other settings"):
        evaluate_rewards([jpeg], other, out)


class Biased(RewardModel):
    """A judge of pairs that prefers the larger picture, and the first one of equal size."""

    info = RewardInfo("biased", "none", (), pairwise_native=True)

    def preprocess(self, item):
        return to_rgb(item)

    def score_prepared(self, prepared, texts):
        raise AssertionError("it judges pairs")

    def compare(self, a, b, prompts, *, batch_size=32, on_invalid="raise"):
        p, bias, errors = [], [], []
        for one, other in zip(a, b, strict=True):
            try:
                first, second = self.preprocess(one).size, self.preprocess(other).size
            except ValueError as error:
                p, bias, errors = [*p, float("nan")], [*bias, float("nan")], [*errors, str(error)]
                continue
            p.append(0.5 if first == second else float(first > second))
            bias.append(float(first == second))
            errors.append(None)
        p = torch.tensor(p)
        none = tuple(() for _ in errors)
        return JudgedPairs(p, p == 0.5, p == p, {"overall": p}, torch.tensor(bias), tuple(errors), none)


def test_judges_of_pairs_are_asked_in_both_orders_and_told_by_their_consistency(pictures):
    (pictures / "torn.png").write_bytes(b"torn")
    rows = [pair("b", "a", "a"), pair("a", "c", "a", "q"), pair("a", "a", "tie", "r"), pair("torn", "a", "a", "s")]
    file = JudgedFile(write_lines(pictures / "x.jsonl", rows))
    report = evaluate_rewards([Biased()], file, pictures / "out", batch_size=3)
    assert report.scores["accuracy/biased"].value == 0.5
    assert report.scores["accuracy_ties_half/biased"].value == pytest.approx(2 / 3)
    assert report.scores["position_consistency/biased"].value == pytest.approx(2 / 3)
    assert report.n_missing == 1
    assert report.scores["log_loss/biased"].value < 100  # a judge's 0 and 1 are not taken at their word
    again = evaluate_rewards([Biased()], file, pictures / "out", batch_size=3)
    assert again.scores == report.scores
    ranked = pictures / "r.jsonl"
    write_lines(ranked, [{"prompt": "p", "generations": ["a.png", "b.png"], "ranking": [1, 2]}])
    with pytest.raises(ValueError, match="biased judges pairs, and .* holds rankings"):
        evaluate_rewards([Biased()], JudgedFile(ranked), pictures / "ranked")


# --- the pure half -----------------------------------------------------------------------------------------------


def judged(margin, label, prompt="p", model="m"):
    return {"id": prompt, "prompt": prompt, "group": None, "labels": {"overall": label}, "ranks": None,
            "scores": {model: {"overall": [margin, 0.0]}}}  # fmt: skip


def test_calibration_comes_from_its_own_rows():
    rows = [judged(0.5, 1, "a"), judged(-0.2, 0, "b"), judged(0.1, 0.5, "c")]
    found = calibrate(rows, {"m": 1.0})
    assert found == {"m/overall": Calibration(threshold=0.0, epsilon=0.1)}
    report = accuracy_report(rows, benchmark="pairs", taus={"m": 1.0}, calibrations=found)
    assert (report.scores["accuracy_with_ties/m"].value, report.scores["accuracy/m"].value) == (1.0, 1.0)
    loose = accuracy_report(rows, benchmark="pairs", taus={"m": 1.0}, calibrations={"m/overall": Calibration(0.0, 0.3)})
    assert loose.scores["accuracy_with_ties/m"].value == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="no comparison for calibration has a score of other"):
        calibrate(rows, {"m": 1.0, "other": 1.0})
    with pytest.raises(ValueError, match="no comparisons to report on"):
        accuracy_report([], benchmark="pairs", taus={"m": 1.0})


def test_a_model_without_any_score_is_missing_not_wrong():
    rows = [judged(None, 1, "a") | {"scores": {"m": {"overall": [None, 1.0]}}}]
    report = accuracy_report(rows, benchmark="pairs", taus={"m": 1.0})
    score = report.scores["accuracy/m"]
    assert (score.value, score.n, score.n_missing, report.n_missing) == (None, 0, 1, 1)
    assert "PARTIAL" in render(report)


def test_intervals_are_wilsons_for_single_pairs_and_over_prompts_for_several():
    single = accuracy_report([judged(1.0, i % 2, f"p{i}") for i in range(40)], benchmark="pairs", taus={"m": 1.0})
    rows = [judged(1.0, i % 2, f"p{i % 2}") for i in range(40)]
    clustered = accuracy_report(rows, benchmark="pairs", taus={"m": 1.0})
    assert single.scores["accuracy/m"].value == clustered.scores["accuracy/m"].value == 0.5
    assert single.scores["accuracy/m"].ci95.low > 0.3
    assert clustered.scores["accuracy/m"].ci95 == (0.0, 1.0)


def test_published_rows_are_the_recorded_ones():
    table = {(row["benchmark"], row["model"], row["accuracy"]) for row in PUBLISHED}
    assert {("hpdv2", "HPSv2.1", 84.1), ("hpdv2", "ImageReward", 74.0), ("hpdv2", "ImageReward", 70.6)} <= table
    assert {("imagerewarddb", "ImageReward", 65.1), ("pickapic_v2", "PickScore", 70.5)} <= table
    assert ("videogen_rewardbench", "VideoReward", 73.59) in table
    memory = [row for row in PUBLISHED if row["benchmark"] == "pickapic_v2"]
    assert all("not confirmed here" in row["source"] for row in memory)


@pytest.mark.slow
def test_the_command(pictures):
    write_lines(pictures / "x.jsonl", [pair("a", "b", "a"), pair("c", "d", "b")])
    runner = CliRunner()
    words = ["evaluate-reward", "jpeg", "--benchmark", str(pictures / "x.jsonl"), "--output", str(pictures / "out")]
    done = runner.invoke(cli.cli, words)
    assert done.exit_code == 0, done.output
    assert "jpeg_compressibility" in done.output
    assert (pictures / "out" / "report.json").is_file()
    wrong = runner.invoke(cli.cli, ["evaluate-reward", "jpg", *words[2:]])
    assert wrong.exit_code == 2
    assert "unknown reward model 'jpg'; did you mean 'jpeg'?" in wrong.output
