"""Pictures that several benchmarks share: each prompt and seed of a model is drawn once, then found again.

`<root>/<key of the settings>/images/<key of prompt and seed>.png` (`videos/....mp4`): the first key is a hash of
everything a picture depends on, weights, sampler, size, dtype and device type among it, the second one of prompt and
seed. A picture that is there is never written again.

A list of pictures is drawn in batches that are cut from the list alone; a batch with a missing picture is drawn as a
whole, and only what was missing is written. So a killed command, run again, ends with the same bytes as one that was
not, whatever the number of processes. Another list may have drawn a picture in another batch, which can change its
last digits, as another batch size can; batches of one exclude that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.generation import IMAGE_FOLDER, VIDEO_FOLDER, Request, SamplingConfig, draw, drawing_settings
from diffalign.processes import ALONE, Processes, own_files
from diffalign.resumable import claim_folder, to_line, write_atomically

if TYPE_CHECKING:
    from diffalign.policy import Policy

_LOG = "drawing.jsonl"


@dataclass(frozen=True)
class PictureCache:
    """The pictures of one model under one set of settings.

    Attributes:
        root: Where the caches of all models are.
        key: Hash of the settings; the name of the folder.
        is_video: Whether it holds videos.
    """

    root: Path
    key: str
    is_video: bool = False

    @property
    def folder(self) -> Path:
        """The cache's own folder."""
        return self.root / self.key

    def request(self, prompt: str, seed: int) -> Request:
        """What to draw for a prompt and seed; its id is the hash of both."""
        content = json.dumps([prompt, seed], ensure_ascii=False).encode()
        return Request(hashlib.sha256(content).hexdigest()[:32], prompt, seed, is_video=self.is_video)

    def file(self, prompt: str, seed: int) -> Path:
        """Where the picture of a prompt and seed is, or will be."""
        return self.folder / self.request(prompt, seed).file

    def missing(self, wanted: Iterable[tuple[str, int]]) -> int:
        """How many of these prompts and seeds are not drawn yet, each counted once."""
        return sum(not self.file(*pair).is_file() for pair in dict.fromkeys(wanted))

    def fill(
        self,
        policy: Policy,
        wanted: Sequence[tuple[str, int]],
        sampling: SamplingConfig,
        processes: Processes = ALONE,
    ) -> None:
        """Draws what is missing of a list of prompts and seeds.

        Args:
            policy: The model whose cache this is.
            wanted: Prompts and seeds; one that occurs twice is drawn once.
            sampling: As for `open_cache`.
            processes: Who shares the work, each calling this with the same arguments.

        Raises:
            ValueError: If there is nothing to draw, or a seed is out of range.
            NonFiniteImageError: If the model draws NaN.
        """
        requests = [self.request(*pair) for pair in dict.fromkeys(wanted)]
        log = self.folder / _LOG

        def remove_log() -> None:
            for file in (log, *own_files(log)):
                file.unlink(missing_ok=True)

        def take_stock() -> list[str]:
            """What is there counts as drawn, whichever list it was drawn for."""
            there = [request for request in requests if (self.folder / request.file).is_file()]
            if len(there) < len(requests):
                write_atomically(log, "".join(to_line(request.row()) for request in there).encode())
            else:
                remove_log()
            return [request.id for request in there]

        there = processes.on_first(take_stock)
        if len(there) == len(requests):
            return
        draw(policy, requests, log, sampling, kept=frozenset(there), processes=processes)
        processes.on_first(remove_log)


def open_cache(
    root: Path,
    policy: Policy,
    sampling: SamplingConfig,
    settings: Mapping[str, Any],
    processes: Processes = ALONE,
) -> PictureCache:
    """The cache of a model under some settings, made if it is new.

    Args:
        root: Where the caches of all models are.
        policy: The model. Its weights are hashed, wherever they came from.
        sampling: Guidance, steps and frame rate. The batch size is not part of the key.
        settings: What else its pictures depend on, as JSON values.
        processes: As for `PictureCache.fill`.
    """

    def claim() -> str:
        everything = drawing_settings(policy, sampling.resolved(policy), settings=settings)
        key = hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:16]
        claim_folder(root / key, everything, (VIDEO_FOLDER if policy.is_video else IMAGE_FOLDER,))
        return key

    return PictureCache(root, processes.on_first(claim), policy.is_video)
