"""Layers that FLUX.1's original network fuses, at its real widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffalign.lora_formats import (
    import_lora,
    read_adapters,
    write_adapters,
)
from tests.lora_files import adapters_of, delta, random_adapters

WIDTH = 3072


def flux_layers(parts: str = "all") -> dict[str, tuple[int, ...]]:
    """Shapes of the adapted weights in some blocks of FLUX.1."""
    layers: dict[str, tuple[int, ...]] = {}
    for i in (0, 18):
        block = f"transformer.transformer_blocks.{i}"
        names = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        layers |= {f"{block}.attn.{name}": (WIDTH, WIDTH) for name in names}
        layers |= {f"{block}.{norm}.linear": (6 * WIDTH, WIDTH) for norm in ("norm1", "norm1_context")}
        for ff in ("ff", "ff_context"):
            layers |= {f"{block}.{ff}.net.0.proj": (4 * WIDTH, WIDTH), f"{block}.{ff}.net.2": (WIDTH, 4 * WIDTH)}
    for i in (0, 37):
        block = f"transformer.single_transformer_blocks.{i}"
        layers |= {f"{block}.attn.{name}": (WIDTH, WIDTH) for name in ("to_q", "to_k", "to_v")}
        layers |= {f"{block}.proj_mlp": (4 * WIDTH, WIDTH), f"{block}.proj_out": (WIDTH, 5 * WIDTH)}
        layers[f"{block}.norm.linear"] = (3 * WIDTH, WIDTH)
    chosen = {
        "all": list(layers),
        "attention": [n for n in layers if ".attn." in n],
        "some": [n for n in layers if n.endswith(("to_k", "to_v", "add_q_proj"))],
    }
    return {name: layers[name] for name in chosen[parts]}


def products(up: Tensor, down: Tensor, scale: float) -> Tensor:
    """What scale * up @ down does to a few fixed vectors; the whole product would be large."""
    vectors = torch.randn(down.shape[1], 2, generator=torch.Generator().manual_seed(7)).double()
    return scale * (up.double() @ (down.double() @ vectors))


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
@pytest.mark.parametrize(
    "parts", [pytest.param("all", marks=pytest.mark.slow), pytest.param("attention", marks=pytest.mark.slow), "some"]
)
def test_diffusers_reads_fused_layers_as_they_were(parts: str, layout: Any) -> None:
    """Single blocks included, whose widths diffusers' converter takes to be FLUX.1's own; missing parts stay without
    effect."""
    from diffusers import FluxPipeline

    adapters = random_adapters(flux_layers(parts))
    state, metadata = write_adapters(adapters, layout, "flux")
    theirs: Any = FluxPipeline.lora_state_dict(dict(state))
    layers = {key.removesuffix(".lora_A.weight") for key in theirs if key.endswith(".lora_A.weight")}
    assert set(adapters) <= layers
    for name in layers:
        up, down = theirs[f"{name}.lora_B.weight"], theirs[f"{name}.lora_A.weight"]
        found = products(up, down, 1.0)
        ours = adapters.get(name)
        expected = products(ours.up, ours.down, ours.scale) if ours else torch.zeros_like(found)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-3)
    back = read_adapters(state, metadata)
    assert back.keys() == adapters.keys()
    for name, adapter in adapters.items():
        assert torch.equal(back[name].down, adapter.down)
        assert torch.equal(back[name].up, adapter.up)
        assert back[name].alpha == adapter.alpha


@pytest.mark.parametrize("first", ["to_q", "to_v"])
def test_parts_of_different_rank_and_alpha_are_fused_exactly(first: str) -> None:
    block = "transformer.transformer_blocks.0.attn"
    others = [name for name in ("to_q", "to_k", "to_v") if name != first]
    adapters = random_adapters({f"{block}.{first}": (8, 8)}, rank=3, alpha=6.0)
    adapters |= random_adapters({f"{block}.{name}": (8, 8) for name in others}, rank=1, alpha=0.5)
    state, metadata = write_adapters(adapters, "kohya", "flux")
    back = read_adapters(state, metadata)
    for name, adapter in adapters.items():
        assert back[name].rank == adapter.rank
        torch.testing.assert_close(delta(back[name]), delta(adapter))


def test_a_dense_fused_adapter_is_split_by_rows(tmp_path: Path) -> None:
    """Files trained on the fused layer, with either spelling of its matrices."""
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(6, 8, generator=generator), torch.randn(7 * 8, 6, generator=generator)
    key = "diffusion_model.single_blocks.3.linear1"
    file = tmp_path / "dense.safetensors"
    save_file({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, file)
    back = adapters_of(import_lora(file, tmp_path))
    parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    order = [f"transformer.single_transformer_blocks.3.{part}" for part in parts]
    assert set(back) == set(order)
    whole = torch.cat([delta(back[name]) for name in order])
    torch.testing.assert_close(whole, up.double() @ down.double())
    assert len(back[order[3]].up) == 32
