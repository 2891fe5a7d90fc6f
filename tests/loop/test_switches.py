"""Every switch that makes a step faster or smaller: the same losses and gradients as without it.

`trainer.reference: cached` has a file of its own, tests/trainers/test_reference_errors.py, and so have `sync_steps`
(test_sync_steps.py), whole compilation that only captures (tests/test_estimate.py) and several processes
(test_processes.py). What needs a GPU is compared in tests/gpu/test_switches.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.backbones import inspect_model, load_policy
from diffalign.config import RunConfig
from diffalign.data import DataConfig, EncodedPairs, PairSource, encode_pairs, load_pairs
from diffalign.loop import fit
from diffalign.trainers import DiffusionDPO, FlowDPO
from diffalign.training import training_policy
from tests.loop.results import Changed, column
from tests.operations import FLASH, FLASH_BACKWARD, PRODUCT, Operations

ROUNDING = 2e-4
"""Of losses and norms of gradients, relative: what another order of summation leaves after three steps."""
SWITCHES: dict[str, dict[str, Any]] = {
    "channels_last": {"model": {"channels_last": True}},
    "gradient_checkpointing": {"model": {"gradient_checkpointing": True}, "exact": True},
    "selective checkpointing": {"model": {"gradient_checkpointing": "selective"}, "exact": True},
    "compiled blocks": {"model": {"torch_compile": "blocks", "torch_compile_backend": "eager"}},
    "fused optimizer": {"training": {"fused_optimizer": True}},
    "read several steps at once": {"training": {"fused_optimizer": True, "sync_steps": 3}},
    "no reading ahead": {"source": {"prefetch": False}, "exact": True},
    "cuDNN's search": {"training": {"cudnn_benchmark": True}, "exact": True},
    "half the batch twice": {"training": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}},
}


def losses(
    pipeline: Path,
    encoded: EncodedPairs,
    folder: Path,
    lora: bool,
    switch: dict[str, Any],
    method: type[DiffusionDPO] = DiffusionDPO,
    during: AbstractContextManager[Any] | None = None,
) -> list[list[float]]:
    """Loss and gradient norm of three steps, which are made in the context `during`."""
    config = RunConfig.model_validate(
        {
            "output_dir": str(folder),
            "model": {
                "pretrained_model_name_or_path": str(pipeline),
                "lora": {"rank": 2} if lora else None,
                **switch.get("model", {}),
            },
            "training": {
                "output_dir": str(folder),
                "max_train_steps": 3,
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-3,
                **switch.get("training", {}),
            },
        }
    )
    policy = training_policy(config, inspect_model(str(pipeline)), torch.device("cpu"))
    training = config.training
    source = PairSource(
        encoded,
        seed=5,
        batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        **switch.get("source", {}),
    )
    with during or nullcontext():
        fit(method(policy, beta=500.0), source, training)
    return [column(folder, "loss"), column(folder, "grad_norm")]


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch's own, of a block's input
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_no_switch_changes_what_is_learnt(
    tiny_pipeline: Path, encoded: EncodedPairs, tmp_path: Path, lora: bool
) -> None:
    plain = losses(tiny_pipeline, encoded, tmp_path / "plain", lora, {})
    assert plain[0][0] != plain[0][2], "the steps moved the model"
    for name, switch in SWITCHES.items():
        if not lora and "torch_compile" in switch.get("model", {}):
            continue  # seconds of capturing, of the same blocks
        found = losses(tiny_pipeline, encoded, tmp_path / name.replace(" ", "_"), lora, switch)
        if switch.get("exact"):
            assert found == plain, name
        else:
            assert found[0] == pytest.approx(plain[0], rel=ROUNDING), name
            assert found[1] == pytest.approx(plain[1], rel=ROUNDING * 10), name


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory, pair_folder: Path) -> tuple[Path, EncodedPairs]:
    """A tiny Stable Diffusion 3, and pairs encoded for it."""
    from tests.backbones.families.sd3 import save_tiny

    folder = tmp_path_factory.mktemp("flow")
    pipeline, config = save_tiny(folder / "pipeline", t5=False), DataConfig(train_data_dir=pair_folder, resolution=16)
    return pipeline, encode_pairs(load_pairs(config), load_policy(str(pipeline), size=(16, 16)), config, folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unet", "flow"])
@pytest.mark.parametrize(
    ("lora", "recompute"), [(True, False), (True, True), (True, "selective"), (False, False), (False, True)]
)
def test_no_kernel_of_attention_changes_what_is_learnt(
    tiny_pipeline: Path,
    encoded: EncodedPairs,
    flow: tuple[Path, EncodedPairs],
    tmp_path: Path,
    kind: str,
    lora: bool,
    recompute: bool | str,
) -> None:
    pipeline, pairs = (tiny_pipeline, encoded) if kind == "unet" else flow
    method, size = (DiffusionDPO, 8) if kind == "unet" else (FlowDPO, 16)
    found, asked = {}, dict[str, Operations]()
    for name in ("native", "_native_flash", "_native_math"):
        model = {"attention": name, "gradient_checkpointing": recompute, "resolution": size}
        asked[name] = Operations()
        found[name] = losses(pipeline, pairs, tmp_path / name, lora, {"model": model}, method, asked[name])
    plain = found["native"]
    assert plain[0][0] != plain[0][2], "the steps moved the model"
    assert found["_native_flash"] == plain, "a CPU takes this kernel by itself"
    assert found["_native_math"][0] == pytest.approx(plain[0], rel=ROUNDING)
    assert found["_native_math"][1] == pytest.approx(plain[1], rel=ROUNDING * 10)
    flash, math = asked["_native_flash"], asked["_native_math"]
    attentions = 3 * (8 if kind == "unet" else 2)  # of three steps; reference, policy, and the latter once again
    assert flash[FLASH] == (3 if recompute is True else 2) * attentions
    assert flash[FLASH_BACKWARD] == attentions
    assert math[FLASH] == math[FLASH_BACKWARD] == 0
    assert math[PRODUCT] - flash[PRODUCT] >= 8 * attentions


@pytest.fixture
def own_kernels() -> Iterator[Any]:
    """The process's settings of matrix products, as they are again afterwards; monkeypatch cannot undo these."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    yield matmul
    matmul.allow_tf32 = before


@pytest.mark.slow
def test_a_run_leaves_the_processes_kernels_as_they_were(start: Any, own_kernels: Any) -> None:
    seen = []

    def look(step: int, micro_step: int, batch: Any) -> Any:
        seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark))
        if step == 1:
            raise RuntimeError("stop here")
        return batch

    for tf32, own in ((False, False), (False, True), (True, False)):
        own_kernels.allow_tf32 = own
        trainer, source, config = start(f"{tf32}-{own}", allow_tf32=tf32, cudnn_benchmark=tf32)
        begin = trainer.begin
        trainer.begin = lambda *a, begin=begin: (look(0, 0, None), begin(*a))  # where a reference is asked beforehand
        with pytest.raises(RuntimeError, match="stop here"):
            fit(trainer, Changed(source, look), config)
        assert seen == 3 * [(tf32 or own, tf32)]
        assert torch.backends.cuda.matmul.allow_tf32 == own
        assert not torch.backends.cudnn.benchmark
        seen.clear()
