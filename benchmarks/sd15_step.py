"""Times one Diffusion-DPO step on a Stable Diffusion 1.5 UNet with random weights, through `diffalign.fit`.

    python -m benchmarks.sd15_step                    512 px, bf16, LoRA and full, on the accelerator that is there
    python -m benchmarks.sd15_step --tiny             a small UNet, to try the script on a CPU

Prints and writes (benchmarks/results/sd15_step_<device>.json) for each mode: pairs per second as the median over
the steps after warm-up, peak memory, and how a step's time splits into reference forward, policy forward and the
rest (backward, clipping, optimizer). The pipeline's architecture is the published one; only the weights are random,
which changes no time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

import diffalign as da
from benchmarks import steps
from diffalign.backbones.loading import ModelSource
from diffalign.backbones.sd import StableDiffusionPolicy
from diffalign.shapes.networks import build_tokenizer


def build_policy(tiny: bool, lora: bool, dtype: torch.dtype, device: torch.device) -> StableDiffusionPolicy:
    """The published SD1.5 architecture (or a small one) with random weights."""
    unet_options: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
    if tiny:
        unet_options |= {"block_out_channels": (32, 32, 64, 64), "sample_size": 16, "cross_attention_dim": 32}
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    text = CLIPTextModel(
        CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    )
    vae = AutoencoderKL(block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
                        up_block_types=("UpDecoderBlock2D",) * 4, scaling_factor=0.18215)  # fmt: skip
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
    )
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=UNet2DConditionModel(**unet_options), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).to(device)  # fmt: skip
    if lora:
        pipeline.unet.to(dtype)
    source = ModelSource("random", "random", "StableDiffusionPipeline", da.Prediction.EPSILON)
    return StableDiffusionPolicy(
        pipeline, source, lora=da.LoRA(rank=8) if lora else None, train=True, reference_dtype=None if lora else dtype
    )


def measure(mode: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Runs `fit` for a few steps and reads the clock."""
    dtype = torch.float32 if options.mixed_precision == "no" else torch.bfloat16
    policy = build_policy(options.tiny, mode == "lora", dtype, device)
    width, tokens = (32, 20) if options.tiny else (768, 77)
    hidden = torch.randn((1, tokens, width), generator=da.generator("benchmark", "text"))
    found = steps.measure(
        policy,
        {"hidden": hidden},
        steps=options.steps,
        warmup=options.warmup,
        batch_size=options.batch_size,
        mixed_precision=options.mixed_precision,
    )
    return {"mode": mode, **found}


def main() -> None:
    """Measures both modes, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small UNet, to try the script without an accelerator")
    parser.add_argument("--batch-size", type=int, default=8, help="pairs per step")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--warmup", type=int, default=5, help="first steps that do not count")
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="bf16")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    if device.type == "cpu" and not options.tiny:
        parser.error("no accelerator here; --tiny tries the script on a CPU")
    results = [measure(mode, options, device) for mode in ("lora", "full")]
    record = {
        "device": name,
        "torch": torch.__version__,
        "batch_size": options.batch_size,
        "mixed_precision": options.mixed_precision,
        "tiny": options.tiny,
        "results": results,
    }
    print(json.dumps(record, indent=2))
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"sd15_step_{'tiny_' if options.tiny else ''}{name.replace(' ', '_').lower()}.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
