"""What is special to the legacy text-to-video UNet: adapters without diffusers' methods, and their file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffalign.backbones import LoRA, load_policy
from diffalign.backbones.base import LORA_FILE
from tests.backbones.families.text_to_video import save_tiny

pytestmark = pytest.mark.slow  # as those of all families but the first ones

FRAMES = 3


def load(folder: Path, **options: Any) -> Any:
    return load_policy(str(folder), **{"num_frames": FRAMES, **options})


def move_away(policy: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("text_to_video") / "pipeline")


@pytest.fixture(scope="module")
def arguments(folder: Path) -> tuple[Any, ...]:
    latents = torch.randn(1, 4, FRAMES, 4, 4, generator=torch.Generator().manual_seed(0))
    return latents, torch.tensor([500]), load(folder).encode_prompts(["a red circle"])


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A policy with alpha and targets of its own, and where it was saved."""
    policy = load(folder, lora=LoRA(rank=2, alpha=6.0, target_modules=("to_q", "to_v"), use_rslora=True), train=True)
    move_away(policy)
    saved = tmp_path_factory.mktemp("trained")
    policy.save_trained(saved)
    return policy, saved


def test_the_defaults_are_the_published_pipelines(folder: Path) -> None:
    policy = load(folder, num_frames=None)
    assert (policy.guidance_scale, policy.num_inference_steps, policy.num_frames) == (9.0, 50, 16)


def test_frames_see_each_other(folder: Path, arguments: tuple[Any, ...]) -> None:
    policy, (latents, timesteps, conditioning) = load(folder), arguments
    changed = latents.clone()
    changed[:, :, 2] += 1
    with torch.no_grad():
        one, other = (policy.predict(x, timesteps, conditioning) for x in (latents, changed))
    assert not torch.allclose(one[:, :, 0], other[:, :, 0], atol=1e-4)


def test_all_attention_gets_adapters_and_the_switch_reaches_every_one(folder: Path, arguments: tuple[Any, ...]) -> None:
    policy = load(folder, lora=LoRA(rank=2), train=True)
    layers = [m for m in policy.denoiser.modules() if isinstance(m, BaseTunerLayer)]
    assert len(layers) == sum(n.endswith((".to_q", ".to_k", ".to_v", ".to_out.0")) for n, _ in _plain(folder))
    with policy.adapter_off():
        assert all(layer.disable_adapters for layer in layers)
        assert not any(p.requires_grad for p in policy.trainable_parameters())
    assert not any(layer.disable_adapters for layer in layers)
    assert all(p.requires_grad for p in policy.trainable_parameters())
    assert {n for n, p in policy.denoiser.named_parameters() if p.requires_grad} == {
        n for n, _ in policy.named_trainable()
    }


def _plain(folder: Path) -> list[tuple[str, Any]]:
    return list(load(folder).denoiser.named_modules())


def test_the_file_says_what_the_adapter_is(trained: tuple[Any, Path]) -> None:
    with safe_open(trained[1] / LORA_FILE, framework="pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (settings["unet.r"], settings["unet.lora_alpha"], settings["unet.use_rslora"]) == (2, 6.0, True)
    assert settings["unet.target_modules"] == ["to_q", "to_v"]
    assert all(n.startswith("unet.") and ".lora_" in n for n in load_file(trained[1] / LORA_FILE))


def test_a_run_goes_on_from_the_file(folder: Path, trained: tuple[Any, Path], arguments: tuple[Any, ...]) -> None:
    """Into a policy that has another adapter already, as resuming does; the reference stays the base."""
    policy, saved = trained
    again = load(folder, lora=LoRA(rank=4), train=True)
    again.load_trained(saved)
    assert again.lora == LoRA(2, 6.0, ("to_q", "to_v"), use_rslora=True)
    assert [n for n, _ in again.named_trainable()] == [n for n, _ in policy.named_trainable()]
    assert all(p.requires_grad for p in again.trainable_parameters())
    with torch.no_grad():
        assert torch.equal(again.predict(*arguments), policy.predict(*arguments))
        assert torch.equal(again.frozen().predict(*arguments), load(folder).predict(*arguments))
        assert not torch.allclose(again.predict(*arguments), again.frozen().predict(*arguments), atol=1e-4)


def test_files_that_say_nothing_or_do_not_fit_are_refused(
    folder: Path, trained: tuple[Any, Path], tmp_path: Path
) -> None:
    path = trained[1] / LORA_FILE
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, tmp_path / LORA_FILE)
    with pytest.raises(ValueError, match="expected rank and layers in the file's metadata"):
        load(folder, adapter=tmp_path)
    first = sorted(tensors)[0]
    save_file({name: t for name, t in tensors.items() if name != first}, tmp_path / LORA_FILE, metadata=metadata)
    with pytest.raises(ValueError, match="does not fit this UNet; 1 layers differ"):
        load(folder, adapter=tmp_path)
    with pytest.raises(ValueError, match=r"expected pytorch_lora_weights\.safetensors or a unet folder"):
        load(folder, adapter=tmp_path / "nothing")


def test_the_published_size() -> None:
    """ali-vilab/text-to-video-ms-1.7b: a UNet of 1.41 B (5.6 GB in float32), counted on the meta device."""
    from diffusers import UNet3DConditionModel

    with torch.device("meta"):
        unet = UNet3DConditionModel(
            sample_size=32,
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            cross_attention_dim=1024,
            attention_head_dim=64,
        )
    assert sum(p.numel() for p in unet.parameters()) == pytest.approx(1.41e9, rel=5e-3)
