"""SePPO from the command line: phases, their references and samples, killed runs, flows, videos, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from diffalign import commands, reference_samples
from diffalign.backbones import LoRA, load_policy
from diffalign.data import DataConfig, EncodedPairs, PairSource, encode_pairs, load_pairs
from diffalign.randomness import Draw
from diffalign.reference_samples import ReferenceSamples
from diffalign.rollouts import DeterministicSampler
from diffalign.trainers.seppo import SePPO
from tests.trainers.winners import COUNT, winners_config, winners_folder, write_index

pytestmark = pytest.mark.slow

TRAINER = {
    "name": "seppo",
    "phase_steps": 2,
    "reference_draw": "latest",
    "sgn_warmup": 1,
    "num_inference_steps": 2,
    "guidance_scale": 2.0,
    "sample_batch_size": 2,
}
"""Two phases in four steps, of which the second has another reference than the first."""
PHASES = ["phase-001-initial", "phase-002-step-2"]


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_samples, "SAMPLES_PER_FILE", 2)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without the seconds that steps took."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith("seconds")} for row in rows]


def provenance(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        header: dict[str, Any] = json.loads(file.metadata()["provenance"])
        return header


def outcome(run: Path) -> dict[str, bytes]:
    """References and samples of a run by their names, and its weights, whose file has a header in any order."""
    found = {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.glob("[rs]*/**/*.safetensors"))}
    weights = load_file(run / "pytorch_lora_weights.safetensors")
    return found | {name: tensor.numpy().tobytes() for name, tensor in sorted(weights.items())}


def test_a_phase_has_one_reference_that_draws_and_compares(tiny_pipeline: Path, tmp_path: Path) -> None:
    """Check 7.3.5 and 7.3.6 on a whole run: names in folders, files and logs; only what is visited is drawn."""
    commands.train(str(winners_config(tmp_path, tiny_pipeline, TRAINER)), ["training.validation_steps=2"])
    run = tmp_path / "run"
    rows = [row for row in metrics(run) if "train/loss" in row]
    assert [row["train/reference_index"] for row in rows] == [0, 0, 1, 1]
    assert rows[0]["train/aaf_rate"] == 0
    assert rows[0]["train/loss"] == pytest.approx(0.693147, abs=1e-6)  # the policy is its reference
    assert sorted(path.name for path in (run / "references").iterdir()) == ["step-2.safetensors", "step-4.safetensors"]
    assert sorted(path.name for path in (run / "samples").iterdir()) == PHASES
    (cache,) = (run / "cache").iterdir()
    encoded = EncodedPairs.open(cache)
    source = PairSource(encoded, seed=3, batch_size=2, prefetch=False)
    for phase, folder in enumerate(PHASES, start=1):
        headers = [provenance(path) for path in sorted((run / "samples" / folder).iterdir())]
        visited = [draw.pair_id for step in (2 * phase - 2, 2 * phase - 1) for _, draw in source.visits(step)]
        assert [name for header in headers for name in header["pairs"]] == list(dict.fromkeys(visited))
        assert {(header["phase"], header["reference"], header["seed"]) for header in headers} == {
            (phase, folder[10:], 3)
        }

    # The second phase's samples are those of the weights after two steps.
    policy: Any = load_policy(str(tiny_pipeline))
    policy.load_trained(run / "checkpoint-2")
    sampler = DeterministicSampler(policy, num_inference_steps=2, guidance_scale=2.0)
    path = run / "samples" / PHASES[1] / "00000.safetensors"
    names = provenance(path)["pairs"]
    draws = [Draw(3, 2, name) for name in names]
    conditioning = encoded.conditioning([encoded.ids.index(name) for name in names])
    drawn = sampler.draw(policy, draws, conditioning, encoded.empty_conditioning())
    torch.testing.assert_close(load_file(path)["latents"], drawn, rtol=1e-4, atol=1e-5)


class Killed(BaseException):
    """Stands for a signal that nobody can catch."""


@pytest.mark.parametrize(("draw", "files"), [("latest", 4), ("uniform", 3)])
def test_a_run_killed_while_it_draws_goes_on_to_the_same_bits(
    draw: str, files: int, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the samples of the second phase and again before a checkpoint of it; whole and pieced runs agree."""
    trainer = {**TRAINER, "reference_draw": draw}
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    for folder in (whole, pieces):
        winners_folder(folder / "winners")
    commands.train(str(winners_config(whole, tiny_pipeline, trainer)), [])
    config = str(winners_config(pieces, tiny_pipeline, trainer))
    write, update, written = ReferenceSamples._write, SePPO.update, []

    def killing_write(self: ReferenceSamples, *args: Any) -> None:
        write(self, *args)
        written.append(args[0])
        if len(written) == files:
            raise Killed

    monkeypatch.setattr(ReferenceSamples, "_write", killing_write)
    with pytest.raises(Killed):
        commands.train(config, [])
    assert len(written) == files
    ages = {path: path.stat().st_mtime_ns for path in written}

    def killing_update(self: SePPO, step: int) -> None:
        update(self, step)
        if step == 4:
            raise Killed

    monkeypatch.setattr(SePPO, "update", killing_update)
    with pytest.raises(Killed):
        commands.train(config, [])
    monkeypatch.setattr(SePPO, "update", update)
    commands.train(config, [])
    assert outcome(pieces / "run") == outcome(whole / "run")
    for ours, theirs in zip(metrics(pieces / "run"), metrics(whole / "run"), strict=True):
        assert ours == theirs
    assert all(path.stat().st_mtime_ns == age for path, age in ages.items())  # what was drawn is not drawn again


