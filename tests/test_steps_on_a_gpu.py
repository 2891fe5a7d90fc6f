"""A training step as a GPU sees it, without one: no mixture of devices, no look at a value, no copy that waits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from diffalign.backbones import LoRA, load_policy
from diffalign.batches import PairBatch
from diffalign.devices import send
from diffalign.randomness import Draw
from diffalign.trainers import DiffusionDPO
from tests.backbones.families import FAMILIES, PROMPTS, Family
from tests.pretended_gpu import GPU, PretendedGPU

PAIRS = len(PROMPTS)


def pairs(policy: Any, visit: int = 0) -> PairBatch:
    chosen, rejected = (torch.zeros(PAIRS, *policy.latent_shape) for _ in range(2))
    draws = tuple(Draw(0, visit, str(number)) for number in range(PAIRS))
    return PairBatch(policy.encode_prompts(PROMPTS), chosen, rejected, torch.ones(PAIRS), draws)


COPIES = {"qwen-image": ["transformer_qwenimage.py, compute_text_seq_len_from_mask"] * 2}
"""Family -> copies inside diffusers that wait, of reference and policy: one number each."""
LOOKS = {
    "mochi": "MochiAttnProcessor2_0 of diffusers reads which tokens are padding",
    "wan-experts": "which expert computes depends on the timestep",
}
"""Family -> why the device is asked for values in the middle of a forward pass."""


def placed(policy: Any) -> PretendedGPU:
    """A GPU that holds the policy's weights, and the reference's."""
    gpu = PretendedGPU()
    for module in (policy.denoiser, policy._frozen):
        if module is not None:
            gpu.put(module)
    return gpu


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:CUDA is not available")  # of autocast, which Mochi enters by itself
@pytest.mark.parametrize(
    ("family", "lora"),
    [
        pytest.param(family, lora, id=f"{family.name}-{'lora' if lora else 'full'}")
        for family in FAMILIES
        for lora in (True, False)
        if lora or family.name in ("sd-epsilon", "sdxl", "sd3", "wan")
    ],
)
def test_no_family_waits(family: Family, lora: bool, tmp_path: Path) -> None:
    family.save(tmp_path)
    video = {"num_frames": family.num_frames} if family.num_frames > 1 else {}
    how: dict[str, Any] = {"size": family.size, "options": family.options, **video}
    policy: Any = load_policy(str(tmp_path), lora=LoRA(rank=2) if lora else None, train=True, **how)
    batches = [pairs(policy, visit) for visit in range(2)]
    gpu = placed(policy)
    trainer = DiffusionDPO(policy, beta=500.0)
    with gpu.on():
        if family.name in LOOKS:
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                trainer.loss(batches[0].to(GPU))
            return
        for batch in batches:
            gpu.waits.clear()  # what is looked up in the first step may stay there
            loss = trainer.loss(batch.to(GPU)).loss
    assert loss.device.type == "cuda"
    assert loss.requires_grad
    assert gpu.waits == COPIES.get(family.name, [])


@pytest.mark.parametrize(
    "look",
    [
        lambda number: float(number.sum()),
        lambda number: number.tolist(),
        lambda number: bool((number > 0).any()),
        lambda number: number[number > 0],
        lambda number: number + torch.ones(3),
    ],
    ids=["float", "tolist", "bool", "mask", "mixed devices"],
)
def test_what_a_gpu_would_wait_for_or_refuse_is_refused(look: Callable[[Tensor], Any]) -> None:
    with PretendedGPU().on():
        number = torch.zeros(3, device=GPU)
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException, RuntimeError)):
            look(number)


def test_copies_that_wait_are_noted() -> None:
    with PretendedGPU().on() as gpu:
        there = send(torch.ones(3), GPU)
        assert (there.device.type, gpu.waits) == ("cuda", [])
        assert float(torch.ones(3).sum()) == 3, "what is on the CPU is real"
        torch.ones(3).to(GPU, non_blocking=True)  # not pinned
        torch.ones(3).pin_memory().to(GPU)
        there.cpu()
        torch.tensor([1.0], device=GPU)
    assert gpu.waits == ["test_steps_on_a_gpu.py, test_copies_that_wait_are_noted"] * 4
