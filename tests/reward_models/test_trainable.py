"""Scorers that are trained: rewards equal to the published scorers', weights in their layouts, losses of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffalign.data.compared import Comparison, ComparisonList
from diffalign.randomness import Draw
from diffalign.reward_config import ScorerConfig
from diffalign.reward_losses import bradley_terry_loss, contrastive_loss, preference_loss
from diffalign.reward_models.comparison_source import ComparisonSource
from diffalign.reward_models.trainable import TrainingDropout, thaw
from diffalign.reward_models.training import ScorerTrainer
from tests.reward_models.scorer_training import batch_of, comparisons, load, rewards_of, scores, start

FAMILIES = ["pickscore", "hpsv2.1", "shapes", "image_reward", "mps", "pal"]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.slow
def test_rewards_are_the_scorers_and_what_is_trained_is_what_is_saved(
    name: str, section: Callable[..., ScorerConfig], tmp_path: Path
) -> None:
    """One large step; the saved folder, loaded as the published one is, gives the trained rewards."""
    config = section(name)
    trainable = start(config, tmp_path)
    items = comparisons(3, person="bob")
    first = rewards_of(trainable, items)
    trainable.save(tmp_path / "before")
    torch.testing.assert_close(scores(load(config, tmp_path / "before"), items), first, atol=1e-4, rtol=1e-4)
    trainer = ScorerTrainer(trainable, config)
    optimizer = torch.optim.SGD(trainer.policy.trainable_parameters(), lr=0.02)
    trainer.loss(batch_of(trainable, items)).loss.backward()
    assert all(weight.grad is not None for _, weight in trainer.policy.named_trainable())
    optimizer.step()
    after = rewards_of(trainable, items)
    assert (after - first).abs().max() > 1e-3
    trainable.save(tmp_path / "after")
    torch.testing.assert_close(scores(load(config, tmp_path / "after"), items), after, atol=1e-4, rtol=1e-4)


def test_saved_names_are_the_published_ones(
    section: Callable[..., ScorerConfig], blip_folder: Path, hps_folder: Path, tmp_path: Path
) -> None:
    for name in ("image_reward", "hpsv2.1"):
        start(section(name), tmp_path).save(tmp_path / name)
    published = torch.load(blip_folder / "ImageReward.pt", weights_only=True)
    unused = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
    found = torch.load(tmp_path / "image_reward" / "ImageReward.pt", weights_only=True)
    assert set(found) == {name for name in published if not name.startswith(unused)}
    assert all(torch.equal(found[name], published[name]) for name in found)
    file = "HPS_v2.1_compressed.pt"
    own, theirs = (torch.load(folder / file, weights_only=True) for folder in (tmp_path / "hpsv2.1", hps_folder))
    assert set(own) == {"state_dict"}
    assert set(own["state_dict"]) == set(theirs["state_dict"])
    start(section("mps"), tmp_path / "mps").save(tmp_path / "saved")
    names = set(load_file(tmp_path / "saved" / "model.safetensors"))
    assert {"model.logit_scale", "cross_model.layers.1.0.fn.to_q.weight"} <= names
    assert all(name.startswith(("model.", "cross_model.")) for name in names)


def test_mps_reads_each_comparison_under_its_own_condition(
    section: Callable[..., ScorerConfig], tmp_path: Path
) -> None:
    config = section("mps")
    trainable = start(config, tmp_path)
    items = [*comparisons(1, condition="aesthetics"), *comparisons(2, condition="overall")[1:]]
    found = rewards_of(trainable, items)
    trainable.save(tmp_path / "saved")
    model = load(config, tmp_path / "saved")
    for i, item in enumerate(items):
        expected = model.score(item.first.decode(), item.prompt).dims[str(item.condition)]
        torch.testing.assert_close(found[:1, i], expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="under the condition 'taste'; the model has aesthetics"):
        batch_of(trainable, comparisons(1, condition="taste"))


def test_groups_are_those_of_open_clip(hps_config: dict) -> None:
    """`thaw` against open_clip's own `lock`, for both towers."""
    import open_clip

    for groups in range(5):
        mine, theirs = open_clip.CLIP(**hps_config), open_clip.CLIP(**hps_config)
        theirs.lock_image_tower(unlocked_groups=groups)
        theirs.lock_text_tower(unlocked_layers=groups)
        visual = [(n, p) for n, p in mine.named_parameters() if n.startswith("visual.")]
        thaw(visual, groups)
        thaw([(n, p) for n, p in mine.named_parameters() if not n.startswith("visual.") and n != "logit_scale"], groups)
        expected = {n: p.requires_grad for n, p in theirs.named_parameters()}
        assert {n: p.requires_grad for n, p in mine.named_parameters()} == expected


