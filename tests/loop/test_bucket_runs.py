"""`data.aspect_ratio_buckets` in a run: what it trains on, and what is refused before anything loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffalign import training
from diffalign.config import ConfigError, RunConfig
from diffalign.reward_training import checked_reward

FLOW, VIDEO, UNET = "diffalign://shapes_flow", "diffalign://shapes_video", "diffalign://shapes"


def config(folder: Path, model: dict[str, Any] | None = None, trainer: Any = "diffusion_dpo", **data: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "output_dir": str(folder / "run"),
            "model": {"pretrained_model_name_or_path": UNET, "lora": {"rank": 2}, **(model or {})},
            "data": {"train_data_dir": str(folder), "aspect_ratio_buckets": True, "bucket_step": 16, **data},
            "trainer": trainer,
            "training": {"max_train_steps": 3, "per_device_train_batch_size": 2, "num_validation_pairs": 2},
        }
    )


CACHED = {"name": "diffusion_dpo", "reference": "cached", "draws_per_pair": 1}


@pytest.mark.parametrize(
    ("model", "trainer", "message"),
    [
        ({"pretrained_model_name_or_path": VIDEO}, "diffusion_dpo", "takes pictures of one size here, or leave the"),
        ({}, "seppo", "SePPO draws samples of one size beside them, or leave"),
        ({}, CACHED, "trainer.reference: cached measures pairs in batches of all sizes; set it to live"),
        (
            {},
            {"name": "inpo", "cache_inversion": True, "inversion_net": "reference"},
            "cache_inversion inverts pairs in batches of all sizes",
        ),
        (
            {"pretrained_model_name_or_path": FLOW, "options": {"timestep_shift": "dynamic"}},
            "flow_dpo",
            "timestep_shift: dynamic each size would have a law of timesteps of its own",
        ),
    ],
)
def test_what_cannot_have_several_sizes_is_refused(
    model: dict[str, Any], trainer: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        training.checked(config(tmp_path, model, trainer))
    assert str(caught.value).startswith("data.aspect_ratio_buckets: ")
    assert "\n" not in str(caught.value)
    training.checked(config(tmp_path, model | {"options": {}}, "diffusion_dpo", aspect_ratio_buckets=False))


@pytest.mark.parametrize("trainer", ["diffusion_dpo", "npo", "sft", "inpo", "self_npo"])
def test_what_may_have_several_sizes(trainer: str, tmp_path: Path) -> None:
    training.checked(config(tmp_path, trainer=trainer))


def test_the_reward_on_noisy_latents_takes_one_size(tmp_path: Path) -> None:
    model = {"pretrained_model_name_or_path": FLOW, "lora": None}
    whole = config(tmp_path, model, "flow_dpo").model_dump(mode="json")
    reward = {"kind": "noisy_latent", "layers": 2}
    for buckets in (False, True):
        whole["data"]["aspect_ratio_buckets"] = buckets
        asked = RunConfig.model_validate({**whole, "reward": reward})
        if buckets:
            with pytest.raises(ConfigError, match="train-reward takes pictures of one size"):
                checked_reward(asked)
        else:
            checked_reward(asked)


@pytest.mark.slow
def test_a_run_on_pictures_of_three_sizes(tiny_pipeline: Path, tmp_path: Path) -> None:
    rows = []
    for number in range(8):
        size = ((16, 16), (40, 10), (10, 40))[number % 3]
        for side in ("chosen", "rejected"):
            colours = np.random.default_rng([number, side == "chosen"]).integers(0, 255, (*size, 3), dtype=np.uint8)
            Image.fromarray(colours).save(tmp_path / f"{number}-{side}.png")
        rows.append({"prompt": "a photo", "chosen": f"{number}-chosen.png", "rejected": f"{number}-rejected.png"})
    for number, row in enumerate(rows):
        row["prompt"] += f" of {number}"
    (tmp_path / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = config(tmp_path, {"pretrained_model_name_or_path": str(tiny_pipeline)}, resolution=32)
    folder = training.train_config(asked)
    losses = [json.loads(line)["train/loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3
    assert np.isfinite(losses).all()
