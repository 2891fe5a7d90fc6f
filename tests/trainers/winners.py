"""A folder of winners without rejected images, and a configuration that trains on it; no test by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COUNT = 6


def winners_folder(folder: Path) -> Path:
    """`COUNT` pictures of 8x8 pixels with an index of prompts."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(COUNT):
        noise = np.random.default_rng(number).integers(0, 256, (8, 8, 3))
        Image.fromarray(noise.astype(np.uint8)).save(folder / f"{number}.png")
        rows.append({"id": f"w{number}", "prompt": f"a photo of {number} stars", "chosen": f"{number}.png"})
    write_index(folder, rows)
    return folder


def write_index(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def winners_config(folder: Path, model: Path, trainer: dict[str, Any], **sections: Any) -> Path:
    """A configuration of four steps in `folder/run`; `data` is a folder of winners unless it is given."""
    if "data" not in sections:
        data = folder / "winners"
        sections["data"] = {"train_data_dir": str(data if data.exists() else winners_folder(data))}
    config = {
        "output_dir": str(folder / "run"),
        "seed": 3,
        "model": {"pretrained_model_name_or_path": str(model), "lora": {"rank": 2}},
        "trainer": trainer,
        "sampling": {"num_inference_steps": 1, "guidance_scale": 1.0},
        **sections,
    }
    config["training"] = {
        "max_train_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "checkpointing_steps": 1,
        "resume_from_checkpoint": "latest",
        **sections.get("training", {}),
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))  # which is YAML
    return path
