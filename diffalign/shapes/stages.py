"""What the trainings of the embedded world share: prompts by task, random numbers by step, and resumable stages."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffalign.shapes.scenes import Prompt, prompts

TASK_WEIGHTS = {
    "single_object": 0.08,
    "two_object": 0.17,
    "counting": 0.18,
    "colors": 0.10,
    "position": 0.23,
    "color_attr": 0.24,
}
"""How often each task is drawn in the trainings."""


class PromptSampler:
    """Draws training prompts: first a task by `TASK_WEIGHTS`, then one of its prompts uniformly."""

    def __init__(self) -> None:
        self.tasks = list(TASK_WEIGHTS)
        self.weights = np.array([TASK_WEIGHTS[t] for t in self.tasks])
        self.prompts = {t: prompts("train", t) for t in self.tasks}

    def __call__(self, generator: np.random.Generator) -> Prompt:
        """The next prompt."""
        task = self.tasks[int(generator.choice(len(self.tasks), p=self.weights))]
        return self.prompts[task][int(generator.integers(len(self.prompts[task])))]


def to_pixels(images: list[np.ndarray]) -> Tensor:
    """uint8 pictures to a tensor [B, 3, 64, 64] in [-1, 1]."""
    stacked = np.stack(images).astype(np.float32) / 127.5 - 1.0
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()


class Stage:
    """One resumable training: modules, optimizer, step counter and moving average in one state file."""

    def __init__(self, name: str, work: Path, modules: dict[str, nn.Module], lr: float, steps: int, ema: float,
                 cooldown: float = 0.2):  # fmt: skip
        self.name, self.steps, self.decay, self.cooldown = name, steps, ema, cooldown
        self.path = work / f"{name}.pt"
        self.modules = modules
        self.parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=1e-4)
        self.lr = lr
        self.average = [p.detach().clone() for p in self.parameters]
        self.step = 0
        self.seconds = 0.0
        self.losses: list[float] = []
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            for key, module in modules.items():
                module.load_state_dict(state["modules"][key])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average = state["average"]
            self.step, self.seconds, self.losses = state["step"], state["seconds"], state["losses"]

    def save(self) -> None:
        """Writes the state file, whole or not at all."""
        state = {
            "modules": {key: module.state_dict() for key, module in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.path)

    def run(self, loss_of: Callable[[int], Tensor], save_every: int = 250) -> None:
        """Trains to the last step; `loss_of(step)` must depend on nothing but the weights and the step."""
        bar = tqdm(total=self.steps, initial=self.step, desc=self.name, unit="step", mininterval=5)
        last = time.monotonic()
        while self.step < self.steps:
            # Warm-up over 100 steps, constant, and a linear way to zero over the last steps.
            factor = min(1.0, (self.step + 1) / 100, (self.steps - self.step) / (self.cooldown * self.steps))
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * factor
            loss = loss_of(self.step)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.step += 1
            decay = min(self.decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
            self.losses.append(float(loss.detach()))
            bar.update()
            if self.step % 50 == 0:
                bar.set_postfix(loss=f"{np.mean(self.losses[-50:]):.4f}")
            now = time.monotonic()
            self.seconds += now - last
            last = now
            if self.step % save_every == 0 or self.step == self.steps:
                self.save()
        bar.close()

    def load_average(self) -> None:
        """Puts the moving average into the modules."""
        with torch.no_grad():
            for p, a in zip(self.parameters, self.average, strict=True):
                p.copy_(a)
        for module in self.modules.values():
            module.eval()


def generators(seed: int, *key: int) -> tuple[np.random.Generator, torch.Generator]:
    """NumPy's and PyTorch's random numbers of one purpose and step, named by `key`."""
    words = np.random.SeedSequence([seed, *key])
    return np.random.default_rng(words), torch.Generator().manual_seed(int(words.generate_state(1)[0]))
