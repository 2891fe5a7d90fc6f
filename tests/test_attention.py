"""Attention kernels: what a switch reaches, what then computes, and what is refused."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffalign.attention import KERNELS, _reason, check_kernel, set_attention
from diffalign.backbones import LoRA, load_policy
from diffalign.checkpointing import is_kept, recompute_activations
from tests.backbones.families import FAMILIES, Family
from tests.backbones.families.sd import tiny_unet
from tests.operations import FLASH, FLASH_BACKWARD, PRODUCT, Operations

ONE_OF_EACH = {family.pipeline_class: family for family in reversed(FAMILIES)}.values()


def attention_modules(module: nn.Module) -> int:
    return sum(hasattr(m, "processor") for m in module.modules())


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Of `tiny_unet`: latents, timesteps, and embeddings of five tokens."""
    draw = torch.Generator().manual_seed(0)
    latents, hidden = torch.randn(2, 4, 4, 4, generator=draw), torch.randn(2, 5, 16, generator=draw)
    return latents, torch.tensor([3.0, 700.0]), hidden


@pytest.fixture
def unet() -> Any:
    torch.manual_seed(0)
    return tiny_unet().eval()


def test_native_attention_counts_every_module(tiny_pipeline: Path) -> None:
    policy: Any = load_policy(str(tiny_pipeline))
    assert set_attention(policy.denoiser, "native") == attention_modules(policy.denoiser) == 8


def test_attention_switches_that_reach_nothing_are_refused(tiny_pipeline: Path) -> None:
    """Of packages' kernels the older UNets know none, and say nothing about it."""
    with pytest.raises(ValueError, match="'flex' reached none of the attention modules of UNet2DCondition"):
        load_policy(str(tiny_pipeline), attention="flex")
    with pytest.raises(ValueError, match="found no attention module in Linear"):
        set_attention(nn.Linear(1, 1), "native")
    for name in ("flash", "_native_math"):
        with pytest.raises(ValueError, match=f"'{name}' reached none of the attention modules of Linear"):
            set_attention(nn.Linear(1, 1), name)


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


def test_switching_one_model_leaves_others_alone() -> None:
    """diffusers' own setter would also change what models do that nobody switched."""
    from diffusers import FluxTransformer2DModel
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

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
    before = Registry.get_active_backend()
    assert set_attention(model, "_native_math") == attention_modules(model) == 2
    assert Registry.get_active_backend() == before


# --- kernels of PyTorch's own function -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", ONE_OF_EACH, ids=lambda family: str(family.name))
def test_a_kernel_reaches_what_it_says_in_every_family(family: Family, tmp_path: Path) -> None:
    """As many attentions take the kernel as were counted, and none takes another one."""
    video = {"num_frames": family.num_frames} if family.num_frames > 1 else {}
    policy: Any = load_policy(str(family.save(tmp_path / "pipeline")), size=family.size, **video)  # type: ignore[arg-type]
    latents, timesteps = torch.zeros(2, *policy.latent_shape), torch.tensor([200.0, 700.0])
    conditioning = policy.encode_prompts(["a red circle", "two"])

    def attend() -> Operations:
        with Operations() as watch, torch.no_grad():
            policy.predict(latents, timesteps, conditioning)
        return watch

    fused = attend()[FLASH]
    reached = set_attention(policy.denoiser, "_native_math")
    # Mochi's attention takes row after row, and its pooling of the text calls PyTorch by itself.
    rows, apart = (2, 1) if family.name == "mochi" else (1, 0)
    assert attend()[FLASH] == apart
    assert fused == rows * reached + apart
    assert set_attention(policy.denoiser, "_native_flash") == reached
    assert attend()[FLASH] == fused  # on a CPU with a mask, too


def test_the_second_name_takes_the_place_of_the_first(unet: Any) -> None:
    numbers = []
    for name, fused in (("_native_math", 0), ("_native_flash", 8), ("_native_math", 0)):
        assert set_attention(unet, name) == 8
        with Operations() as watch, torch.no_grad():
            numbers.append(unet(*inputs()).sample)
        assert watch[FLASH] == fused
    torch.testing.assert_close(numbers[0], numbers[1], rtol=1e-4, atol=1e-5)
    assert torch.equal(numbers[0], numbers[2])
    assert set_attention(unet, "native") == 8
    kind = type(tiny_unet().down_blocks[0].attentions[0].transformer_blocks[0].attn1.processor)
    assert type(unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.processor) is kind


def test_drawing_is_held_to_no_kernel(tiny_pipeline: Path) -> None:
    """It is done in float32, which the kernels of training may not know."""
    policy: Any = load_policy(str(tiny_pipeline), attention="_native_cudnn")
    assert policy.sample(["a"], [0], num_inference_steps=1).isfinite().all()
    latents = torch.zeros(1, *policy.latent_shape)
    with pytest.raises(ValueError, match="'_native_cudnn' has no kernel for torch.float32 on cpu"):
        policy.predict(latents, torch.tensor([3]), policy.encode_prompts(["a"]))


