"""The ways to make one training step that benchmarks measure, by name: "cached+compile+fused"."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from benchmarks.architectures import Architecture
from diffalign.checkpointing import recompute_activations

SWITCHES = {
    "compile": "`torch.compile` of the denoiser",
    "compile-blocks": "only of the blocks that it repeats",
    "cudagraphs": "compiled in the mode that records CUDA graphs",
    "channels_last": "the memory format that convolutions like",
    "fused": "AdamW in one kernel, and losses read ten steps at once",
    "checkpointing": "activations of whole blocks are computed again",
    "selective": "cheap activations are computed again",
    "cudnn_benchmark": "cuDNN searches for the fastest convolution, which a loop of equal shapes pays once",
}
"""Switches of a step and what they do."""
EXCLUSIVE = (("compile", "compile-blocks"), ("checkpointing", "selective"))
FOR_UNETS = frozenset({"channels_last", "cudnn_benchmark"})
PLAIN = "plain"


@dataclass(frozen=True)
class Way:
    """One way.

    Attributes:
        start: "plain" as public scripts do it, or `diffalign.fit` with a "live" or a "cached" reference.
        switches: Of `SWITCHES`.
        attention: See `diffalign.attention.set_attention`.
    """

    start: Literal["plain", "live", "cached"]
    switches: frozenset[str] = frozenset()
    attention: str = "native"

    @classmethod
    def parse(cls, text: str) -> Way:
        """The way of a name: where it starts, then switches, then "attention=NAME".

        Raises:
            ValueError: If there is no such way.
        """
        start, *rest = text.split("+")
        if start not in ("plain", "live", "cached"):
            raise ValueError(f"way {text!r}: expected plain, live or cached first, found {start!r}")
        attention = [word.removeprefix("attention=") for word in rest if word.startswith("attention=")]
        switches = [word for word in rest if not word.startswith("attention=")]
        unknown = sorted(set(switches) - set(SWITCHES))
        if unknown or len(attention) > 1 or len(set(rest)) < len(rest):
            known = ", ".join((*SWITCHES, "attention=NAME"))
            found = unknown[0] if unknown else text
            raise ValueError(f"way {text!r}: expected some of {known}, each once and one attention, found {found!r}")
        if start == PLAIN and rest:
            raise ValueError(f"way {text!r}: the plain step has no switches; leave {rest[0]!r} out")
        for one, other in EXCLUSIVE:
            if one in rest and other in rest:
                raise ValueError(f"way {text!r}: {one} and {other} exclude each other; leave one of them out")
        if "cudagraphs" in rest and not {"compile", "compile-blocks"} & set(rest):
            raise ValueError(f"way {text!r}: cudagraphs are recorded by compiled code; add compile")
        return cls(start, frozenset(switches), *attention)  # type: ignore[arg-type]

    def __str__(self) -> str:
        named = [name for name in SWITCHES if name in self.switches]
        other = [] if self.attention == "native" else [f"attention={self.attention}"]
        return "+".join([self.start, *named, *other])

    def fit_for(self, is_unet: bool) -> Way:
        """The way without switches that only help convolutions, if there are none."""
        return self if is_unet else replace(self, switches=self.switches - FOR_UNETS)

    def adapted(self, architecture: Architecture) -> Way | None:
        """The way as the architecture can go it: without switches that it does not know; None if there is none.

        Activations are recomputed where a pair does not fit into memory otherwise.
        """
        if self.start == PLAIN:
            return self
        if "compile-blocks" in self.switches and not architecture.repeats_blocks:
            return None
        switches = self.fit_for(architecture.is_unet).switches
        if architecture.checkpointed and "selective" not in switches:
            switches |= {"checkpointing"}
        return Way(self.start, switches, self.attention)

    @contextmanager
    def on(self, policy: Any, backend: str | None = None) -> Iterator[dict[str, Any]]:
        """Switches a policy over, whose attention has been chosen when it was built; gives settings of the loop.

        What was compiled is forgotten when the block ends.

        Args:
            policy: What is trained.
            backend: Of `torch.compile`; None takes inductor on a GPU and "eager", which only captures, on a CPU.
        """
        with ExitStack() as undo:
            if "channels_last" in self.switches:
                policy.to_channels_last()
            selective = "selective" in self.switches
            recompute_activations(policy.denoiser, "selective" if selective else "checkpointing" in self.switches)
            if self.switches & {"compile", "compile-blocks"}:
                backend = backend or ("inductor" if policy.device.type == "cuda" else "eager")
                mode = "reduce-overhead" if "cudagraphs" in self.switches else None
                policy.compile(backend, mode, blocks="compile-blocks" in self.switches)
                undo.callback(torch.compiler.reset)
            together = {"sync_steps": 10} if "fused" in self.switches else {}
            yield {
                "fused_optimizer": "fused" in self.switches,
                "cudnn_benchmark": "cudnn_benchmark" in self.switches,
                **together,
            }


_ALL = "channels_last+fused"
DEFAULT = tuple(
    Way.parse(text)
    for text in (
        "plain",
        "live",
        f"cached+compile+{_ALL}",
        f"live+compile+{_ALL}",
        "cached",
        "cached+fused",
        "cached+channels_last",
        "cached+cudnn_benchmark",
        "cached+compile",
        f"cached+compile-blocks+{_ALL}",
    )
)
"""What is measured unless ways are named, of all models in this order: the first lines say most."""
QUICK = tuple(Way.parse(text) for text in ("plain", "live", "cached+fused"))
"""With `--tiny`; compiling even these takes up to half a minute a cell, so it has to be asked for."""
