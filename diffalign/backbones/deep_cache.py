"""Deep features that one step of sampling computes and the next ones use again: faster pictures, not the same ones.

UNets have `reuse_deep_features`, DeepCache (Ma et al. 2023, "DeepCache: Accelerating Diffusion Models for Free",
arXiv:2312.00858): features far from the picture change slowly from step to step, so every Nth step computes the whole
network, and the others its shallowest branch alone, which is the last layer of the last block on the way up, with the
skip connection that leads to it.

Transformers have diffusers' first block cache: where the first block changes its input almost as it did one step
before, the other blocks are taken to do so too.

Both hold only while a pipeline draws. What asks the policy for its prediction, training and rollouts with the
probability of every step, always gets the whole network's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from diffalign.backbones.loading import ModelSource, policy_class

if TYPE_CHECKING:
    from diffalign.generation import SamplingConfig

__all__ = ["DeepCache", "deep_cache_of", "reuse_deep_features"]

MISFITS = ("Flux2Transformer2DModel",)
"""Transformers that diffusers 0.42 offers its cache for and fails on: their single blocks join image and text."""


@dataclass(frozen=True)
class DeepCache:
    """How much of the denoiser is computed when pictures are drawn.

    Attributes:
        interval: Of UNets: every so manyth step is computed whole, at least 1; 1 computes all of them.
        threshold: Of transformers: change of the first block's residual, mean of absolute values over the batch and
            relative to the one before, up to which the others are not computed; 0 computes all of them. The mean lets
            a picture depend on those that are drawn with it.
    """

    interval: int | None = None
    threshold: float | None = None

    def settings(self) -> dict[str, Any]:
        """What pictures depend on, as JSON values."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @contextmanager
    def during(self, *denoisers: Any) -> Iterator[None]:
        """Denoisers compute no more than that inside the block, which draws one batch of pictures."""
        with ExitStack() as stack:
            for denoiser in denoisers:
                if self.interval is not None:
                    stack.enter_context(reuse_deep_features(denoiser, self.interval))
                if self.threshold is not None:
                    stack.enter_context(_reuse_blocks(denoiser, self.threshold))
            yield


def deep_cache_of(source: ModelSource, sampling: SamplingConfig) -> DeepCache | None:
    """What a section `sampling` asks for, or None; loads no weights.

    Raises:
        ValueError: If this model cannot have it, or it is asked for together with compilation.
    """
    interval, threshold = sampling.deep_cache, sampling.first_block_cache
    if interval is None and threshold is None:
        return None
    kind = policy_class(source)
    names = [name for part in (kind.part, *kind.more_parts) if (name := source.parts.get(part)) is not None]
    here = f"the denoiser of {source.name} is a {' and a '.join(dict.fromkeys(names))}"
    if interval is not None and kind.part != "unet":
        raise ValueError(f"sampling.deep_cache is for UNets, and {here}; leave it out, or try first_block_cache")
    if threshold is not None:
        if kind.part == "unet":
            raise ValueError(f"sampling.first_block_cache is for transformers, and {here}; take deep_cache instead")
        if not all(map(_has_block_cache, names)):
            raise ValueError(f"sampling.first_block_cache: {here}, which diffusers has no such cache for; leave it out")
    if sampling.torch_compile:
        raise ValueError("sampling.torch_compile compiles the whole network, which a cache computes parts of; drop one")
    return DeepCache(interval, threshold)


def _has_block_cache(name: str) -> bool:
    import diffusers

    return issubclass(getattr(diffusers, name), diffusers.CacheMixin) and name not in MISFITS


@contextmanager
def reuse_deep_features(unet: Any, interval: int) -> Iterator[None]:
    """Inside the block, of every `interval` calls of the UNet the first is computed whole and the others use it again.

    Args:
        unet: Of diffusers: blocks on the way down, in the middle and on the way up.
        interval: At least 1.
    """
    calls = 0
    whole = True

    def count(module: nn.Module, arguments: Any) -> None:
        nonlocal calls, whole
        whole = calls % interval == 0
        calls += 1

    def reusing(forward: Callable[..., Any]) -> Callable[..., Any]:
        last: Any = None

        def once(*arguments: Any, **named: Any) -> Any:
            nonlocal last
            if whole:
                last = forward(*arguments, **named)
            return last

        return once

    deep = _deep_parts(unet)
    before = [vars(part).get("forward") for part in deep]
    counting = unet.register_forward_pre_hook(count)
    try:
        for part in deep:
            part.forward = reusing(part.forward)
        yield
    finally:
        counting.remove()
        for part, forward in zip(deep, before, strict=True):
            del part.forward
            if forward is not None:
                part.forward = forward


def _deep_parts(unet: Any) -> list[Any]:
    """All of a UNet but its ends and the last layer on the way up.

    What a part gives from memory is either read by the last layer, or by parts whose own results are in memory too. So
    the skip connections from the way down are right to be old: the only one that is read leads from the first
    convolution, which is none of these parts.
    """
    *blocks, last = unet.up_blocks
    layers = len(last.resnets)
    beside = [module for module in last.children() if isinstance(module, nn.ModuleList) and len(module) == layers]
    middle = [] if unet.mid_block is None else [unet.mid_block]
    return [*unet.down_blocks, *middle, *blocks, *(layer for layers in beside for layer in layers[:-1])]


@contextmanager
def _reuse_blocks(transformer: Any, threshold: float) -> Iterator[None]:
    from diffusers import FirstBlockCacheConfig

    transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    try:
        # Pipelines that call the network once for each branch name it themselves, the others name none.
        with transformer.cache_context("all"):
            yield
    finally:
        transformer.disable_cache()