def test_processors_keep_name_kind_and_signature(unet: Any) -> None:
    before = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.processor
    kind, signature = type(before), inspect.signature(before.__call__)
    set_attention(unet, "_native_flash")
    processor = copy.deepcopy(unet).down_blocks[0].attentions[0].transformer_blocks[0].attn1.processor
    assert isinstance(processor, kind)
    assert type(processor).__name__ == kind.__name__
    assert inspect.signature(processor.__call__) == signature
    assert type(tiny_unet().down_blocks[0].attentions[0].transformer_blocks[0].attn1.processor) is kind


def test_sliced_attention_is_not_counted(unet: Any) -> None:
    """It computes with products of its own, which no kernel of PyTorch's function can replace."""
    unet.set_attention_slice("max")
    with pytest.raises(ValueError, match="'_native_math' reached none of the attention modules of UNet2DCondition"):
        set_attention(unet, "_native_math")


@pytest.mark.slow
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("how", [False, True, "selective"])
def test_recomputed_activations_take_the_same_kernel(tiny_pipeline: Path, lora: bool, how: Any) -> None:
    """Selective recomputation keeps what flash attention gives; PyTorch's own products it computes again."""
    runs = {}
    for name in ("_native_flash", "_native_math"):
        adapters = LoRA(rank=2) if lora else None
        policy: Any = load_policy(str(tiny_pipeline), lora=adapters, train=True, attention=name)
        recompute_activations(policy.denoiser, how)
        with Operations() as watch:
            policy.denoiser(*inputs()).sample.square().mean().backward()
        runs[name] = watch
    flash, math = runs["_native_flash"], runs["_native_math"]
    blocks = 8  # all attentions are in blocks that can be computed again
    assert flash[FLASH] == (2 * blocks if how is True else blocks)
    assert flash[FLASH_BACKWARD] == blocks
    assert flash[PRODUCT] == math[FLASH] == math[FLASH_BACKWARD] == 0
    assert math[PRODUCT] >= (8 if how else 6) * blocks
    assert is_kept(FLASH, ())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), [("_native_flash", "aot_eager"), ("_native_math", "eager")])
def test_compiled_attention_keeps_its_kernel_in_one_graph(name: str, backend: str) -> None:
    from diffusers.models.attention import BasicTransformerBlock

    block = BasicTransformerBlock(dim=8, num_attention_heads=2, attention_head_dim=4, cross_attention_dim=16).eval()
    _, _, hidden = inputs()
    arguments = (torch.linspace(-1, 1, 96).reshape(2, 6, 8), None, hidden)
    expected = block(*arguments)
    assert set_attention(block, name) == 2
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), expected, rtol=1e-4, atol=1e-5)
    with torch.profiler.profile() as profile:
        compiled(*arguments).sum().backward()
    found = {event.key: event.count for event in profile.key_averages()}
    fused = 2 if name == "_native_flash" else 0
    assert found.get("aten::_scaled_dot_product_flash_attention_for_cpu", 0) == fused
    assert found.get("aten::_scaled_dot_product_flash_attention_for_cpu_backward", 0) == fused
    assert (found.get("aten::bmm", 0) > 0) == (fused == 0)


# --- kernels that cannot run -----------------------------------------------------------------------------------------


def test_a_kernel_that_is_not_there_is_named(unet: Any) -> None:
    set_attention(unet, "_native_efficient")
    with pytest.raises(ValueError, match="attention: '_native_efficient' has no kernel for torch.float32 on cpu") as e:
        unet(*inputs())
    assert "it needs a CUDA device; use 'native'" in str(e.value)
    assert "\n" not in str(e.value)


def test_other_errors_stay_what_they_are(unet: Any) -> None:
    set_attention(unet, "_native_math")
    latents, timesteps, hidden = inputs()
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        unet(latents, timesteps, hidden[..., :3])


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_tried_before_anything_is_loaded(name: str) -> None:
    there = name in ("_native_flash", "_native_math")
    for dtype in (torch.float32, torch.bfloat16):
        if there:
            check_kernel(name, "cpu", dtype)
        else:
            with pytest.raises(ValueError, match=f"'{name}' has no kernel for {dtype} on cpu; it needs a CUDA device"):
                check_kernel(name, "cpu", dtype)
    check_kernel("native", "cpu", torch.float32)
    check_kernel("flash", "cpu", torch.float32)


def test_the_reason_is_that_of_the_kernel_that_was_asked_for() -> None:
    """The warnings of CUDA's path, in their order; a CPU gives none."""
    source = "(Triggered internally at /pytorch/aten/src/ATen/native/transformers/cuda/sdp_utils.cpp:1.)"
    warned = [
        f"Memory efficient kernel not used because: {source}",
        f"Memory Efficient attention has been runtime disabled. {source}",
        f"Flash attention kernel not used because: {source}",
        f"Expected query, key and value to all be of dtype: {{Half, BFloat16}}.\nGot float instead. {source}",
        f"CuDNN attention kernel not used because: {source}",
        f"cuDNN attention has been runtime disabled. {source}",
    ]
    expected = "Expected query, key and value to all be of dtype: {Half, BFloat16}. Got float instead"
    assert _reason("_native_flash", warned) == expected
    assert _reason("_native_efficient", warned) == "Memory Efficient attention has been runtime disabled"
    assert _reason("_native_cudnn", warned) == "cuDNN attention has been runtime disabled"
    assert _reason("_native_math", warned) == _reason("_native_flash", []) == ""
