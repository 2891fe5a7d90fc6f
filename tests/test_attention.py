"""Attention kernels: what a switch reaches, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from diffalign.attention import set_attention
from diffalign.backbones import load_policy


def attention_modules(module: nn.Module) -> int:
    return sum(hasattr(m, "set_processor") for m in module.modules())


def test_native_attention_counts_every_module(tiny_pipeline: Path) -> None:
    policy: Any = load_policy(str(tiny_pipeline))
    assert set_attention(policy.denoiser, "native") == attention_modules(policy.denoiser) == 8


def test_attention_switches_that_reach_nothing_are_refused(tiny_pipeline: Path) -> None:
    """Of diffusers' own backends the older UNets know none, and say nothing about it."""
    with pytest.raises(ValueError, match="'_native_math' reached none of the attention modules of UNet2DCondition"):
        load_policy(str(tiny_pipeline), attention="_native_math")
    with pytest.raises(ValueError, match="found no attention module in Linear"):
        set_attention(nn.Linear(1, 1), "native")
    with pytest.raises(ValueError, match="'flash' reached none of the attention modules of Linear"):
        set_attention(nn.Linear(1, 1), "flash")


def test_unknown_attention_is_refused_in_one_line(tiny_pipeline: Path) -> None:
    with pytest.raises(ValueError, match="attention: unknown backend 'flsh'; did you mean 'flash'") as error:
        load_policy(str(tiny_pipeline), attention="flsh")
    assert "\n" not in str(error.value)


def test_xformers_is_asked_for_by_name_when_it_is_missing(tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "xformers" else find(name, *a))
    with pytest.raises(ValueError, match=r"xformers is not installed; run `pip install 'diffalign\[xformers\]'`"):
        load_policy(str(tiny_pipeline), attention="xformers")


def test_a_switch_that_reaches_modules_counts_them() -> None:
    """A newer transformer, where the backend setter works."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=1,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    assert set_attention(model, "_native_math") == attention_modules(model) == 2
