"""`train-reward` for scorers of pictures: rewards equal to the scorers', weights in their layouts, and the loop."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from diffalign import commands
from diffalign.config import ConfigError, dump_config
from diffalign.data.compared import Comparison
from diffalign.data.images import ImageSource
from diffalign.processes import Processes
from diffalign.randomness import Draw
from diffalign.reward_config import ScorerConfig, ScorerRun
from diffalign.reward_losses import bradley_terry_loss, contrastive_loss, preference_loss
from diffalign.reward_models import HPSv2, RewardModel, WeightsError, load_reward_model
from diffalign.reward_models.comparison_source import ComparisonBatch, ComparisonSource, drop_bad
from diffalign.reward_models.starting import UNTRAINED, start_training
from diffalign.reward_models.trainable import Trainable, TrainingDropout, thaw
from diffalign.reward_models.training import ScorerTrainer, train_scorer
from tests.reward_models.test_image_reward import VISION, save_published
from tests.reward_models.test_mps import CROSS

SMALL_CROSS = {"dim": 12, "layers": 2, "heads": 3, "head_width": 4, "ff_mult": 2}


def picture(brightness: int, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 40, (64, 64, 3))
    return Image.fromarray((brightness + noise).astype(np.uint8))


def comparisons(count: int = 4, **more: Any) -> list[Comparison]:
    """A light picture against a dark one."""
    return [
        Comparison(
            str(i), f"prompt {i % 3}", ImageSource(picture(200, i)), ImageSource(picture(10, 50 + i)), 1.0, **more
        )
        for i in range(count)
    ]


def batch_of(trainable: Trainable, items: list[Comparison]) -> ComparisonBatch:
    from diffalign.data.compared import ComparisonList

    source = ComparisonSource(ComparisonList(items, "test"), trainable, seed=0, batch_size=2, prefetch=False)
    return source.gather(range(len(items)), tuple(Draw(0, 0, item.pair_id) for item in items))


def rewards_of(trainable: Trainable, items: list[Comparison]) -> Tensor:
    batch = batch_of(trainable, items)
    with torch.no_grad():
        return trainable(batch.chosen, batch.rejected, batch.conditioning.tensors)["rewards"]


# --- the families ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_sizes(clip_folder: Path) -> dict[str, Any]:
    config = json.loads((clip_folder / "config.json").read_text())
    return {name: config[name] for name in ("text_config", "vision_config", "projection_dim")}


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_published(tmp_path_factory.mktemp("blip"))


@pytest.fixture(scope="module")
def section(
    clip_folder: Path, hps_folder: Path, hps_config: dict, blip_folder: Path, clip_sizes: dict, shapes_folder: Path
) -> Callable[..., ScorerConfig]:
    starts: dict[str, dict[str, Any]] = {
        "pickscore": {"start": str(clip_folder)},
        "hpsv2.1": {"start": str(hps_folder), "options": {"model_config": hps_config}},
        "shapes": {"start": str(shapes_folder)},
        "image_reward": {"start": str(blip_folder), "options": {"vision_config": VISION}},
        "mps": {"start": str(clip_folder), "options": {"clip_config": clip_sizes, "cross_config": SMALL_CROSS}},
        "pal": {"start": str(clip_folder), "head": {"prototypes": 2, "hidden": 1, "out_dim": 8}},
    }

    def build(name: str, **more: Any) -> ScorerConfig:
        return ScorerConfig.model_validate({"name": name, **starts[name], **more})

    return build


FAMILIES = ["pickscore", "hpsv2.1", "shapes", "image_reward", "mps", "pal"]


def start(config: ScorerConfig, folder: Path) -> Trainable:
    return start_training(config, folder / "start", people=["ann", "bob"], seed=3)


def load(config: ScorerConfig, folder: Path) -> RewardModel:
    options = dict(config.options)
    if "cross_config" in options:
        options["cross_config"] = CROSS
    if config.name == "pal":
        options["user"] = "bob"
    return load_reward_model(config.name, path=folder, device="cpu", **options)


def scores(model: RewardModel, items: list[Comparison]) -> Tensor:
    """Published scores [2, N], on the scale of the training's rewards."""
    pictures = [[item.first.decode() for item in items], [item.second.decode() for item in items]]
    found = torch.stack([model(side, [item.prompt for item in items]) for side in pictures])
    if isinstance(model, HPSv2):
        return found * model.towers.scale
    return found * model.std + model.mean if hasattr(model, "std") and hasattr(model, "mlp") else found


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
    from diffalign.data.compared import ComparisonList

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


