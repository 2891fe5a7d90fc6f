"""UniGenBench: prompts and test points, the question byte for byte, verdicts read or refused, dimensions, its files."""

from __future__ import annotations

import json
from collections import Counter
from statistics import fmean

import numpy as np
import pytest
from PIL import Image

from diffalign.eval.base import Row
from diffalign.eval.unigenbench import UniGenBench, read_points
from diffalign.eval.unigenbench_files import read_folder, read_results, score_folder, write_folder, write_results
from diffalign.eval.unigenbench_prompts import LANGUAGES, PRIMARIES, primary, read_judge_texts, read_prompts
from diffalign.eval.unigenbench_table import PUBLISHED
from diffalign.plugins import find
from diffalign.reward_models.answering import Answer
from diffalign.reward_models.base import WeightsError
from diffalign.reward_models.judge_answers import UnreadableAnswerError
from tests.reward_models.judge_files import Say, data_folder

WHITE = np.full((8, 8, 3), 255, np.uint8)


@pytest.fixture(scope="module")
def data():
    files = [f"test_prompts_{language}.csv" for language in LANGUAGES]
    return data_folder("unigenbench", "judge_prompts.json", *files)


@pytest.fixture(scope="module")
def english(data):
    return read_prompts("en", data)


def scores(*values):
    return f"<analysis>['x']</analysis>\n<score>{list(values)}</score>"


def bench_with(data, reply, amount=5, **options):
    judge = {"answerer": Say(reply, "some-judge"), **options.pop("judge", {})}
    return UniGenBench(amount, **{"samples": 1, "data": data, "texts": data, **options}, judge=judge)


def all_right(question):
    """Ones for every test point, as many as the question has definitions."""
    return scores(*[1] * (question.text.split("Defination:「")[1].split("\n」")[0].count("\n")))


@pytest.mark.parametrize(("language", "points"), [("en", 1813), ("en_long", 3920), ("zh", 1813), ("zh_long", 3920)])
def test_the_four_lists_have_600_prompts_in_ten_dimensions(data, language, points):
    wanted = read_prompts(language, data)
    names = [point.name for w in wanted for point in w.points]
    assert len({w.prompt for w in wanted}) == len({w.index for w in wanted}) == 600
    assert len(names) == points
    assert len(set(names)) == 27
    assert {primary(name) for name in names} == set(PRIMARIES.values())


def test_counts_of_the_english_list(english):
    names = Counter(point.name for w in english for point in w.points)
    assert [names[n] for n in ("Style", "World Knowledge", "Logical Reasoning", "Text Generation")] == [
        250,
        158,
        109,
        87,
    ]
    assert Counter(w.theme for w in english) == {
        "Art": 157, "Film & Story": 150, "Illustration": 113, "Design": 110, "Creative Divergence": 70,
    }  # fmt: skip
    subs = Counter(primary(name) for name in names)
    assert [subs[n] for n in ("Attribute", "Action", "Relationship", "Compound", "Grammar", "Entity Layout")] == [
        6, 6, 4, 2, 3, 2,
    ]  # fmt: skip


def test_the_malformed_row_is_repaired(data):
    row = read_prompts("en_long", data)[509]
    assert [p.name for p in row.points][1:3] == ["Grammar - Negation", "Attribute - Color"]
    assert row.points[2].description == "deep sea blue"


def test_the_question_is_the_released_one(data, english):
    text = read_judge_texts("en", data).question(english[0])
    template = json.loads((data / "judge_prompts.json").read_text(encoding="utf-8"))["SYSTEM_PROMPT_EN_TEMPLATE"]
    parts = template.split("{explanation}")
    assert text.startswith(parts[0].split("{prompt}")[0] + english[0].prompt + "」. You are")
    assert "['Style', 'World Knowledge', 'Attribute - Quantity']" in text
    assert (
        "Checkpoints Defination:「\nStyle: Art, painting, photography, design styles, and corresponding artist names\n"
        "World Knowledge: Covers knowledge of" in text
    )
    assert "Checkpoints Description:「\nStyle: classical ink painting\nWorld Knowledge: Egyptian pyramids\n" in text
    assert "Attribute - Quantity: two pandas\n」" in text
    assert "{" not in text
    chinese = read_judge_texts("zh_long", data).question(read_prompts("zh", data)[0])
    assert "考点说明：「\n风格: 艺术" in chinese
    assert "考点描述说明：「\n风格: " in chinese


