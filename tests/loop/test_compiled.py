"""Code that inductor writes learns the same as the network itself."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.steps import RandomPairs
from diffalign.backbones import load_policy
from diffalign.config import TrainingConfig
from diffalign.loop import fit
from diffalign.trainers import DiffusionDPO
from tests.loop.results import column

COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
HEADERS = Path(sysconfig.get_path("include")) / "Python.h"


@pytest.fixture(scope="module")
def smallest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose UNet has three residual blocks and one attention, so that compiling it does not take minutes."""
    from diffusers import UNet2DConditionModel

    from tests.backbones.families.sd import save_tiny

    folder = save_tiny(tmp_path_factory.mktemp("smallest") / "pipeline", "epsilon")
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=4,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    ).save_pretrained(folder / "unet")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="inductor needs a C++ compiler; neither g++ nor clang++ is here")
@pytest.mark.skipif(not HEADERS.is_file(), reason="inductor needs Python's headers; they are not installed")
def test_inductor_changes_nothing_that_is_learnt(
    smallest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    found = []
    for compiled in (False, True):
        policy: Any = load_policy(str(smallest), train=True)
        embedded = policy.encode_prompts(["a red circle"]).tensors
        pairs, trainer = RandomPairs(policy.latent_shape, embedded, 2), DiffusionDPO(policy, beta=500.0)
        pairs.ask(trainer)  # so that the reference, a network like the other, need not be compiled too
        torch._dynamo.utils.counters.clear()
        if compiled:
            policy.compile("inductor")
        folder = tmp_path / f"compiled-{compiled}"
        config = TrainingConfig(output_dir=str(folder), max_train_steps=3, learning_rate=1e-3)
        with torch._inductor.config.patch(compile_threads=1):  # others would import everything first
            fit(trainer, pairs, config)
        found.append([column(folder, name) for name in ("loss", "grad_norm")])
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == int(compiled)
    torch.compiler.reset()
    (losses, norms), (ours, our_norms) = found
    assert losses[0] != losses[2]
    assert ours == pytest.approx(losses, rel=2e-4)
    assert our_norms == pytest.approx(norms, rel=2e-3)