# --- runs ------------------------------------------------------------------------------------------------------------


def save_pairs(folder: Path, count: int = 16) -> Path:
    folder.mkdir(parents=True)
    rows = []
    for i in range(count):
        picture(200, i).save(folder / f"light-{i}.png")
        picture(10, 50 + i).save(folder / f"dark-{i}.png")
        rows.append({"id": f"p{i}", "prompt": f"prompt {i}", "chosen": f"light-{i}.png", "rejected": f"dark-{i}.png"})
    (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run_of(folder: Path, data: Path, config: ScorerConfig, steps: int = 6, **training: Any) -> ScorerRun:
    loop = {
        "max_train_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "checkpointing_steps": 2,
        "validation_steps": 3, "num_validation_pairs": 4, "resume_from_checkpoint": "latest", **training,
    }  # fmt: skip
    return ScorerRun.model_validate(
        {"output_dir": str(folder), "reward": config.model_dump(), "data": {"train_data_dir": str(data)},
         "training": loop, "workers": 2}
    )  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pairs(tmp_path_factory.mktemp("data") / "pairs")


@pytest.mark.slow
def test_a_run_learns_and_goes_on_bit_for_bit(
    section: Callable[..., ScorerConfig], pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out pairs come out right in the end; an interrupted run ends with the same bytes."""
    config = section("shapes", loss="divergence", contrastive_weight=0.1)
    folder, found = train_scorer(run_of(tmp_path / "one", pairs, config))
    assert found["accuracy"] == 1.0
    assert found["best"] == 1.0
    assert json.loads((folder / "accuracy.json").read_text()) == found
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    validated = [row["validation/accuracy"] for row in rows if "validation/accuracy" in row]
    assert validated[0] == found["before"]
    assert len(validated) == 3
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses[-1] < losses[0]
    model = load_reward_model("shapes", path=folder)
    light, dark = (Image.open(pairs / f"{name}-0.png") for name in ("light", "dark"))
    assert float(model(light, "prompt 0")) > float(model(dark, "prompt 0"))

    def stop(trainer: ScorerTrainer, step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ScorerTrainer, "update", stop)
        with pytest.raises(KeyboardInterrupt):
            train_scorer(run_of(tmp_path / "two", pairs, config))
    _, again = train_scorer(run_of(tmp_path / "two", pairs, config))
    assert again == found
    for part in ("model.safetensors", "best/model.safetensors"):
        if (folder / part).exists():
            assert (folder / part).read_bytes() == (tmp_path / "two" / part).read_bytes()
    with pytest.raises(ValueError, match="seed"):
        train_scorer(run_of(tmp_path / "two", pairs, config).model_copy(update={"seed": 7}))


@pytest.mark.slow
def test_an_average_of_the_weights_is_saved_in_the_same_layout(
    section: Callable[..., ScorerConfig], pairs: Path, tmp_path: Path
) -> None:
    config = section("hpsv2.1", image_groups=1, text_groups=0)
    folder, _ = train_scorer(
        run_of(tmp_path, pairs, config, 2, use_ema=True, validation_steps=0, num_validation_pairs=0)
    )
    model, average = (load(config, path) for path in (folder, folder / "ema"))
    assert model.fingerprint() != average.fingerprint()


@pytest.mark.slow
def test_the_command_and_a_model_from_it(section: Callable[..., ScorerConfig], pairs: Path, tmp_path: Path) -> None:
    """A YAML file as the recipes are; its folder is a reward model for every other command."""
    config = section("pickscore", weighting="prompt", image_groups=1)
    run = run_of(tmp_path / "run", pairs, config, 2, validation_steps=0)
    (tmp_path / "run.yaml").write_text(dump_config(run))
    said = commands.train_reward(str(tmp_path / "run.yaml"), ["training.max_train_steps=1"])
    assert said.splitlines()[-2:] == [f"reward model: {run.output_dir}", f"metrics: {run.output_dir}/metrics.jsonl"]
    assert load_reward_model("pickscore", path=run.output_dir).info.name == "pickscore"
    assert not (tmp_path / "run" / "start").exists()  # it started from its own layout


RUN = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from diffalign.reward_config import ScorerRun
from diffalign.reward_models.training import ScorerTrainer, train_scorer

run = ScorerRun.model_validate(json.loads(sys.argv[1]))
if len(sys.argv) > 2:
    def killed(self, step):
        if step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
    ScorerTrainer.update = killed
train_scorer(run)
"""


def launch(run: ScorerRun, *more: str, processes: int = 1) -> int:
    several = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))
    file = Path(run.output_dir).parent / "run.py"
    file.write_text(RUN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                   "PYTHONPATH": str(Path(__file__).parents[2])}  # fmt: skip
    command = [sys.executable, *(several if processes > 1 else ()), str(file), run.model_dump_json(), *more]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
    return done.returncode


