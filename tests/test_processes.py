"""Work shared out over processes: dealt once, put together to the same bytes, resumed by any number of them."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed import run as launcher

from diffalign.processes import ALONE, OtherProcessError, Processes, launched, own_files
from diffalign.resumable import RowLog
from tests import shared_work
from tests.forks import Forks
from tests.threads import together

TOOLS = Path(__file__).parent / "data" / "conftest.py"
KINDS = ("sample", "pairs", "score", "cache")


def contents(folder: Path) -> dict[str, bytes]:
    files = {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
    return {name: content for name, content in files.items() if not name.endswith("/lock")}


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_list_is_dealt_out_once(count: int) -> None:
    items = [range(i, i + 2) for i in range(0, 10, 2)]
    shares = [Processes(rank, count).share(items) for rank in range(count)]
    assert sorted(item.start for share in shares for item in share) == [0, 2, 4, 6, 8]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert shares[0][0] == items[0]


def test_each_process_has_files_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "scores[1].jsonl.journal"
    assert ALONE.own_file(path) == path
    names = [Processes(rank, 12).own_file(path) for rank in (0, 11)]
    assert [n.name for n in names] == [f"scores[1].jsonl.{k}-of-00012.journal" for k in ("00001", "00012")]
    for file in (path, *names, tmp_path / "scores[1].jsonl.backup.journal", tmp_path / "other.00001-of-00002.journal"):
        file.touch()
    assert own_files(path) == names


def test_alone_nothing_is_said_about_processes() -> None:
    assert launched() is ALONE
    assert ALONE.gather(3) == [3]
    assert ALONE.on_first(lambda: 4) == 4
    assert ALONE.label("sampling") == "sampling"
    assert Processes(1, 4).label("sampling") == "sampling, process 2 of 4"


def test_a_log_of_several_is_the_log_of_one(tmp_path: Path) -> None:
    ids = [f"row{i}" for i in range(11)]

    def fill(folder: str, processes: Processes, stop_after: int = 9) -> list[Any]:
        log = RowLog(tmp_path / folder / "log.jsonl", ids, 2, lambda row: row["v"] != -1, processes)
        done = []
        for chunk in log.todo[:stop_after]:
            log.append([{"id": ids[i], "v": i} for i in chunk])
            done.append(chunk.start)
        if stop_after == 9:
            assert [row["v"] for row in log.finish()] == list(range(11))
        return done

    for folder in ("one", "three"):
        (tmp_path / folder).mkdir()
    assert fill("one", ALONE) == [0, 2, 4, 6, 8, 10]
    assert together(3, lambda p: fill("three", p, 1)) == [[0], [2], [4]]
    shards = [f"log.0000{k}-of-00003.jsonl" for k in (1, 2, 3)]
    assert [p.name for p in own_files(tmp_path / "three" / "log.jsonl")] == shards
    stale = tmp_path / "three" / shards[1]
    stale.write_text(stale.read_text().replace('"v": 2', '"v": -1') + '{"id": "row6", "v"')
    assert together(2, lambda p: fill("three", p)) == [[2, 8], [6, 10]]
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


def test_rows_that_the_first_process_cannot_see_are_an_error(tmp_path: Path) -> None:
    def work(processes: Processes) -> None:
        folder = tmp_path / str(processes.rank)  # as on machines that share no disk
        folder.mkdir()
        log = RowLog(folder / "log.jsonl", ["a", "b"], 1, lambda row: True, processes)
        log.append([{"id": "ab"[processes.rank]}])
        log.finish()

    first, second = together(2, work)
    assert isinstance(first, ValueError)
    assert "1 rows of other processes cannot be seen" in str(first)
    assert "all machines share" in str(first)
    assert isinstance(second, OtherProcessError)


@pytest.fixture(scope="module")
def pictures(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures to score; also what one process samples."""
    folder = tmp_path_factory.mktemp("pictures") / "out"
    shared_work.Work(str(tiny_pipeline), str(TOOLS), "").sample(folder, ALONE)
    return folder


@pytest.fixture(scope="module")
def work(tiny_pipeline: Path, pictures: Path) -> shared_work.Work:
    return shared_work.Work(str(tiny_pipeline), str(TOOLS), str(pictures / "index.jsonl"))


