"""Rounds of rollouts: which image is better, scored pairs in visits, and runs that go on where they were killed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor

from diffalign.backbones import LoRA, load_policy
from diffalign.batches import PairBatch
from diffalign.config import TrainingConfig
from diffalign.loop import NonFiniteLossError, fit, replay
from diffalign.processes import Processes
from diffalign.reward_models.base import RewardOutput
from diffalign.rollout_source import RolloutConfig, RolloutSource, preference
from diffalign.rollouts import StochasticSampler, TransitionPairs
from diffalign.trainers.d3po import D3PO

pytestmark = pytest.mark.slow

PROMPTS = ("one circle", "two squares", "three stars")
STEPS = 4


# --- ranking ---------------------------------------------------------------------------------------------------------


def test_preference_is_dominance() -> None:
    assert preference(torch.tensor(1.0), torch.tensor(0.5)) == 1
    assert preference(torch.tensor(0.5), torch.tensor(1.0)) == -1
    assert preference(torch.tensor(0.5), torch.tensor(0.5 + 1e-7)) == 0
    assert preference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])) == 1
    assert preference(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])) == 0


class Redness:
    """Scores how much more red than blue a picture is, times `sign`; not at all where the prompt has `unreadable`."""

    def __init__(self, sign: float = 1.0, unreadable: str = "nothing", constant: bool = False) -> None:
        self.info = SimpleNamespace(higher_is_better=sign > 0)
        self.sign, self.unreadable, self.constant = sign, unreadable, constant

    def score(
        self,
        media: Tensor,
        prompts: Sequence[str],
        *,
        batch_size: int = 32,
        on_invalid: Literal["raise", "nan"] = "raise",
    ) -> RewardOutput:
        values = self.sign * (media[:, 0] - media[:, 2]).mean((1, 2)) * (not self.constant)
        valid = torch.tensor([self.unreadable not in prompt for prompt in prompts])
        values = values.masked_fill(~valid, float("nan"))
        errors = tuple(None if ok else "cannot be read" for ok in valid.tolist())
        return RewardOutput(values, {"overall": values}, valid, errors)

    def fingerprint(self) -> str:
        return "redness"


def _source(policy: Any, scorer: Any = None, config: dict[str, Any] | None = None, **options: Any) -> RolloutSource:
    sampler = StochasticSampler(policy, num_inference_steps=3)
    settings = {"seed": 1, "batch_size": 2, "gradient_accumulation_steps": 3, **options}
    rounds = RolloutConfig(**{"prompts_per_round": 2, "num_images_per_prompt": 3, **(config or {})})
    return RolloutSource(sampler, scorer or Redness(), PROMPTS, rounds, **settings)


def _visits(source: RolloutSource, steps: Sequence[int], micro_steps: int = 3) -> dict[str, list[dict[str, Any]]]:
    """What a run of optimizer steps sees of each pair, in its order."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for step in steps:
        for micro in range(micro_steps):
            batch = source.batch(step, micro)
            for row, draw in enumerate(batch.draws):
                names = ("chosen", "rejected", "next_chosen", "next_rejected", "timesteps", "preference", "weight")
                found[f"{draw.epoch} {draw.pair_id}"].append({name: getattr(batch, name)[row] for name in names})
    return found


# --- rounds ----------------------------------------------------------------------------------------------------------


