"""One process of a run among others: accelerate's set-up, checked, and the wish of a scheduler that it should stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)

from diffalign.config import TrainingConfig

WRAPPERS = ("DistributedDataParallel", "FSDPModule", "DeepSpeedEngine")
"""What makes several processes one training: at least one of them must be around the denoiser."""
PATIENCE = timedelta(hours=6)
"""How long processes wait for each other: one of them may be drawing or scoring validation pictures."""


class Terminated:
    """Remembers a SIGTERM until the step is finished."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> Terminated:
        def note(signum: int, frame: FrameType | None) -> None:
            self.requested = True

        try:
            self._previous = signal.signal(signal.SIGTERM, note)
        except ValueError:  # not in the main thread, where only the caller can listen
            self._previous = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)


@contextmanager
def kernel_settings(config: TrainingConfig) -> Iterator[None]:
    """What a run wants of the kernels of the whole process; all is as it was when the block ends."""
    with ExitStack() as undo:
        if config.allow_tf32:
            undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("high")
        if config.cudnn_benchmark:
            undo.callback(setattr, torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
            torch.backends.cudnn.benchmark = True
        yield


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """The accelerator of a run: precision and trackers as configured.

    Raises:
        ValueError: If the launcher started several processes and accelerate sees but one.
    """
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.gradient_accumulation_steps, adjust_scheduler=False, sync_with_dataloader=False
        ),
        log_with=None if config.report_to in (None, "none") else config.report_to,
        project_dir=config.output_dir,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=PATIENCE),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # no second copy of every gradient
        ],
        cpu=not torch.accelerator.is_available(),  # without it several processes on CPUs would not see each other
    )
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise ValueError("FSDP1 is not supported; set fsdp_version: 2 as configs/accelerate/fsdp2.yaml does")
        # Sharding's own mixed precision would round norms too, which autocast leaves alone.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if config.use_ema or config.resume_from_checkpoint:
            raise ValueError(
                "DeepSpeed runs have no moving average and cannot be resumed; leave out training.use_ema and "
                "training.resume_from_checkpoint, or use configs/accelerate/fsdp2.yaml"
            )
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": config.per_device_train_batch_size,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "gradient_clipping": config.max_grad_norm,
        }
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise ValueError(
            f"{started} processes were started but {accelerator.num_processes} would train together; "
            "start them with `python -m torch.distributed.run --nproc_per_node N` or check `accelerate env`"
        )
    return accelerator


def check_wrapped(module: Any, num_processes: int) -> None:
    """Refuses several processes around a plain denoiser.

    Raises:
        RuntimeError: If each would train for itself.
    """
    kinds = {kind.__name__ for kind in type(module).__mro__}
    if num_processes > 1 and not kinds & set(WRAPPERS):
        raise RuntimeError(
            f"{num_processes} processes were started, but accelerate left the denoiser a plain "
            f"{type(module).__name__} and each would train for itself; check the accelerate config"
        )


def anyone(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is up in any process; all of them ask."""
    if accelerator.num_processes == 1:
        return flag
    value = torch.tensor(float(flag), device=accelerator.device)
    return bool(accelerator.reduce(value, reduction="sum") > 0)


def largest(accelerator: Accelerator, number: int) -> int:
    """The largest of the processes' numbers; all of them ask."""
    if accelerator.num_processes == 1:
        return number
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())
