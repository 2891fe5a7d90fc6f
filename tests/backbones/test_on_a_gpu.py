"""Every family trains, encodes and draws where weights are on a GPU, and its training steps never wait for it.

On a pretended GPU, see `tests/pretended_gpu.py`: this needs none.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffalign.backbones import LoRA
from diffalign.trainers import DiffusionDPO
from tests.backbones.families import PROMPTS
from tests.backbones.tiny_family import Tiny
from tests.pretended_gpu import GPU, PretendedGPU

WAITS = {"mochi": "attention_processor.py", "qwen-image": "transformer_qwenimage.py", "wan-experts": "wan.py"}
"""Family -> the file where its forward pass waits: diffusers reads which tokens are padding, or copies a number; which
of Wan's experts computes depends on the timestep."""
FULL = ("sd-epsilon", "sdxl", "sd3", "wan")
"""Where all weights are trained as well, beside a frozen copy."""


def parts(policy: Any) -> list[torch.nn.Module]:
    """All networks of a policy."""
    found = [module for module in policy.pipeline.components.values() if isinstance(module, torch.nn.Module)]
    return [*found, policy.denoiser, *([policy._frozen] if policy._frozen is not None else [])]


def losses(policy: Any, batch: Any, device: torch.device, waits: list[str]) -> tuple[list[float], list[str]]:
    """Of three steps, and what waited in the last two: in the first one something may be looked up."""
    trainer = DiffusionDPO(policy, beta=500.0)
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=1e-3)
    found = []
    for step in range(3):
        if step == 1:
            waits.clear()
        loss = trainer.loss(batch.to(device)).loss
        assert loss.device.type == device.type
        loss.backward()
        found.append(loss.detach())
    waited = list(waits)
    optimizer.step()
    return [float(loss) for loss in found], waited


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:CUDA is not available")  # of autocast, which Mochi enters by itself
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_it_trains_and_draws_on_a_gpu(tiny: Tiny, lora: bool) -> None:
    name = tiny.family.name
    if not lora and name not in FULL:
        pytest.skip("all weights are trained of one family of each kind")
    how: dict[str, Any] = {"lora": LoRA(rank=2) if lora else None, "train": True}
    policy = tiny.load(**how)
    batch = tiny.batch(policy)
    expected, _ = losses(policy, batch, torch.device("cpu"), [])
    moments = policy.encode(tiny.media(1)).mean
    policy, gpu = tiny.load(**how), PretendedGPU()
    gpu.put(*parts(policy))
    with gpu.on():
        found, waits = losses(policy, batch, GPU, gpu.waits)
        encoded = policy.encode(tiny.media(1)).mean.cpu()
        drawn = tiny.sample(policy, PROMPTS, [0, 1], num_inference_steps=2)
    unexpected = [wait for wait in waits if not wait.startswith(WAITS.get(name, "nowhere"))]
    assert unexpected == []
    assert waits != [] or name not in WAITS, "what waits no longer need not be listed"
    assert found == pytest.approx(expected, abs=1e-5)
    assert torch.equal(encoded, moments)
    assert drawn.device.type == "cpu"