def test_a_round_visits_every_step_of_every_pair(policy: Any) -> None:
    """Both images take the same step in an order of the pair's own; the better image of all pairs of K comes first."""
    source = _source(policy)
    assert source.steps_per_round == 3  # 2 prompts, 3 pairs of 3 images each, 2 pairs a step
    found = _visits(source, range(3))
    assert len(found) == 6
    grid = source.sampler.grid
    orders = set()
    for visits in found.values():
        orders.add(tuple(int(visit["timesteps"]) for visit in visits))
        ordered = sorted(visits, key=lambda visit: -int(visit["timesteps"]))
        assert [int(visit["timesteps"]) for visit in ordered] == grid[:-1].tolist()
        assert torch.equal(ordered[0]["chosen"], ordered[0]["rejected"])
        for side in ("chosen", "rejected"):
            assert torch.equal(ordered[0][f"next_{side}"], ordered[1][side])
            assert torch.equal(ordered[1][f"next_{side}"], ordered[2][side])
        assert not torch.equal(ordered[1]["chosen"], ordered[1]["rejected"])
        images = policy.decode(torch.stack([ordered[2]["next_chosen"], ordered[2]["next_rejected"]]))
        scores = Redness().score(images, ["", ""]).score
        assert scores[0] > scores[1]
        assert all(float(visit["preference"]) == 1.0 == float(visit["weight"]) for visit in visits)
    assert len(orders) > 1
    assert not found.keys() & _visits(source, range(3, 6)).keys()  # the next round has other visits


def test_the_best_image_of_a_prompt_against_the_worst(policy: Any) -> None:
    """One pair of each prompt, the images whose scores are furthest apart; a prompt of ties gives a tie."""
    config = {"num_images_per_prompt": 4}
    every = _visits(_source(policy, config=config), range(6))
    source = _source(policy, config={**config, "pairs": "best_worst"})
    assert source.steps_per_round == 1
    found = _visits(source, range(1))
    assert len(found) == 2

    def margin(visits: list[dict[str, Any]]) -> float:
        last = min(visits, key=lambda visit: int(visit["timesteps"]))
        images = policy.decode(torch.stack([last["next_chosen"], last["next_rejected"]]))
        scores = Redness().score(images, ["", ""]).score
        return float(scores[0] - scores[1])

    for name, visits in found.items():
        same_prompt = [own for other, own in every.items() if other.split("/")[0] == name.split("/")[0]]
        assert len(same_prompt) == 6
        assert margin(visits) == pytest.approx(max(map(margin, same_prompt)))
    tied = _source(policy, Redness(constant=True), {**config, "pairs": "best_worst"})
    assert all(float(v["preference"]) == 0.0 for visits in _visits(tied, range(1)).values() for v in visits)
    unread = _source(policy, Redness(unreadable="squares"), {**config, "prompts_per_round": 4, "pairs": "best_worst"})
    weights = {name: float(own[0]["weight"]) for name, own in _visits(unread, range(unread.steps_per_round)).items()}
    assert weights == {name: float("prompt-00001" not in name) for name in weights}
    assert set(weights.values()) == {0.0, 1.0}


def test_a_batch_is_one_step_for_the_trainer(policy: Any) -> None:
    batch = _source(policy).batch(0, 1).to("cpu", torch.float64)
    assert isinstance(batch, TransitionPairs)
    assert len(batch) == 2
    assert batch.chosen.dtype == batch.next_rejected.dtype == torch.float64
    assert batch.timesteps.dtype == torch.int64
    grid = StochasticSampler(policy, num_inference_steps=3).grid.tolist()
    for now, after in zip(batch.timesteps.tolist(), batch.next_timesteps.tolist(), strict=True):
        assert grid[grid.index(now) + 1] == after


def test_a_scorer_whose_smaller_scores_are_better(policy: Any) -> None:
    one, other = _visits(_source(policy), range(3)), _visits(_source(policy, Redness(-1.0)), range(3))
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name][0]["chosen"], other[name][0]["chosen"])


def test_ties_and_unscored_images(policy: Any) -> None:
    tied = _source(policy, Redness(constant=True))
    assert all(float(v["preference"]) == 0.0 for visits in _visits(tied, range(3)).values() for v in visits)
    assert tied.metrics()["round_ties"] == 1.0
    source = _source(policy, Redness(unreadable="squares"), {"prompts_per_round": 3}, batch_size=3)
    found = _visits(source, range(source.steps_per_round))
    weights = {name: {float(visit["weight"]) for visit in visits} for name, visits in found.items()}
    assert sorted(w for own in weights.values() for w in own) == [0.0] * 3 + [1.0] * 6
    assert all(len(own) == 1 and (own == {0.0}) == ("prompt-00001" in name) for name, own in weights.items())
    summary = source.metrics()
    names = ("round", "round_dropped", "round_left_out", "round_ties")
    assert [summary[name] for name in names] == pytest.approx([0, 1 / 3, 1 / 3, 0])
    assert math.isfinite(summary["round_score_mean"])
    assert summary["round_score_std"] > 0


