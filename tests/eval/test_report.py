import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from diffalign.eval import report
from diffalign.eval.base import Row, write_json, write_rows
from diffalign.eval.compare import compare_folder
from diffalign.eval.report import write_report

EVIL = '<script>alert("x")</script> & <img src=y onerror=z> {{ 7 * 7 }}'
SETTINGS = {"model": {"id": "m"}, "sampling": {"guidance_scale": 5.0, "num_inference_steps": 20}}
VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Parses a page strictly: every tag closed in its place; collects tags, attributes and text."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.text = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A run folder with everything in it."""
    run = tmp_path_factory.mktemp("runs") / "my run"
    evaluation = run / "evaluation"
    generator = np.random.default_rng(0)
    for side, shift in (("base", 0.0), ("aligned", 0.5)):
        (evaluation / side).mkdir(parents=True)
        rows = []
        for i in range(30):
            pixels = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(evaluation / side / f"{i}.png")
            prompt = f"prompt {i} {EVIL}" if i == 3 else f"prompt {i}"
            score = 100.0 * (shift > 0) if i == 3 else float(generator.normal(shift))
            correct, task = bool(generator.integers(2)), ("colors", "counting")[i % 2]
            rows.append(Row(str(i), prompt, i, task, f"{side}/{i}.png", {"clip": score}, correct, f"why {i}"))
        write_rows(evaluation / f"{side}.jsonl", rows)
    write_json(evaluation / "settings.json", {"base": SETTINGS, "aligned": SETTINGS})
    write_json(evaluation / "comparison.json", compare_folder(evaluation).to_dict("cpu"))
    (run / "config.yaml").write_text(f"seed: 0  # {EVIL}\ntraining: {{validation_prompts: [a red field, a sea]}}\n")
    write_json(run / "run.json", {"kappa": 250.0, "commands": ["diffalign train my.yaml"]})
    records = [{"step": 0, "event": "start", "message": EVIL}]
    for step in range(1, 101):
        values = {"loss": 0.69 - step / 1000, "implicit_accuracy": 0.5, "z_mean": 0.1, "gate": 0.5, "a$b{c}<d": 1.0}
        errors = {f"{r}error_{h}": 0.1 for r in ("", "ref_") for h in ("chosen", "rejected")}
        logged = {**values, **errors, "grad_norm": 1.0, "learning_rate": 1e-4, "z_square": 9.0}
        records.append({"step": step, **{f"train/{k}": v for k, v in logged.items()}})
    records += [{"step": s, "validation/implicit_accuracy": 0.6} for s in (50, 100)]
    records += [{"step": s, "event": "warning", "message": f"drift {EVIL}"} for s in (70, 90)]
    lines = "".join(json.dumps(r) + "\n" for r in records)
    (run / "metrics.jsonl").write_text(lines + '{"step": 101, "train/lo')
    (run / "validation").mkdir()
    for step in (0, 50, 100):
        Image.new("RGB", (128, 64), "red").save(run / "validation" / f"step-{step:06d}.png")
    return run


@pytest.fixture(scope="module")
def html(finished_run):
    return write_report(finished_run).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


@pytest.mark.slow
def test_it_is_written_into_the_run_by_default(finished_run, html):
    assert (finished_run / "report.html").read_text(encoding="utf-8") == html
    assert not list(finished_run.glob(".*partial"))


@pytest.mark.slow
def test_it_asks_the_network_for_nothing(html, page):
    assert not re.search(r"(https?|ftp|file):|//\w", re.sub(r"data:image/\w+;base64,[\w+/=]+", "", html))
    assert not re.search(r"@import|url\((?!#)", html)
    assert not page.all("script") + page.all("link") + page.all("iframe")
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset"):
            assert attributes.get(name, "#").startswith(("data:image/", "#"))
    [policy] = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")


def test_text_of_the_run_is_escaped(html, page):
    assert "<script" not in html
    assert "onerror" not in [name for _, attributes in page.tags for name in attributes]
    assert page.words.count('alert("x")') == 3  # a prompt, a warning and the config
    assert r"alert(\"x\")" in page.words  # an event, as JSON
    assert "{{ 7 * 7 }}" in page.words
    assert any(EVIL in image["alt"] for image in page.all("img"))


def test_the_verdict_and_the_tables_come_first(page):
    words = page.words
    assert "it wins" in words[: words.index("Warnings")]
    assert words.index("Results") < words.index("scorer base aligned") < words.index("side by side")
    assert {"colors", "counting", "mean of tasks"} <= {t.strip() for t in page.text}


def test_losses_are_shown_beside_gains_and_nothing_twice(page):
    words = page.words
    gains, random, losses = (words.index(t) for t in ("Largest gains", "Random pairs", "Largest losses"))
    assert gains < random < losses
    shown = [i["alt"].removeprefix("base: ") for i in page.all("img") if i["alt"].startswith("base: ")]
    assert len(shown) == len(set(shown)) == 18
    assert shown[0].startswith("prompt 3")
    differences = [float(d) for d in re.findall(r"difference ([+-][\d.e+-]+)", words)]
    assert differences[:6] == sorted(differences[:6], reverse=True)
    assert differences[-6:] == sorted(differences[-6:])
    assert differences[-6] < 0 < differences[0]


def test_when_nothing_lost_it_says_so(finished_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run, ignore=shutil.ignore_patterns("metrics.jsonl"))
    for side, score in (("base", 0.0), ("aligned", 1.0)):
        path = run / "evaluation" / f"{side}.jsonl"
        write_rows(path, [replace(r, scores={"clip": score}) for r in report.read_rows(path)])
    assert "No pair lost." in Page(write_report(run).read_text()).words


