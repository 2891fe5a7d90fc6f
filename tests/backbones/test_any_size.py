"""Families with `any_size`: pictures of another size mean what they mean to a policy that was loaded for that size."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.backbones import loading
from diffalign.predictions import Prediction
from tests.backbones.families import FAMILIES, PROMPTS, Family

TAKEN = {
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusion3Pipeline",
    "FluxPipeline",
}
ONE_OF_EACH = {family.pipeline_class: family for family in reversed(FAMILIES) if family.pipeline_class in TAKEN}


def test_which_families_take_any_size() -> None:
    found = set()
    for name, place in loading.FAMILIES.items():
        module, _, kind = place.partition(":")
        policy = getattr(importlib.import_module(f"diffalign.backbones.{module}"), kind)
        found |= {name} if policy.any_size and not policy.is_video else set()
    assert found == TAKEN


@pytest.mark.parametrize("family", ONE_OF_EACH.values(), ids=str)
@pytest.mark.slow
def test_another_size_is_the_one_of_a_policy_for_that_size(family: Family, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    family.save(folder)
    size = (2 * family.size[1], family.size[0])
    policies: list[Any] = [
        loading.load_policy(str(folder), size=one, options=family.options) for one in (family.size, size)
    ]
    pictures = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    embedded = policies[0].encode_prompts(PROMPTS)
    found = []
    for policy in policies:
        latents = policy.encode(pictures).mean
        assert tuple(latents.shape[1:]) == policies[1].latent_shape != policies[0].latent_shape
        flow = policy.prediction is Prediction.VELOCITY
        timesteps = torch.full((2,), 300, dtype=torch.float32 if flow else torch.long)
        with torch.no_grad():
            found.append((latents, policy.predict(latents, timesteps, embedded)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