@pytest.mark.slow
def test_killed_it_goes_on_bit_for_bit(section: Callable[..., ScorerConfig], pairs: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of a run, between two checkpoints."""
    config = section("shapes")
    whole, _ = train_scorer(run_of(tmp_path / "whole", pairs, config, 4))
    killed = run_of(tmp_path / "killed", pairs, config, 4)
    assert launch(killed, "3") == -signal.SIGKILL
    train_scorer(killed)
    for name in ("model.safetensors", "accuracy.json"):
        assert (whole / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


@pytest.mark.slow
def test_two_processes_are_one_with_a_batch_of_both(
    section: Callable[..., ScorerConfig], pairs: Path, tmp_path: Path
) -> None:
    """The same pairs in every step: the same weights and held-out accuracy, up to rounding."""
    config = section("shapes")
    whole, _ = train_scorer(run_of(tmp_path / "whole", pairs, config, 3, learning_rate=1e-3))
    two = run_of(tmp_path / "two", pairs, config, 3, learning_rate=1e-3, per_device_train_batch_size=2)
    assert launch(two, processes=2) == 0
    alone, shared = (load_reward_model("shapes", path=p).state_dict() for p in (whole, tmp_path / "two"))
    for name, value in alone.items():
        torch.testing.assert_close(shared[name], value, atol=5e-4, rtol=1e-3)
    found = [json.loads((p / "accuracy.json").read_text()) for p in (whole, tmp_path / "two")]
    assert found[1]["accuracy"] == pytest.approx(found[0]["accuracy"])
    assert found[1]["reward_mean"] == pytest.approx(found[0]["reward_mean"], rel=1e-2)


def test_bad_comparisons_are_left_out_and_counted(
    section: Callable[..., ScorerConfig], pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A truncated picture, a missing one, one twice; what was found is not looked for again."""
    from diffalign.data.compared import ComparisonsConfig, load_comparisons

    data = tmp_path / "pairs"
    shutil.copytree(pairs, data)
    whole = (data / "light-0.png").read_bytes()
    (data / "light-0.png").write_bytes(whole[: len(whole) // 2])
    (data / "dark-1.png").unlink()
    shutil.copy(data / "light-2.png", data / "dark-2.png")
    trainable = start(section("shapes"), tmp_path)
    loaded = load_comparisons(ComparisonsConfig(train_data_dir=data))
    kept = drop_bad(loaded, trainable, tmp_path / "found.json", 0.2, 2, Processes())
    assert kept.left_out == {"unreadable": 2, "identical": 1}
    assert [kept.pair_id(row) for row in range(2)] == ["p3", "p4"]
    assert len(kept) == 13
    dropped = json.loads((tmp_path / "found.json").read_text())["dropped"]
    assert dropped["p1"].startswith("unreadable: second picture: no file")
    monkeypatch.setattr(type(trainable), "prepare", lambda *_: pytest.fail("looked again"))
    assert drop_bad(loaded, trainable, tmp_path / "found.json", 0.2, 2, Processes()).left_out == kept.left_out
    with pytest.raises(ValueError, match=r"2 of 16 comparisons of .* cannot be read, such as 'p0' \(unreadable: first"):
        drop_bad(loaded, trainable, tmp_path / "found.json", 0.1, 2, Processes())


def test_what_cannot_be_trained_is_refused(
    section: Callable[..., ScorerConfig], pairs: Path, tmp_path: Path, clip_folder: Path
) -> None:
    with pytest.raises(ValueError, match="'jpeg' cannot be trained; expected one on CLIP, BLIP or Qwen2-VL"):
        start_training(ScorerConfig(name="jpeg", start="x"), tmp_path)
    with pytest.raises(ValueError, match="unknown reward model 'pikscore'; did you mean 'pickscore'"):
        start_training(ScorerConfig(name="pikscore", start="x"), tmp_path)
    with pytest.raises(WeightsError, match="there is no folder or file '/nowhere'"):
        start_training(ScorerConfig(name="pickscore", start="/nowhere"), tmp_path)
    with pytest.raises(ValueError, match="pal needs people: name the column"):
        start_training(ScorerConfig(name="pal", start=str(clip_folder)), tmp_path)
    for changes, message in (
        ({"loss": "uncertainty"}, "needs a model that says how sure it is"),
        ({"loss": "none"}, "leaves nothing to train on"),
        ({"head": {"prototypes": 2}}, "reward.head is for pal"),
    ):
        with pytest.raises(ValueError, match=message):
            section("shapes", **changes)
    run = run_of(tmp_path / "run", pairs, section("shapes"), num_validation_pairs=0)
    with pytest.raises(ConfigError, match="validation_steps needs validation_data"):
        train_scorer(run)
    rates = ScorerTrainer(start(section("shapes"), tmp_path), section("shapes", learning_rates={"nothing": 1.0}))
    with pytest.raises(ConfigError, match="no trained weight has 'nothing' in its name"):
        rates.policy.trainable_parameters()


def test_rates_of_their_own(section: Callable[..., ScorerConfig], tmp_path: Path) -> None:
    config = section("pal", learning_rates={"user_logits": 5e-3, "logit_scale": 0.1})
    groups = ScorerTrainer(start(config, tmp_path), config).policy.trainable_parameters()
    sizes = {group.get("lr"): len(group["params"]) for group in groups}
    assert sizes[5e-3] == sizes[0.1] == 1
    assert sizes[None] > 5


# --- starting from other models --------------------------------------------------------------------------------------


def test_hpsv2_starts_from_open_clips_file(hps_folder: Path, hps_config: dict, tmp_path: Path) -> None:
    state = torch.load(hps_folder / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    (tmp_path / "clip").mkdir()
    torch.save(state, tmp_path / "clip" / "open_clip_pytorch_model.bin")
    options = {"model_config": hps_config}
    config = ScorerConfig(name="hpsv2.1", start=str(tmp_path / "clip"), options=options)
    trainable = start_training(config, tmp_path / "start")
    expected = load_reward_model("hpsv2.1", path=hps_folder, device="cpu", **options)
    assert trainable.model.fingerprint() == expected.fingerprint()


def test_image_reward_starts_from_blip_with_a_new_head(blip_folder: Path, tmp_path: Path) -> None:
    published = torch.load(blip_folder / "ImageReward.pt", weights_only=True)
    blip = {n.removeprefix("blip."): v for n, v in published.items() if n.startswith("blip.")}
    blip |= {"visual_encoder_m.norm.weight": torch.ones(3), "image_queue": torch.ones(2, 2)}
    shutil.copytree(blip_folder, tmp_path / "blip")
    (tmp_path / "blip" / "ImageReward.pt").unlink()
    torch.save({"model": blip}, tmp_path / "blip" / "model_large.pth")
    config = ScorerConfig(name="image_reward", start=str(tmp_path / "blip"), options={"vision_config": VISION})
    trainable = start_training(config, tmp_path / "start", seed=1)
    state = trainable.model.state_dict()
    torch.testing.assert_close(
        state["towers.vision.post_layernorm.weight"], published["blip.visual_encoder.norm.weight"]
    )
    assert float(state["mlp.0.weight"].std()) == pytest.approx(33**-0.5, rel=0.05)
    assert float(state["mlp.7.bias"].abs().max()) == 0.0
    again = start_training(config, tmp_path / "again", seed=1).model.fingerprint()
    assert again == trainable.model.fingerprint() != start_training(config, tmp_path / "b", seed=2).model.fingerprint()


# --- the embedded world ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_embedded_clip_from_nothing(tmp_path: Path) -> None:
    """Contrast alone, then pairs on top: scenes are drawn, the judge decides only about the held-out ones."""
    loop = {"max_train_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "validation_steps": 2}
    world = {"dataset_name": "diffalign://shapes/train"}
    held_out = {"dataset_name": "diffalign://shapes/held_out", "max_train_samples": 12}
    before = ScorerRun.model_validate(
        {"output_dir": str(tmp_path / "before"), "data": world, "validation_data": held_out, "training": loop,
         "reward": {"name": "shapes", "start": UNTRAINED, "loss": "none", "contrastive_weight": 1.0}}
    )  # fmt: skip
    folder, found = train_scorer(before)
    assert found["before"] is not None
    reward = {"name": "shapes", "start": str(folder), "contrastive_weight": 0.5}
    run = {**before.model_dump(), "output_dir": str(tmp_path / "after"), "reward": reward}
    after, second = train_scorer(ScorerRun.model_validate(run))
    assert second["before"] == pytest.approx(found["accuracy"])
    assert (
        load_reward_model("shapes", path=after).fingerprint() != load_reward_model("shapes", path=folder).fingerprint()
    )


# --- HPSv3 -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_hpsv3_from_qwen_with_its_token_and_uncertainty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts from Qwen2-VL; of the embeddings the new token's row moves and no other; saved and loaded as published."""
    from safetensors.torch import save_file

    from diffalign.reward_models import hpsv3
    from tests.reward_models.qwen_files import (
        CONFIG,
        PROMPTS,
        published,
        random_model,
        rows_of,
        save_tokenizer,
        template_folder,
    )

    template_folder("hpsv3_user_text.txt")
    monkeypatch.setattr(hpsv3, "AREA", 56 * 56)
    base = save_tokenizer(tmp_path / "qwen")
    rows = rows_of(base, 0)
    qwen = random_model(rows + 6, 6, torch.nn.Identity())  # Qwen's matrix has more rows than its tokenizer words
    save_file({n: v.contiguous() for n, v in published(qwen).items()}, base / "model.safetensors")
    options = {"tokenizer": str(base), "template": str(PROMPTS), "model_config": CONFIG}
    config = ScorerConfig(name="hpsv3", start=str(base), options=options, loss="uncertainty", noise_samples=5)
    trainable = start_training(config, tmp_path / "start", seed=2)
    trainer = ScorerTrainer(trainable, config)
    wide = [picture(200, 1).resize((90, 40)), picture(10, 2)]  # grids of their own
    items = [
        Comparison(str(i), f"prompt {i}", ImageSource(a), ImageSource(b), 1.0)
        for i, (a, b) in enumerate([(wide[0], wide[1]), (wide[1], wide[0])])
    ]
    table = trainable.model.scorer.model.get_input_embeddings().weight.clone()
    assert len(table) == rows + 1
    optimizer = torch.optim.SGD(trainer.policy.trainable_parameters(), lr=0.05)
    loss = trainer.loss(batch_of(trainable, items)).loss
    loss.backward()
    assert all(p.grad is not None for _, p in trainer.policy.named_trainable())
    optimizer.step()
    found = rewards_of(trainable, items)
    trainable.save(tmp_path / "saved")
    names = set(load_file(tmp_path / "saved" / "HPSv3.safetensors"))
    assert names == set(published(qwen)) - {"lm_head.weight"} | {
        f"rm_head.{place}.{kind}" for place in (0, 3, 5) for kind in ("weight", "bias")
    }
    model = load_reward_model("hpsv3", path=tmp_path / "saved", device="cpu", **options)
    torch.testing.assert_close(scores(model, items), found, atol=1e-4, rtol=1e-4)
    moved = (model.scorer.model.get_input_embeddings().weight - table).abs().amax(1) > 0
    assert moved.nonzero().flatten().tolist() == [rows]
    output = model.score(items[0].first.decode(), items[0].prompt)
    batch = batch_of(trainable, items)
    with torch.no_grad():
        log_deviations = trainable(batch.chosen, batch.rejected, batch.conditioning.tensors)["log_deviations"]
    assert output.uncertainty is not None
    assert float(output.uncertainty[0]) == pytest.approx(float(log_deviations[0, 0].exp()), rel=1e-4)
