"""Every family at its real widths trains a few steps on a GPU; memory and speed go to `benchmarks/results`."""

from __future__ import annotations

import gc
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.steps import measure
from diffalign.batches import Conditioning
from tests.gpu.full_size import BY_NAME, CASES, Case, build

RESULTS = Path(os.environ.get("DIFFALIGN_GPU_RESULTS", "benchmarks/results/gpu_smoke.json"))
STEPS, WARMUP = 6, 2

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU with about 80 GB; this machine has none"
)


def run(case: Case, mode: str, folder: Path, tiny: bool) -> dict[str, Any]:
    device = torch.device("cpu" if tiny else "cuda")
    precision = "no" if tiny else "bf16"
    dtype = torch.float32 if tiny else torch.bfloat16
    BY_NAME[case.family].save(folder)
    policy, embedded = build(case, folder, mode, tiny=tiny, dtype=dtype, device=device)
    if not tiny:
        assert policy.latent_shape[1:] == case.grid
    found = measure(
        policy,
        embedded,
        steps=3 if tiny else STEPS,
        warmup=1 if tiny else WARMUP,
        batch_size=case.batch_size,
        mixed_precision=precision,
    )
    assert all(loss == loss and 0 < loss < 5 for loss in found["losses"])
    assert found["losses"][0] == pytest.approx(math.log(2), abs=1e-6 if mode == "lora" else 0.1)
    return {**found, "batch_size": case.batch_size, "reduced": case.reduced, "mixed_precision": precision}


def record(key: str, found: dict[str, Any], path: Path) -> None:
    known = json.loads(path.read_text()) if path.is_file() else {}
    known[key] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, **found}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    ("case", "mode"), [pytest.param(c, mode, id=f"{c.name}-{mode}") for c in CASES for mode in c.modes]
)
def test_real_widths_train_on_a_gpu(case: Case, mode: str, tmp_path: Path) -> None:
    try:
        found = run(case, mode, tmp_path / "pipeline", tiny=False)
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    assert found["peak_memory_gib"] < 80
    record(f"{case.name} {mode}", found, RESULTS)


FIRST = {case.family: case for case in reversed(CASES)}


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FIRST))
def test_the_same_code_runs_tiny_on_a_cpu(family: str, tmp_path: Path) -> None:
    case = FIRST[family]
    for mode in case.modes:
        found = run(case, mode, tmp_path / "pipeline", tiny=True)
        assert found["pairs_per_second"] > 0
        assert found["trained_parameters"] > 0


UNCALLED = ("mochi", "qwen-image", "z-image")
"""Qwen-Image and Z-Image compute with as many tokens as a mask leaves, and Mochi uses autocast: not on "meta"."""


LARGEST = {(case.family, str(case.config)): case for case in CASES}
"""Of cases that differ in their pictures' size alone, the last."""


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGEST.values(), ids=str)
def test_real_widths_fit_together_on_the_meta_device(case: Case, tmp_path: Path) -> None:
    """Configurations, latents and embeddings of the GPU runs, without their weights, and where adapters would go."""
    folder, device = tmp_path / "pipeline", torch.device("meta")
    BY_NAME[case.family].save(folder)
    policy, embedded = build(case, folder, "none", tiny=False, dtype=torch.bfloat16, device=device)
    assert policy.latent_shape[1:] == case.grid
    names = tuple(f".{name}" for name in policy.lora_targets)
    assert any(name.endswith(names) for name, _ in policy.denoiser.named_modules())
    if case.family in UNCALLED:
        return
    latents = torch.zeros(1, *policy.latent_shape, device=device)
    conditioning = Conditioning({name: tensor.to(device) for name, tensor in embedded.items()})
    with torch.no_grad():
        output = policy.predict(latents, torch.tensor([500.0]).to(device), conditioning)
    assert output.shape == latents.shape
