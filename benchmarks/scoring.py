"""Pictures per second of a CLIP scorer, from decoded pixels and from JPEG files, and rows per second of the journal.

    python -m benchmarks.scoring                a small CLIP, on whatever is there; a minute or so
    python -m benchmarks.scoring --full-size    ViT-H/14 as HPSv2.1 has it, random weights, bf16; wants a GPU
    python -m benchmarks.scoring --tiny         two layers and a few pictures, to try the script

Four ways to the same scores, every prompt with four pictures as in a group of samples:

- `tensors`: `model.score_tensor` without gradient, pixels already on the device, one call per batch
- `files`: `model.score` on JPEG files, read and resized in threads
- `one by one`: the same model on one file at a time, prompt included
- `naive`: one file at a time, and the model loaded from its checkpoint for each, as the originals' `score` functions do

Prints a table, and the record as JSON to `--output`. Random weights change no time.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor

from benchmarks.steps import synchronise
from diffalign.reward_models import HPSv2, RewardInfo, RewardModel, score_index
from diffalign.reward_models.media import Media

SMALL = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 224, "layers": 6, "width": 256, "head_width": 64, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 4},
}
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 32, "head_width": 16, "patch_size": 56},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
GROUP = 4
"""Pictures of one prompt."""


class Nothing(RewardModel):
    """A model that takes no time, so that what is left is the work of reading rows and keeping scores."""

    info = RewardInfo(name="nothing", license="none", weights=(), needs_prompt=False)

    def preprocess(self, item: Media) -> Media:
        """See `RewardModel`."""
        return item

    def score_prepared(self, prepared: Sequence[Media], texts: Sequence[str]) -> dict[str, Tensor]:
        """See `RewardModel`."""
        return {"overall": torch.ones(len(prepared))}


def build(config: dict[str, Any], folder: Path) -> Path:
    """A random checkpoint in the format of HPSv2."""
    torch.manual_seed(0)
    path = folder / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": open_clip.CLIP(**config).state_dict()}, path)
    return path


def make_files(folder: Path, count: int, side: int) -> list[Path]:
    """JPEG files with smooth colours and some noise."""
    generator = np.random.default_rng(0)
    paths = []
    for i in range(count):
        coarse = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
        noisy = smooth + generator.normal(0, 6, smooth.shape)
        paths.append(folder / f"{i:05d}.jpg")
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def rate(action: Callable[[], int], device: torch.device, seconds: float) -> float:
    """Pictures per second of an action that gives how many it did: one to warm up, then until the time is over."""
    action()
    synchronise(device)
    done, started = 0, time.perf_counter()
    while not done or time.perf_counter() - started < seconds:
        done += action()
        synchronise(device)
    return done / (time.perf_counter() - started)


def measure(options: argparse.Namespace, folder: Path, device: torch.device) -> list[dict[str, Any]]:
    """One record per way and batch size."""
    config = TINY if options.tiny else open_clip.get_model_config("ViT-H-14") if options.full_size else SMALL
    path = build(config, folder)
    dtype = torch.bfloat16 if options.full_size else torch.float32

    def load() -> HPSv2:
        return HPSv2(path, model_config=config, device=device, dtype=dtype)

    model = load()
    model.workers = options.workers
    files = make_files(folder, max(options.batch_sizes), options.side)
    prompts = [f"a photo of thing number {i // GROUP}" for i in range(len(files))]
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])
    pixels = pixels.to(device)

    def tensors(size: int) -> int:
        with torch.no_grad():
            model.score_tensor(pixels[:size] / 255, prompts[:size])
        return size

    def from_files(size: int) -> int:
        model.score(files[:size], prompts[:size], batch_size=size)
        return size

    def one_by_one(count: int, scorer: Callable[[], HPSv2]) -> int:
        for file, prompt in zip(files[:count], prompts, strict=False):
            scorer()(file, prompt)
        return count

    records = []
    for size in options.batch_sizes:
        for way, action in (("tensors", tensors), ("files", from_files)):
            found = rate(lambda action=action, size=size: action(size), device, options.seconds)
            records.append({"way": way, "batch_size": size, "images_per_second": found})
    model.workers = 1
    count = min(GROUP, len(files))
    for way, scorer in (("one by one", lambda: model), ("naive", load)):
        found = rate(lambda scorer=scorer: one_by_one(count, scorer), device, options.seconds)
        records.append({"way": way, "batch_size": 1, "images_per_second": found})
    return records


def measure_journal(folder: Path, count: int) -> dict[str, float]:
    """Rows per second of `score_index` with a model that takes no time: first run, and one that finds all done."""
    Image.new("RGB", (2, 2)).save(folder / "x.png")
    index = folder / "index.jsonl"
    with index.open("w") as stream:
        stream.writelines(json.dumps({"id": f"row{i}", "prompt": "p", "image": "x.png"}) + "\n" for i in range(count))
    found = {}
    for name in ("first", "again"):
        started = time.perf_counter()
        score_index(index, [Nothing()], folder / "scores.jsonl", batch_size=64, progress=False)
        found[name] = count / (time.perf_counter() - started)
    return found


def render(record: dict[str, Any]) -> str:
    """The record as a table."""
    naive = next(r["images_per_second"] for r in record["results"] if r["way"] == "naive")
    lines = [f"{record['model']} on {record['device']}, {record['side']} px JPEG, {record['workers']} threads", ""]
    lines.append(f"{'way':<12}{'batch':>6}{'images/s':>12}{'x naive':>10}")
    for r in record["results"]:
        per_second = r["images_per_second"]
        lines.append(f"{r['way']:<12}{r['batch_size']:>6}{per_second:>12.1f}{per_second / naive:>10.1f}")
    journal = record["journal_rows_per_second"]
    lines += ["", f"journal: {journal['first']:.0f} rows/s at first, {journal['again']:.0f} rows/s when all are known"]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full-size", action="store_true", help="ViT-H/14 in bf16")
    parser.add_argument("--tiny", action="store_true", help="to try the script")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--side", type=int, default=512, help="of the JPEG files, in pixels")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each number")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 16), help="threads that read files")
    parser.add_argument("--rows", type=int, default=20_000, help="of the journal's measurement")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.batch_sizes, options.side, options.seconds, options.rows = [1, 4], 64, 0.0, 200
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    kind = "tiny" if options.tiny else "full_size" if options.full_size else "small"
    with tempfile.TemporaryDirectory() as folder:
        record = {
            "model": {"tiny": "two-layer CLIP", "full_size": "CLIP ViT-H/14 in bf16", "small": "small CLIP"}[kind],
            "device": name,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "workers": options.workers,
            "side": options.side,
            "results": measure(options, Path(folder), device),
            "journal_rows_per_second": measure_journal(Path(folder), options.rows),
        }
    print(render(record))
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"scoring_{kind}_{name.replace(' ', '_').lower()}.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
