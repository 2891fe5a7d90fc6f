"""A small run: eight pairs of pictures, their cache, and the parts that `fit` takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from diffalign.backbones import LoRA, load_policy
from diffalign.config import TrainingConfig
from diffalign.data import DataConfig, EncodedPairs, PairSource, encode_pairs, load_pairs
from diffalign.trainers.diffusion_dpo import DiffusionDPO


@pytest.fixture(autouse=True)
def _own_accelerator() -> Iterator[None]:
    """Accelerate keeps precision and devices for the whole process; each test starts anew."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def pair_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pairs of PNG files with an index: the chosen ones reddish, the rejected ones bluish."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for i in range(8):
        for side, tint in (("chosen", (200, 60, 40)), ("rejected", (40, 60, 200))):
            noise = np.random.default_rng([i, side == "chosen"]).integers(0, 50, (8, 8, 3))
            Image.fromarray((noise + tint).astype(np.uint8)).save(folder / f"{i}-{side}.png")
        prompt = f"a photo of {('one', 'two', 'three', 'four')[i % 4]} circles"
        rows.append({"id": f"p{i}", "prompt": prompt, "chosen": f"{i}-chosen.png", "rejected": f"{i}-rejected.png"})
    (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def encoded(tiny_pipeline: Path, pair_folder: Path, cache: Path) -> EncodedPairs:
    config = DataConfig(train_data_dir=pair_folder)
    return encode_pairs(load_pairs(config), load_policy(str(tiny_pipeline)), config, cache)


@pytest.fixture
def start(tiny_pipeline: Path, encoded: EncodedPairs, tmp_path: Path, policies: Any) -> Callable[..., Any]:
    """(trainer, source, config) of a small run."""

    def start(
        name: str = "run",
        *,
        lora: LoRA | None = LoRA(rank=2),  # noqa: B008 - frozen
        double: bool = False,
        beta: float = 500.0,
        dropout: float = 0.2,
        output_dir: Path | None = None,
        **training: Any,
    ) -> tuple[DiffusionDPO, PairSource, TrainingConfig]:
        settings = {"max_train_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3, **training}
        config = TrainingConfig(output_dir=str(output_dir or tmp_path / name), **settings)
        policy: Any
        if double:
            policy = policies.double(tiny_pipeline, lora=lora)
        else:
            policy = load_policy(str(tiny_pipeline), lora=lora, train=True)
        source = PairSource(
            encoded,
            seed=5,
            batch_size=config.per_device_train_batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            caption_dropout=dropout,
        )
        return DiffusionDPO(policy, beta=beta), source, config

    return start