def test_unscored_images_can_stop_the_run(policy: Any) -> None:
    message = "round 0: 3 of 9 images have no score, the first for 'two squares': cannot be read"
    with pytest.raises(ValueError, match=message):
        _source(
            policy, Redness(unreadable="squares"), {"prompts_per_round": 3, "on_invalid": "stop"}, batch_size=3
        ).batch(0, 0)
    with pytest.raises(ValueError, match="6 of 6 images have no score"):
        _source(policy, Redness(unreadable="")).batch(0, 0)


def test_processes_share_a_round(policy: Any) -> None:
    """Two processes draw together what one draws, and never the same prompt."""
    whole = _visits(_source(policy), range(3))
    shares = [_visits(_source(policy, batch_size=1, processes=Processes(rank, 2)), range(3)) for rank in range(2)]
    assert not shares[0].keys() & shares[1].keys()
    assert whole.keys() == shares[0].keys() | shares[1].keys()
    for share in shares:
        for name, visits in share.items():
            ours, theirs = (sorted(v, key=lambda visit: -int(visit["timesteps"])) for v in (visits, whole[name]))
            for a, b in zip(ours, theirs, strict=True):
                assert torch.allclose(a["next_chosen"], b["next_chosen"], atol=1e-4)


def test_numbers_that_do_not_come_out_even_are_refused(policy: Any) -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps must be a multiple of the 3 sampling steps"),
        ({"processes": Processes(0, 3)}, "prompts_per_round must be a multiple of the 3 processes, got 2"),
        ({"batch_size": 4}, "a round has 6 visits of pairs for each process, which is no multiple of the 4"),
    )
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            _source(policy, **options)
    with pytest.raises(ValueError, match="there is no prompt"):
        RolloutSource(StochasticSampler(policy, num_inference_steps=3), Redness(), [], seed=0)


def test_inner_epochs_visit_a_round_again_in_another_order(policy: Any) -> None:
    source = _source(policy, config={"inner_epochs": 2}, batch_size=3)
    assert source.steps_per_round == 4
    found = _visits(source, range(4))
    assert {len(visits) for visits in found.values()} == {6}
    first = [[int(v["timesteps"]) for v in visits[:3]] for visits in found.values()]
    second = [[int(v["timesteps"]) for v in visits[3:]] for visits in found.values()]
    assert first != second


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture
def _own_accelerator() -> Iterator[None]:
    """Accelerate keeps precision and devices for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Spoiled:
    """A source whose second step has a latent that is no number."""

    def __init__(self, source: RolloutSource) -> None:
        self.source, self.update = source, source.update

    def batch(self, step: int, micro_step: int) -> TransitionPairs:
        batch = self.source.batch(step, micro_step)
        return dataclasses.replace(batch, next_chosen=batch.next_chosen * math.nan) if step == 1 else batch


def _run(
    folder: Path,
    tiny_pipeline: Path,
    spoiled: bool = False,
    kept: bool = True,
    stop: int | None = None,
    ref_update: str = "never",
    **training: Any,
) -> Path:
    """Rounds of two optimizer steps; `stop` is a step after which the run breaks off."""
    AcceleratorState._reset_state(reset_partial_state=True)
    policy = load_policy(str(tiny_pipeline), lora=LoRA(rank=2), train=True)
    trainer = D3PO(policy, num_inference_steps=3, ref_update=ref_update)
    rounds = RolloutConfig(prompts_per_round=2, num_images_per_prompt=2)
    source = RolloutSource(
        trainer.sampler,
        Redness(),
        PROMPTS,
        rounds,
        seed=1,
        gradient_accumulation_steps=3,
        folder=folder / "rollouts" if kept else None,
    )
    assert source.steps_per_round == 2
    settings = {
        "max_train_steps": 6,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 3,
        "learning_rate": 1e-2,
        "checkpointing_steps": 1,
        **training,
    }
    batches: Any = Spoiled(source) if spoiled else trainer.source(source, 1)
    if stop is not None:
        update = source.update

        def breaking(step: int) -> None:
            update(step)
            if step == stop + 1:
                raise Killed

        source.update = breaking  # type: ignore[method-assign]
    return fit(trainer, batches, TrainingConfig(output_dir=str(folder), **settings))


SPENT = ("train/seconds", "train/data_seconds", "train/forwards")


class Killed(Exception):  # noqa: N818 - no error, an end
    """What ends a run in the middle of its fourth step, say, whose work is lost."""


def _logged(folder: Path) -> list[dict[str, Any]]:
    """The lines of the metrics without the time and the passes they took: a resumed run may find its round drawn."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in SPENT} for row in rows]


