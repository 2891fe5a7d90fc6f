from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from diffusers.quantizers import quantization_config as diffusers_settings

from diffalign.backbones import LoRA, load_policy
from diffalign.cli import cli
from diffalign.quantization import BYTES_PER_WEIGHT, PACKAGES, check_quantization, quantization_config

MISSING = [kind for kind, package in PACKAGES.items() if importlib.util.find_spec(package) is None]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if both packages were there."""
    find = importlib.util.find_spec

    def found(name: str, package: str | None = None) -> Any:
        known = name in PACKAGES.values()
        return importlib.machinery.ModuleSpec(name, None) if known else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", found)


@pytest.fixture
def bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version of it, which is all that its configuration asks for."""
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.46.0" if name == "bitsandbytes" else version(name)
    )


@pytest.mark.parametrize("kind", MISSING)
def test_a_missing_package_is_one_line_with_its_name(kind: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^model.quantization: {kind} needs {PACKAGES[kind]}, .*pip install"
    ) as error:
        check_quantization(kind, "cpu")
    assert "\n" not in str(error.value)


def test_unknown_kinds_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown kind 'int3' \(available: nf4, int8\)"):
        check_quantization("int3", "cuda")


@pytest.mark.usefixtures("installed")
def test_four_bits_need_a_gpu() -> None:
    with pytest.raises(ValueError, match="nf4 needs a CUDA GPU, and this run is on 'cpu'"):
        check_quantization("nf4", "cpu")
    check_quantization("nf4", "cuda:1")
    check_quantization("int8", "cpu")


def test_quantized_weights_alone_cannot_be_trained(tiny_pipeline: Path) -> None:
    with pytest.raises(ValueError, match=r"quantized weights cannot be trained; add adapters with model\.lora"):
        load_policy(str(tiny_pipeline), train=True, quantization="int8")


@pytest.mark.parametrize("kind", MISSING)
def test_nothing_is_loaded_before_the_refusal(kind: Any, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers.StableDiffusionPipeline.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=f"needs {PACKAGES[kind]}"):
        load_policy(str(tiny_pipeline), lora=LoRA(), train=True, quantization=kind)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.lora=null", "model.quantization=nf4"],
            "error: model.quantization: quantized weights cannot be",
        ),
        (["model.quantization=int4"], "error: config key 'model.quantization': Input should be 'nf4' or 'int8'"),
    ],
)
def test_the_command_line_refuses_in_one_line(overrides: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["train", "configs/demo.yaml", f"output_dir={tmp_path}/run", *overrides])
    assert result.exit_code == 2
    assert result.output.startswith(message)
    assert result.output.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("bitsandbytes")
def test_nf4_is_what_the_paper_trains_with() -> None:
    config = quantization_config("nf4", ("transformer", "transformer_2"), torch.bfloat16)
    assert set(config.quant_mapping) == {"transformer", "transformer_2"}
    settings = config.quant_mapping["transformer"].to_dict()
    assert settings["load_in_4bit"] is True
    assert settings["bnb_4bit_quant_type"] == "nf4"
    assert settings["bnb_4bit_use_double_quant"] is True
    assert settings["bnb_4bit_compute_dtype"] == "bfloat16"
    assert config._resolve_quant_config(is_diffusers=True, module_name="vae") is None


@pytest.mark.usefixtures("bitsandbytes")
def test_int8_takes_torchaos_weight_only_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torchao: a package of that name whose config class diffusers accepts."""
    quantization_config("nf4", ("unet",), torch.bfloat16)  # all that asks once for torchao has asked
    torchao, quantization, api = (
        ModuleType(f"torchao{part}") for part in ("", ".quantization", ".quantization.quant_api")
    )

    class AOBaseConfig:
        pass

    class Int8WeightOnlyConfig(AOBaseConfig):
        pass

    api.AOBaseConfig = AOBaseConfig  # type: ignore[attr-defined]
    quantization.Int8WeightOnlyConfig = Int8WeightOnlyConfig  # type: ignore[attr-defined]
    for module in (torchao, quantization, api):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(diffusers_settings, "is_torchao_version", lambda *_: False)
    config = quantization_config("int8", ("unet",), torch.bfloat16)
    assert isinstance(config.quant_mapping["unet"].quant_type, Int8WeightOnlyConfig)


def test_four_bits_with_their_constants() -> None:
    """Section 3 of the paper: 8/64 + 32/(64 * 256) bits of constants per weight."""
    assert BYTES_PER_WEIGHT["nf4"] * 8 == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(bool(MISSING), reason="needs bitsandbytes and torchao")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_adapters_train_over_quantized_weights(kind: Any, tiny_pipeline: Path, batches: Any) -> None:
    from diffalign.trainers.diffusion_dpo import DiffusionDPO

    policy: Any = load_policy(
        str(tiny_pipeline), lora=LoRA(rank=2), train=True, dtype=torch.bfloat16, device="cuda", quantization=kind
    )
    trainer = DiffusionDPO(policy, beta=500.0)
    output = trainer.loss(batches(4).to("cuda"))
    output.loss.backward()
    assert all(p.grad is not None and p.dtype == torch.float32 for p in policy.trainable_parameters())
