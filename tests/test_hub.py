"""What only the Hub can show; run when asked for, with `make test-all`."""

from __future__ import annotations

import pytest

from diffalign.backbones import inspect_model
from diffalign.predictions import Prediction


@pytest.mark.network
def test_a_hub_model_is_recognised_from_its_small_files() -> None:
    source = inspect_model("stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert source.family == "StableDiffusionPipeline"
    assert source.prediction is Prediction.EPSILON
