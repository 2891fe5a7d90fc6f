"""Why InPO needs pairs from elsewhere: `python -m benchmarks.inversion_errors PAIRS [PAIRS ...]`.

For each folder of pairs, the mean squared error of the embedded UNet's noise at timesteps 400 and 700, on the better
and the worse pictures: with fresh noise, as Diffusion-DPO sees them, and with the noise that inversion finds. What a
preference method learns from is the difference between the two columns. The model's own pictures have one with fresh
noise, and hardly any with the noise that they were drawn from.

    diffalign pairs configs/demo.yaml
    python -m diffalign.shapes.scene_pairs --out runs/scenes
    python -m benchmarks.inversion_errors runs/demo/pairs runs/scenes
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.backbones import LoRA, load_policy
from diffalign.trainers.inpo import InPO

TIMESTEPS = (400, 700)


def errors(trainer: InPO, policy: Any, folder: Path, pairs: int) -> dict[str, float]:
    """Errors by kind of noise, timestep and side."""
    rows = [json.loads(line) for line in (folder / "index.jsonl").read_text(encoding="utf-8").splitlines()][:pairs]
    conditioning = policy.encode_prompts([row["prompt"] for row in rows])
    found = {}
    for side in ("chosen", "rejected"):
        pictures = [np.asarray(Image.open(folder / row[side]).convert("RGB")) for row in rows]
        latents = policy.encode(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255).mean
        for step in TIMESTEPS:
            timesteps = torch.full((len(rows),), step)
            alphas, sigmas = (scale[:, None, None, None].float() for scale in trainer.schedule.scales(timesteps))
            inverted = trainer.invert(latents, timesteps, conditioning, ())
            fresh = torch.randn(latents.shape, generator=torch.Generator().manual_seed(step))
            for kind, noisy in (("fresh", alphas * latents + sigmas * fresh), ("inverted", inverted)):
                noise: Tensor = (noisy - alphas * latents) / sigmas
                seen = policy.predict(noisy, timesteps, conditioning)
                found[f"{kind} {step} {side}"] = float((seen - noise).square().mean())
    return found


@torch.no_grad()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inversion_errors", description=__doc__.split("\n\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", help="folders of pairs of the embedded world")
    parser.add_argument("--pairs", type=int, default=48, help="of each folder")
    options = parser.parse_args()
    policy = load_policy("diffalign://shapes", lora=LoRA(rank=4), train=True)
    trainer = InPO(policy)
    for folder in options.folders:
        found = errors(trainer, policy, folder, options.pairs)
        sys.stdout.write(f"{folder}\n   t  noise     chosen   rejected\n")
        for step in TIMESTEPS:
            for kind in ("fresh", "inverted"):
                chosen, rejected = (found[f"{kind} {step} {side}"] for side in ("chosen", "rejected"))
                sys.stdout.write(f" {step}  {kind:8} {chosen:8.4f}   {rejected:8.4f}\n")


if __name__ == "__main__":
    main()
