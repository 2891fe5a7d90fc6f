"""Rollouts: the pipelines' own samplers with noise, densities that can be recomputed, and rounds of scored pairs."""

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
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from diffalign.backbones import LoRA, load_policy
from diffalign.config import TrainingConfig
from diffalign.loop import NonFiniteLossError, fit
from diffalign.randomness import Draw
from diffalign.reward_models.base import RewardOutput
from diffalign.rollout_source import RolloutConfig, RolloutSource, preference
from diffalign.rollouts import Rollouts, StochasticSampler, TransitionPairs, sampling_grid
from diffalign.schedules import DiscreteSchedule, FlowSchedule
from diffalign.trainers.d3po import D3PO

pytestmark = pytest.mark.slow

PROMPTS = ("one circle", "two squares", "three stars")
STEPS = 4


def _draws(count: int, seed: int = 3) -> list[Draw]:
    return [Draw(seed, 0, f"prompt-{i}") for i in range(count)]


def _law(sampler: StochasticSampler, rollouts: Rollouts, step: int, rows: Sequence[int]) -> Any:
    """The law of one stored step of some images, computed again."""
    count, images = len(rows), rollouts.images_per_prompt
    return sampler.transition(
        sampler.policy,
        rollouts.latents[list(rows), step],
        rollouts.timesteps[step].expand(count),
        rollouts.next_timesteps[step].expand(count),
        rollouts.conditioning[[row // images for row in rows]],
        rollouts.unconditional,
    )


@pytest.fixture(scope="module")
def policy(tiny_pipeline: Path, policies: Any) -> Any:
    """Away from its reference; nothing here trains it."""
    policy = load_policy(str(tiny_pipeline), lora=LoRA(rank=2), train=True)
    policies.move_away(policy)
    return policy


# --- the sampler -----------------------------------------------------------------------------------------------------


def test_grids_are_the_schedulers_own() -> None:
    chain = DiscreteSchedule.scaled_linear()
    assert sampling_grid(chain, 20).tolist() == [*range(951, 0, -50), 0]
    for shift in (1.0, 3.0):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(10)
        grid = sampling_grid(FlowSchedule(shift=shift), 10) / 1000
        assert torch.allclose(grid, scheduler.sigmas.double(), atol=1e-6)
    golden = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
    assert grid.tolist() == pytest.approx(golden, abs=5e-5)
    with pytest.raises(ValueError, match="expected 1 to 999 sampling steps"):
        sampling_grid(chain, 1000)


@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_with_hardly_any_noise_it_is_the_pipeline(
    kind: str, tiny_pipeline: Path, request: pytest.FixtureRequest
) -> None:
    """Grid, guidance and unconditional branch against diffusers' own loop, with DDIM at eta 0."""
    folder = tiny_pipeline if kind == "epsilon" else request.getfixturevalue("tiny_v_pipeline")
    policy: Any = load_policy(str(folder))
    _is_the_pipeline(policy, eta=0.0)


def test_with_hardly_any_noise_it_is_the_flow_pipeline(tmp_path: Path) -> None:
    """The same for Stable Diffusion 3, whose pipeline takes Euler steps."""
    from tests.backbones.families.sd3 import save_tiny

    _is_the_pipeline(load_policy(str(save_tiny(tmp_path / "sd3", t5=False))))


def _is_the_pipeline(policy: Any, **options: Any) -> None:
    sampler = StochasticSampler(policy, num_inference_steps=STEPS, guidance_scale=5.0, eta=1e-5)
    rollouts = sampler.rollout(PROMPTS, _draws(3), 1)
    drawn = policy.pipeline(
        list(PROMPTS),
        latents=rollouts.path[:, 0],
        guidance_scale=5.0,
        num_inference_steps=STEPS,
        output_type="latent",
        **options,
    ).images
    assert torch.allclose(rollouts.final, drawn, atol=2e-3 * float(drawn.abs().max()))
    plain = StochasticSampler(policy, num_inference_steps=STEPS, guidance_scale=1.0, eta=1e-5)
    apart = plain.rollout(PROMPTS, _draws(3), 1).final
    assert not torch.allclose(apart, drawn, atol=2e-3 * float(drawn.abs().max()))


def test_images_of_a_prompt_share_their_initial_noise_only(policy: Any) -> None:
    """Check 7.2.9."""
    draws = _draws(2)
    rollouts = StochasticSampler(policy, num_inference_steps=STEPS).rollout(PROMPTS[:2], draws, 3)
    assert rollouts.path.shape == (6, STEPS + 1, 4, 4, 4)
    assert rollouts.path.dtype == rollouts.log_probs.dtype == torch.float32
    assert rollouts.images_per_prompt == 3
    start = rollouts.latents[:, 0].reshape(2, 3, 4, 4, 4)
    for prompt in range(2):
        assert all(torch.equal(start[prompt, k], draws[prompt].normal("initial noise", (4, 4, 4))) for k in range(3))
    assert not torch.equal(start[0, 0], start[1, 0])
    after = rollouts.next_latents[:, 0]
    assert len({tuple(row.flatten().tolist()) for row in after}) == 6
    assert torch.equal(rollouts.next_latents[:, :-1], rollouts.latents[:, 1:])
    assert torch.equal(rollouts.final, rollouts.next_latents[:, -1])


def test_densities_can_be_recomputed(policy: Any) -> None:
    """Check 7.2.4: with unchanged weights and guidance the stored densities come back, without guidance others do."""
    sampler = StochasticSampler(policy, num_inference_steps=STEPS)
    rollouts = sampler.rollout(PROMPTS[:2], _draws(2), 2)
    off = StochasticSampler(policy, num_inference_steps=STEPS, guidance_scale=1.0)
    for step in range(STEPS):
        with torch.no_grad():
            drawn = rollouts.next_latents[:, step]
            again = _law(sampler, rollouts, step, range(4)).log_prob(drawn)
            one = _law(sampler, rollouts, step, [2]).log_prob(drawn[2:3])
            without = _law(off, rollouts, step, range(4)).log_prob(drawn)
        assert torch.allclose(again, rollouts.log_probs[:, step], atol=1e-4)
        assert torch.allclose(one, rollouts.log_probs[2:3, step], atol=1e-4)
        assert float((without - again).abs().min()) > 5e-4


def test_numbers_belong_to_the_prompt_and_the_place(policy: Any) -> None:
    """Another batch size, order or neighbourhood changes rounding at most; the noise of every step is its key's."""
    sampler = StochasticSampler(policy, num_inference_steps=STEPS)
    draws = _draws(3)
    rollouts = sampler.rollout(PROMPTS, draws, 2, batch_size=4)
    alone = sampler.rollout(PROMPTS[1:2], draws[1:2], 2, batch_size=1)
    assert torch.allclose(alone.path, rollouts.path[2:4], atol=1e-4)
    more = sampler.rollout(PROMPTS[1:2], draws[1:2], 3, batch_size=3)
    assert torch.allclose(more.path[:2], alone.path, atol=1e-4)
    for step in range(STEPS):
        with torch.no_grad():
            law = _law(sampler, rollouts, step, [3])
        noise = (rollouts.next_latents[3:4, step] - law.mean) / law.std.float().reshape(-1, 1, 1, 1)
        assert torch.allclose(noise[0], draws[1].normal(f"image 1, step {step}", (4, 4, 4)), atol=1e-3)


def test_final_latents_are_what_is_decoded(policy: Any) -> None:
    sampler = StochasticSampler(policy, num_inference_steps=2)
    rollouts = sampler.rollout(PROMPTS[:2], _draws(2), 2)
    images = sampler.decode(rollouts, batch_size=3)
    assert images.shape == (4, 3, 8, 8)
    assert torch.allclose(images, policy.decode(rollouts.path[:, -1]), atol=1e-5)


def test_what_cannot_be_drawn_is_refused(policy: Any) -> None:
    for eta in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="eta must be above 0 for steps to have a probability"):
            StochasticSampler(policy, eta=eta)
    sampler = StochasticSampler(policy, num_inference_steps=2)
    with pytest.raises(ValueError, match="expected one draw per prompt, got 2 prompts and 1 draws"):
        sampler.rollout(PROMPTS[:2], _draws(1))
    assert StochasticSampler(policy).eta == 1.0


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
    assert tied.metrics()["ties"] == 6.0
    source = _source(policy, Redness(unreadable="squares"), {"prompts_per_round": 3}, batch_size=3)
    found = _visits(source, range(source.steps_per_round))
    weights = {name: {float(visit["weight"]) for visit in visits} for name, visits in found.items()}
    assert sorted(w for own in weights.values() for w in own) == [0.0] * 3 + [1.0] * 6
    assert all(len(own) == 1 and (own == {0.0}) == ("prompt-00001" in name) for name, own in weights.items())
    summary = source.metrics()
    assert (summary["dropped"], summary["ties"]) == (3.0, 0.0)
    assert math.isfinite(summary["score_mean"])
    assert summary["score_std"] > 0


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
    shares = [
        _visits(_source(policy, batch_size=1, num_processes=2, process_index=rank), range(3)) for rank in range(2)
    ]
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
        ({"num_processes": 3}, "prompts_per_round must be a multiple of the 3 processes, got 2"),
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


def _run(folder: Path, tiny_pipeline: Path, spoiled: bool = False, **training: Any) -> Path:
    policy = load_policy(str(tiny_pipeline), lora=LoRA(rank=2), train=True)
    trainer = D3PO(policy, num_inference_steps=3)
    rounds = RolloutConfig(prompts_per_round=2, num_images_per_prompt=2)
    source = RolloutSource(trainer.sampler, Redness(), PROMPTS, rounds, seed=1, gradient_accumulation_steps=3)
    assert source.steps_per_round == 2
    settings = {
        "max_train_steps": 4,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 3,
        "learning_rate": 1e-3,
        "checkpointing_steps": 2,
        **training,
    }
    batches: Any = Spoiled(source) if spoiled else source
    return fit(trainer, batches, TrainingConfig(output_dir=str(folder), **settings))


def _logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("_own_accelerator")
def test_fit_trains_on_rounds_and_resumes_between_them(tiny_pipeline: Path, tmp_path: Path) -> None:
    """Two rounds of two steps; resumed at the end of the first, the second is the same to the bit."""
    whole = _logged(_run(tmp_path / "whole", tiny_pipeline))
    assert [row["step"] for row in whole] == [1, 2, 3, 4]
    first = whole[0]
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["train/ratio_chosen"] == first["train/ratio_rejected"] == 1.0
    assert first["train/grad_norm"] > 0
    assert whole[1]["train/kl"] > 0
    AcceleratorState._reset_state(reset_partial_state=True)
    resumed = tmp_path / "resumed"
    _run(resumed, tiny_pipeline, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    numbers = ("train/loss", "train/z_mean", "train/kl", "train/grad_norm")
    after = [row for row in _logged(resumed) if row["step"] > 2]
    assert [[row[n] for n in numbers] for row in after] == [[row[n] for n in numbers] for row in whole[2:]]


@pytest.mark.usefixtures("_own_accelerator")
def test_a_loss_that_is_no_number_names_the_images(tiny_pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match=r"the loss of step 2 is not finite for pair\(s\) prompt-0000\d/0-1;"):
        _run(tmp_path, tiny_pipeline, spoiled=True)
