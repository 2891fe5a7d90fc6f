"""GenEval's verdict as a reward: are the objects there, as many as asked for, of their colours and in their places?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal, get_args

import torch
from PIL import Image, ImageOps

from diffalign.reward_models.base import RewardInfo, RewardModel, Scores
from diffalign.reward_models.geneval_colors import COLOR_CLIP, Background, ColorNamer
from diffalign.reward_models.geneval_detector import DETECTOR, Detector, Mask2FormerDetector
from diffalign.reward_models.geneval_prompts import METADATA, Wanted, by_prompt, read_metadata, read_names
from diffalign.reward_models.geneval_rules import (
    Detection,
    Rules,
    Verdict,
    dense_score,
    judge,
    keep_objects,
)
from diffalign.reward_models.media import InvalidMediaError, Media, to_rgb
from diffalign.reward_models.weights import one_line

__all__ = ["GenEval", "Judged"]

Kind = Literal["dense", "strict", "official"]


@dataclass(frozen=True)
class Judged:
    """What was found out about one picture.

    Attributes:
        objects: The objects that count, by class, the surest first.
        official: The released benchmark's verdict.
        strict: The verdict with exact numbers of objects.
        dense: The mean of partial terms, see `geneval_rules.dense_score`.
        seconds: Time it took; the detector's is shared out evenly over the pictures it saw together.
    """

    objects: dict[str, list[Detection]]
    official: Verdict
    strict: Verdict
    dense: float
    seconds: float

    def boxes(self) -> dict[str, list[list[float]]]:
        """The objects as results files list them: class -> [x1, y1, x2, y2, score] of each."""
        return {name: [[*d.box, round(d.score, 6)] for d in found] for name, found in self.objects.items()}


class GenEval(RewardModel):
    """Whether a detector finds in a picture what GenEval's prompt asks for.

    Source: Ghosh et al. 2023, "GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment"
    (arXiv:2310.11513). Three scores: "official", 0 or 1 as the benchmark counts; "strict", 0 or 1 with exact numbers of
    objects; "dense", the mean of partial terms that Flow-GRPO (arXiv:2505.05470) trains with, at most 1 and below 0
    where there are more than twice the objects asked for. What a picture must show is looked up by its prompt in
    metadata in GenEval's format. A prompt that is not there has no score, and its row is invalid.

    Different from the released rewards: Meta's weights of the same detector in transformers instead of mmdet's; the
    detector sees RGB, where the server of Flow-GRPO gives it red and blue swapped; a position that does not hold counts
    0, where Flow-GRPO's code adds a 1 (`released_position=True` does too). Scores differ from published curves.

    The default prompts are the benchmark's own: a model that was trained on them, or on others from the same templates,
    has no meaningful GenEval score any more. Train with other metadata.
    """

    info = RewardInfo(
        name="geneval",
        license="other (detector, see its page on the Hub), MIT (CLIP and prompts)",
        weights=(DETECTOR, COLOR_CLIP),
        dims=("official", "strict", "dense"),
        differentiable=False,
        nominal_range=(0.0, 1.0),
        min_vram_gb=4.0,
    )

    def __init__(
        self,
        path_or_id: str | Path | None = None,
        *,
        score: Kind = "dense",
        detector: Detector | None = None,
        clip: str | Path | None = None,
        metadata: str | Path | None = None,
        data: str | Path | None = None,
        rules: Rules | None = None,
        background: Background = "grey",
        released_position: bool = False,
        device: str | torch.device = "auto",
        dtype: torch.dtype | Literal["auto"] = "auto",
        local_files_only: bool | None = None,
    ):
        """Loads prompts, detector and CLIP.

        Args:
            path_or_id: Folder with the detector in the layout of transformers, or a Hub id; None is the published one.
            score: Which of the three is the primary score.
            detector: Another detector in its place; its class numbers are COCO's.
            clip: Folder or Hub id of OpenAI's CLIP ViT-L/14 in the layout of transformers; None is the published one.
            metadata: A file in the format of GenEval's metadata, for other prompts than the benchmark's.
            data: Folder with `object_names.txt` and, without `metadata`, `evaluation_metadata.jsonl`; None reads them
                from the cache, or fetches them once.
            rules: Thresholds and limits; None are the released ones.
            background: What becomes of the pixels around an object whose colour is told.
            released_position: See `geneval_rules.dense_score`.
            device: As in `from_pretrained`.
            dtype: Must be "auto" or float32: the thresholds were set on float32 scores.
            local_files_only: As in `from_pretrained`; holds for the prompts as well.

        Raises:
            ValueError: If an option is unknown or two contradict each other, or the metadata is malformed.
            WeightsError: If weights or a published file are missing, damaged or of another kind.
        """
        super().__init__()
        self.info = self.describe(score)
        if dtype not in ("auto", torch.float32):
            raise ValueError(f"geneval's thresholds were set on float32 scores, got dtype {dtype}; leave dtype out")
        if detector is not None and path_or_id is not None:
            raise ValueError(f"pass either a detector or a path to the published kind, got both ({str(path_or_id)!r})")
        self.names = read_names(data, local_files_only)
        rows = read_metadata(METADATA if metadata is None else metadata, self.names, data, local_files_only)
        self.wanted = by_prompt(rows)
        self.rules = Rules() if rules is None else rules
        self.released_position = released_position
        self.detector: Detector = detector or Mask2FormerDetector(
            path_or_id, device=device, local_files_only=local_files_only
        )
        self.colors = ColorNamer(clip, background=background, device=device, local_files_only=local_files_only)

    @classmethod
    def describe(cls, score: Kind = "dense") -> RewardInfo:
        """See `RewardModel`."""
        if score not in get_args(Kind):
            raise ValueError(f"unknown score {score!r} of geneval (available: {', '.join(get_args(Kind))})")
        if score == "dense":
            return GenEval.info
        rest = tuple(name for name in GenEval.info.dims if name != score)
        return replace(GenEval.info, name=f"geneval-{score}", dims=(*rest, score))

    def preprocess(self, item: Media) -> Image.Image:
        """See `RewardModel`: the picture in 8-bit RGB, turned as its EXIF data say, as the original does."""
        image = to_rgb(item)
        try:
            return ImageOps.exif_transpose(image)
        except (SyntaxError, ValueError, KeyError, TypeError, OSError) as error:
            raise InvalidMediaError(f"its EXIF data cannot be read: {one_line(error)}") from error

    def encode_text(self, prompts: Sequence[str], batch_size: int) -> list[Wanted | str]:
        """What each prompt asks for; of one that is not in the metadata the prompt itself."""
        return [self.wanted.get(prompt, prompt) for prompt in prompts]

    def score_prepared(self, prepared: Sequence[Image.Image], texts: Sequence[Wanted | str]) -> Scores:
        """See `RewardModel`."""
        known = [(i, text) for i, text in enumerate(texts) if isinstance(text, Wanted)]
        judged = dict(
            zip(
                (i for i, _ in known),
                self.judge([prepared[i] for i, _ in known], [wanted for _, wanted in known]),
                strict=True,
            )
        )
        results = [judged.get(i, f"prompt {text!r} is not in the metadata") for i, text in enumerate(texts)]
        dims = {
            "official": [float(r.official.correct) if isinstance(r, Judged) else float("nan") for r in results],
            "strict": [float(r.strict.correct) if isinstance(r, Judged) else float("nan") for r in results],
            "dense": [r.dense if isinstance(r, Judged) else float("nan") for r in results],
        }
        return Scores(
            {name: torch.tensor(values) for name, values in dims.items()},
            raw=["\n".join(r.strict.reasons) if isinstance(r, Judged) else "" for r in results],
            errors=[r if isinstance(r, str) else None for r in results],
        )

    def judge(self, images: Sequence[Image.Image], wanted: Sequence[Wanted]) -> list[Judged | str]:
        """All verdicts on RGB pictures that are the right way up, or why there is none.

        Args:
            images: B pictures of any sizes.
            wanted: What each must show.
        """
        if not images:
            return []
        start = time.perf_counter()
        found = self.detector.detect(images, [self.rules.threshold_for(w.tag) for w in wanted])
        shared = (time.perf_counter() - start) / len(images)
        return [self._judge(*one, shared) for one in zip(images, wanted, found, strict=True)]

    def _judge(self, image: Image.Image, wanted: Wanted, found: Sequence[Detection], detecting: float) -> Judged | str:
        start = time.perf_counter()
        known: dict[int, str] = {}  # the three rules ask for the colours of the same objects

        def name_colors(name: str, asked: Sequence[Detection]) -> list[str]:
            new = [d for d in asked if id(d) not in known]
            known.update(zip(map(id, new), self.colors.name(image, name, new), strict=True))
            return [known[id(d)] for d in asked]

        objects = keep_objects(found, self.names, wanted.tag, self.rules)
        try:
            official = judge(wanted, objects, name_colors, self.rules)
            strict = judge(wanted, objects, name_colors, self.rules, "strict")
            dense = dense_score(wanted, objects, name_colors, self.rules, released_position=self.released_position)
        except InvalidMediaError as error:
            return str(error)
        return Judged(objects, official, strict, dense, detecting + time.perf_counter() - start)

    def settings(self) -> dict[str, str]:
        """See `RewardModel`: everything but the weights that a score depends on."""
        rows = repr(sorted(self.wanted.items())) + repr(self.names)
        return {
            "detector": self.detector.identity,
            "rules": str(asdict(self.rules)),
            "background": self.colors.background,
            "released_position": str(self.released_position),
            "metadata": sha256(rows.encode()).hexdigest()[:16],
            "primary": self.info.dims[-1],
        }
