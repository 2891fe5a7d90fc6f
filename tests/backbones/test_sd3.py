"""What is special to Stable Diffusion 3: a latent shift, the sampler's shift, T5 that may be absent, three sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel

from diffalign.backbones import load_policy
from diffalign.predictions import Prediction
from tests.backbones.families.base import PROMPTS
from tests.backbones.families.sd3 import save_tiny
from tests.gpu.full_size import SD35_MEDIUM

SD3_MEDIUM = {**SD35_MEDIUM, "pos_embed_max_size": 192, "dual_attention_layers": (), "qk_norm": None}
SD35_LARGE = {
    **SD3_MEDIUM,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}


@pytest.fixture(scope="module", params=[True, False], ids=["t5", "without-t5"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The plain model; no test may change it."""
    return load_policy(str(save_tiny(tmp_path_factory.mktemp("sd3") / "pipeline", t5=request.param)))


def test_latents_are_shifted_before_they_are_scaled(base: Any) -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    vae = base.pipeline.vae
    with torch.no_grad():
        plain = vae.encode(images * 2 - 1).latent_dist.mean
    assert (vae.config.shift_factor, vae.config.scaling_factor) == (0.0609, 1.5305)
    assert torch.allclose(base.encode(images).mean, (plain - 0.0609) * 1.5305, atol=1e-6)


def test_the_schedule_is_the_samplers(base: Any) -> None:
    assert base.prediction is Prediction.VELOCITY
    assert base.schedule.shift == 3.0
    assert float(base.schedule.timestep_of_index(torch.tensor([500]))) == pytest.approx(750.0)


@pytest.mark.slow
def test_without_t5_its_tokens_are_zeros(base: Any) -> None:
    hidden = base.encode_prompts(PROMPTS).tensors["hidden"]
    assert hidden.shape[:2] == (len(PROMPTS), 77 + 256) or hidden.shape[1] == base.max_tokens + 256
    tail = hidden[:, -256:]
    assert bool(tail.any()) == (base.pipeline.text_encoder_3 is not None)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [(SD3_MEDIUM, 2_028_328_000), (SD35_MEDIUM, 2_243_171_520), (SD35_LARGE, 8_056_627_520)],
    ids=["sd3-medium", "sd35-medium", "sd35-large"],
)
def test_published_sizes(config: dict[str, Any], parameters: int) -> None:
    with torch.device("meta"):
        denoiser = SD3Transformer2DModel(**config)
    assert sum(p.numel() for p in denoiser.parameters()) == parameters
