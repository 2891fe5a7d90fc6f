"""Pairs from the policy's own images: ranking, ties, invalid scores, and resuming."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffalign.backbones import load_policy
from diffalign.data import DataConfig
from diffalign.generation import Request, SamplingConfig
from diffalign.mining import Candidate, PairsConfig, choose_pairs, mine_pairs
from diffalign.reward_models.base import InvalidMediaError, Media, RewardInfo, RewardModel, RewardOutput
from tests.forks import Forks

SAMPLING = SamplingConfig(guidance_scale=2.0, num_inference_steps=2, batch_size=3, seed=99)
CONFIG = PairsConfig(num_prompts=6, num_images_per_prompt=3, reward_model="redness", score_batch_size=4, seed=7)


class Redness(RewardModel):
    """A real reward model whose answer is known: mean red minus mean blue, times a weight."""

    info = RewardInfo(name="redness", license="Apache-2.0", weights=(), needs_prompt=False)

    def __init__(self, weight: float = 1.0, lower_is_better: bool = False, refuse: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight), requires_grad=False)
        self.refuse = refuse
        self.calls: list[str] = []
        if lower_is_better:
            self.info = RewardInfo(name="redness", license="", weights=(), higher_is_better=False)

    def preprocess(self, item: Media) -> np.ndarray:
        self.calls.append(Path(str(item)).stem)
        if Path(str(item)).stem in self.refuse:
            raise InvalidMediaError("refused by the test")
        return np.asarray(Image.open(str(item)).convert("RGB"), dtype=np.float32) / 255

    def score_prepared(self, prepared: Sequence[np.ndarray], texts: Sequence[Any]) -> Mapping[str, Tensor]:
        values = [float(image[..., 0].mean() - image[..., 2].mean()) for image in prepared]
        return {"overall": torch.tensor(values) * self.weight}


@pytest.fixture(scope="module")
def policy(tiny_pipeline: Path) -> Any:
    return load_policy(str(tiny_pipeline))


@pytest.fixture(scope="module")
def mined(policy: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("mined") / "pairs"
    return folder, mine_pairs(policy, Redness(), CONFIG, SAMPLING, folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_best_is_paired_with_worst(mined: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = mined
    scorer = Redness()
    pairs = rows_of(folder / "index.jsonl")
    groups = itertools.groupby(rows_of(folder / "candidates" / "index.jsonl"), key=lambda row: row["prompt"])
    for pair, (prompt, group) in zip(pairs, groups, strict=True):
        images = {f"candidates/{row['image']}" for row in group}
        assert len(images) == 3
        scores = {image: float(scorer(folder / image, prompt)) for image in images}
        assert pair["prompt"] == prompt
        assert pair["chosen"] == max(scores, key=scores.__getitem__)
        assert pair["rejected"] == min(scores, key=scores.__getitem__)
        assert pair["score_chosen"] == scores[pair["chosen"]]
        assert pair["margin"] == pair["score_chosen"] - pair["score_rejected"] > 0
    assert list(pairs[0]) == ["id", "prompt", "chosen", "rejected", "score_chosen", "score_rejected", "margin"]
    assert len({pair["id"] for pair in pairs}) == 6
    assert summary == json.loads((folder / "summary.json").read_text())
    margins = [pair["margin"] for pair in pairs]
    assert summary == {
        "prompts": 6,
        "images": 18,
        "dropped": 0,
        "pairs": 6,
        "ties": 0,
        "short_groups": 0,
        "dropped_images": [],
        "mean_margin": pytest.approx(sum(margins) / 6),
    }


def test_the_folder_can_be_trained_on(mined: tuple[Path, dict[str, Any]]) -> None:
    from diffalign.data import load_pairs

    pairs = list(load_pairs(DataConfig(train_data_dir=mined[0], resolution=8)))
    assert [pair.pair_id for pair in pairs] == [row["id"] for row in rows_of(mined[0] / "index.jsonl")]


def test_all_scored_images_are_left_with_their_rewards(mined: tuple[Path, dict[str, Any]]) -> None:
    """`samples.jsonl`, for methods that learn from scored images one by one."""
    from diffalign.data import load_pairs

    folder = mined[0]
    found = load_pairs(DataConfig(train_data_dir=folder, index="samples.jsonl", format="scored", resolution=8))
    scores = {row["id"]: row["score"] for row in rows_of(folder / "scores.jsonl")}
    assert found.winners_only
    assert {sample.pair_id: sample.rewards for sample in found} == {name: (score,) for name, score in scores.items()}
    images = {row["id"]: folder / "candidates" / row["image"] for row in rows_of(folder / "candidates" / "index.jsonl")}
    assert all(sample.chosen is sample.rejected and sample.chosen.data == images[sample.pair_id] for sample in found)


def test_groups_reach_a_reward_that_compares_them_whole(policy: Any, mined: tuple[Path, Any], tmp_path: Path) -> None:
    """A batch of 4 is made 6, which holds two prompts' three images; so each rank is one among three."""

    class Ranked(Redness):
        info = replace(Redness.info, groupwise=True)

        def score(self, media: Any, prompts: Any, *, batch_size: int = 32, on_invalid: Any = "raise") -> RewardOutput:
            sizes.append(len(media))
            output = super().score(media, prompts, batch_size=batch_size, on_invalid=on_invalid)
            ranks = output.score.reshape(-1, 3).argsort(1).argsort(1).flatten().float()
            return replace(output, score=ranks)

    sizes: list[int] = []
    folder = Path(shutil.copytree(mined[0], tmp_path / "pairs"))
    (folder / "scores.jsonl").unlink()
    summary = mine_pairs(policy, Ranked(), CONFIG, SAMPLING, folder)
    assert sizes == [6, 6, 6]
    assert summary["mean_margin"] == 2.0
    same = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows_of(mined[0] / "index.jsonl")]
    assert [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows_of(folder / "index.jsonl")] == same