@pytest.fixture(scope="module")
def of_one(work: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of every kind of work."""
    root = tmp_path_factory.mktemp("of_one")
    for kind in KINDS:
        getattr(work, kind)(root / kind, ALONE)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_several_make_what_one_makes(work: Any, of_one: Path, kind: str, tmp_path: Path) -> None:
    assert together(3, lambda processes: getattr(work, kind)(tmp_path, processes)) == [None] * 3
    assert contents(tmp_path) == contents(of_one / kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_processes_goes_on(work: Any, of_one: Path, kind: str, tmp_path: Path) -> None:
    """Three processes stop in the middle, one more stops, two finish; no batch is done twice."""
    batches: list[str] = []
    work.at_every_batch(lambda: batches.append(threading.current_thread().name))
    getattr(work, kind)(tmp_path / "whole", ALONE)
    all_batches = len(batches)
    batches.clear()
    limit = [all_batches // 2]

    def stop() -> None:
        if len(batches) >= limit[0]:
            raise KeyError("stopped")
        batches.append("")

    work.at_every_batch(stop)
    results = together(3, lambda processes: getattr(work, kind)(tmp_path / "out", processes))
    assert {type(result) for result in results} <= {KeyError, OtherProcessError}
    assert KeyError in {type(result) for result in results}
    with pytest.raises(KeyError, match="stopped"):
        getattr(work, kind)(tmp_path / "out", ALONE)
    limit[0] = 10**6
    assert together(2, lambda processes: getattr(work, kind)(tmp_path / "out", processes)) == [None] * 2
    work.at_every_batch(lambda: None)
    assert contents(tmp_path / "out") == contents(of_one / kind)
    # a shard of the cache is two batches, of which a stop may lose the first
    assert len(batches) <= all_batches + (4 if kind == "cache" else 0)


# --- real processes --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_processes_are_followed_by_another_number(
    tiny_pipeline: Path, pictures: Path, of_one: Path, forks: Forks, tmp_path: Path
) -> None:
    """SIGKILL of one process stops the others at once; whoever goes on ends with the bytes of one process."""
    chains: dict[str, list[dict[str, Any]]] = {
        kind: [
            {"processes": 3, "what": "kill", "rank": 2, "batch": 2},
            {"processes": 1, "what": "kill", "rank": 0, "batch": 1},
            {"processes": 2},
        ]
        for kind in KINDS
    }
    chains["sample-failing"] = [{"processes": 2, "what": "raise", "rank": 1, "batch": 2}]
    arguments = {"model": str(tiny_pipeline), "tools": str(TOOLS), "index": str(pictures / "index.jsonl")}
    forks.run(shared_work.main, **arguments, root=str(tmp_path), chains=chains)
    codes = json.loads((tmp_path / "codes.json").read_text())
    for kind in KINDS:
        assert codes[kind] == [[3, 3, -9], [-9], [0, 0]], kind
        assert contents(tmp_path / kind / "out") == contents(of_one / kind), kind
    assert codes["sample-failing"] == [[3, 2]]
    assert (tmp_path / "sample-failing" / "failure.txt").read_text() == "no picture today"
    lost = (tmp_path / "sample-failing" / "lost.txt").read_text()
    assert lost == "another process of this command is gone; its own message says why"


@pytest.mark.slow
def test_a_launched_command_prints_once_and_fails_as_a_whole(tiny_pipeline: Path, forks: Forks, tmp_path: Path) -> None:
    """`diffalign pairs` in two processes; then by the launcher, with a picture that the second one cannot write."""
    config = {
        "output_dir": str(tmp_path / "run"),
        "model": {"pretrained_model_name_or_path": str(tiny_pipeline)},
        "pairs": {"num_prompts": 6, "num_images_per_prompt": 2, "reward_model": "shapes", "score_batch_size": 5},
        "sampling": {"num_inference_steps": 2, "guidance_scale": 1.0, "batch_size": 3},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    first, second = forks.command("pairs", path, processes=2)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    pairs = tmp_path / "run" / "pairs"
    assert first.out.count("pairs 6") == 1, first.out
    assert first.out.rstrip().endswith(f"pairs: {pairs / 'index.jsonl'}")
    assert "sampling, process 1 of 2" in first.err
    assert second.out == ""
    assert "process 2 of 2" not in second.err
    whole = contents(tmp_path / "run")
    images = [pairs / "candidates" / "images" / f"{name}.png" for name in ("00000-00", "00001-01")]
    for image in images:  # of the first batch and of the second
        image.unlink()
    images[1].mkdir()
    line = ["--standalone", "--nproc_per_node", "2", "-m", "diffalign", "pairs", str(path)]
    (failed,) = forks.start(launcher.main, line).wait()
    assert failed.code != 0
    assert failed.out == ""
    assert "error: process 2 of 2: [Errno 21] Is a directory" in failed.err
    images[1].rmdir()
    (again,) = forks.command("pairs", path)
    assert again.code == 0, again.err
    assert contents(tmp_path / "run") == whole
