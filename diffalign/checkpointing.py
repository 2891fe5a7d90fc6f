"""Activations that are not kept for the backward pass but computed again: all of a block's, or the cheap ones alone.

Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (arXiv:1604.06174); what to keep is chosen
operation by operation, as in Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models"
(arXiv:2205.05198, section 5, "selective").
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

__all__ = ["Recompute", "is_kept", "recompute_activations"]

Recompute = bool | Literal["selective"]

_ALWAYS = frozenset(
    getattr(torch.ops.aten, name).default
    for name in (
        "convolution",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
)
_PRODUCTS = {torch.ops.aten.mm.default: 0, torch.ops.aten.addmm.default: 1}
"""Matrix products, with the place of their first matrix among the arguments."""


def is_kept(operation: Any, arguments: Sequence[Any]) -> bool:
    """Whether "selective" computes an operation once and keeps what it gives.

    A product of [N, K] and [K, M] costs K multiplications for each number that would have to be kept. Convolutions
    cost the most, then the products that make their input narrower, K > M; the others (queries, keys, values, and the
    wide layers whose outputs are most of a transformer's activations) are computed again.
    """
    if operation in _ALWAYS:
        return True
    if operation not in _PRODUCTS:
        return False
    right = arguments[_PRODUCTS[operation] + 1]
    return bool(right.shape[0] > right.shape[1])


def recompute_activations(denoiser: Any, how: Recompute) -> None:
    """Makes the backward pass compute activations again, block by block.

    Args:
        denoiser: A diffusers model that can do it.
        how: True for all of a block's, which costs one more forward pass; "selective" for what `is_kept` leaves: norms,
            activation functions and products whose outputs are wide; False changes nothing.
    """
    if how:
        denoiser.enable_gradient_checkpointing(_selective if how == "selective" else _whole)


def _whole(block: Any, *inputs: Any) -> Any:
    # In eval mode no block draws random numbers, whose generator's state would have to be kept too.
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)


def _selective(block: Any, *inputs: Any) -> Any:
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_kept(operation, args) else CheckpointPolicy.PREFER_RECOMPUTE
