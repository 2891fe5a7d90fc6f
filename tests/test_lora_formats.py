"""LoRA files in other programs' layouts: diffusers' own loaders and converters are the judges."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.backbones import LoRA, load_policy
from diffalign.backbones.base import LORA_FILE
from diffalign.lora_formats import (
    PIPELINES,
    Adapter,
    export_lora,
    import_lora,
    lora_file,
    pipeline_class,
    read_adapters,
    write_adapters,
)
from tests.backbones.families import flux, sd, sdxl
from tests.backbones.families.base import PROMPTS, save
from tests.lora_files import content, delta, random_adapters

pytestmark = pytest.mark.slow

RANK, ALPHA = 3, 5.0
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
DOUBLE_BLOCK = tuple(
    f"transformer_blocks.0.{layer}"
    for layer in (
        *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")),
        *(f"attn.add_{name}_proj" for name in "qkv"),
        "norm1.linear",
        "norm1_context.linear",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )
)


def save_sdxl(folder: Path) -> Path:
    """The tiny SDXL with the published arrangement of levels and layers, on which the original numbers depend."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl.save_tiny(folder / "small"), add_watermarker=False)
    config = dict(pipeline.unet.config)
    config |= {
        "sample_size": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 8, 16),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (2, 2, 4),
    }
    torch.manual_seed(0)
    pipeline.unet = UNet2DConditionModel(**{k: v for k, v in config.items() if not k.startswith("_")})
    return save(pipeline, folder / "pipeline")


FAMILIES: dict[str, tuple[Any, tuple[str, ...], str, dict[str, Any]]] = {
    # family: how to save it, layers that get adapters, its pipeline, arguments of its call
    "sd": (
        partial(sd.save_tiny, prediction_type="epsilon"),
        ATTENTION,
        "StableDiffusionPipeline",
        {"height": 8, "width": 8},
    ),
    "sdxl": (
        save_sdxl,
        ATTENTION,
        "StableDiffusionXLPipeline",
        {"height": 8, "width": 8},
    ),
    "flux": (
        partial(flux.save_tiny, dev=True),
        DOUBLE_BLOCK,
        "FluxPipeline",
        {"height": 16, "width": 16, "max_sequence_length": 64},
    ),
}


