"""What an accelerator did during some steps: its kernels, and how much of the time it had none to run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

SHOWN = 12
"""Lines of a table."""


@dataclass(frozen=True)
class Profile:
    """Some steps under the profiler.

    Attributes:
        steps: How many.
        kernels: Name -> seconds and number of calls of all steps, the longest first; operators on a CPU.
        gaps: Share of the time from the first kernel to the last in which none ran; None on a CPU.
    """

    steps: int
    kernels: dict[str, tuple[float, int]]
    gaps: float | None

    def __str__(self) -> str:
        total = sum(seconds for seconds, _ in self.kernels.values()) or 1.0
        what = "operator" if self.gaps is None else "kernel"
        lines = [f"| {what} | ms a step | share | calls a step |", "| --- | ---: | ---: | ---: |"]
        for name, (seconds, calls) in list(self.kernels.items())[:SHOWN]:
            short = name if len(name) <= 90 else f"{name[:87]}..."
            cells = f"{1000 * seconds / self.steps:.3f} | {seconds / total:.1%} | {calls / self.steps:g}"
            lines.append(f"| {short.replace('|', '/')} | {cells} |")
        if self.gaps is not None:
            lines += ["", f"no kernel running: {self.gaps:.1%} of the time"]
        return "\n".join(lines)


class Profiler:
    """Watches from `start` to `stop`.

    Args:
        device: Where steps run.
        trace: File for the trace that chrome://tracing and perfetto.dev read, packed if it ends in .gz; with it the
            host is watched, too, which makes gaps longer than they are without.
    """

    def __init__(self, device: torch.device, trace: Path | None = None) -> None:
        self.device, self.trace = device, trace
        activities = [ProfilerActivity.CUDA] if device.type == "cuda" else [ProfilerActivity.CPU]
        if trace is not None and device.type == "cuda":
            activities.append(ProfilerActivity.CPU)
        self._profile = profile(activities=activities)

    def start(self) -> None:
        """Begins."""
        self._profile.start()

    def stop(self, steps: int) -> Profile:
        """Ends, after so many steps; the accelerator must have finished."""
        self._profile.stop()
        if self.trace is not None:
            self.trace.parent.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(self.trace))
        if self.device.type != "cuda":
            rows = [row for row in self._profile.key_averages() if row.self_cpu_time_total > 0]
            return Profile(steps, longest((row.key, row.self_cpu_time_total / 1e6, row.count) for row in rows), None)
        ran = [event for event in self._profile.events() if _is_kernel(event)]  # type: ignore[no-untyped-call]
        times = [(event.time_range.start, event.time_range.end) for event in ran]
        kernels = longest((event.name, (event.time_range.end - event.time_range.start) / 1e6, 1) for event in ran)
        return Profile(steps, kernels, idle_share(times))


def longest(rows: Iterable[tuple[str, float, int]]) -> dict[str, tuple[float, int]]:
    """Sums of seconds and calls by name, the largest first."""
    sums: dict[str, tuple[float, int]] = {}
    for name, seconds, calls in rows:
        before = sums.get(name, (0.0, 0))
        sums[name] = before[0] + seconds, before[1] + calls
    return dict(sorted(sums.items(), key=lambda item: -item[1][0]))


def idle_share(times: Iterable[tuple[float, float]]) -> float:
    """Share of the time from the first start to the last end that no interval covers; they may overlap."""
    ordered = sorted(times)
    if not ordered:
        return 1.0
    busy, begin, end = 0.0, *ordered[0]
    for start, stop in ordered:
        if start > end:
            busy, begin = busy + end - begin, start
        end = max(end, stop)
    busy += end - begin
    span = end - ordered[0][0]
    return 1 - busy / span if span else 0.0


def _is_kernel(event: Any) -> bool:
    """Kernels and copies; the ranges that PyTorch draws over them, such as an optimizer's step, hide gaps."""
    return event.device_type == DeviceType.CUDA and not event.is_user_annotation