@pytest.mark.parametrize(("name", "depth"), [("pickscore", 2), ("image_reward", 1), ("mps", 2)])
def test_frozen_layers_stay_and_the_rest_moves(
    name: str, depth: int, section: Callable[..., ScorerConfig], tmp_path: Path
) -> None:
    """The last block and what is behind it: HF's names are grouped as open_clip's are."""
    trainable = start(section(name, image_groups=depth, text_groups=0), tmp_path)
    trained = {name for name, p in trainable.named_parameters() if p.requires_grad}
    image = {n for n in trained if "vision" in n}
    assert any(".layers.1." in n for n in image)
    assert not any(".layers.0." in n or "embeddings" in n for n in image)
    assert not any("text" in n and "mlp" not in n.split(".")[1] for n in trained)
    trainer = ScorerTrainer(trainable, section(name))
    trainer.loss(batch_of(trainable, comparisons(2))).loss.backward()
    missing = [n for n, p in trainer.policy.named_trainable() if p.grad is None]
    assert not missing
    assert all(p.grad is None for p in trainable.parameters() if not p.requires_grad)


# --- losses on batches -----------------------------------------------------------------------------------------------


def test_losses_of_a_batch(section: Callable[..., ScorerConfig], tmp_path: Path) -> None:
    """Weights by prompt, ties, the direction of a comparison, and the contrastive term over preferred pictures."""
    trainable = start(section("pickscore"), tmp_path)
    items = comparisons(4)
    swapped = Comparison("swapped", items[1].prompt, items[1].second, items[1].first, 0.0)
    tie = Comparison("tie", items[2].prompt, items[2].first, items[2].second, 0.5)
    batch = batch_of(trainable, [items[0], items[1], swapped, tie])
    found = trainable(batch.chosen, batch.rejected, batch.conditioning.tensors)
    d = found["rewards"][0] - found["rewards"][1]
    assert float(d[1].detach()) == pytest.approx(-float(d[2].detach()), rel=1e-4)

    def losses(**options: Any) -> Tensor:
        return ScorerTrainer(trainable, section("pickscore", **options)).loss(batch).losses

    plain = losses(loss="bradley_terry")
    torch.testing.assert_close(plain[:2], bradley_terry_loss(d[:2]).detach())
    assert float(plain[1]) == pytest.approx(float(plain[2]), rel=1e-4)
    assert float(plain[3]) == 0.0
    torch.testing.assert_close(losses(), preference_loss(d, batch.preference).detach())
    assert float(losses(loss="ties")[3]) != 0.0
    for loss in ("divergence", "hinge", "displacement"):
        assert float(losses(loss=loss)[1]) == pytest.approx(float(losses(loss=loss)[2]), rel=1e-4)
    images = torch.where(batch.preference[:, None] >= 0.5, found["images"][0], found["images"][1])
    same = torch.tensor(
        [[a.prompt == b.prompt for b in (*items[:2], swapped, tie)] for a in (*items[:2], swapped, tie)]
    )
    expected = contrastive_loss(images, found["texts"], found["scale"], same).detach()
    torch.testing.assert_close(losses(loss="none", contrastive_weight=0.5), 0.5 * expected)