def test_pictures_are_embedded_small_ones_crisp_and_all_have_a_text(page):
    images = page.all("img")
    assert len(images) == 36 + 3
    assert all(i["src"].startswith("data:image/png;base64,") and i["class"] == "pixelated" for i in images)
    assert all(i["alt"].strip() for i in images)
    assert [i["alt"] for i in images][-3:] == [f"step {s}: a red field; a sea" for s in (0, 50, 100)]


def test_the_curves_are_there_and_described(page):
    labels = [s["aria-label"] for s in page.all("svg")]
    assert all(s["role"] == "img" for s in page.all("svg"))
    assert [label.partition(" over steps")[0] for label in labels] == [
        *("Loss", "Implicit accuracy", "Margin z", "Errors", "Gradient gate", "Gradient norm", "Learning rate"),
        "train/a$b{c}<d",
    ]
    assert "train/loss from 0.689 at step 1 to 0.59 at step 100" in labels[0]
    assert "validation/implicit_accuracy from 0.6 at step 50" in labels[1]
    assert all(f"{r}error_{h}" in labels[3] for r in ("train/", "train/ref_") for h in ("chosen", "rejected"))
    assert not any("z_square" in label for label in labels)


def test_ids_are_unique_and_every_inner_reference_is_met(page):
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    used = {a["xlink:href"][1:] for _, a in page.tags if "xlink:href" in a}
    used |= {m for _, a in page.tags for v in a.values() for m in re.findall(r"url\(#([^)]+)\)", v or "")}
    used |= {a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a}
    assert used <= set(ids)
    assert used


def test_plots_use_the_pages_ink_in_light_and_dark(html):
    assert "prefers-color-scheme: dark" in html
    assert "currentColor" in html
    assert report._INK not in html


def test_warnings_are_counted_once(page):
    [item] = [t for t in page.text if t.startswith("step 70: drift")]
    assert item.endswith("(2 times, last at step 90)")


def test_it_says_how_the_run_was_made(page):
    words = page.words
    for text in ("kappa 250.0", "diffalign train my.yaml", "seed: 0", "guidance_scale 5.0", "torch", "start"):
        assert text in words


@pytest.mark.slow
def test_equal_runs_give_equal_reports(finished_run, html, tmp_path):
    assert write_report(finished_run, tmp_path / "deep" / "again.html").read_text(encoding="utf-8") == html


@pytest.mark.slow
@pytest.mark.parametrize(
    "missing",
    [
        "config.yaml",
        "metrics.jsonl",
        "run.json",
        "validation",
        "evaluation",
        "evaluation/comparison.json",
        "evaluation/base.jsonl",
        "evaluation/aligned/3.png",
        "validation/step-000050.png",
    ],
)
def test_any_part_may_be_missing(finished_run, missing, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": 0.7}\n')  # one curve is faster to draw than eight
    shutil.rmtree(run / missing) if (run / missing).is_dir() else (run / missing).unlink()
    words = Page(write_report(run).read_text(encoding="utf-8")).words
    expected = {
        "config.yaml": "No configuration was saved",
        "metrics.jsonl": "No metrics were logged",
        "evaluation": "There is no evaluation yet",
        "evaluation/comparison.json": "There is no evaluation yet",
        "evaluation/base.jsonl": "No pictures of both models yet",
        "evaluation/aligned/3.png": "picture missing",
    }
    assert expected.get(missing, "How this run was made") in words


def test_an_empty_folder_still_gives_a_report(tmp_path):
    words = Page(write_report(tmp_path).read_text(encoding="utf-8")).words
    assert "There is no evaluation yet" in words
    assert "No metrics were logged" in words


def test_errors_name_the_file(finished_run, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        write_report(tmp_path / "none")
    with pytest.raises(ValueError, match="no scorer 'hps' in this run; it was scored by clip"):
        write_report(finished_run, tmp_path / "r.html", scorer="hps")
    (tmp_path / "evaluation").mkdir()
    for content in ("{", "[]", "{}", '{"schema": 1}'):
        (tmp_path / "evaluation" / "comparison.json").write_text(content)
        with pytest.raises(ValueError, match=r"comparison\.json: "):
            write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_picture_outside_the_run_is_not_embedded(tmp_path):
    run = tmp_path / "run"
    (run / "evaluation").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    for side in ("base", "aligned"):
        row = Row("0", "p", 0, image="../../secret.png", scores={})
        write_rows(run / "evaluation" / f"{side}.jsonl", [row])
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert page.all("img") == []
    assert "picture missing" in page.words


def test_a_large_picture_is_made_smaller(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "large.png")
    picture = report._picture(tmp_path, "large.png")
    assert picture is not None
    assert picture["src"].startswith("data:image/jpeg;base64,")
    assert len(picture["src"]) < 500_000
    assert not picture["pixelated"]
    (tmp_path / "torn.png").write_bytes((tmp_path / "large.png").read_bytes()[:1000])
    assert report._picture(tmp_path, "torn.png") is None


def test_a_step_logged_twice_counts_once_with_its_last_value():
    records = [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 2.0}, {"step": 1, "train/loss": 3.0}]
    records += [
        {"step": 3, "train/loss": float("nan"), "train/text": "x"},
        {"step": 4, "event": "e", "train/loss": 9.0},
    ]
    assert report._series(records) == {"train/loss": {1: 3.0, 2: 2.0}}


def test_the_running_mean_is_centred_and_keeps_straight_lines():
    line = np.arange(50.0)
    np.testing.assert_allclose(report._running_mean(line, 7)[3:-3], line[3:-3])
    assert report._running_mean(line, 7)[0] == pytest.approx(1.5)
