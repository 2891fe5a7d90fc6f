"""`doctor`: complete, aligned, quick, and honest about what is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from diffalign import doctor
from diffalign.attention import KERNELS


@pytest.fixture(scope="module")
def info() -> dict:
    return doctor.collect()


def test_everything_is_there_and_plain_data(info: dict) -> None:
    assert json.loads(json.dumps(info)) == info
    assert info["packages"]["torch"] == metadata.version("torch")
    assert info["devices"][-1]["name"] == "cpu"
    assert info["devices"][-1]["memory_gib"] > 0.5
    assert len(info["devices"]) >= 1 + torch.cuda.device_count()
    assert info["attention"][0]["name"] == "native"
    assert info["attention"][0]["missing"] == []
    assert {d["name"] for d in info["disk"]} == {"output folder", "Hub cache"}
    assert set(info["assets"]) == {"pipeline", "scorer"}


def test_text_is_aligned_and_has_a_command_for_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = metadata.version

    def without(name: str) -> str:
        if name in ("wandb", "xformers", "peft"):
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", without)
    text = doctor.render(doctor.collect(tmp_path / "not" / "yet"))
    assert "missing wandb: pip install 'diffalign[wandb]'" in text
    assert "pip install 'diffalign[xformers]'" in text
    assert "MISSING: pip install peft" in text
    assert str(tmp_path / "not" / "yet") in text
    assert all(line == line.rstrip() for line in text.splitlines())
    packages = text.split("packages\n")[1].split("\n\n")[0].splitlines()
    assert len(packages) == len(doctor.PACKAGES)
    column = packages[1].index(real("torch"))
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in packages)


def test_attention_that_needs_cuda_says_so_without_one() -> None:
    row = ("flash", "flash-attn", "pip install flash-attn", True, "some")
    there = doctor._attention(*row[:1], "numpy", *row[2:], cuda=True)
    assert there["missing"] == []
    assert there["version"] == metadata.version("numpy")
    assert doctor._attention(*row[:1], "numpy", *row[2:], cuda=False)["missing"] == ["a CUDA device"]
    nothing = doctor._attention(*row[:1], "no-such-package-here", *row[2:], cuda=False)
    assert nothing["missing"] == ["no-such-package-here", "a CUDA device"]


def test_pytorchs_kernels_are_named_with_what_they_need() -> None:
    rows = {row[0]: doctor._attention(*row, cuda=False) for row in doctor.ATTENTION}
    assert rows.keys() >= KERNELS.keys()
    assert [name for name in KERNELS if not rows[name]["missing"]] == ["_native_flash", "_native_math"]
    assert all(rows[name]["reaches"].startswith("every model") for name in KERNELS)


def test_assets_are_looked_for_in_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.resources, "files", lambda package: tmp_path)
    folder = tmp_path / "assets" / "scorer"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert "MISSING *.safetensors" in doctor._asset("scorer", doctor.ASSETS["scorer"])
    (folder / "model.safetensors").write_bytes(bytes(1_500_000))
    assert doctor._asset("scorer", doctor.ASSETS["scorer"]) == "present, 1.5 MB"


@pytest.mark.slow
def test_heavy_packages_stay_unimported() -> None:
    code = (
        "import sys; from diffalign import doctor; doctor.render(doctor.collect());"
        "print([m for m in ('diffusers', 'transformers', 'open_clip', 'datasets', 'wandb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