def _weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "pytorch_lora_weights.safetensors")


@pytest.fixture(scope="module")
def whole(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rounds that nothing disturbed."""
    return _run(tmp_path_factory.mktemp("whole"), tiny_pipeline)


@pytest.mark.usefixtures("_own_accelerator")
def test_what_is_logged(whole: Path) -> None:
    rows = _logged(whole)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    first = rows[0]
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["train/ratio_chosen"] == first["train/ratio_rejected"] == 1.0
    assert first["train/grad_norm"] > 0
    assert rows[1]["train/kl"] > 0
    assert [row["train/round"] for row in rows] == [0, 0, 1, 1, 2, 2]
    assert rows[0]["train/round_score_mean"] == rows[1]["train/round_score_mean"] != rows[2]["train/round_score_mean"]
    for row in rows:
        assert {"train/clipped", "train/round_score_std", "train/round_dropped", "train/round_ties"} <= row.keys()
        assert sum(name.startswith("train/grad_per_step/") and row[name] > 0 for name in row) == 3


@pytest.mark.usefixtures("_own_accelerator")
@pytest.mark.parametrize("step", [2, 3])
def test_a_run_that_was_killed_repeats_the_uninterrupted_one(
    step: int, whole: Path, tiny_pipeline: Path, tmp_path: Path
) -> None:
    """In the middle of a round (3) and at its end (2), to the bit."""
    with pytest.raises(Killed):
        _run(tmp_path, tiny_pipeline, stop=step)
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == ["round-000", "round-001"]
    _run(tmp_path, tiny_pipeline, resume_from_checkpoint="latest")
    assert _logged(tmp_path) == _logged(whole)
    ours, theirs = _weights(tmp_path), _weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.usefixtures("_own_accelerator")
def test_a_round_that_cannot_be_had_again_is_refused(tiny_pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        _run(tmp_path, tiny_pipeline, stop=3)
    resumed: Any = {"resume_from_checkpoint": "latest", "checkpointing_steps": 1}
    with pytest.raises(ValueError, match=r"^step 3 lies within round 1, whose rollouts were not kept; .* of 2 steps$"):
        _run(tmp_path, tiny_pipeline, kept=False, **resumed)
    (file,) = (tmp_path / "rollouts" / "round-001" / "trajectories").glob("00001.*")
    content = file.read_bytes()
    file.write_bytes(content[:100])
    with pytest.raises(ValueError, match=r"step 3 needs the rollouts of round 1, which cannot be had \(.*00001"):
        _run(tmp_path, tiny_pipeline, **resumed)
    file.unlink()
    with pytest.raises(ValueError, match=r"round 1, which cannot be had \(.*00001.safetensors is missing\)"):
        _run(tmp_path, tiny_pipeline, **resumed)


@pytest.mark.usefixtures("_own_accelerator")
def test_rounds_are_kept_as_long_as_a_checkpoint_lies_in_them(whole: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    assert sorted(p.name for p in (whole / "rollouts").iterdir()) == ["round-000", "round-001", "round-002"]
    _run(tmp_path / "ends", tiny_pipeline, checkpointing_steps=2)
    assert sorted(p.name for p in (tmp_path / "ends" / "rollouts").iterdir()) == ["round-002"]


def test_a_round_on_disk_is_used_by_the_weights_that_drew_it_only(
    policy: Any, policies: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was killed after the drawing and before a checkpoint draws no second time, with the same weights."""
    folder = tmp_path / "rollouts"
    first = _source(policy, folder=folder).batch(0, 0)
    files = sorted((folder / "round-000" / "trajectories").iterdir())
    assert [file.name for file in files] == ["00000.safetensors", "00001.safetensors"]
    monkeypatch.setattr(StochasticSampler, "rollout", lambda *_, **__: pytest.fail("drew"))
    again = _source(policy, folder=folder)
    assert again.waiting(0) is None
    assert torch.equal(again.batch(0, 0).next_chosen, first.next_chosen)
    monkeypatch.undo()
    kept = policy.trained_state()
    policies.move_away(policy)
    other = _source(policy, folder=folder).batch(0, 0)
    for name, parameter in policy.named_trainable():
        parameter.data.copy_(kept[name])
    assert not torch.equal(other.next_chosen, first.next_chosen)
    monkeypatch.setattr(StochasticSampler, "rollout", lambda *_, **__: pytest.fail("drew"))
    with pytest.raises(BaseException, match="drew"):  # those of the other weights lie there now
        _source(policy, folder=folder).batch(0, 0)
    with pytest.raises(ValueError, match="was drawn with other settings"):
        _source(policy, folder=folder, seed=2).batch(1, 0)


@pytest.mark.usefixtures("_own_accelerator")
def test_the_reference_can_follow_the_rounds(whole: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    """A round's first step has the ratio 1 then, and a killed run finds the reference of its round again."""
    followed = _run(tmp_path / "followed", tiny_pipeline, ref_update="every_round")
    rows, never = _logged(followed), _logged(whole)
    for number, row in enumerate(rows):
        ratios = [row["train/ratio_chosen"], row["train/ratio_rejected"]]
        assert (max(abs(ratio - 1) for ratio in ratios) < 1e-6) == (number % 2 == 0)
    assert rows[:2] == never[:2]
    assert abs(never[2]["train/ratio_chosen"] - 1) > 1e-6
    with pytest.raises(Killed):
        _run(tmp_path / "killed", tiny_pipeline, ref_update="every_round", stop=3, checkpoints_total_limit=1)
    references = tmp_path / "killed" / "references"
    assert sorted(path.name for path in references.iterdir()) == ["round-001.safetensors", "round-002.safetensors"]
    _run(
        tmp_path / "killed",
        tiny_pipeline,
        ref_update="every_round",
        checkpoints_total_limit=1,
        resume_from_checkpoint="latest",
    )
    assert _logged(tmp_path / "killed") == rows
    assert sorted(path.name for path in references.iterdir()) == ["round-002.safetensors", "round-003.safetensors"]


@pytest.mark.usefixtures("_own_accelerator")
def test_a_loss_that_is_no_number_names_the_images_and_can_be_replayed(tiny_pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match=r"the loss of step 2 is not finite for pair\(s\) prompt-0000\d/0-1;"):
        _run(tmp_path, tiny_pipeline, spoiled=True)
    (path,) = (tmp_path / "failures").iterdir()
    saved = torch.load(path, weights_only=True)
    batch = PairBatch.from_state(saved["batch"])
    assert isinstance(batch, TransitionPairs)
    assert bool(batch.next_chosen.isnan().all())
    assert batch.draws[0].pair_id.endswith("/0-1")
    trainer: Any = D3PO(load_policy(str(tiny_pipeline), lora=LoRA(rank=2), train=True), num_inference_steps=3)
    assert bool(replay(path, trainer).losses.isnan().all())
    mended = dataclasses.replace(batch, next_chosen=batch.chosen)
    torch.save({**saved, "batch": mended.to_state()}, path)
    again = replay(path, trainer)
    assert bool(again.losses.isfinite().all())
    assert torch.equal(again.losses, trainer.loss(mended).losses)
