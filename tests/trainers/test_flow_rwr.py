"""Flow-RWR: weights from rewards, exact for any cut of an optimizer step, and the loss that they weigh; check 7.6.4."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.data import PairSource
from diffalign.predictions import Prediction
from diffalign.trainers.flow_rwr import FlowRWR, FlowRWRConfig, WeightedSource, reward_weights, z_scores
from diffalign.trainers.sft import SFT
from tests.trainers.golden import ANSWERS, REFERENCE, TablePolicy, double, golden_batch


def _policy(prediction: Prediction = Prediction.VELOCITY) -> TablePolicy:
    return TablePolicy(ANSWERS[:1].clone().requires_grad_(True), REFERENCE[:1], prediction)


class Samples:
    """Encoded samples as a source sees them: names, prompts, rewards."""

    buckets = None

    def __init__(self, prompts: list[str], rewards: list[list[float]]) -> None:
        self.prompts, self._rewards = prompts, double(*rewards)

    def __len__(self) -> int:
        return len(self.prompts)

    def pair_id(self, row: int) -> str:
        return f"sample-{row}"

    def rewards(self, rows: Any) -> Tensor:
        return self._rewards[list(rows)]


class Visits(PairSource):
    """A `PairSource` whose batches hold nothing but their draws: no latents are needed to weigh them."""

    def _assemble(self, visits: Any, *, training: bool) -> Any:
        draws = tuple(draw for _, draw in visits)
        empty = torch.zeros(len(draws), 1)
        return replace(golden_batch(), chosen=empty, rejected=empty, weight=torch.ones(len(draws)), draws=draws)


def _visits(samples: Samples, **options: Any) -> Visits:
    return Visits(samples, seed=3, prefetch=False, **options)  # type: ignore[arg-type]


def _random_samples(count: int = 40) -> Samples:
    rewards = torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Samples([f"prompt {i}" for i in range(count)], rewards.tolist())


# --- the numbers -----------------------------------------------------------------------------------------------------


def test_weights_of_the_self_check() -> None:
    """Check 7.6.4."""
    rewards = double([0.0, math.log(2), math.log(4)])[0]
    assert reward_weights(rewards).tolist() == pytest.approx([0.428571, 0.857143, 1.714286], abs=1e-6)
    torch.testing.assert_close(reward_weights(rewards + 12.5), reward_weights(rewards))
    assert torch.equal(reward_weights(torch.full((5,), -3.0)), torch.ones(5))
    torch.testing.assert_close(reward_weights(rewards, temperature=2.0), reward_weights(rewards / 2))


def test_the_cut_comes_last_and_nothing_is_normalised_again() -> None:
    rewards = torch.zeros(100, dtype=torch.float64)
    rewards[0] = 10.0
    weights = reward_weights(rewards)
    assert float(weights[0]) == 10.0
    assert float(weights[1]) == pytest.approx(100 / (99 + math.exp(10)))


def test_z_scores_sum_dimensions_of_any_scale() -> None:
    rewards = double([1.0, 1000.0, 0.1 + 0.2], [2.0, 3000.0, 0.3], [3.0, 2000.0, 0.3])
    scores, unit = z_scores(rewards), math.sqrt(1.5)
    assert scores.tolist() == [
        pytest.approx([-unit, -unit, 0.0]),
        pytest.approx([0.0, unit, 0.0]),
        pytest.approx([unit, 0.0, 0.0]),
    ]


# --- who competes ----------------------------------------------------------------------------------------------------


def test_samples_of_a_prompt_compete_with_each_other() -> None:
    samples = Samples(["a", "b", "a", "b", "b"], [[0.0], [5.0], [1.0], [5.0], [5.0]])
    source = WeightedSource(_visits(samples, batch_size=5), FlowRWRConfig())
    assert source.by_prompt
    batch = source.batch(0, 0)
    found = {draw.pair_id: float(weight) for draw, weight in zip(batch.draws, batch.weight, strict=True)}
    scores = z_scores(samples.rewards(range(5)))[:, 0]
    first = 2 / (1 + math.exp(float(scores[2] - scores[0])))
    assert [found[f"sample-{row}"] for row in (1, 3, 4)] == pytest.approx([1.0] * 3)
    assert [found["sample-0"], found["sample-2"]] == pytest.approx([first, 2 - first])


@pytest.mark.parametrize(("processes", "micro_steps", "size"), [(1, 1, 8), (2, 2, 2), (4, 1, 2), (1, 8, 1)])
def test_an_optimizer_step_competes_as_a_whole(processes: int, micro_steps: int, size: int) -> None:
    """The weights of 8 samples are the same however many processes and micro steps they are spread over."""
    samples = _random_samples()
    whole = WeightedSource(_visits(samples, batch_size=8), FlowRWRConfig())
    assert not whole.by_prompt
    for step in (0, 4, 5):  # the epoch of 40 ends after step 4
        expected = whole.batch(step, 0)
        rows = [int(draw.pair_id.partition("-")[2]) for draw in expected.draws]
        scores = z_scores(samples.rewards(range(40))).sum(dim=1)
        torch.testing.assert_close(expected.weight, reward_weights(scores[rows]).float())
        found = {}
        for rank in range(processes):
            own = _visits(
                samples,
                batch_size=size,
                gradient_accumulation_steps=micro_steps,
                num_processes=processes,
                process_index=rank,
            )
            source = WeightedSource(own, FlowRWRConfig())
            for micro in range(micro_steps):
                part = source.batch(step, micro)
                found |= {d.pair_id: float(w) for d, w in zip(part.draws, part.weight, strict=True)}
        assert found == {d.pair_id: float(w) for d, w in zip(expected.draws, expected.weight, strict=True)}


def test_a_sample_that_is_alone_is_weighed_against_the_batch_or_refused() -> None:
    samples = Samples(["a", "a", "b"], [[0.0], [1.0], [2.0]])
    visits = _visits(samples, batch_size=3)
    assert not WeightedSource(visits, FlowRWRConfig()).by_prompt
    with pytest.raises(ValueError, match="normalisation is 'prompt', and the prompt 'b' has one sample only"):
        WeightedSource(visits, FlowRWRConfig(normalisation="prompt"))
    with pytest.raises(ValueError, match=r"the data have no rewards; name their columns with data\.reward_columns"):
        WeightedSource(_visits(Samples(["a", "a"], [[], []]), batch_size=1), FlowRWRConfig())


def test_the_data_sets_own_weights_stay_and_the_cut_is_told() -> None:
    class Weighed(Visits):
        def _assemble(self, visits: Any, *, training: bool) -> Any:
            batch = super()._assemble(visits, training=training)
            return replace(batch, weight=batch.weight * 3)

    samples = Samples(["a", "a"], [[1.0], [1.0]])
    source = WeightedSource(Weighed(samples, seed=0, batch_size=2, prefetch=False), FlowRWRConfig())  # type: ignore[arg-type]
    assert source.batch(0, 0).weight.tolist() == [3.0, 3.0]
    far = Samples([str(i) for i in range(100)], [[0.0]] * 99 + [[1.0]])
    source = WeightedSource(_visits(far, batch_size=100), FlowRWRConfig())
    source.batch(0, 0)
    assert source.metrics() == {"weight_max": 10.0, "weight_cut": 0.01}


# --- the loss --------------------------------------------------------------------------------------------------------


def test_equal_rewards_are_supervised_fine_tuning() -> None:
    """Check 7.6.4: weights of 1 give SFT's loss; others multiply the samples' errors."""
    policy, batch = _policy(), golden_batch()
    plain = SFT(policy, caption_dropout=0.0, timestep_sampling="logit_normal").loss(batch)
    assert torch.equal(FlowRWR(policy).loss(batch).loss, plain.loss)
    doubled = FlowRWR(policy).loss(replace(batch, weight=2 * batch.weight))
    assert torch.equal(doubled.loss, 2 * plain.loss)
    assert plain.loss.item() == pytest.approx(0.008125)  # the golden pair's chosen error
    assert "ref_mse" not in doubled.metrics


def test_only_flows_are_trained() -> None:
    with pytest.raises(ValueError, match="FlowRWR cannot train a model that predicts 'epsilon'; it knows velocity"):
        FlowRWR(_policy(Prediction.EPSILON))
    described = FlowRWR(_policy(), temperature=0.5).describe()
    assert "temperature 0.5" in described


# --- from the pairs folder to trained weights ------------------------------------------------------------------------


@pytest.mark.slow
def test_train_learns_from_what_pairs_left(tmp_path: Path) -> None:
    """`diffalign train` with `trainer: flow_rwr` reads all scored images of a run, the dropped one left out."""
    import json

    from PIL import Image

    from diffalign.config import RunConfig
    from diffalign.training import train_config
    from tests.backbones.families.sd3 import save_tiny

    model = save_tiny(tmp_path / "model", False)
    folder = tmp_path / "run" / "pairs"
    (folder / "candidates").mkdir(parents=True)
    lines = []
    for i in range(8):
        name = f"candidates/{i}.png"
        Image.new("RGB", (16, 16), (30 * i, 10, 200)).save(folder / name)
        reward = None if i == 7 else float(i % 3)
        lines.append(json.dumps({"id": str(i), "prompt": f"prompt {i % 2}", "image": name, "reward": reward}))
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
    config = RunConfig.model_validate(
        {
            "output_dir": str(tmp_path / "run"),
            "model": {"pretrained_model_name_or_path": str(model), "lora": {"rank": 2}},
            "pairs": {},
            "trainer": "flow_rwr",
            "training": {"max_train_steps": 2, "per_device_train_batch_size": 3, "num_validation_pairs": 0},
        }
    )
    out = train_config(config)
    assert (out / "pytorch_lora_weights.safetensors").is_file()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert json.loads((out / "run.json").read_text())["pairs"] == 7
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["train/weight_max"] > 1
