"""Commands' bodies shared out over forked processes, for `test_processes.py`; no test by itself.

`main`, called in a process of its own, forks the processes of every attempt. The attempts of a chain work in the same
folder, one after the other, each with its own number of processes; one of them may be killed.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.data import DataConfig, PairList, encode_pairs
from diffalign.generation import SamplingConfig, generate, make_requests
from diffalign.mining import PairsConfig, mine_pairs
from diffalign.processes import OtherProcessError, Processes, launched, leave
from diffalign.prompts import read_prompts
from diffalign.reward_models.base import RewardInfo, RewardModel
from diffalign.reward_models.media import Media
from diffalign.reward_models.scoring import score_index
from tests.forks import launcher_environment

torch.set_num_threads(1)

SAMPLING = SamplingConfig(guidance_scale=2.0, num_inference_steps=2, batch_size=3, seed=5)
REQUESTS = make_requests(read_prompts("diffalign://shapes/train", 16), SAMPLING)  # six batches, the last of one
PAIRS = PairsConfig(num_prompts=8, num_images_per_prompt=2, reward_model="brightness", score_batch_size=3)


class Brightness(RewardModel):
    """Mean of all pixels. `before` is called at every batch."""

    info = RewardInfo(name="brightness", license="Apache-2.0", weights=(), needs_prompt=False)
    before: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()), requires_grad=False)

    def preprocess(self, item: Media) -> np.ndarray:
        return np.asarray(Image.open(str(item)).convert("RGB"), dtype=np.float32)

    def score_prepared(self, prepared: Sequence[np.ndarray], texts: Sequence[Any]) -> Mapping[str, Tensor]:
        self.before()
        return {"overall": torch.tensor([float(image.mean()) for image in prepared])}


class Work:
    """What can be shared out; each method fills a folder. One network, so that threads take turns.

    Args:
        model: Folder of a tiny pipeline.
        tools: The file with `TinyEncoder` and `make_pairs`.
        index: Pictures to score, as `generate` left them.
    """

    def __init__(self, model: str, tools: str, index: str) -> None:
        from diffalign.backbones import load_policy

        self.policy: Any = load_policy(model)
        self.tools = runpy.run_path(tools)
        self.encoder = self.tools["TinyEncoder"]()
        self.scorer = Brightness()
        self.index = index
        sample, turn = self.policy.sample, threading.Lock()

        def in_turn(*arguments: Any, **options: Any) -> Tensor:
            self.before()
            with turn:
                images: Tensor = sample(*arguments, **options)
            return images

        self.before: Callable[[], None] = lambda: None
        self.policy.sample = in_turn  # type: ignore[method-assign]

    def at_every_batch(self, function: Callable[[], None]) -> None:
        """Calls the function before every batch of whatever is worked on."""
        self.before = self.scorer.before = self.encoder.before_encode = function

    def sample(self, folder: Path, processes: Processes) -> None:
        generate(self.policy, REQUESTS, folder, SAMPLING, settings={}, processes=processes)

    def pairs(self, folder: Path, processes: Processes) -> None:
        mine_pairs(self.policy, self.scorer, PAIRS, SAMPLING, folder, processes=processes)

    def score(self, folder: Path, processes: Processes) -> None:
        score_index(self.index, [self.scorer], folder / "scores.jsonl", 3, progress=False, processes=processes)

    def cache(self, folder: Path, processes: Processes) -> None:
        config = DataConfig(dataset_name="in memory", encode_batch_size=3)
        prompts = [f"a photo of {kind}" for kind in ("a star", "a moon", "a cross", "two stars", "a heart")]
        pairs = PairList(self.tools["make_pairs"](14, prompts))
        encode_pairs(pairs, self.encoder, config, folder, shard_size=2, processes=processes)


def process(work: Work, name: str, folder: Path, how: dict[str, Any], place: dict[str, str]) -> None:
    """One process of an attempt; never returns. Its exit code: 0 done, 2 failed, 3 lost another one."""
    code, rank, left = 1, int(place.get("RANK", "0")), [how.get("batch", 0)]
    os.environ.update(place)

    def batch() -> None:
        left[0] -= 1
        if left[0] == 0 and rank == how.get("rank", 0):
            if how["what"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("no picture today")

    work.at_every_batch(batch)
    try:
        getattr(work, name)(folder, launched())
        leave()
        code = 0
    except ValueError as error:
        code = 2
        (folder.parent / "failure.txt").write_text(str(error))
    except OtherProcessError as error:
        code = 3
        (folder.parent / "lost.txt").write_text(str(error))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def attempt(work: Work, name: str, folder: Path, how: dict[str, Any]) -> list[int]:
    """Exit codes of all processes of one attempt, the negative number of a signal included."""
    children = []
    for place in launcher_environment(how["processes"]):
        child = os.fork()
        if child == 0:
            process(work, name, folder, how, place)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main(model: str, tools: str, index: str, root: str, chains: dict[str, list[dict[str, Any]]]) -> None:
    """Runs every chain `<method of Work>[-anything]` in `root/<name>` and writes the exit codes beside it."""
    work = Work(model, tools, index)
    codes = {}
    for name, attempts in chains.items():
        folder = Path(root) / name / "out"
        folder.mkdir(parents=True)
        codes[name] = [attempt(work, name.partition("-")[0], folder, how) for how in attempts]
    (Path(root) / "codes.json").write_text(json.dumps(codes))
