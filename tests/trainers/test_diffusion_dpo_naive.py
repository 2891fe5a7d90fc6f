"""Margins, loss and gradients against a computation from the equations alone, on the real UNet."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.func import functional_call

from diffalign.backbones import LoRA, load_policy
from diffalign.batches import PairBatch
from diffalign.trainers.diffusion_dpo import DiffusionDPO
from tests.trainers.golden import (
    Batches,
    gradients,
)


def naive(
    unet: UNet2DConditionModel, weights: dict[str, Tensor], batch: PairBatch, beta: float, kind: str
) -> tuple[list[Tensor], Tensor]:
    """Margins and mean loss of a batch, one pair after the other, from the equations alone.

    `unet` holds the reference's weights; `weights` are the policy's for those names where they differ.
    """
    low, high = math.sqrt(0.00085), math.sqrt(0.012)
    abar, table = 1.0, []
    for i in range(1000):
        abar *= 1.0 - (low + (high - low) * i / 999) ** 2
        table.append(abar)
    margins, total = [], torch.zeros((), dtype=batch.chosen.dtype)
    for i, draw in enumerate(batch.draws):
        t = int(1000 * draw.uniform("timestep"))
        noise = draw.normal("noise", batch.chosen.shape[1:]).to(batch.chosen.dtype)
        prompt = batch.conditioning.tensors["hidden"][i : i + 1]
        difference = []
        for x0 in (batch.chosen[i], batch.rejected[i]):
            x_t = math.sqrt(table[t]) * x0 + math.sqrt(1 - table[t]) * noise
            y = noise if kind == "epsilon" else math.sqrt(table[t]) * noise - math.sqrt(1 - table[t]) * x0
            arguments = (x_t[None], torch.tensor([t]), prompt)
            answer = functional_call(unet, weights, arguments).sample[0]
            with torch.no_grad():
                reference = unet(*arguments).sample[0]
            difference.append(sum_of_squares(answer - y) / y.numel() - sum_of_squares(reference - y) / y.numel())
        delta = difference[0] - difference[1]
        margins.append(-delta / 2)
        total = total - torch.log(1 / (1 + torch.exp(beta / 2 * delta)))
    return margins, total / len(batch)


def sum_of_squares(tensor: Tensor) -> Tensor:
    return (tensor * tensor).sum()


def naive_weights(policy: Any, unet: UNet2DConditionModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The policy's weights for `naive`, and the leaves they are made of, by the policy's parameter names.

    An adapter is written out: W + alpha / rank * B A.
    """
    leaves = {name: p.detach().double().clone().requires_grad_(True) for name, p in policy.named_trainable()}
    if policy.lora is None:
        return dict(leaves), leaves
    scale = (policy.lora.alpha or policy.lora.rank) / policy.lora.rank
    weights = {}
    for name, a in leaves.items():
        if "lora_A" in name:
            layer = name.split(".lora_A")[0]
            b = leaves[name.replace("lora_A", "lora_B")]
            base = unet.get_parameter(f"{layer}.weight").detach()
            weights[f"{layer}.weight"] = base + scale * b @ a
    return weights, leaves


@pytest.mark.parametrize(
    "lora",
    [pytest.param(LoRA(rank=2, alpha=3.0), marks=pytest.mark.slow, id="lora"), pytest.param(None, id="full")],
)
@pytest.mark.parametrize("kind", ["epsilon", pytest.param("v", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_margin_loss_and_gradients_equal_a_naive_computation_in_double_precision(
    kind: str, lora: LoRA | None, tiny_pipeline: Path, tiny_v_pipeline: Path, batches: Batches, policies: Any
) -> None:
    """On the real UNet with everything in float64, to 1e-9, at the beta that is used on Stable Diffusion."""
    folder, beta = (tiny_pipeline if kind == "epsilon" else tiny_v_pipeline), 2000.0
    policy = policies.double(folder, lora=lora)
    assert {p.dtype for p in policy.denoiser.parameters()} == {torch.float64}
    policies.move_away(policy, 0.02 if lora is None else 0.1)
    batch = batches(3, dtype=torch.float64)
    batch = dataclasses.replace(batch, weight=torch.ones(3, dtype=torch.float64))
    trainer = DiffusionDPO(policy, beta=beta)
    states = trainer.noisy_states(batch)
    margin = trainer.margin(trainer.log_ratio(*trainer.errors(states)), states)
    loss = trainer.loss(batch).loss
    found = gradients(trainer, batch)

    unet = UNet2DConditionModel.from_pretrained(folder / "unet").double().requires_grad_(False)
    weights, leaves = naive_weights(policy, unet)
    margins, expected = naive(unet, weights, batch, beta, kind)
    expected.backward()
    assert loss.dtype == margin.dtype == torch.float64
    assert 1e-3 < beta * float(margin.detach().abs().max())
    torch.testing.assert_close(margin.detach(), torch.stack(margins).detach(), rtol=0, atol=1e-9 / beta)
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=0, atol=1e-9)
    scale = max(float(leaf.grad.abs().max()) for leaf in leaves.values() if leaf.grad is not None)
    assert scale > 1e-3
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        torch.testing.assert_close(found[name], leaf.grad, rtol=0, atol=1e-9 * max(scale, 1.0))


@pytest.mark.slow
@pytest.mark.parametrize("lora", [LoRA(rank=2), None], ids=["lora", "full"])
def test_single_precision_is_as_near_as_beta_allows(
    lora: LoRA | None, tiny_pipeline: Path, batches: Batches, policies: Any
) -> None:
    """The same against the naive float64 computation, in float32.

    A forward pass in float32 gives each of the four errors with a relative rounding of at most 2^-19 (32 units in
    the last place), so z = -beta / 2 * Delta is off by at most beta / 2 * 2^-19 * (sum of the four errors); the loss,
    whose slope in z is at most 1, by no more. A gradient carries its own forward's and backward's rounding, and the
    factor S(-z), whose slope is at most 1/4: relative to the largest gradient, that bound / 4 / S(-z) and 2^-15.
    """
    beta = 2000.0
    policy: Any = load_policy(str(tiny_pipeline), lora=lora, train=True)
    policies.move_away(policy, 0.002 if lora is None else 0.02)
    trainer, batch = DiffusionDPO(policy, beta=beta), batches(3)
    output = trainer.loss(batch)
    error, reference_error = trainer.errors(trainer.noisy_states(batch))
    found = gradients(trainer, batch)
    assert error.dtype == torch.float32

    unet = UNet2DConditionModel.from_pretrained(tiny_pipeline / "unet").double().requires_grad_(False)
    weights, leaves = naive_weights(policy, unet)
    wide = batch.to("cpu", torch.float64)
    margins, expected = naive(unet, weights, wide, beta, "epsilon")
    expected.backward()
    sums = (error + reference_error).detach().double().reshape(2, -1).sum(0)
    bound = float(beta / 2 * 2**-19 * sums.max())
    assert bound < 0.02
    z = beta * trainer.margin(trainer.log_ratio(error, reference_error), trainer.noisy_states(batch)).detach()
    exact = beta * torch.stack(margins).detach()
    assert float((z.double() - exact).abs().max()) <= bound
    assert abs(output.loss.item() - expected.item()) <= bound
    gate = float(torch.sigmoid(-exact).min())
    scale = max(float(leaf.grad.abs().max()) for leaf in leaves.values() if leaf.grad is not None)
    tolerance = scale * (bound / 4 / gate + 2**-15)
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        torch.testing.assert_close(found[name].double(), leaf.grad, rtol=0, atol=tolerance)
