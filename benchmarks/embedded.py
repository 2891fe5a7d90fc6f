"""The embedded models as a benchmark of training steps takes them: a method, pairs on disk, and the plain step."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffalign as da
from benchmarks.plain_step import PlainFlowStep, PlainStep, PlainUNetStep, PlainVideoStep
from diffalign.data import DataConfig, EncodedPairs, PairSource, encode_pairs, load_pairs
from diffalign.shapes.clip_pairs import write_clip_pairs
from diffalign.shapes.drawn_pairs import WritePairs
from diffalign.shapes.scene_pairs import write_scene_pairs
from diffalign.trainers import DiffusionDPO, FlowDPO
from diffalign.trainers.base import PairTrainer

__all__ = ["MODELS", "SHAPES", "Model", "Scene"]

SHAPES = "diffalign://shapes"
SEED, LR = 0, 1e-5


@dataclass(frozen=True)
class Model:
    """What is trained, and how.

    Attributes:
        path: Of the pipeline.
        trainer: The method.
        beta: Of its loss, as the method has it usually.
        plain: The same step as public scripts write it.
        write_pairs: Writes pairs to train on.
        batch_size: Pairs of a step.
        is_unet: Whether the denoiser has convolutions that a memory format can help.
    """

    path: str
    trainer: type[PairTrainer]
    beta: float
    plain: type[PlainStep]
    write_pairs: WritePairs
    batch_size: int
    is_unet: bool = False


MODELS = {
    "unet": Model(SHAPES, DiffusionDPO, 2000.0, PlainUNetStep, write_scene_pairs, 16, is_unet=True),
    "flow": Model("diffalign://shapes_flow", FlowDPO, 500.0, PlainFlowStep, write_scene_pairs, 16),
    "video": Model("diffalign://shapes_video", DiffusionDPO, 2000.0, PlainVideoStep, write_clip_pairs, 8),
}
"""Name -> model."""


@dataclass(frozen=True)
class Scene:
    """Pairs on disk, how many make a step, and what is trained on them.

    Attributes:
        model: What is trained.
        folder: With the pairs in `pairs/` and everything else beside it.
        lora: Adapters, or all weights.
        batch_size: Pairs of a step.
        steps: Steps that are begun; the last one is not timed.
    """

    model: Model
    folder: Path
    lora: bool
    batch_size: int
    steps: int

    @property
    def pairs(self) -> Path:
        """The pictures or clips and their index."""
        return self.folder / "pairs"

    def write_pairs(self, pairs: int) -> None:
        """So many pairs on disk."""
        self.model.write_pairs(self.pairs, pairs, SEED)

    def policy(self) -> Any:
        """The model as training begins."""
        return da.load_policy(self.model.path, lora=da.LoRA(rank=8) if self.lora else None, train=True)

    def encoded(self) -> EncodedPairs:
        """The cache, made when it is first asked for."""
        config = DataConfig(train_data_dir=self.pairs)
        return encode_pairs(load_pairs(config), self.policy(), config, self.folder / "cache")

    def source(self, *, prefetch: bool = True) -> PairSource:
        """Each pair with the same draw at every visit."""
        return PairSource(self.encoded(), seed=SEED, batch_size=self.batch_size, draws_per_pair=1, prefetch=prefetch)

    def plain_step(self) -> PlainStep:
        """As public scripts write it."""
        rows = [json.loads(line) for line in (self.pairs / "index.jsonl").read_text(encoding="utf-8").splitlines()]
        model = self.model
        return model.plain(self.policy(), self.source(prefetch=False), self.pairs, rows, model.beta, LR)

    def trainer(self, policy: Any, reference: str) -> PairTrainer:
        """The method, without dropped captions, each pair drawing once and for all."""
        return self.model.trainer(
            policy,
            beta=self.model.beta,
            caption_dropout=0.0,
            reference=reference,
            draws_per_pair=1,
            reference_batch_size=8,
        )
