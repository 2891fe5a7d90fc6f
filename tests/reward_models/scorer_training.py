"""Tiny scorers of pictures to be trained, comparisons and runs for them; no test by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.data.compared import Comparison, ComparisonList
from diffalign.data.images import ImageSource
from diffalign.randomness import Draw
from diffalign.reward_config import ScorerConfig, ScorerRun
from diffalign.reward_models import HPSv2, RewardModel, load_reward_model
from diffalign.reward_models.comparison_source import ComparisonBatch, ComparisonSource
from diffalign.reward_models.starting import start_training
from diffalign.reward_models.trainable import Trainable
from tests.reward_models.test_image_reward import VISION
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
    source = ComparisonSource(ComparisonList(items, "test"), trainable, seed=0, batch_size=2, prefetch=False)
    return source.gather(range(len(items)), tuple(Draw(0, 0, item.pair_id) for item in items))


def rewards_of(trainable: Trainable, items: list[Comparison]) -> Tensor:
    batch = batch_of(trainable, items)
    with torch.no_grad():
        return trainable(batch.chosen, batch.rejected, batch.conditioning.tensors)["rewards"]


def sections(clip: Path, hps: Path, hps_config: Any, blip: Path, shapes: Path) -> Callable[..., ScorerConfig]:
    """The `reward` section of a configuration by the scorer's name, starting from tiny models in these folders."""
    config = json.loads((clip / "config.json").read_text())
    sizes = {name: config[name] for name in ("text_config", "vision_config", "projection_dim")}
    starts: dict[str, dict[str, Any]] = {
        "pickscore": {"start": str(clip)},
        "hpsv2.1": {"start": str(hps), "options": {"model_config": hps_config}},
        "shapes": {"start": str(shapes)},
        "image_reward": {"start": str(blip), "options": {"vision_config": VISION}},
        "mps": {"start": str(clip), "options": {"clip_config": sizes, "cross_config": SMALL_CROSS}},
        "pal": {"start": str(clip), "head": {"prototypes": 2, "hidden": 1, "out_dim": 8}},
    }

    def build(name: str, **more: Any) -> ScorerConfig:
        return ScorerConfig.model_validate({"name": name, **starts[name], **more})

    return build


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
