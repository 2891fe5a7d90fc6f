"""Predicted activations are those that a real forward pass keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import memory
from benchmarks.activations import Activations, count, count_of
from benchmarks.building import build
from benchmarks.tiny_widths import TINY
from diffalign.batches import Conditioning
from diffalign.checkpointing import Recompute, recompute_activations

SD15, SD35, FLUX = TINY["sd15-512"], TINY["sd35m-512"], TINY["flux-dev-512"]


def really_kept(architecture: Any, *, lora: bool, dtype: torch.dtype, recompute: Recompute) -> Activations:
    """Of real tensors on a CPU; whole blocks are computed again by PyTorch's own checkpointing."""
    policy = build(architecture, lora=lora, dtype=dtype, device="cpu")
    embedded = {name: tensor.repeat(2, *[1] * (tensor.ndim - 1)) for name, tensor in architecture.embeddings().items()}
    latents, timesteps = torch.zeros(2, *architecture.latents), torch.full((2,), 500.0)
    recompute_activations(policy.denoiser, recompute)
    return count_of(
        policy.denoiser,
        lambda: policy.predict(latents, timesteps, Conditioning(embedded)),
        dtype=dtype,
        device="cpu",
    )


@pytest.mark.slow
def test_what_is_computed_again() -> None:
    kept, selective, whole = (count(SD15, lora=False, recompute=how).recomputed for how in (False, "selective", True))
    assert kept == 0
    assert 0 < selective < 0.5 < whole <= 1


def test_a_layer_keeps_its_input_once() -> None:
    layer = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    inputs = torch.zeros(3, 4)
    found = count_of(layer, lambda: layer(inputs), dtype=torch.float32, device="cpu")
    assert found == Activations(4 * 3 * (4 + 6), 0, 0)  # ReLU keeps its output, which is the next layer's input


def test_autocast_keeps_rounded_copies_of_trained_weights() -> None:
    layer = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    inputs = torch.zeros(3, 4)
    found = count_of(layer, lambda: layer(inputs), dtype=torch.bfloat16, device="cpu")
    assert found == Activations(2 * 3 * (4 + 6), 0, 2 * (4 * 6 + 6 + 6 * 2 + 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "lora", "dtype", "recompute"),
    [
        pytest.param(SD15, True, torch.bfloat16, False, id="sd15-lora-bf16"),
        pytest.param(SD15, False, torch.float32, True, id="sd15-full-recomputed"),
        pytest.param(SD35, False, torch.bfloat16, True, id="sd35-full-bf16-recomputed"),
    ],
)
def test_predicted_bytes_are_those_of_a_real_run(
    architecture: Any, lora: bool, dtype: torch.dtype, recompute: bool
) -> None:
    predicted = count(architecture, lora=lora, dtype=dtype, device="cpu", recompute=recompute)
    found = really_kept(architecture, lora=lora, dtype=dtype, recompute=recompute)
    assert (predicted.kept, predicted.rounded) == (found.kept, found.rounded)
    assert (predicted.largest_block > 0) == recompute


@pytest.mark.slow
def test_attention_called_by_name_is_fused_too() -> None:
    found = count(FLUX, lora=True)
    tokens, heads = 512 + 4 * 4, 2
    assert 0 < found.kept < 2 * 2 * heads * tokens**2  # bytes of the probabilities of one block, two samples in bf16


def test_sums_hold_every_part_once() -> None:
    plans = [memory.Plan("sd15-512", "full", aim=16.0), memory.Plan("sd15-512", "full", "adamw_8bit", aim=16.0)]
    ways = {"all kept": Activations(1_000, 0, 30), "checkpointing": Activations(200, 50, 30)}
    records = [memory.predict(SD15, plan, ways) for plan in plans]
    parameters = records[0]["held"]["trained weights"] // 4
    for record, each in zip(records, (8, 2), strict=True):
        held = record["held"]
        assert held["gradients"] == 4 * parameters
        assert held["frozen weights"] == 0 < held["reference copy"] < held["trained weights"]
        assert held["optimizer"] == 8 * parameters if each == 8 else held["optimizer"] >= 2 * parameters
        rest = sum(held.values())
        assert record["together"] == {"all kept": rest + 1_030, "checkpointing": rest + 280}
    resting = memory.predict(SD15, memory.Plan("sd15-512", "full", cached=True), ways)["held"]
    assert resting == {**records[0]["held"], "reference copy": 0}
    lines = memory.table(records).splitlines()
    assert lines[2].startswith("| sd15-512 | full | adamw | 0.00 |")
    assert lines[2].endswith("| < 16 |")
    assert "predicted, not measured" in lines[-3]


@pytest.mark.slow
def test_the_command_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "memory.json"
    monkeypatch.setattr(memory, "PLANS", (memory.Plan("sd35m-512", "full"), memory.Plan("sd35m-1024", "full")))
    assert memory.main(["--tiny", "--output", str(output)]) == 0
    (plan,) = json.loads(output.read_text(encoding="utf-8"))["plans"]
    kept, whole, selective = (plan["activations"][name] for name in ("all kept", "checkpointing", "selective"))
    assert whole["kept"] < selective["kept"] < kept["kept"]
    assert kept["largest_block"] == 0 < selective["largest_block"] < whole["largest_block"]
    assert plan["together"]["checkpointing"] < plan["together"]["all kept"]
    assert memory.table([plan]) in capsys.readouterr().out
