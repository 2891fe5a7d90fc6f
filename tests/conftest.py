"""Shared fixtures: a tiny Stable Diffusion pipeline with random weights, saved in the published layout."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")

import pytest
import torch

torch.set_num_threads(1)


QUICK_FAMILIES = ("sd-epsilon", "sd3")
"""The others' contract is slow only because they are many."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker for a file, which builds its fixtures once; the contract test is shared out by family."""
    for item in items:
        family = getattr(item, "callspec", None) and item.callspec.params.get("tiny")  # type: ignore[attr-defined]
        if family is not None and str(family) not in QUICK_FAMILIES:
            item.add_marker(pytest.mark.slow)
        item.add_marker(pytest.mark.xdist_group(f"{item.path.name} {family or ''}"))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Tests reach no address but this machine's own."""
    if request.node.get_closest_marker("network"):
        return
    import socket

    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> object:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost", "::1"):
            raise RuntimeError(f"a test tried to reach {address}")
        return connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", guarded)


def save_tiny_pipeline(folder: Path, prediction_type: str = "epsilon") -> Path:
    """A two-level UNet on 4x4 latents, a two-level autoencoder, a one-layer text encoder; random weights."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from diffalign.shapes.networks import build_tokenizer

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=8,
    )
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny epsilon pipeline, 8x8 images."""
    return save_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "pipeline")


@pytest.fixture(scope="session")
def tiny_v_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny v-prediction pipeline."""
    return save_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "v_pipeline", "v_prediction")


def random_batch(
    count: int,
    *,
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] = (4, 4, 4),
    key: str = "batch",
    first: int = 0,
) -> Any:
    """Pairs `first` to `first + count - 1` of an endless random set; pair i is the same in every batch."""
    from diffalign.batches import Conditioning, PairBatch
    from diffalign.randomness import Draw

    draws = tuple(Draw(0, 0, f"{key}-{i}") for i in range(first, first + count))

    def stack(purpose: str, size: tuple[int, ...]) -> torch.Tensor:
        return torch.stack([draw.normal(purpose, size) for draw in draws]).to(dtype)

    return PairBatch(
        conditioning=Conditioning({"hidden": stack("prompt", (5, 16))}),
        chosen=stack("chosen", shape),
        rejected=stack("rejected", shape),
        weight=torch.ones(count),
        draws=draws,
    )


def move_away(policy: Any, scale: float = 0.05) -> None:
    """Changes the trained weights, so that the policy differs from its reference."""
    from diffalign.randomness import generator

    with torch.no_grad():
        for name, parameter in policy.named_trainable():
            noise = torch.randn(parameter.shape, generator=generator("move away", name), dtype=torch.float64)
            parameter.add_(scale * noise.to(parameter.dtype))


def double_policy(folder: Path, *, lora: Any = None, train: bool = True) -> Any:
    """A policy with everything in float64."""
    from diffusers import StableDiffusionPipeline

    from diffalign.backbones import inspect_model
    from diffalign.backbones.sd import StableDiffusionPolicy

    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float64, safety_checker=None)
    return StableDiffusionPolicy(pipeline, inspect_model(str(folder)), lora=lora, train=train)


@pytest.fixture(scope="session")
def batches() -> Callable[..., Any]:
    """`random_batch`, for tests that cannot import this file."""
    return random_batch


@pytest.fixture(scope="session")
def policies() -> Any:
    """`double_policy` and `move_away`, for tests that cannot import this file."""

    class Policies:
        double = staticmethod(double_policy)
        move_away = staticmethod(move_away)

    return Policies
