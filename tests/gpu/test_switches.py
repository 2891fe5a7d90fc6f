"""Every switch of docs/performance.md beside the plain path: on a GPU all of them, on a CPU those that exist there.

Networks are small, of the benchmark's families, with random weights; heads have sizes that all kernels take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks.architectures import Part
from benchmarks.building import build
from benchmarks.steps import RandomPairs
from benchmarks.tiny_widths import TINY
from benchmarks.ways import Way
from diffalign.config import TrainingConfig
from diffalign.loop import fit
from diffalign.trainers import DiffusionDPO
from tests.loop.results import column
from tests.operations import Operations

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; this machine has none")

_SD15 = TINY["sd15-512"]
NETWORKS = {
    "unet": replace(  # heads of 8 and 16
        _SD15, denoiser=Part(_SD15.denoiser.kind, {**_SD15.denoiser.config, "block_out_channels": (16, 32)})
    ),
    "flow": TINY["sd35m-512"],
}
STEPS = 4
BETA = 50.0
TOLERANCE = {"no": 5e-4, "bf16": 0.02}
"""Of losses and norms of gradients, relative, by `mixed_precision`: another order of sums, and 8 bits of a number."""
KERNELS = {
    "_native_flash": {"_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"},
    "_native_cudnn": {"_scaled_dot_product_cudnn_attention"},
    "_native_efficient": {"_scaled_dot_product_efficient_attention"},
    "_native_math": set(),
}
"""What PyTorch is asked for with each kernel; the last has none of its own."""

Numbers = list[list[float]]


@dataclass(frozen=True)
class Switch:
    """One line of the table.

    Attributes:
        way: As the benchmark writes it.
        training: Further settings of the loop.
        precisions: In which it exists on a GPU.
        networks: Which know it.
        on_cpu: Which networks try it there.
    """

    way: str
    training: Mapping[str, Any] = field(default_factory=dict)
    precisions: tuple[str, ...] = ("no", "bf16")
    networks: tuple[str, ...] = ("unet", "flow")
    on_cpu: tuple[str, ...] = ("unet", "flow")

    def __str__(self) -> str:
        return "+".join([self.way, *self.training])


PLAIN = Switch("live")
SWITCHES = (
    Switch("live+channels_last", networks=("unet",)),
    Switch("live+fused"),
    Switch("live+fused", {"sync_steps": STEPS}),
    Switch("cached"),
    Switch("live+checkpointing"),
    Switch("live+selective"),
    Switch("live+cudnn_benchmark", networks=("unet",)),
    Switch("live+attention=_native_math"),
    Switch("live+attention=_native_efficient", on_cpu=()),
    Switch("live+attention=_native_flash", precisions=("bf16",)),
    Switch("live+attention=_native_cudnn", precisions=("bf16",), on_cpu=()),
    Switch("live+selective+attention=_native_flash", precisions=("bf16",)),
    Switch("live+compile", on_cpu=("flow",)),  # of the UNet seconds of capturing more
    Switch("live+compile-blocks", networks=("unet",)),
    Switch("live+compile+cudagraphs", on_cpu=()),
)


def learnt(network: str, switch: Switch, device: str, precision: str, lora: bool, folder: Path) -> Numbers:
    """Losses and norms of gradients of a few steps."""
    AcceleratorState._reset_state(reset_partial_state=True)
    way, architecture = Way.parse(switch.way), NETWORKS[network]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    policy = build(architecture, lora=lora, dtype=dtype, device=device, attention=way.attention)
    trainer, pairs = DiffusionDPO(policy, beta=BETA), RandomPairs(policy.latent_shape, architecture.embeddings(), 2)
    begin = trainer.begin

    def ask_first(step: int, output: Path) -> None:
        begin(step, output)
        pairs.ask(trainer)
        policy.rest_reference()

    if way.start == "cached":
        trainer.begin = ask_first  # type: ignore[method-assign]
    with way.on(policy) as settings:
        config = TrainingConfig(
            output_dir=str(folder),
            max_train_steps=STEPS,
            per_device_train_batch_size=2,
            learning_rate=1e-2 if lora else 1e-3,  # adapters begin at nothing
            mixed_precision=precision,
            **{"sync_steps": 1, **settings, **switch.training},
        )
        if way.attention == "native":
            fit(trainer, pairs, config)
        else:
            with Operations() as asked:
                fit(trainer, pairs, config)
            found = {str(operation).split(".")[1] for operation in asked.found if "dot_product" in str(operation)}
            fused = {name for name in found if not name.endswith("backward")}
            assert fused <= KERNELS[way.attention]
            assert bool(fused) == bool(KERNELS[way.attention])
    return [column(folder, "loss"), column(folder, "grad_norm")]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Numbers]:
    """What is learnt without any switch; computed once."""
    known: dict[tuple[Any, ...], Numbers] = {}

    def found(network: str, device: str, precision: str, lora: bool) -> Numbers:
        key = (network, device, precision, lora)
        if key not in known:
            known[key] = learnt(network, PLAIN, device, precision, lora, tmp_path_factory.mktemp("plain"))
            losses = known[key][0]
            assert abs(losses[0] - losses[-1]) > 2 * TOLERANCE[precision] * losses[0], "the steps moved the model"
        return known[key]

    return found


def compare(found: Numbers, expected: Numbers, precision: str, name: str) -> None:
    for ours, plain in zip(found, expected, strict=True):
        assert ours == pytest.approx(plain, rel=TOLERANCE[precision]), name


@pytest.fixture
def exact_convolutions() -> Iterator[None]:
    """In float32 they take TF32 by default, in which no two algorithms would agree."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


ON_A_GPU = [
    pytest.param(network, switch, precision, id=f"{network}-{precision}-{switch}")
    for switch in SWITCHES
    for network in switch.networks
    for precision in switch.precisions
]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.usefixtures("exact_convolutions")
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize(("network", "switch", "precision"), ON_A_GPU)
def test_no_switch_changes_what_is_learnt_on_a_gpu(
    plain: Callable[..., Numbers], network: str, switch: Switch, precision: str, lora: bool, tmp_path: Path
) -> None:
    expected = plain(network, "cuda", precision, lora)
    compare(learnt(network, switch, "cuda", precision, lora, tmp_path), expected, precision, str(switch))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.usefixtures("exact_convolutions")
def test_tf32_rounds_and_no_more(plain: Callable[..., Numbers], tmp_path: Path) -> None:
    expected = plain("flow", "cuda", "no", False)
    found = learnt("flow", Switch("live", {"allow_tf32": True}), "cuda", "no", False, tmp_path)
    compare(found, expected, "bf16", "allow_tf32")
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch's own, of a block's input
@pytest.mark.parametrize(("network", "precision"), [("unet", "no"), ("flow", "no"), ("flow", "bf16")])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_the_same_code_runs_on_a_cpu(
    plain: Callable[..., Numbers], network: str, precision: str, lora: bool, tmp_path: Path
) -> None:
    expected = plain(network, "cpu", precision, lora)
    for number, switch in enumerate(SWITCHES):
        if network not in switch.networks or network not in switch.on_cpu:
            continue
        if "compile" in switch.way and (lora or precision != "no"):
            continue  # it would capture the same network again
        found = learnt(network, switch, "cpu", precision, lora, tmp_path / str(number))
        compare(found, expected, precision, str(switch))