def test_the_question_is_found_in_a_clone_and_nowhere_else(data, tmp_path):
    content = json.loads((data / "judge_prompts.json").read_text(encoding="utf-8"))
    template, definitions = content["SYSTEM_PROMPT_EN_TEMPLATE"], content["EXPLANATION_DICT_EN"]
    (tmp_path / "eval").mkdir()
    script = tmp_path / "eval" / "gemini_en_eval.py"
    script.write_text(f"def f(prompt):\n    d = {definitions!r}\n    return f'''{template}'''\nx = {{'a': f('')}}\n")
    assert read_judge_texts("en", tmp_path) == read_judge_texts("en", data)
    script.write_text(script.read_text().replace("precise and objective", "kind"))
    with pytest.raises(WeightsError, match="the template of the judge's question .* not the published"):
        read_judge_texts("en", tmp_path)
    script.write_text("def f(:")
    with pytest.raises(WeightsError, match="cannot read the judge's question"):
        read_judge_texts("en", tmp_path)
    with pytest.raises(WeightsError, match=r"has neither 'judge_prompts.json' nor 'eval/gemini_zh_eval.py'"):
        read_judge_texts("zh", tmp_path)
    with pytest.raises(WeightsError, match="not part of this package"):
        read_judge_texts("en", None)


@pytest.mark.parametrize(
    ("text", "count", "verdicts"),
    [
        (scores(1, 0, 1), 3, [True, False, True]),
        ("<score>\n [1,\n 0] \n</score> and <score>[0, 0]</score>", 2, [True, False]),
        ("<score>[1.0]</score>", 1, [True]),
    ],
)
def test_verdicts_are_read(text, count, verdicts):
    assert read_points(text, count) == verdicts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no <score>"),
        ("<score>[1, 0]", "no <score>"),
        ("<score>one</score>", "holds no list"),
        ("<score>[1, 0</score>", "holds no list"),
        (scores(1), "expected a list of 2 verdicts"),
        (scores(1, 0, 1), "expected a list of 2 verdicts"),
        ("<score>1</score>", "expected a list of 2"),
        (scores(1, 2), "expected only 0 and 1"),
        (scores(1, "0"), "expected only 0 and 1"),
        (scores(1, None), "expected only 0 and 1"),
        (scores(True, False), "expected only 0 and 1"),
    ],
)
def test_an_answer_in_another_format_is_refused(text, message):
    with pytest.raises(UnreadableAnswerError, match=message):
        read_points(text, 2)


def test_the_leaderboards_overall_is_the_mean_of_the_ten(data):
    # Golden: 60.974 and 40.216 from the published primaries.
    rows = {row["model"]: row for row in PUBLISHED}
    for model, golden in (("FLUX.1-dev", 60.974), ("SDXL", 40.216)):
        assert fmean(rows[model]["primaries"].values()) == pytest.approx(golden, abs=1e-9)
        assert rows[model]["overall"] == round(golden, 2)
    assert rows["Qwen-Image"]["overall"] == 78.36


@pytest.mark.slow
def test_published_primaries_come_out_of_verdicts_with_those_shares(data):
    """Verdicts in the shares of FLUX.1-dev's row give its overall score, to the rounding of a verdict."""
    bench = UniGenBench(data=data, samples=1)
    flux = next(row for row in PUBLISHED if row["model"] == "FLUX.1-dev")["primaries"]
    totals = Counter(primary(p.name) for w in bench.wanted for p in w.points)
    left = {name: round(flux[name] * n / 100) for name, n in totals.items()}
    expected = fmean(100 * left[name] / n for name, n in totals.items())
    rows = []
    for case, w in zip(bench.cases(), bench.wanted, strict=True):
        verdicts = []
        for p in w.points:
            left[primary(p.name)] -= 1
            verdicts.append(left[primary(p.name)] >= 0)
        evidence = {"judge": "j", "points": [p.name for p in w.points], "verdicts": verdicts}
        rows.append(Row(case.id, case.prompt, case.seed, case.task, evidence=evidence))
    report = bench.aggregate(rows)
    assert report.scores["overall"].value == pytest.approx(expected)
    assert report.scores["overall"].value == pytest.approx(60.97, abs=0.3)
    assert report.groups["Style"]["correct"].n == 250
    assert report.groups["Attribute"]["correct"].n == 234
    assert not report.partial
    assert 55 < report.scores["overall"].ci95.low < report.scores["overall"].ci95.high < 67


