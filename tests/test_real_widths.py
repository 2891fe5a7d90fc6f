"""The benchmark of real widths: what a step is worth, which ways there are, and that its script runs on a CPU."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import profiling, real_widths, steps
from benchmarks.accounting import count_tflop, goal, measure_peak, share, units
from benchmarks.building import build
from benchmarks.machine import machine
from benchmarks.published_widths import PUBLISHED
from benchmarks.tiny_widths import TINY
from benchmarks.ways import DEFAULT, Way

CPU = torch.device("cpu")
SD15, SD35, WAN = (TINY[name] for name in ("sd15-512", "sd35m-512", "wan21-1.3b-480p"))


def measured(architecture: Any, way: str, *, lora: bool, **options: Any) -> dict[str, Any]:
    parsed = Way.parse(way)
    policy = build(architecture, lora=lora, dtype=torch.float32, device=CPU, attention=parsed.attention)
    with parsed.on(policy) as training:
        return steps.measure(
            policy,
            architecture.embeddings(),
            batch_size=2,
            mixed_precision="no",
            reference=parsed.start,  # type: ignore[arg-type]
            training=training,
            **{"steps": 2, "warmup": 1, "rounds": 1, **options},
        )


# --- what a step is worth --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "cached", "expected"), [("full", False, 8), ("full", True, 6), ("lora", False, 6), ("lora", True, 4)]
)
def test_useful_units_of_a_pair(mode: str, cached: bool, expected: int) -> None:
    assert units(mode, cached=cached) == expected


@pytest.mark.parametrize(
    ("name", "mode", "goals"),
    [("sd15-512", "full", (49, 61)), ("sdxl-1024", "full", (5.8, 7.3)), ("sd35m-512", "lora", (21.6, 27))],
)
def test_goals_on_one_h200(name: str, mode: str, goals: tuple[float, float]) -> None:
    tflop, worth = PUBLISHED[name].forward_tflop, units(mode, cached=False)
    assert tflop is not None
    for wanted, rate in zip((0.4, 0.5), goals, strict=True):
        assert goal(wanted, worth, tflop, 790) == pytest.approx(rate, rel=0.01)
        assert share(goal(wanted, worth, tflop, 790), worth, tflop, 790) == pytest.approx(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, one in PUBLISHED.items() if one.forward_tflop])
def test_forward_passes_cost_what_the_goals_say(name: str) -> None:
    assert count_tflop(PUBLISHED[name]) == pytest.approx(PUBLISHED[name].forward_tflop, rel=2e-3)


def test_a_forward_pass_is_counted_without_weights() -> None:
    found = count_tflop(WAN)
    tokens, width, text = 3 * 4 * 4, 24, 512
    # per token: q, k, v, out of both attentions with keys and values of the text, feed-forward, and attention itself
    linear = 2 * tokens * (6 * width**2 + 2 * width * 32) + 2 * text * 2 * width**2
    attention = 4 * width * tokens * (tokens + text)
    layers = 2 * (linear + attention)
    assert layers < 1e12 * found < 1.7 * layers  # the rest: text and time embedding, patches


def test_the_peak_is_that_of_a_matrix_product() -> None:
    assert 0 < measure_peak(CPU, side=64, repeats=2) < 100


# --- ways ------------------------------------------------------------------------------------------------------------


def test_ways_are_read_from_their_names() -> None:
    way = Way.parse("cached+fused+attention=_native_cudnn+compile")
    assert str(way) == "cached+compile+fused+attention=_native_cudnn"
    assert (way.start, way.attention) == ("cached", "_native_cudnn")
    assert Way.parse("live").attention == "native"
    for known in DEFAULT:
        assert Way.parse(str(known)) == known


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fast", "expected plain, live or cached first, found 'fast'"),
        ("live+faster", "found 'faster'"),
        ("live+fused+fused", "each once"),
        ("live+attention=flash+attention=sage", "one attention"),
        ("plain+fused", "the plain step has no switches"),
        ("live+compile+compile-blocks", "exclude each other"),
        ("live+checkpointing+selective", "exclude each other"),
        ("live+cudagraphs", "add compile"),
    ],
)
def test_ways_that_do_not_exist_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="way '") as caught:
        Way.parse(text)
    assert message in str(caught.value)


def test_cells_leave_out_what_an_architecture_does_not_know() -> None:
    names = [cell.name for cell in real_widths.cells(PUBLISHED.values(), DEFAULT)]
    assert len(set(names)) == len(names)
    plain = {name.rpartition("/")[0] for name in names if name.endswith("/plain")}
    assert plain == {f"{one.name}/{mode}/{one.pairs[mode]}" for one in PUBLISHED.values() for mode in one.pairs}
    assert not any("channels_last" in name for name in names if name.startswith(("sd35", "wan", "flux")))
    assert all(name.endswith("/plain") or "checkpointing" in name for name in names if name.startswith("wan"))
    assert {name.split("/")[1] for name in names if name.startswith("flux")} == {"lora"}
    blocks = [name.partition("/")[0] for name in names if "compile-blocks" in name]
    assert set(blocks) == {"sd15-512", "sdxl-1024", "wan21-1.3b-480p", "flux-dev-512", "flux-dev-1024"}
    last = max(names.index(name) for name in names if name.endswith("/live"))
    assert last < min(names.index(name) for name in names if "/cached" in name)  # all models before the next way
    assert all("/3/" in cell.name for cell in real_widths.cells([SD15], DEFAULT, batch_size=3))


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", ["cached+fused", "live+channels_last+checkpointing", "cached+selective+attention=_native_math"]
)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_every_switch_trains_the_same_model(way: str, lora: bool, plain_losses: dict[bool, list[float]]) -> None:
    found = measured(SD15, way, lora=lora)
    assert found["losses"] == pytest.approx(plain_losses[lora], abs=2e-4)  # at beta 2000
    assert (found["split_seconds"]["reference"] == 0) == way.startswith("cached")


@pytest.fixture(scope="module")
def plain_losses() -> dict[bool, list[float]]:
    return {lora: measured(SD15, "live", lora=lora)["losses"] for lora in (True, False)}


def test_some_switches_are_settings_of_the_loop() -> None:
    policy = build(SD35, lora=True, dtype=torch.float32, device=CPU)
    with Way.parse("cached+cudnn_benchmark").on(policy) as training:
        assert training == {"fused_optimizer": False, "cudnn_benchmark": True}
    with Way.parse("live+fused").on(policy) as training:
        assert training == {"fused_optimizer": True, "cudnn_benchmark": False, "sync_steps": 10}


# --- measuring -------------------------------------------------------------------------------------------------------


def test_a_step_is_measured_in_parts() -> None:
    found = measured(SD35, "live", lora=False, steps=1, rounds=2)
    assert len(found["losses"]) == 3
    assert len(found["rounds"]) == 2
    assert found["losses"][0] == pytest.approx(0.693147, abs=1e-5)
    assert found["parameters"] == found["trained_parameters"] > 0
    split = found["split_seconds"]
    assert list(split) == [*steps.PARTS, "rest"]
    assert all(seconds > 0 for seconds in split.values())
    assert sum(split.values()) == pytest.approx(found["seconds_per_step"], rel=0.5)


def test_what_is_watched_is_let_go() -> None:
    timeline, owner = steps.Timeline(CPU), SimpleNamespace(work=lambda number: number + 1)
    plain = owner.work
    timeline.watch(owner, "work", "policy")
    assert owner.work(1) == 2  # before the first step, untimed
    timeline.begin_step()
    assert owner.work(2) == 3
    timeline.begin_step()
    (split,) = timeline.seconds()
    assert 0 < split["policy"] <= split["step"]
    timeline.watched.close()
    assert owner.work is plain


def test_gaps_are_what_no_kernel_covers() -> None:
    assert profiling.idle_share([(0, 4), (2, 5), (8, 10), (9, 9.5)]) == pytest.approx(0.3)
    assert profiling.idle_share([(3, 4), (0, 10)]) == 0
    assert profiling.idle_share([]) == 1


def test_a_trace_is_a_file(tmp_path: Path) -> None:
    trace = tmp_path / "folder" / "trace.json.gz"
    profiler = profiling.Profiler(CPU, trace)
    profiler.start()
    torch.ones(8, 8) @ torch.ones(8, 8)
    found = profiler.stop(1)
    assert found.gaps is None
    assert "aten::mm" in str(found)
    assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]


def test_a_profile_names_the_longest_first() -> None:
    kernels = profiling.longest([("a", 0.001, 1), ("b", 0.004, 1), ("a", 0.001, 1)])
    assert kernels == {"b": (0.004, 1), "a": (0.002, 2)}
    lines = str(profiling.Profile(2, kernels, 0.25)).splitlines()
    assert lines[2] == "| b | 2.000 | 66.7% | 0.5 |"
    assert lines[-1] == "no kernel running: 25.0% of the time"


def test_the_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine("cpu", "abc")["commit"] == "abc"
    monkeypatch.setenv("PATH", "")  # a machine without git
    assert machine()["commit"] is None
    assert machine()["versions"]["torch"] == torch.__version__.partition("+")[0] or machine()["versions"]["torch"]


# --- the script ------------------------------------------------------------------------------------------------------


def run(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    code = real_widths.main(["--tiny", "--peak-tflops", "1", "--output", str(folder), *arguments])
    return code, json.loads((folder / "real_widths_tiny_cpu.json").read_text(encoding="utf-8"))


def test_the_script_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell = "wan21-1.3b-480p/lora/1/live+checkpointing"
    code, record = run(tmp_path, "--only", cell)
    assert code == 0
    assert list(record["cells"]) == [cell]
    row = record["cells"][cell]
    assert row["mfu"] == pytest.approx(row["pairs_per_second"] * 6 * row["forward_tflop"])
    assert row["settings"] == {"steps": 1, "warmup": 1, "rounds": 1}
    assert record["machine"]["device"] == "cpu"
    before = capsys.readouterr()
    assert f"| {cell} | " in before.out
    _, again = run(tmp_path, "--only", cell)
    assert again["cells"] == record["cells"]
    assert cell not in capsys.readouterr().err  # nothing was measured
    main = ["--tiny", "--peak-tflops", "1", "--output", str(tmp_path), "--only", cell, "--commit", "later"]
    assert real_widths.main(main) == 0
    assert "at commit later" not in capsys.readouterr().out
    code, _ = run(tmp_path, "--minutes", "0", "--only", "wan*/full/*live*")
    assert "stopped after" in capsys.readouterr().err
    assert real_widths.main(["--tiny", "--table", "--output", str(tmp_path)]) == 0
    assert f"| {cell} | " in capsys.readouterr().out


@pytest.mark.slow
def test_the_script_traces_one_cell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "PROFILED", 1)
    arguments = ["--tiny", "--trace", "sd35m-512/lora/*", "--ways", "cached", "--output", str(tmp_path)]
    assert real_widths.main(arguments) == 0
    (trace,) = tmp_path.iterdir()
    assert trace.name == "trace_tiny_sd35m-512_lora_1_cached.json.gz"
    assert "| aten::mm | " in capsys.readouterr().out


def test_a_cell_without_memory_is_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore")

    monkeypatch.setattr(real_widths, "build", full)
    code, record = run(tmp_path, "--only", "sd35m-512/lora/*")
    assert code == 0  # that is a result, too
    row = record["cells"]["sd35m-512/lora/1/live"]
    assert row["out_of_memory"] == "CUDA out of memory. Tried to allocate 20 GiB"
    assert "| sd35m-512/lora/1/live | out of memory |" in capsys.readouterr().out


def test_a_cell_that_fails_is_a_line_and_an_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, record = run(tmp_path, "--only", "sd35m-512/lora/1/*", "--ways", "live+attention=flash")
    assert code == 1
    assert "cannot be used here" in record["cells"]["sd35m-512/lora/1/live+attention=flash"]["failed"]
    assert "live+attention=flash | ValueError: attention: 'flash'" in capsys.readouterr().out


def test_the_table_compares_with_the_plain_step_and_names_other_commits() -> None:
    split = {"policy": 0.75, "rest": 0.25}
    row = {"pairs_per_second": 3.0, "mfu": 0.4, "goals": [3.0, 3.75], "peak_memory_gib": 11.5, "split_seconds": split}
    row |= {"no_kernel": 0.07, "commit": "abc"}
    cells = {
        "sd15-512/full/16/plain": {**row, "pairs_per_second": 1.5, "no_kernel": None},
        "sd15-512/full/16/cached": row,
        "sd15-512/full/32/cached": row,
        "sd15-512/full/64/cached": {**row, "commit": "def"},
        "sd15-512/full/99/cached": {"out_of_memory": "", "commit": None},
    }
    made = {"device": "NVIDIA H200", "versions": {"torch": "2.11"}, "commit": "abc"}
    lines = real_widths.table({"cells": cells, "machine": made, "peak_tflops": 790}).splitlines()
    assert lines[3].startswith("| sd15-512/full/16/cached | 3 | 2.00 | 40.0% | 3 | 3.75 | 11.5 |")
    assert lines[3].endswith("| 25% | 7% |")
    assert lines[4].startswith("| sd15-512/full/32/cached | 3 |  | 40.0% |")
    assert lines[5].startswith("| sd15-512/full/64/cached (def) | 3 |")
    assert lines[6].startswith("| sd15-512/full/99/cached (commit unknown) | out of memory |")
    assert lines[-1] == "peak 790 TFLOP/s; NVIDIA H200, PyTorch 2.11, at commit abc where a cell names no other"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tiny", "--only", "sd16*"], "no cell fits sd16"),
        (["--tiny", "--ways", "quick"], "expected plain, live or cached first"),
        (["--tiny", "--table"], "measure something first"),
        pytest.param([], "no GPU here", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
    ],
)
def test_calls_that_cannot_work(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        real_widths.main([*arguments, "--output", str(tmp_path)])
    assert message in capsys.readouterr().err
