from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest

from diffalign.monitor import (
    CHOSEN_ERROR_WINDOW,
    FLIPPED_STEPS,
    SATURATED_STEPS,
    EarlyWarnings,
    MetricsFile,
)


def metrics(gate: float = 0.5, chosen: float = 1.0, reference: float = 1.0) -> dict[str, float]:
    return {"gate": gate, "error_chosen": chosen, "ref_error_chosen": reference}


def test_healthy_steps_raise_no_alarm(caplog: pytest.LogCaptureFixture) -> None:
    alarms = EarlyWarnings()
    for step in range(500):
        assert alarms.observe(metrics(gate=0.02, chosen=1.0 + 0.09 * (step % 2), reference=1.0)) == []
    assert caplog.text == ""


def test_saturation_warns_at_the_hundredth_step_and_never_again(caplog: pytest.LogCaptureFixture) -> None:
    alarms = EarlyWarnings()
    with caplog.at_level(logging.WARNING, logger="diffalign"):
        for step in range(1, 3 * SATURATED_STEPS):
            given = alarms.observe(metrics(gate=0.019))
            assert len(given) == (step == SATURATED_STEPS)
    assert caplog.text.count("saturated") == 1


def test_one_living_step_starts_the_count_of_saturated_ones_anew() -> None:
    alarms = EarlyWarnings()
    for gate in [0.01] * (SATURATED_STEPS - 1) + [0.03] + [0.01] * (SATURATED_STEPS - 1):
        assert alarms.observe(metrics(gate)) == []
    assert "lower beta or the learning rate" in alarms.observe(metrics(0.01))[0]


def test_displacement_is_judged_by_the_mean_of_a_full_window() -> None:
    alarms = EarlyWarnings()
    for _ in range(CHOSEN_ERROR_WINDOW - 1):
        assert alarms.observe(metrics(chosen=1.12)) == []
    given = alarms.observe(metrics(chosen=1.12))
    assert len(given) == 1
    assert "12 % above the reference's" in given[0]
    assert "lower the learning rate" in given[0]
    assert all(alarms.observe(metrics(chosen=2.0)) == [] for _ in range(100))


def test_displacement_is_relative_to_the_reference_and_single_steps_do_not_count() -> None:
    alarms = EarlyWarnings()
    for _ in range(CHOSEN_ERROR_WINDOW - 1):
        assert alarms.observe(metrics(chosen=0.3, reference=0.3)) == []
    assert alarms.observe(metrics(chosen=0.6, reference=0.3)) == []  # mean ratio 1.05
    assert alarms.observe(metrics(chosen=0.63, reference=0.3))  # mean ratio 1.105


def test_both_alarms_may_come() -> None:
    alarms = EarlyWarnings()
    given = [text for _ in range(200) for text in alarms.observe(metrics(gate=0.001, chosen=1.5))]
    assert len(given) == 2


def test_counters_survive_a_checkpoint() -> None:
    whole, first, second = EarlyWarnings(), EarlyWarnings(), EarlyWarnings()
    steps = [metrics(gate=0.01, chosen=1.05 + 0.001 * i) for i in range(150)]
    expected = [whole.observe(step) for step in steps]
    got = [first.observe(step) for step in steps[:70]]
    second.restore(json.loads(json.dumps(first.state())))
    got += [second.observe(step) for step in steps[70:]]
    assert got == expected
    assert sum(map(len, got)) == 2


def test_a_flipper_that_hardly_pushes_away_any_more_warns_once() -> None:
    alarms, again = EarlyWarnings(), EarlyWarnings()
    for rate in [0.71] * (FLIPPED_STEPS - 1) + [0.7] + [0.71] * (FLIPPED_STEPS - 1):
        assert alarms.observe({"aaf_rate": rate}) == []
    again.restore(json.loads(json.dumps(alarms.state())))
    (given,) = again.observe({"aaf_rate": 0.9})
    assert "more than 70 % of the samples as winners for 100 steps" in given
    assert all(again.observe({"aaf_rate": 1.0}) == [] for _ in range(2 * FLIPPED_STEPS))


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_write_is_a_line(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write(1, {"train/loss": 0.5})
    file.write(2, {"train/loss": math.nan, "train/lr": math.inf, "event": "warning"})
    assert lines(file.path) == [
        {"step": 1, "train/loss": 0.5},
        {"step": 2, "train/loss": None, "train/lr": None, "event": "warning"},
    ]


def test_rewinding_drops_later_lines_and_a_torn_one(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        file.write(step, {"train/loss": step / 7})
    before = file.path.read_bytes()
    with file.path.open("a") as raw:
        raw.write('{"step": 3, "train/lo')
    file.rewind(3)
    assert file.path.read_bytes() == b"".join(before.splitlines(keepends=True)[:3])
    file.write(4, {"train/loss": 0.1})
    assert [row["step"] for row in lines(file.path)] == [1, 2, 3, 4]
    file.rewind(-1)
    assert file.path.read_text() == ""
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("cut", [1, 5, 10, 23, 29, 30])
def test_a_line_torn_at_any_place_is_dropped_or_whole(tmp_path: Path, cut: int) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write(1, {"x": 1})
    whole = file.path.read_text()
    file.write(2, {"x": 2.25, "y": 3})
    last = file.path.read_text().removeprefix(whole)
    file.path.write_text(whole + last[:cut])
    file.rewind(2)
    file.write(2, {"x": 2.25, "y": 3})
    rows = lines(file.path)
    assert rows[0] == {"step": 1, "x": 1}
    assert rows[-1] == {"step": 2, "x": 2.25, "y": 3}


def test_rewinding_nothing_is_fine(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "metrics.jsonl").rewind(5)
    assert list(tmp_path.iterdir()) == []