def test_in_bfloat16_rewards_are_near(section: Callable[..., ScorerConfig], tmp_path: Path) -> None:
    """Towers in half precision, embeddings and their product in float32: within 2e-2 of the scale."""
    trainable = start(section("pickscore"), tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        found = rewards_of(trainable, comparisons(2))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, rewards_of(trainable, comparisons(2)), atol=0.02 * 37.5, rtol=0)


@pytest.mark.parametrize("name", ["pickscore", "mps", "image_reward"])
def test_gradients_to_the_weights(name: str, section: Callable[..., ScorerConfig], tmp_path: Path) -> None:
    """The loss along one direction in all weights, by finite differences in float64; without the head's dropout."""
    config = section(name, loss="divergence")
    trainable = start(config, tmp_path).double()
    for module in trainable.modules():
        if isinstance(module, TrainingDropout):
            module.rate = 0.0
    trainer = ScorerTrainer(trainable, config)
    batch = batch_of(trainable, comparisons(2)).to("cpu", torch.float64)
    weights = [weight for _, weight in trainer.policy.named_trainable()]
    chance = torch.Generator().manual_seed(0)
    direction = [torch.randn(weight.shape, generator=chance, dtype=torch.float64) * 1e-2 for weight in weights]
    gradients = torch.autograd.grad(trainer.loss(batch).loss, weights)
    slope = sum(float((gradient * step).sum()) for gradient, step in zip(gradients, direction, strict=True))

    def moved(by: float) -> float:
        with torch.no_grad():
            for weight, step in zip(weights, direction, strict=True):
                weight.add_(step, alpha=by)
            value = float(trainer.loss(batch).loss)
            for weight, step in zip(weights, direction, strict=True):
                weight.sub_(step, alpha=by)
        return value

    assert abs(slope) > 1e-6
    assert (moved(1e-4) - moved(-1e-4)) / 2e-4 == pytest.approx(slope, rel=1e-4)


def test_weights_by_prompt_are_one_over_the_number_of_its_comparisons(
    section: Callable[..., ScorerConfig], tmp_path: Path
) -> None:
    trainable = start(section("pickscore"), tmp_path)
    items = comparisons(4)  # prompts 0, 1, 2, 0
    source = ComparisonSource(
        ComparisonList(items, "test"), trainable, by_prompt=True, seed=0, batch_size=2, prefetch=False
    )
    batch = source.gather(range(4), tuple(Draw(0, 0, item.pair_id) for item in items))
    assert batch.weight.tolist() == [0.5, 1.0, 1.0, 0.5]
    output = ScorerTrainer(trainable, section("pickscore")).loss(batch)
    expected = (batch.weight * output.losses).sum() / 3
    assert float(output.loss.detach()) == pytest.approx(float(expected))


def test_the_scale_of_clip_stays_within_its_limits(section: Callable[..., ScorerConfig], tmp_path: Path) -> None:
    trainable = start(section("hpsv2.1", max_logit_scale=100.0), tmp_path)
    scale = dict(trainable.named_parameters())["model.towers.model.logit_scale"]
    trainer = ScorerTrainer(trainable, section("hpsv2.1", max_logit_scale=100.0))
    for value, kept in ((9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        scale.data.fill_(value)
        trainer.update(1)
        assert float(scale.detach()) == pytest.approx(kept)


def test_dropout_of_the_head_repeats_and_is_off_in_validation(
    section: Callable[..., ScorerConfig], tmp_path: Path
) -> None:
    trainable = start(section("image_reward"), tmp_path)
    trainer = ScorerTrainer(trainable, section("image_reward", loss="bradley_terry"))
    batch = batch_of(trainable, comparisons(3))
    first, again = trainer.loss(batch).losses, trainer.loss(batch).losses
    assert torch.equal(first, again)
    with torch.no_grad():
        without = trainer.loss(batch).losses
    assert not torch.allclose(first, without)