@pytest.mark.slow
def test_a_direction_of_smaller_is_better_swaps_the_halves(
    policy: Any, mined: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    mine_pairs(policy, Redness(lower_is_better=True), CONFIG, SAMPLING, tmp_path / "pairs")
    for pair, other in zip(rows_of(mined[0] / "index.jsonl"), rows_of(tmp_path / "pairs" / "index.jsonl"), strict=True):
        assert (other["chosen"], other["rejected"]) == (pair["rejected"], pair["chosen"])
        assert other["score_chosen"] == pair["score_rejected"]
        assert other["margin"] == pair["margin"]
    samples = [rows_of(folder / "samples.jsonl") for folder in (mined[0], tmp_path / "pairs")]
    assert [row["reward"] for row in samples[1]] == [-row["reward"] for row in samples[0]]


def test_the_choice_does_not_depend_on_the_order_of_the_group() -> None:
    group = [Candidate(Request(f"0-{i}", "p", i), s) for i, s in enumerate((0.5, 2.0, 2.0, -1.0, -1.0, 0.1))]
    expected = choose_pairs(group, 3)
    assert [(a.request.id, b.request.id) for a, b in expected] == [("0-1", "0-4"), ("0-2", "0-3"), ("0-0", "0-5")]
    for order in itertools.permutations(group):
        assert choose_pairs(order, 3) == expected


def test_equal_and_near_scores_give_no_pair() -> None:
    def group(*scores: float) -> list[Candidate]:
        return [Candidate(Request(str(i), "p", 0), score) for i, score in enumerate(scores)]

    assert choose_pairs(group(1.0, 1.0, 1.0)) == []
    assert choose_pairs(group(0.0, 1e-6)) == []
    assert len(choose_pairs(group(0.0, 2e-6))) == 1
    assert choose_pairs(group(0.0, 0.3), min_margin=0.5) == []
    assert len(choose_pairs(group(0.0, 0.5), min_margin=0.5)) == 1
    assert choose_pairs(group(1.0)) == choose_pairs([]) == []
    assert len(choose_pairs(group(0.0, 0.1, 0.9), 2)) == 1  # the middle one has no partner


def test_invalid_scores_drop_the_image_and_are_named(
    policy: Any, mined: tuple[Path, dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    best = Path(rows_of(mined[0] / "index.jsonl")[2]["chosen"]).stem
    refuse = (best, "00004-00", "00004-02")
    with caplog.at_level(logging.WARNING, logger="diffalign"):
        summary = mine_pairs(policy, Redness(refuse=refuse), CONFIG, SAMPLING, tmp_path / "pairs")
    assert [dropped["id"] for dropped in summary["dropped_images"]] == sorted(refuse)
    assert summary["dropped"] == 3
    assert all("refused by the test" in dropped["error"] for dropped in summary["dropped_images"])
    assert best in caplog.text
    assert (summary["pairs"], summary["short_groups"], summary["ties"]) == (5, 1, 0)
    used = {Path(p[half]).stem for p in rows_of(tmp_path / "pairs/index.jsonl") for half in ("chosen", "rejected")}
    assert used.isdisjoint(refuse)
    assert {row["id"] for row in rows_of(tmp_path / "pairs/samples.jsonl")}.isdisjoint(refuse)
    scores = {row["id"]: row["score"] for row in rows_of(tmp_path / "pairs/scores.jsonl")}
    assert [scores[name] for name in refuse] == [None] * 3


@pytest.mark.slow
def test_no_pair_at_all_is_an_error(policy: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="not one pair could be made from 6 prompts: 6 groups differ by less"
    ) as caught:
        mine_pairs(policy, Redness(weight=0.0), CONFIG, SAMPLING, tmp_path / "pairs")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pairs" / "index.jsonl").exists()


@pytest.mark.slow
def test_another_margin_uses_images_and_scores_again(
    policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pairs"
    mine_pairs(policy, Redness(), CONFIG, SAMPLING, folder)
    margins = sorted(row["margin"] for row in rows_of(folder / "index.jsonl"))
    stricter = CONFIG.model_copy(update={"min_margin": margins[2]})
    monkeypatch.setattr(policy, "sample", lambda *args, **options: pytest.fail("drew an image again"))
    scorer = Redness()
    summary = mine_pairs(policy, scorer, stricter, SAMPLING, folder)
    assert scorer.calls == []
    assert (summary["pairs"], summary["ties"]) == (4, 2)
    assert [row["margin"] >= margins[2] for row in rows_of(folder / "index.jsonl")] == [True] * 4


@pytest.mark.slow
def test_another_reward_model_or_seed_is_refused(policy: Any, mined: tuple[Path, dict[str, Any]]) -> None:
    before = contents(mined[0])
    with pytest.raises(ValueError, match="reward_weights"):
        mine_pairs(policy, Redness(weight=2.0), CONFIG, SAMPLING, mined[0])
    with pytest.raises(ValueError, match="seed 7 -> 8"):
        mine_pairs(policy, Redness(), CONFIG.model_copy(update={"seed": 8}), SAMPLING, mined[0])
    assert contents(mined[0]) == before


@pytest.mark.slow
@pytest.mark.parametrize("rows", [0, 1, 4, 6, 18])
def test_interrupted_scoring_goes_on(
    policy: Any, mined: tuple[Path, dict[str, Any]], tmp_path: Path, rows: int
) -> None:
    folder = tmp_path / "pairs"
    shutil.copytree(mined[0], folder)
    lines = (folder / "scores.jsonl").read_bytes().splitlines(keepends=True)
    torn = lines[rows][:9] if rows < len(lines) else b""
    (folder / "scores.jsonl").write_bytes(b"".join(lines[:rows]) + torn)
    (folder / "index.jsonl").unlink()
    scorer = Redness()
    mine_pairs(policy, scorer, CONFIG, SAMPLING, folder)
    assert contents(folder) == contents(mined[0])
    assert len(scorer.calls) == 18 - rows // 4 * 4 if rows < 18 else not scorer.calls


def mine_slowly(model: Path, folder: Path) -> None:
    """Scores so slowly that the run cannot be over before it is killed."""
    torch.set_num_threads(1)

    class Slow(Redness):
        def score_prepared(self, *arguments: Any) -> Any:
            time.sleep(1)
            return super().score_prepared(*arguments)

    mine_pairs(load_policy(model), Slow(), CONFIG, SAMPLING, folder)


@pytest.mark.slow
def test_killed_run_goes_on_bit_for_bit(
    tiny_pipeline: Path, policy: Any, mined: tuple[Path, dict[str, Any]], forks: Forks, tmp_path: Path
) -> None:
    """SIGKILL while it scores (`test_generation` kills while it draws), then go on."""
    folder = tmp_path / "pairs"
    scores = folder / "scores.jsonl"
    started = forks.start(mine_slowly, tiny_pipeline, folder)
    started.until(lambda: scores.exists() and scores.read_bytes().count(b"\n") >= 4)
    started.kill()
    assert started.wait()[0].code == -signal.SIGKILL
    assert not (folder / "index.jsonl").exists(), "the run was over before it could be killed"
    assert mine_pairs(policy, Redness(), CONFIG, SAMPLING, folder) == mined[1]
    assert contents(folder) == contents(mined[0])


def test_config_is_strict() -> None:
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        PairsConfig(num_images_per_prompt=1)
    with pytest.raises(ValueError, match="pairs_per_prompt 3 needs num_images_per_prompt of at least 6, got 4"):
        PairsConfig(pairs_per_prompt=3)
    with pytest.raises(ValueError, match="extra"):
        PairsConfig.model_validate({"margin": 1})