@pytest.fixture(scope="module", params=["sd", pytest.param("sdxl", marks=pytest.mark.slow), "flux"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Made(dict[str, Path]):
    """Folders by family, made when they are asked for."""

    def __init__(self, make: Callable[[str], Path]) -> None:
        super().__init__()
        self.make = make

    def __missing__(self, family: str) -> Path:
        self[family] = self.make(family)
        return self[family]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(lambda name: FAMILIES[name][0](tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="module")
def runs(models: Made, tmp_path_factory: pytest.TempPathFactory, policies: Any) -> Made:
    """An adapter of each family as a run leaves it."""

    def make(name: str) -> Path:
        policy: Any = load_policy(str(models[name]), lora=LoRA(RANK, ALPHA, FAMILIES[name][1]), train=True)
        policies.move_away(policy, 0.3)
        folder = tmp_path_factory.mktemp(f"run-{name}")
        policy.save_trained(folder)
        config = {"model": {"pretrained_model_name_or_path": str(models[name])}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        return folder

    return Made(make)


@cache
def plain_pipeline(model: Path, family: str) -> Any:
    """The diffusers pipeline, without a line of this project."""
    import diffusers

    pipeline = getattr(diffusers, FAMILIES[family][2]).from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(model: Path, family: str, lora: Path | None = None) -> Tensor:
    """One picture by diffusers alone."""
    pipeline = plain_pipeline(model, family)
    pipeline.unload_lora_weights()
    if lora is not None:
        pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    arguments = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt", **FAMILIES[family][3]}
    picture: Tensor = pipeline(PROMPTS[1], generator=torch.Generator().manual_seed(1), **arguments).images
    return picture


# --- diffusers draws the same picture --------------------------------------------------------------------------------


def test_a_kohya_file_draws_the_same_picture(family: str, models: Made, runs: Made, tmp_path: Path) -> None:
    exported = export_lora(runs[family], tmp_path / "kohya.safetensors")
    assert all(key.startswith("lora_unet_") for key in load_file(exported))
    ours = draw(models[family], family, runs[family] / LORA_FILE)
    assert (ours - draw(models[family], family)).abs().max() > 1e-3, "the adapter changes nothing"
    torch.testing.assert_close(draw(models[family], family, exported), ours, atol=2e-6, rtol=0)


def test_a_comfyui_file_of_flux_draws_the_same_picture(models: Made, runs: Made, tmp_path: Path) -> None:
    exported = export_lora(runs["flux"], tmp_path / "comfy.safetensors", "comfyui")
    assert "diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight" in load_file(exported)
    ours = draw(models["flux"], "flux", runs["flux"] / LORA_FILE)
    torch.testing.assert_close(draw(models["flux"], "flux", exported), ours, atol=2e-6, rtol=0)


def test_a_file_that_came_back_draws_the_same_picture_here(
    family: str, models: Made, runs: Made, tmp_path: Path
) -> None:
    back = import_lora(export_lora(runs[family], tmp_path / "kohya.safetensors"), tmp_path / "back")
    policy = load_policy(str(models[family]), adapter=back.parent)
    assert policy.lora == replace(policy.lora, rank=RANK, alpha=ALPHA)  # type: ignore[attr-defined]
    ours = draw(models[family], family, runs[family] / LORA_FILE)
    torch.testing.assert_close(draw(models[family], family, back), ours, atol=2e-6, rtol=0)


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
def test_there_and_back(family: str, layout: Any, runs: Made, tmp_path: Path) -> None:
    """Same keys, same tensors bit for bit, same alpha and rank. FLUX.1 comes back through its fused layers."""
    source = runs[family] / LORA_FILE
    if family == "sd" and layout == "comfyui":  # a UNet whose first up block attends has no original name
        pytest.skip("the tiny UNet has one layer per block, so its layers have no original names")
    exported = export_lora(source, tmp_path / "there.safetensors", layout, family="flux" if family == "flux" else None)
    back = import_lora(exported, tmp_path / "back")
    (before, first), (after, second) = content(source), content(back)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key
    prefix = "transformer" if family == "flux" else "unet"
    old, new = json.loads(first["lora_adapter_metadata"]), json.loads(second["lora_adapter_metadata"])
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):
        assert old[f"{prefix}.{key}"] == new[f"{prefix}.{key}"]
    assert new[f"{prefix}.lora_alpha"] == ALPHA
    assert new[f"{prefix}.r"] == RANK


def test_kohya_again_is_bit_equal(family: str, runs: Made, tmp_path: Path) -> None:
    """A kohya file read and written again, through the diffusers layout, is the same file."""
    first = export_lora(runs[family], tmp_path / "first.safetensors")
    back = import_lora(first, tmp_path)
    second = export_lora(back, tmp_path / "second.safetensors", family=family)  # type: ignore[arg-type]
    before, after = load_file(first), load_file(second)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert {float(v) for k, v in before.items() if k.endswith(".alpha")} <= {ALPHA, 3 * ALPHA}


def test_rank_stabilised_scale_survives(models: Made, tmp_path: Path, policies: Any) -> None:
    """alpha / sqrt(rank) becomes the alpha that gives the same factor divided by the rank."""
    lora = LoRA(4, 6.0, ATTENTION, use_rslora=True)
    policy: Any = load_policy(str(models["sd"]), lora=lora, train=True)
    policies.move_away(policy, 0.3)
    policy.save_trained(tmp_path)
    exported = export_lora(tmp_path, tmp_path / "kohya.safetensors", family="sd")
    assert {float(v) for k, v in load_file(exported).items() if k.endswith(".alpha")} == {12.0}
    ours = draw(models["sd"], "sd", tmp_path / LORA_FILE)
    torch.testing.assert_close(draw(models["sd"], "sd", exported), ours, atol=2e-6, rtol=0)


@pytest.mark.parametrize("family", ["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_every_kind_of_layer_with_different_alphas_and_ranks(family: Any, models: Made, tmp_path: Path) -> None:
    """diffusers would take one alpha for all attention layers of a kohya file, so one is written; the products stay."""
    unet = load_policy(str(models[family])).denoiser
    inner = r".*\.(to_[qkv]|to_out\.0|proj_in|proj_out|proj|net\.2|conv1|conv2|conv_shortcut|time_emb_proj|conv)"
    weights = {n.removesuffix(".weight"): p for n, p in unet.named_parameters() if n.endswith(".weight")}
    layers = {f"unet.{n}": tuple(p.shape) for n, p in weights.items() if re.fullmatch(inner, n)}
    kinds = {name.rpartition(".")[2] for name in layers}
    assert kinds >= {"to_q", "0", "proj_in", "proj", "2", "conv1", "conv2", "time_emb_proj", "conv_shortcut", "conv"}
    names = list(layers)
    half = len(names) // 2
    adapters = random_adapters({n: layers[n] for n in names[:half]}, rank=2, alpha=2.0)
    adapters |= random_adapters({n: layers[n] for n in names[half:-1]}, rank=3, alpha=0.75)
    adapters |= random_adapters({names[-1]: layers[names[-1]]}, rank=2, alpha=8.0)
    files = {}
    for layout in ("diffusers", "kohya"):
        tensors, metadata = write_adapters(adapters, layout, family)
        files[layout] = tmp_path / f"{layout}.safetensors"
        save_file({k: 0.3 * v if "up." in k or "_B." in k else v for k, v in tensors.items()}, files[layout], metadata)
        back = read_adapters(tensors, metadata)
        assert back.keys() == adapters.keys()
        for name, adapter in back.items():
            torch.testing.assert_close(delta(adapter), delta(adapters[name]), rtol=1e-6, atol=1e-6)
    ours = draw(models[family], family, files["diffusers"])
    assert (ours - draw(models[family], family)).abs().max() > 1e-3
    torch.testing.assert_close(draw(models[family], family, files["kohya"]), ours, atol=1e-5, rtol=0)


def test_comfyui_file_of_a_unet_names_the_original_layers(tmp_path: Path, runs: Made) -> None:
    exported = load_file(export_lora(runs["sdxl"], tmp_path / "comfy.safetensors", "comfyui"))
    kohya = load_file(export_lora(runs["sdxl"], tmp_path / "kohya.safetensors", "kohya"))
    assert "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.lora_down.weight" in exported
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight" in kohya
    for key, tensor in exported.items():
        layer, _, rest = key.removeprefix("diffusion_model.").partition(".lora_")
        spelled = f"lora_unet_{layer.replace('.', '_')}.lora_{rest}" if rest else ""
        assert torch.equal(kohya[spelled], tensor) if rest else key.endswith(".alpha")


# --- errors ----------------------------------------------------------------------------------------------------------


def test_what_is_not_understood_is_refused() -> None:
    pair = {"lora_down.weight": torch.ones(2, 4), "lora_up.weight": torch.ones(4, 2)}

    def named(*layers: str) -> dict[str, Tensor]:
        return {f"{layer}.{suffix}": tensor for layer in layers for suffix, tensor in pair.items()}

    layer = "lora_unet_mid_block_attentions_0_proj_in"
    for tensors, message in (
        ({**named(layer), f"{layer}.dora_scale": torch.ones(4)}, "DoRA"),
        (named(layer, "lora_te_text_model_encoder_layers_0_mlp_fc1"), "2 tensors belong to text encoders"),
        ({**named(layer), f"{layer}.hada_w1_a": torch.ones(4)}, "is not understood"),
        ({f"{layer}.lora_up.weight": torch.ones(4, 2)}, "has only up"),
        (named("lora_unet_down_blocks_0_motion_modules_0_proj_in"), "unknown layer"),
        (named("lora_unet_double_blocks_0_linear1"), "unknown layer 'double_blocks.0.linear1'; expected one of FLUX.1"),
        ({**named(layer), f"{layer}.lora_up.weight": torch.ones(4, 3)}, "has ranks 2 and 3"),
        ({}, "holds no tensors"),
    ):
        with pytest.raises(ValueError, match=message):
            read_adapters(tensors)
    adapter = Adapter(pair["lora_down.weight"], pair["lora_up.weight"], 1.0)
    with pytest.raises(ValueError, match="no kohya name is known"):
        write_adapters({"unet.down_blocks.0.motion_modules.0.proj_in": adapter}, "kohya", "sd")
    with pytest.raises(ValueError, match="no original name is known for the layer 'x_embedder'"):
        write_adapters({"transformer.x_embedder": adapter}, "kohya", "flux")
    with pytest.raises(ValueError, match="is none of the family sd"):
        write_adapters({"transformer.x_embedder": adapter}, "kohya", "sd")


def test_files_that_cannot_be_read_or_written(tmp_path: Path, runs: Made) -> None:
    source, out = runs["sd"], tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match="unknown layout 'koya'"):
        export_lora(source, out, "koya")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown family 'sd9'"):
        export_lora(source, out, family="sd9")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"holds no {LORA_FILE}"):
        export_lora(tmp_path, out)
    with pytest.raises(ValueError, match="does not exist"):
        export_lora(tmp_path / "none.safetensors", out)
    with pytest.raises(ValueError, match="is the file that is read"):
        export_lora(source, source / LORA_FILE, "diffusers")
    with pytest.raises(ValueError, match=r"no \*\.safetensors file name"):
        export_lora(source, tmp_path / "lora.pt")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        export_lora(broken, out)
    pickle = tmp_path / "lora.bin"
    pickle.write_bytes(b"")
    with pytest.raises(ValueError, match="pickle files can run code"):
        lora_file(pickle)
    assert not out.exists()


def test_the_family_is_told_by_the_run_or_its_layers(tmp_path: Path, runs: Made) -> None:
    alone = {name: tmp_path / f"{name}.safetensors" for name in FAMILIES}
    for name, path in alone.items():
        path.write_bytes((runs[name] / LORA_FILE).read_bytes())
    for name in ("sd", "sdxl"):
        out = export_lora(alone[name], tmp_path / f"{name}-kohya.safetensors")
        assert load_file(out).keys() == load_file(export_lora(runs[name], tmp_path / "run.safetensors")).keys()
    with pytest.raises(ValueError, match="say it with family"):
        export_lora(alone["flux"], tmp_path / "out.safetensors")
    other = tmp_path / "other"
    (other / "scheduler").mkdir(parents=True)
    (other / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    (other / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}')
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"pretrained_model_name_or_path": str(other)}}))
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline have names in the diffusers layout only"):
        export_lora(alone["flux"], tmp_path / "out.safetensors")
    assert set(PIPELINES.values()) == {"sd", "sdxl", "sdxl-refiner", "flux"}


def test_pipeline_class_of_a_hub_model_comes_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training left it there; nothing is asked of the Hub, whether the model is there or not."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    repo = tmp_path / "models--ada--model"
    (repo / "snapshots" / "abc").mkdir(parents=True)
    (repo / "snapshots" / "abc" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    assert pipeline_class("ada/model") == "FluxPipeline"
    assert pipeline_class("ada/other") is None
    assert pipeline_class("diffalign://shapes") == "StableDiffusionPipeline"
    assert pipeline_class(str(tmp_path)) is None
