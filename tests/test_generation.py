"""Sampling into a folder: seeds, resuming after every kind of interruption, prompts and their errors."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.backbones import LoRA, load_policy
from diffalign.generation import (
    NonFiniteImageError,
    Request,
    SamplingConfig,
    generate,
    make_requests,
    to_png,
    weights_fingerprint,
)
from diffalign.prompts import PromptRow, image_seed, read_prompts, task_shares
from diffalign.resumable import RowLog, claim_folder
from diffalign.shapes import scenes
from tests.forks import Forks

SAMPLING = SamplingConfig(guidance_scale=2.0, num_inference_steps=2, num_images_per_prompt=2, batch_size=3, seed=5)
PROMPTS = [PromptRow(p.text, {"task": p.task}) for p in scenes.prompts("train", "colors")[:4]]
REQUESTS = make_requests(PROMPTS, SAMPLING)  # 8 images: chunks of 3, 3 and 2
SETTINGS = {"model": "tiny"}


@pytest.fixture(scope="module")
def policy(tiny_pipeline: Path) -> Any:
    return load_policy(str(tiny_pipeline))


@pytest.fixture(scope="module")
def finished(policy: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "out"
    generate(policy, REQUESTS, folder, SAMPLING, settings=SETTINGS)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_folder_holds_images_index_and_settings(policy: Any, finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "index.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [request.id for request in REQUESTS]
    assert rows[0] == {
        "id": "00000-00",
        "prompt": PROMPTS[0].prompt,
        "seed": image_seed(5, PROMPTS[0].prompt, 0),
        "image": "images/00000-00.png",
        "task": "colors",
    }
    assert len(contents(finished)) == len(REQUESTS) + 2
    settings = json.loads((finished / "settings.json").read_text())
    assert settings["model"] == "tiny"
    assert settings["guidance_scale"] == 2.0
    assert settings["weights"] == weights_fingerprint(policy)
    image = policy.sample(
        [r.prompt for r in REQUESTS[6:]], [r.seed for r in REQUESTS[6:]], guidance_scale=2.0, num_inference_steps=2
    )[1]
    pixels = np.asarray(Image.open(finished / rows[7]["image"]))
    torch.testing.assert_close(torch.from_numpy(pixels.copy()).permute(2, 0, 1), (image * 255).round().byte())


def test_images_of_one_prompt_differ_and_seeds_are_a_pure_function() -> None:
    assert image_seed(0, "a photo of a circle", 0) == image_seed(0, "a photo of a circle", 0)
    seeds = {image_seed(run, prompt, n) for run in (0, 1) for prompt in ("a", "b", "a1") for n in range(50)}
    assert len(seeds) == 300
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert max(seeds) > 2**30
    twice = make_requests([PromptRow("a"), PromptRow("b"), PromptRow("a")], SAMPLING)
    assert [r.seed for r in twice] == [image_seed(5, p, n) for p, n in zip("aabbaa", (0, 1, 0, 1, 2, 3), strict=True)]
    assert len({r.id for r in twice}) == 6


def test_a_finished_folder_is_left_alone(policy: Any, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    monkeypatch.setattr(policy, "sample", lambda *args, **options: pytest.fail("drew an image again"))
    generate(policy, REQUESTS, finished, SAMPLING, settings=SETTINGS)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


@pytest.mark.parametrize(
    ("rows", "torn", "images"),
    [(0, 0, 0), (0, 0, 2), (0, 7, 3), (2, 0, 3), (3, 0, 3), (3, 11, 5), (6, 1, 8), (8, 0, 8), (7, 30, 8)],
    ids=lambda value: str(value),
)
def test_every_state_a_kill_can_leave_is_completed(
    policy: Any, finished: Path, tmp_path: Path, rows: int, torn: int, images: int
) -> None:
    """`rows` whole lines and `torn` bytes of the next are in the index, `images` pictures are there."""
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    lines = (folder / "index.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "index.jsonl").write_bytes(b"".join(lines[:rows]) + (lines[rows][:torn] if torn else b""))
    for request in REQUESTS[images:]:
        (folder / request.file).unlink()
    if images < len(REQUESTS):
        (folder / f"{REQUESTS[images].file}.tmp").write_bytes(b"half a picture")
    generate(policy, REQUESTS, folder, SAMPLING, settings=SETTINGS)
    assert contents(folder) == contents(finished)


def test_finished_chunks_are_kept_and_a_lost_image_comes_back_in_order(
    policy: Any, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    (folder / REQUESTS[1].file).unlink()
    sample, drawn = policy.sample, []

    def counted(prompts: Any, seeds: Any, **options: Any) -> Any:
        drawn.extend(seeds)
        return sample(prompts, seeds, **options)

    monkeypatch.setattr(policy, "sample", counted)
    generate(policy, REQUESTS, folder, SAMPLING, settings=SETTINGS)
    assert drawn == [r.seed for r in REQUESTS[:3]]
    assert contents(folder) == contents(finished)


TEN = SamplingConfig(num_inference_steps=4, num_images_per_prompt=2, batch_size=2, seed=1)


def draw_slowly(model: Path, folder: Path) -> None:
    """Draws for ten prompts, so slowly that the run cannot be over before it is killed."""
    torch.set_num_threads(1)
    policy = load_policy(model)
    sample = policy.sample

    def slow_sample(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.5)
        return sample(*arguments, **options)

    policy.sample = slow_sample  # type: ignore[method-assign]
    generate(policy, make_requests(read_prompts("diffalign://shapes/train", 10), TEN), folder, TEN, settings={})


@pytest.mark.slow
def test_killed_run_goes_on_bit_for_bit(tiny_pipeline: Path, policy: Any, forks: Forks, tmp_path: Path) -> None:
    """SIGKILL in the second chunk, then go on: the folder equals an uninterrupted one."""
    folder = tmp_path / "killed"
    started = forks.start(draw_slowly, tiny_pipeline, folder)
    started.until(lambda: sum(1 for _ in folder.glob("images/*.png")) >= 3)
    started.kill()
    assert started.wait()[0].code == -signal.SIGKILL
    assert len(list(folder.glob("images/*.png"))) < 20, "the run was over before it could be killed"
    first = folder / "images" / "00000-00.png"
    kept = first.stat().st_mtime_ns
    requests = make_requests(read_prompts("diffalign://shapes/train", 10), TEN)
    generate(policy, requests, folder, TEN, settings={})
    assert first.stat().st_mtime_ns == kept
    generate(policy, requests, tmp_path / "whole", TEN, settings={})
    assert contents(folder) == contents(tmp_path / "whole")


def test_other_settings_in_the_same_folder_are_refused(policy: Any, finished: Path, tmp_path: Path) -> None:
    before = contents(finished)
    other = SAMPLING.model_copy(update={"guidance_scale": 3.0})
    with pytest.raises(ValueError, match=r"other settings \(guidance_scale 2.0 -> 3.0\); use another output folder"):
        generate(policy, REQUESTS, finished, other, settings=SETTINGS)
    with pytest.raises(ValueError, match=r"requests .*8 from.* -> .*6 from") as caught:
        generate(policy, REQUESTS[:6], finished, SAMPLING, settings=SETTINGS)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match='weights "[0-9a-f]+" -> "others"'):
        generate(policy, REQUESTS, finished, SAMPLING, settings={**SETTINGS, "weights": "others"})
    assert contents(finished) == before
    (tmp_path / "index.jsonl").write_text("precious")
    with pytest.raises(ValueError, match=r"index.jsonl but no settings.json: not made here"):
        generate(policy, REQUESTS, tmp_path, SAMPLING, settings=SETTINGS)
    with pytest.raises(ValueError, match="is a file"):
        generate(policy, REQUESTS, tmp_path / "index.jsonl", SAMPLING, settings=SETTINGS)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        claim_folder(tmp_path / "torn", {})


def test_the_same_weights_under_another_path_go_on(policy: Any, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    (folder / REQUESTS[-1].file).unlink()
    generate(policy, REQUESTS, folder, SAMPLING, settings={"model": "moved/here", "adapter": "run1"})
    assert contents(folder) == contents(finished)
    policy.pipeline.scheduler.register_to_config(timestep_spacing="other")
    try:
        with pytest.raises(ValueError, match="pipeline .*other settings|other settings .*pipeline"):
            generate(policy, REQUESTS, folder, SAMPLING, settings={"model": "moved/here", "adapter": "run1"})
    finally:
        policy.pipeline.scheduler.register_to_config(timestep_spacing="leading")
    claim_folder(tmp_path / "deep", {"negative": {"model": "a", "weights": "1"}}, (), ("model",))
    claim_folder(tmp_path / "deep", {"negative": {"model": "b", "weights": "1"}}, (), ("model",))
    with pytest.raises(ValueError, match='negative .*"weights": "1".* -> .*"weights": "2"'):
        claim_folder(tmp_path / "deep", {"negative": {"model": "b", "weights": "2"}}, (), ("model",))


@pytest.mark.slow
def test_fingerprint_sees_weights_and_the_reference_ignores_adapters(tiny_pipeline: Path, policy: Any) -> None:
    adapted = load_policy(str(tiny_pipeline), lora=LoRA(rank=2))
    base = weights_fingerprint(policy)
    assert weights_fingerprint(adapted) != base
    assert weights_fingerprint(adapted, reference=True) == weights_fingerprint(policy, reference=True)
    other = load_policy(str(tiny_pipeline))
    next(other.denoiser.parameters()).data.flatten()[0] += 1e-4
    assert weights_fingerprint(other) != base
    assert weights_fingerprint(other, reference=True) != weights_fingerprint(policy, reference=True)


@pytest.mark.slow
def test_reference_images_are_the_base_models(tiny_pipeline: Path, policy: Any, finished: Path, tmp_path: Path) -> None:
    adapted = load_policy(str(tiny_pipeline), lora=LoRA(rank=2))
    for parameter in adapted.trainable_parameters():
        parameter.data += 0.5
    generate(adapted, REQUESTS, tmp_path / "reference", SAMPLING, reference=True, settings=SETTINGS)
    generate(adapted, REQUESTS, tmp_path / "aligned", SAMPLING, settings=SETTINGS)
    image = REQUESTS[0].file
    assert (tmp_path / "reference" / image).read_bytes() == (finished / image).read_bytes()
    assert (tmp_path / "aligned" / image).read_bytes() != (finished / image).read_bytes()
    drawn = (tmp_path / "reference" / image).stat().st_mtime_ns
    generate(policy, REQUESTS, tmp_path / "reference", SAMPLING, settings=SETTINGS)  # the same weights, named otherwise
    assert (tmp_path / "reference" / image).stat().st_mtime_ns == drawn


def test_nan_is_an_error_that_names_prompt_and_seed(tiny_pipeline: Path, tmp_path: Path) -> None:
    broken = load_policy(str(tiny_pipeline))
    next(broken.denoiser.parameters()).data.fill_(float("nan"))
    with pytest.raises(NonFiniteImageError) as caught:
        generate(broken, REQUESTS, tmp_path / "out", SAMPLING, settings=SETTINGS)
    assert REQUESTS[0].prompt in str(caught.value)
    assert f"seed {REQUESTS[0].seed}" in str(caught.value)
    assert not list((tmp_path / "out").rglob("*.png"))


def test_long_prompts_are_counted_in_one_warning(policy: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = Request("long", "a photo of " + "a red circle and " * 20, 1)
    with caplog.at_level(logging.WARNING, logger="diffalign"):
        generate(policy, [REQUESTS[0], long], tmp_path / "out", SAMPLING, settings={})
    ours = [record.getMessage() for record in caplog.records if record.name == "diffalign"]
    assert ours == ["1 of 2 prompts are longer than the 20 tokens that the text encoder reads; their ends are cut off"]


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([], "nothing to draw"),
        ([Request("a/b", "p", 0)], "cannot name a file"),
        ([Request("../a", "p", 0)], "cannot name a file"),
        ([Request("a", "p", 0), Request("a", "q", 0)], "occurs twice"),
        ([Request("a", "p", 2**31)], "seed must be in"),
        ([Request("a", "p", 0, {"image": "x"})], "would hide"),
    ],
)
def test_bad_requests(policy: Any, tmp_path: Path, requests: list[Request], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(policy, requests, tmp_path / "out", SAMPLING, settings={})
    assert not (tmp_path / "out").exists()


def test_png_rounds_to_the_nearest_level() -> None:
    image = torch.tensor([0.0, 1.0, 0.4999 / 255, 0.5001 / 255, 254.6 / 255, 1.0001]).reshape(1, 1, 6).repeat(3, 1, 1)
    import io

    pixels = np.asarray(Image.open(io.BytesIO(to_png(image))))
    assert pixels[0, :, 0].tolist() == [0, 255, 0, 1, 255, 255]


def test_row_log_drops_what_is_torn_stale_or_unknown(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(
        '{"id": "b", "v": 1}\n[]\n{"id": "zz", "v": 1}\n{"id": "a", "v": 1}\n{"id": "c", "v": 0}\n{"id": "d"'
    )
    log = RowLog(path, ["a", "b", "c", "d"], 1, lambda row: row["v"] == 1)
    assert log.todo == [range(2, 3), range(3, 4)]
    assert path.read_text() == '{"id": "a", "v": 1}\n{"id": "b", "v": 1}\n'
    log.append([{"id": "d", "v": 1}])
    log.append([{"id": "c", "v": 1}])
    assert [row["id"] for row in log.finish()] == ["a", "b", "c", "d"]
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "b", "c", "d"]


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_text_and_jsonl_files(tmp_path: Path) -> None:
    text = tmp_path / "prompts.txt"
    text.write_text("\ufeffa red cube\r\n\n  ein Würfel \n#1 fan\n", encoding="utf-8")
    assert read_prompts(str(text)) == [PromptRow("a red cube"), PromptRow("ein Würfel"), PromptRow("#1 fan")]
    assert read_prompts(str(text), 2) == read_prompts(str(text))[:2]
    table = tmp_path / "prompts.jsonl"
    table.write_text('{"tag": "x", "prompt": "a cat", "seed": 3}\n\n{"prompt": "a dog"}\n')
    assert read_prompts(str(table)) == [PromptRow("a cat", {"tag": "x", "source_seed": 3}), PromptRow("a dog")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "does not exist; expected a text file"),
        ("empty.txt", b" \n\n", "is empty; expected one prompt a line"),
        ("latin.txt", b"W\xfcrfel\n", "is not UTF-8 text"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt"\n', "line 2 of .* is no JSON"),
        ("b.jsonl", b'{"caption": "a"}\n', "line 1 of .* has no prompt"),
        ("c.jsonl", b'{"prompt": " "}\n', "line 1 of .* has no prompt"),
        ("d.jsonl", b'["a"]\n', "line 1 of .* has no prompt"),
    ],
)
def test_bad_prompt_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_prompts(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_packaged_prompt_lists_are_found_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "package" / "prompts").mkdir(parents=True)
    (tmp_path / "package" / "prompts" / "some.txt").write_text("packaged")
    monkeypatch.setattr("diffalign.prompts.resources.files", lambda package: tmp_path / "package")
    monkeypatch.chdir(tmp_path)
    assert read_prompts("configs/prompts/some.txt") == read_prompts("some.txt") == [PromptRow("packaged")]
    with pytest.raises(ValueError, match="does not exist"):
        read_prompts("elsewhere/some.txt")
    (tmp_path / "some.txt").write_text("mine")
    assert read_prompts("some.txt") == [PromptRow("mine")]


def test_bad_prompt_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder"):
        read_prompts(str(tmp_path))
    with pytest.raises(ValueError, match="did you mean 'diffalign://shapes/held_out'"):
        read_prompts("diffalign://shapes/heldout")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        read_prompts("diffalign://shapes/train", 0)
    with pytest.raises(ValueError, match="unknown task 'color'"):
        read_prompts("diffalign://shapes/train", 5, task_weights={"color": 1})
    with pytest.raises(ValueError, match="finite number >= 0, got -1"):
        read_prompts("diffalign://shapes/train", 5, task_weights={"colors": -1})
    with pytest.raises(ValueError, match="all weights are 0"):
        read_prompts("diffalign://shapes/train", 5, task_weights=dict.fromkeys(scenes.TASKS, 0))
    with pytest.raises(ValueError, match="task_weights need the embedded world"):
        read_prompts("x.txt", 5, task_weights={"colors": 1})


@pytest.mark.slow
def test_embedded_prompts_are_balanced_seeded_and_nested() -> None:
    everything = read_prompts("diffalign://shapes/held_out")
    assert [row.prompt for row in everything] == [p.text for p in scenes.prompts("held_out")]
    some = read_prompts("diffalign://shapes/train", 120)
    counts = Counter(row.extras["task"] for row in some)
    assert counts == {"single_object": 10, **dict.fromkeys(scenes.TASKS[1:], 22)}
    assert some == read_prompts("diffalign://shapes/train", 120)
    assert some != read_prompts("diffalign://shapes/train", 120, seed=1)
    assert {row.prompt for row in some} <= {row.prompt for row in read_prompts("diffalign://shapes/train", 300)}
    training = {p.text for p in scenes.prompts("train")}
    assert all(row.prompt in training for row in some)
    assert all(scenes.parse_prompt(row.prompt).task == row.extras["task"] for row in some)
    weighted = read_prompts("diffalign://shapes/train", 70, task_weights={"position": 2, "single_object": 0})
    assert Counter(r.extras["task"] for r in weighted)["position"] in (23, 24)
    assert all(row.extras["task"] != "single_object" for row in weighted)
    assert len(weighted) == 70


def test_shares_respect_weights_and_sizes() -> None:
    assert task_shares({"a": 100, "b": 100, "c": 100}, 10, {"a": 1, "b": 1, "c": 1}) == {"a": 4, "b": 3, "c": 3}
    assert task_shares({"a": 100, "b": 100}, 30, {"a": 2, "b": 1}) == {"a": 20, "b": 10}
    assert task_shares({"a": 2, "b": 100, "c": 100}, 30, {"a": 1, "b": 1, "c": 1}) == {"a": 2, "b": 14, "c": 14}
    assert task_shares({"a": 2, "b": 3}, 30, {"a": 1, "b": 1}) == {"a": 2, "b": 3}


def test_sampling_config_is_strict() -> None:
    for wrong in ({"steps": 3}, {"batch_size": 0}, {"guidance_scale": float("nan")}, {"num_inference_steps": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SamplingConfig.model_validate(wrong)


def test_guidance_and_steps_are_the_familys_own_unless_given(policy: Any) -> None:
    assert policy.guidance_scale == 7.5
    own = SamplingConfig().resolved(policy)
    assert (own.guidance_scale, own.num_inference_steps) == (7.5, 25)
    assert SAMPLING.resolved(policy) == SAMPLING
    assert SamplingConfig(guidance_scale=0.0).resolved(policy).guidance_scale == 0.0