def test_a_lost_reference_and_samples_of_another_run_are_errors(tiny_pipeline: Path, tmp_path: Path) -> None:
    config = str(winners_config(tmp_path, tiny_pipeline, TRAINER))
    commands.train(config, [])
    run = tmp_path / "run"
    for step in (3, 4):
        shutil.rmtree(run / f"checkpoint-{step}")
    kept = (run / "references" / "step-2.safetensors").rename(tmp_path / "kept")
    with pytest.raises(ValueError, match=r"reference 'step-2' was not kept: .*step-2.safetensors is missing; start"):
        commands.train(config, [])
    kept.rename(run / "references" / "step-2.safetensors")
    first, second = (run / "samples" / PHASES[1] / f"0000{number}.safetensors" for number in (0, 1))
    shutil.copy(second, first)
    with pytest.raises(ValueError, match=r"the samples in .*00000.safetensors are of another origin: pairs \["):
        commands.train(config, [])


def test_rows_that_a_phase_visits_twice_have_one_sample(tiny_pipeline: Path, tmp_path: Path) -> None:
    """A phase of more than one epoch."""
    config = winners_config(tmp_path, tiny_pipeline, {**TRAINER, "phase_steps": 4})
    commands.train(str(config), [])
    headers = [provenance(path) for path in sorted((tmp_path / "run" / "samples" / PHASES[0]).iterdir())]
    names = [name for header in headers for name in header["pairs"]]
    assert len(names) == len(set(names)) == COUNT < 4 * 2


def test_a_flow_model(tmp_path: Path) -> None:
    from tests.backbones.families.sd3 import save_tiny

    model = save_tiny(tmp_path / "sd3", t5=False)
    commands.train(str(winners_config(tmp_path, model, {**TRAINER, "timestep_sampling": "logit_normal"})), [])
    _moved(tmp_path / "run", (4, 8, 8))


def test_a_video_model(tmp_path: Path) -> None:
    """Clips of winners; the samples are latents of videos."""
    from tests.backbones.families.animatediff import save_tiny
    from tests.clips import clip, counting

    folder = tmp_path / "clips"
    folder.mkdir()
    frames = counting(8, (24, 32))
    for number in range(COUNT):
        (folder / f"{number}.mp4").write_bytes(clip(frames[number % 4 :]))
    names = [{"id": f"c{n}", "prompt": f"a red cube {n % 2}", "chosen": f"{n}.mp4"} for n in range(COUNT)]
    write_index(folder, names)
    config = winners_config(
        tmp_path, save_tiny(tmp_path / "animatediff"), TRAINER, data={"train_data_dir": str(folder)}
    )
    commands.train(str(config), ["model.num_frames=3", "model.resolution=[8, 8]"])
    _moved(tmp_path / "run", (4, 3, 4, 4))


def _moved(run: Path, shape: tuple[int, ...]) -> None:
    """Two phases were trained, each with samples of this shape."""
    assert sorted(path.name for path in (run / "samples").iterdir()) == PHASES
    first, second = (load_file(run / "samples" / phase / "00000.safetensors")["latents"] for phase in PHASES)
    assert first.shape[1:] == second.shape[1:] == shape
    states = [load_file(run / "references" / f"step-{step}.safetensors") for step in (2, 4)]
    assert any(not torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert [row["train/reference_index"] for row in metrics(run) if "train/loss" in row] == [0, 0, 1, 1]


def test_data_without_winners_are_refused_before_weights_load(tiny_pipeline: Path, tmp_path: Path) -> None:
    config = winners_config(tmp_path, tiny_pipeline, TRAINER)
    index = tmp_path / "winners" / "index.jsonl"
    write_index(index.parent, [{"prompt": "a star", "rejected": "0.png"}])
    with pytest.raises(
        ValueError, match=r"has the columns prompt, rejected; expected prompt, chosen \(chosen_rej"
    ) as e:
        commands.train(str(config), [])
    assert "\n" not in str(e.value)
    assert not (tmp_path / "run").exists()


def test_batches_are_asked_for_in_the_phase_that_the_reference_is_in(tiny_pipeline: Path, tmp_path: Path) -> None:
    policy: Any = load_policy(str(tiny_pipeline), lora=LoRA(rank=2), train=True)
    data = DataConfig(train_data_dir=winners_folder(tmp_path / "winners"))
    encoded = encode_pairs(load_pairs(data, winners_only=True), policy, data, tmp_path / "cache")
    trainer = SePPO(policy, phase_steps=2, num_inference_steps=1, reference_draw="latest")
    source = trainer.source(PairSource(encoded, seed=3, batch_size=2), 3)
    with pytest.raises(ValueError, match=r"call trainer.begin and trainer.update as fit does"):
        source.batch(0, 0)
    trainer.begin(0, tmp_path)
    assert source.batch(0, 0).reference == "initial"
    with pytest.raises(ValueError, match=r"phase 2 is drawn by 'step-2', and the reference is 'initial'"):
        source.batch(2, 0)