def test_cases_have_the_names_of_the_original(data):
    assert find("eval", "unigenbench") is UniGenBench
    cases = UniGenBench(data=data).cases()
    assert len(cases) == 2400 == len({(c.prompt, c.seed) for c in cases})
    assert [c.id for c in cases[:5]] == ["0_0", "0_1", "0_2", "0_3", "1_0"]
    assert Counter(c.task for c in UniGenBench(10, samples=1, data=data).cases()) == dict.fromkeys(
        {c.task for c in cases}, 2
    )


def test_a_picture_is_asked_about_once_and_every_point_has_a_verdict(data):
    say = Say(lambda q: all_right(q).replace("[1", "[0"))
    bench = UniGenBench(5, samples=1, data=data, texts=data, judge={"answerer": say})
    rows = bench.score([WHITE] * 5, bench.cases())
    assert len(say.asked) == 5
    assert {q.max_tokens for q in say.asked} == {4096}
    assert bench.estimate().calls == 5
    for row, wanted in zip(rows, bench.wanted, strict=True):
        first = wanted.points[0]
        assert row.evidence["verdicts"] == [False] + [True] * (len(wanted.points) - 1)
        assert row.reason == f"wrong: {first.name} ({first.description})"
        assert row.scores["unigenbench"] == 1 - 1 / len(wanted.points)
    report = bench.aggregate([Row(**{**row.to_dict(), "scores": {}}) for row in rows])
    ones = [value for row in rows for value in row.evidence["verdicts"]]
    assert sum(s["correct"].n for name, s in report.groups.items() if name in PRIMARIES.values()) == len(ones)
    assert report.protocol["judge"] == "say"


def test_points_can_be_asked_one_by_one(data):
    say = Say(lambda q: "Yes." if "Style" in q.text else "no")
    bench = UniGenBench(5, samples=1, form="each", data=data, judge={"answerer": say, "repeat": 1.0})
    rows = bench.score([WHITE] * 5, bench.cases())
    points = [p for w in bench.wanted for p in w.points]
    assert len(say.asked) == 2 * len(points) == bench.estimate().calls
    assert bench.wanted[0].prompt in say.asked[0].text
    assert [v for row in rows for v in row.evidence["verdicts"]] == [
        "Style" in q.text for q in say.asked[: len(points)]
    ]
    report = bench.aggregate(rows)
    assert (report.scores["judge_agreement"].value, report.scores["judge_agreement"].n) == (1.0, len(points))
    assert report.protocol_hash != bench_with(data, all_right).aggregate([]).protocol_hash


def test_without_a_verdict_in_each_dimension_there_is_no_overall_score(data):
    bench = bench_with(data, all_right, 5)
    report = bench.aggregate(bench.score([WHITE] * 5, bench.cases()))
    assert set(report.groups) & set(PRIMARIES.values()) != set(PRIMARIES.values())
    assert report.scores["overall"].value is None


@pytest.mark.parametrize(
    ("reply", "reason"),
    [("all is well", "no <score>"), (Answer(error="HTTP 500"), "HTTP 500"), (scores(1) * 1, "expected a list")],
)
def test_an_answer_that_cannot_be_read_is_missing_never_a_score(data, reply, reason):
    bench = bench_with(data, lambda q: reply, 2)
    wanted = max(bench.wanted, key=lambda w: len(w.points))
    case = next(c for c in bench.cases() if c.prompt == wanted.prompt)
    row = bench.score([WHITE], [case])[0]
    assert reason in row.reason
    assert row.scores == {"unigenbench": None}
    report = bench.aggregate([row])
    assert (report.n_missing, report.partial, report.scores["overall"].value) == (2, True, None)
    assert "2 of 2 pictures are missing, 1 of them could not be judged" in report.warnings[0]


def test_repeated_calls_are_compared_point_by_point(data):
    def reply(question):
        text = all_right(question)
        return text.replace("[1", "[0") if question.template.endswith("(again)") else text

    bench = bench_with(data, reply, 5, judge={"repeat": 1.0})
    report = bench.aggregate(bench.score([WHITE] * 5, bench.cases()))
    points = sum(len(w.points) for w in bench.wanted)
    score = report.scores["judge_agreement"]
    assert (score.value, score.n) == (pytest.approx((points - 5) / points), points)
    silent = bench_with(
        data, lambda q: "" if q.template.endswith("(again)") else all_right(q), 5, judge={"repeat": 1.0}
    )
    score = silent.aggregate(silent.score([WHITE] * 5, silent.cases())).scores["judge_agreement"]
    assert (score.value, score.n, score.n_missing) == (None, 0, points)


