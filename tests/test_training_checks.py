"""What a run asks for and cannot have is refused with one line before anything loads."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from diffalign import commands, configured
from diffalign.attention import check_attention
from diffalign.config import ConfigError, load_config
from diffalign.predictions import Prediction
from diffalign.training_checks import check_training

CONFIG = "configs/demo.yaml"


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Hides installed packages."""
    find = importlib.util.find_spec

    def hide(*names: str) -> None:
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: None if name in names else find(name, *rest)
        )

    return hide


@pytest.mark.parametrize(
    ("override", "hidden", "message"),
    [
        ("trainer={name: d3po}", (), "trainer 'd3po' learns from the model's own images: config section 'rollout' is"),
        (
            "training.report_to=tensorboard",
            ("tensorboard", "tensorboardX"),
            "'tensorboard' needs tensorboard; run `pip",
        ),
        (
            "training={fused_optimizer: true, mixed_precision: fp16}",
            (),
            "training.fused_optimizer hides which steps fp16's gradient scaler skips; leave it out, or use bf16",
        ),
        ("training.report_to=wandb", ("wandb",), "'wandb' needs wandb; run `pip install 'diffalign\\[wandb\\]'`"),
        ("training.optimizer=adamw_8bit", ("bitsandbytes",), "needs bitsandbytes; run `pip install"),
        ("training={optimizer: adafactor, fused_optimizer: true}", (), "fused_optimizer is for optimizer 'adamw'"),
        ("training.lr_scheduler=cosin", (), "'training.lr_scheduler': Input should be 'constant'"),
        (
            "trainer.timestep_sampling=logit_normal",
            (),
            "'logit_normal' is for a flow, and this model is a discrete chain",
        ),
        ("model.attention=xformers", ("xformers",), "xformers is not installed; run `pip install"),
        ("model.attention=flsh", (), "unknown backend 'flsh'; did you mean 'flash'"),
    ],
)
def test_a_run_is_refused_before_anything_loads(
    override: str, hidden: tuple[str, ...], message: str, without: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(*hidden)
    monkeypatch.setattr(configured, "load_policy", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError, match=message) as caught:
        commands.train(CONFIG, [f"output_dir={tmp_path / 'run'}", override])
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_graphs_that_micro_batches_would_overwrite_are_refused() -> None:
    words = ["model.torch_compile=true", "model.torch_compile_mode=reduce-overhead"]
    twice = "training.gradient_accumulation_steps=2"
    with pytest.raises(ConfigError, match="model.torch_compile_mode: reduce-overhead records CUDA graphs, whose grad"):
        check_training(load_config(CONFIG, [*words, twice]), Prediction.EPSILON, "uniform")
    check_training(load_config(CONFIG, words), Prediction.EPSILON, "uniform")
    check_training(load_config(CONFIG, [words[0], twice]), Prediction.EPSILON, "uniform")


def test_every_backend_that_diffusers_knows_passes() -> None:
    for name in ("native", "flash", "_native_cudnn", "sage"):
        check_attention(name)


def test_a_misspelt_benchmark_is_refused_before_pictures_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configured, "load_policy", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(ValueError, match="unknown benchmark 'shape'; did you mean 'shapes'"):
        commands.evaluate(CONFIG, [f"output_dir={tmp_path / 'run'}", "evaluation.benchmark=shape"])
