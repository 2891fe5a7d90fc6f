import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.eval import report_gallery
from diffalign.eval.report_charts import draw_charts, nice_ticks, read_series, running_mean
from diffalign.eval.report_gallery import embed, find_boxes, find_path
from diffalign.eval.report_runs import read_runs


def decoded(image):
    head, _, data = image["src"].partition(",")
    return head, Image.open(io.BytesIO(base64.b64decode(data)))


def test_a_large_picture_is_made_smaller(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (768, 1024, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "large.png", compress_level=0)
    image = embed(tmp_path / "large.png", 256)
    head, small = decoded(image)
    assert head == "data:image/webp;base64"
    assert small.size == (256, 192)
    assert image["size"] == [1024, 768]
    assert "crisp" not in image
    (tmp_path / "torn.png").write_bytes((tmp_path / "large.png").read_bytes()[:1000])
    assert embed(tmp_path / "torn.png", 256) is None
    (tmp_path / "text.png").write_text("no picture")
    assert embed(tmp_path / "text.png", 256) is None


def test_a_small_picture_is_embedded_as_it_is(tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "small.png")
    image = embed(tmp_path / "small.png", 256)
    assert base64.b64decode(image["src"].partition(",")[2]) == (tmp_path / "small.png").read_bytes()
    assert image["crisp"]


@pytest.mark.parametrize(
    ("evidence", "boxes"),
    [
        ({"objects": {"dog": [[10, 20, 60, 70, 0.934]]}}, [["dog 0.93", 0.1, 0.1, 0.5, 0.25]]),
        ({"objects": {"dog": [[-5, 0, 200, 100]]}}, [["dog", 0, 0, 1, 0.5]]),  # cut at the edges
        ({"objects": {"dog": [], "cat": "nothing"}}, []),
        ({"objects": {"dog": [[1, 2, 3], [None, 0, 1, 1]]}}, []),
        (
            {"read": [{"shape": "circle", "color": "red", "x": 32.0, "y": 16.0, "size": 32.0}]},
            [["red circle", 0.25, 0.0, 0.5, 0.5]],
        ),
        ({"read": [{"shape": "circle"}], "objects": [1]}, []),
        ({}, []),
    ],
)
def test_boxes_of_detectors_and_of_the_embedded_judge(evidence, boxes):
    assert find_boxes(evidence, (100, 200)) == boxes


def test_the_path_of_an_object_leaves_out_frames_where_it_was_not_seen():
    assert find_path({"path": [[32, 16], None, [64, 64]]}) == [[0.5, 0.25], [1.0, 1.0]]
    assert find_path({}) == []


def test_clips_are_played_where_they_are_small(tmp_path, monkeypatch):
    pytest.importorskip("av")
    from diffalign.videos import to_mp4

    path = tmp_path / "clip.mp4"
    path.write_bytes(to_mp4(torch.rand(3, 3, 16, 32, generator=torch.Generator().manual_seed(0)), 8.0))
    [image] = report_gallery._embed([path], 256).values()
    assert base64.b64decode(image["clip"].removeprefix("data:video/mp4;base64,")) == path.read_bytes()
    assert decoded(image)[1].size == (32, 16)
    monkeypatch.setattr(report_gallery, "CLIP_BYTES", 10)
    [image] = report_gallery._embed([path], 256).values()
    assert "clip" not in image
    assert image["note"].endswith("too large to embed")
    path.write_bytes(b"no clip")
    assert report_gallery._embed([path], 256) == {}


def test_runs_are_called_by_what_tells_them_apart(tmp_path):
    def names(*paths):
        for path in paths:
            (tmp_path / path).mkdir(parents=True, exist_ok=True)
        return [run.name for run in read_runs([tmp_path / path for path in paths])]

    assert names("one") == ["one"]
    assert names("a/seed0", "a/seed1") == ["seed0", "seed1"]
    assert names("a/seed0", "b/seed0") == ["a", "b"]
    assert names("a/seed0", "b/seed0", "b/seed1") == ["a/seed0", "b/seed0", "b/seed1"]


def test_a_step_logged_twice_counts_once_with_its_last_value():
    records = [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 2.0}, {"step": 1, "train/loss": 3.0}]
    records += [
        {"step": 3, "train/loss": float("nan"), "train/text": "x", "train/flag": True},
        {"step": 4, "event": "e", "train/loss": 9.0},
        {"step": "5", "train/loss": 9.0},
    ]
    assert read_series(records) == {"train/loss": {1: 3.0, 2: 2.0}}


def test_the_running_mean_is_centred_and_keeps_straight_lines():
    line = np.arange(50.0)
    np.testing.assert_allclose(running_mean(line, 7)[3:-3], line[3:-3])
    assert running_mean(line, 7)[0] == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.23, 0.74, [0.2, 0.4, 0.6, 0.8]),
        (-1.2, 3.4, [-2, -1, 0, 1, 2, 3, 4]),
        (1e-6, 3e-6, [1e-6, 1.5e-6, 2e-6, 2.5e-6, 3e-6]),
        (5.0, 5.0, [5.0]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low, high, ticks):
    assert nice_ticks(low, high) == pytest.approx(ticks)


def test_ticks_of_steps_are_whole_and_inside():
    assert nice_ticks(0, 3, whole=True) == [0, 1, 2, 3]
    assert nice_ticks(1, 999, whole=True) == [200, 400, 600, 800]


def test_curves_lie_where_their_values_are():
    [chart] = draw_charts({"run": [{"step": s, "loss": v} for s, v in ((0, 0.0), (5, 1.0), (10, 0.5))]})
    assert 'd="M52.0 182.0L240.0 10.0L428.0 96.0"' in chart.svg
    assert chart.data["curves"] == [[[0, 0.0], [5, 1.0], [10, 0.5]]]


def test_a_curve_of_one_point_or_of_one_value_is_drawn_in_the_middle():
    [chart] = draw_charts({"run": [{"step": 3, "loss": 0.7}]})
    assert 'cx="240.0" cy="96.0"' in chart.svg