def test_what_does_not_belong_is_refused(data, tmp_path):
    bench = bench_with(data, all_right, 2)
    row = bench.score([WHITE], bench.cases()[:1])[0]
    with pytest.raises(ValueError, match="verdicts on other test points"):
        bench.aggregate([Row(**{**row.to_dict(), "evidence": {**row.evidence, "points": ["Style"]}})])
    with pytest.raises(ValueError, match="is none of the 2 of this benchmark"):
        bench.score([WHITE], [type(bench.cases()[0])("a", "another prompt", 0)])
    with pytest.raises(ValueError, match="unknown language 'fr'"):
        UniGenBench(language="fr", data=data)
    with pytest.raises(ValueError, match="unknown form 'both'"):
        UniGenBench(form="both", data=data)
    with pytest.raises(ValueError, match="more than the budget"):
        bench_with(data, all_right, judge={"price": [1, 1], "budget": 1e-6})
    assert "torn.png" in bench.score([tmp_path / "torn.png"], bench.cases()[:1])[0].reason


# --- files -------------------------------------------------------------------------------------------------------


def test_folders_go_out_and_come_back(data, tmp_path, caplog):
    bench = bench_with(data, lambda q: all_right(q) if q.images[0].getpixel((0, 0))[0] else "?", 2, samples=2)
    rows = []
    for number, case in enumerate(bench.cases()):
        Image.new("RGB", (8, 8), (100 * (number % 2), 0, 0)).save(tmp_path / f"p{number}.png")
        rows.append(Row(case.id, case.prompt, case.seed, case.task, image=f"p{number}.png"))
    assert write_folder(tmp_path / "out", rows, tmp_path, bench) == 4
    Image.new("RGB", (8, 8)).save(tmp_path / "out" / "9999_0.png")
    found = read_folder(bench, tmp_path / "out")
    assert "1 pictures are no case of this benchmark, such as 9999_0.png" in caplog.text
    assert [file.stem for _, file in found] == [case.id for case in bench.cases()]
    judged = score_folder(bench, tmp_path / "out", batch_size=3)
    assert [row.scores["unigenbench"] for row in judged] == [None, 1.0, None, 1.0]
    assert bench.aggregate(judged).n_missing == 2
    with pytest.raises(ValueError, match="names no PNG file"):
        write_folder(tmp_path / "out", [Row(**{**judged[0].to_dict(), "image": None})], tmp_path, bench)
    with pytest.raises(ValueError, match=r"expected <index>_<k>.png"):
        read_folder(bench, tmp_path)


def test_results_of_the_original_are_read_and_written(data, tmp_path):
    bench = bench_with(data, lambda q: all_right(q).replace("[1", "[0"), 3)
    rows = bench.score([WHITE] * 3, bench.cases())
    blank = Row(**{**rows[2].to_dict(), "scores": {}, "evidence": {"judge": "some-judge"}})
    write_results(tmp_path / "results.csv", [*rows[:2], blank], "out/model")
    back = read_results(tmp_path / "results.csv", bench, "some-judge")
    assert [(r.id, r.evidence["verdicts"]) for r in back] == [(r.id, r.evidence["verdicts"]) for r in rows[:2]]
    assert bench.aggregate(back).groups == bench.aggregate(rows[:2]).groups
    text = (tmp_path / "results.csv").read_text(encoding="utf-8")
    assert f"out/model/{rows[0].id}.png" in text
    (tmp_path / "bad.csv").write_text(text.replace(f"{rows[1].id}.png", "x_y.png"))
    with pytest.raises(ValueError, match="row 2: not a row of UniGenBench's results .*'x_y' is no case"):
        read_results(tmp_path / "bad.csv", bench, "j")
    (tmp_path / "bad.csv").write_text("index,prompt\n0,a\n")
    with pytest.raises(ValueError, match="expected a table with the columns index, prompt, testpoint"):
        read_results(tmp_path / "bad.csv", bench, "j")
