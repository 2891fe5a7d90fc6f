"""VisionReward: a checklist of yes-or-no questions about a picture or a video, weighed by a linear model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Unpack

import torch
from PIL import Image
from torch import Tensor

from diffalign.reward_models.answering import Answer, Question
from diffalign.reward_models.base import RewardInfo, RewardModel, Scores, WeightsError, WeightSpec
from diffalign.reward_models.judging import Asked, Judge, find_answerer, loading
from diffalign.reward_models.media import InvalidMediaError
from diffalign.reward_models.published_texts import PublishedText, read_text
from diffalign.reward_models.vqa_score import VQAScore

__all__ = ["VisionReward", "Checklist"]

_HOME = "https://raw.githubusercontent.com/THUDM/VisionReward/511960d"
IMAGE_QUESTIONS = PublishedText(
    "VisionReward_image_qa_select.txt",
    f"{_HOME}/VisionReward-Image/VisionReward_image_qa_select.txt",
    "2b603df2f4e30fe8879d85e1bf38f30ad8292278b939e31bf88bf7cf9ff22c33",
)
IMAGE_WEIGHTS = PublishedText(
    "image_weight_select.json",
    f"{_HOME}/VisionReward-Image/weight_select.json",
    "4b60192fa96e0dda0c9101ed61141f89b85bb9669479e3b8eb42cc10611a68c9",
)
VIDEO_QUESTIONS = PublishedText(
    "VisionReward_video_qa_select.txt",
    f"{_HOME}/VisionReward-Video/VisionReward_video_qa_select.txt",
    "79de7f5e135a7957144826056a83be63fd6ddcbc61ba6460e09a0b09da580ee3",
)
VIDEO_WEIGHTS = PublishedText(
    "video_weight.json",
    f"{_HOME}/VisionReward-Video/weight.json",
    "0c6367f244ae64fa881e93f0033f2a4362176893ed2f946223ec64a57e3c9204",
)

IMAGE_MASKS: dict[int, tuple[int, ...]] = {0: (22, 23, 24, 28, 29), 1: (25, 26), 2: (27,)}
"""Questions of the image checklist that count only if question 0 (body), 1 (face) or 2 (hands) is answered yes. The
released code puts the two about harm, 28 and 29, under "body": a harmful picture without people loses nothing."""

YES, NO = "yes", "no"
_MAX_FRAMES = 24
_MAX_TOKENS = 8
"""The checkpoints answer in one token; other models may put a line break or quotation marks first."""
_IMAGE_FORMAT = "Question: {question} Short answer:"
_VIDEO_FORMAT = "{question}"


@dataclass(frozen=True)
class Checklist:
    """Questions, their weights, and how answers become a score.

    Attributes:
        questions: In their order, as the model sees them; `[[prompt]]` stands for the prompt.
        weights: One for each question that is no mask; with `alignment` one more before them.
        masks: By number of a mask question, the questions that count only if it is answered yes.
        alignment: Whether the first weight belongs to a score of alignment with the prompt.
        mean: Whether the score is the mean of answer times weight, rather than the sum.
        intercept: What is added.
    """

    questions: tuple[str, ...]
    weights: tuple[float, ...]
    masks: Mapping[int, tuple[int, ...]]
    alignment: bool
    mean: bool
    intercept: float = 0.0

    def __post_init__(self) -> None:
        expected = len(self.questions) - len(self.masks) + self.alignment
        if len(self.weights) != expected:
            raise WeightsError(
                f"{len(self.questions)} questions with {len(self.masks)} masks need {expected} weights, got "
                f"{len(self.weights)}; question and weight file do not belong together, use the `_select` pair"
            )

    def apply_masks(self, answers: Tensor) -> Tensor:
        """Answers [B, Q] with zeros where a mask question is not answered yes; the mask questions keep theirs."""
        answers = answers.clone()
        for mask, questions in self.masks.items():
            answers[:, list(questions)] *= (answers[:, mask] > 0).to(answers.dtype)[:, None]
        return answers

    def features(self, answers: Tensor, alignment: Tensor | None = None) -> Tensor:
        """What the linear model sees, [B, F]: alignment [B] if it is used, then masked answers without the masks'.

        Args:
            answers: 1 for yes and -1 for no, or anything between, [B, Q].
            alignment: In [0, 1], [B].
        """
        kept = [i for i in range(len(self.questions)) if i not in self.masks]
        features = self.apply_masks(answers)[:, kept]
        if self.alignment != (alignment is not None):
            raise ValueError(f"this checklist is {'with' if self.alignment else 'without'} alignment")
        return features if alignment is None else torch.cat([alignment[:, None].to(features), features], dim=1)

    def score(self, features: Tensor) -> Tensor:
        """Scores [B] of features [B, F], in float64: the published weights are."""
        products = features.double() * torch.tensor(self.weights, dtype=torch.float64, device=features.device)
        return (products.mean(1) if self.mean else products.sum(1)) + self.intercept


class VisionReward(Judge):
    """A checklist answered by a vision-language model; about -2.5 to 4.9 for pictures, -0.22 to 0.22 for videos.

    Source: Xu et al. 2024, "VisionReward: Fine-Grained Multi-Dimensional Human Preference Learning for Image and Video
    Generation" (arXiv:2412.21059), and the released code, which scores a picture by the weighted sum of 27 answers and
    an alignment score, and a video by the weighted mean of 29 answers. Yes is 1, no is -1.

    Beside the total, `dims` has the answers after masking ("q00", "q01", ...) and "alignment", and `raw` all answers
    as JSON. An answer that is neither yes nor no makes its medium invalid. The released code counts it as no, and a
    model that never says "yes" in that exact form then gives every video -0.2164542276209317.

    The original VLMs (CogVLM2, a SAT checkpoint for pictures and Hub code for videos) do not run here: put them behind
    an OpenAI-compatible server, or take another VLM that answers such questions. Scores of different VLMs are not
    comparable.
    """

    info = RewardInfo(
        name="vision_reward-image",
        license="Apache-2.0 (code; that of the weights is not confirmed here)",
        weights=(WeightSpec("THUDM/VisionReward-Image", "config.json"),),
        dims=("alignment", *(f"q{i:02d}" for i in range(30)), "overall"),
        differentiable=False,
        generative=True,
        nominal_range=(-2.54, 4.90),
        tau=1.0,  # the weights come from a logistic regression on differences of the sum
        min_vram_gb=80.0,
    )

    _VIDEO_INFO = RewardInfo(
        name="vision_reward-video",
        license=info.license,
        weights=(WeightSpec("THUDM/VisionReward-Video", "config.json"),),
        kind=frozenset({"video"}),
        dims=(*(f"q{i:02d}" for i in range(29)), "overall"),
        differentiable=False,
        generative=True,
        nominal_range=(-0.217, 0.217),
        tau=1 / 29,  # the same regression, on a mean instead of a sum
        min_vram_gb=40.0,
    )

    def __init__(
        self,
        path_or_id: str | Path | None = None,
        *,
        kind: Literal["image", "video"] = "image",
        mode: Literal["text", "soft"] = "text",
        texts: str | Path | None = None,
        alignment: RewardModel | str | Path | None = None,
        question_format: str | None = None,
        **asked: Unpack[Asked],
    ):
        """Reads checklist and weights, and finds who answers.

        Args:
            path_or_id: Folder or Hub id of a chat VLM of transformers, if it answers in this process.
            kind: What is scored.
            mode: "text" reads yes or no from the answer. "soft" is our own: the probability of yes minus that of no
                for the first token, divided by their sum, in [-1, 1]; masks then are where it is positive.
            texts: Folder with the two published files of that kind; None fetches them once.
            alignment: For pictures, the VQAScore of picture and prompt: a model of scores in [0, 1], or a folder or
                Hub id of CLIP-FlanT5; None is the published xxl.
            question_format: How a question is put, "{question}" standing for it. None is, for pictures, what the
                original puts behind its image tokens, and for videos the question alone.
            asked: Who answers, and where a model in this process runs; see `judging.Asked`.

        Raises:
            ValueError: If an option is unknown or does not fit the others.
            WeightsError: If texts or weights are missing, damaged, or do not belong together.
        """
        if kind not in ("image", "video") or mode not in ("text", "soft"):
            raise ValueError(f"expected kind 'image' or 'video' and mode 'text' or 'soft', got {kind!r} and {mode!r}")
        if alignment is not None and kind == "video":
            raise ValueError("the checklist of videos asks about the prompt itself and takes no alignment")
        if question_format is None:
            question_format = _IMAGE_FORMAT if kind == "image" else _VIDEO_FORMAT
        if "{question}" not in question_format:
            raise ValueError(f"expected a question_format with '{{question}}', got {question_format!r}")
        info = self.describe(kind)
        checklist = read_checklist(kind, texts, asked.get("local_files_only"))
        super().__init__(info, find_answerer(info, path_or_id, asked))
        self.checklist, self.mode, self.question_format = checklist, mode, question_format
        self.alignment: RewardModel | None = None
        if kind == "image":
            if not isinstance(alignment, RewardModel):
                alignment = VQAScore(alignment, **loading(asked))
            self.alignment = alignment

    @classmethod
    def describe(cls, kind: Literal["image", "video"] = "image") -> RewardInfo:
        """See `RewardModel`."""
        return VisionReward.info if kind == "image" else VisionReward._VIDEO_INFO

    def choose_frames(self, total: int, fps: float | None) -> list[int]:
        """One frame per second from 0 on, the one that starts nearest, the earlier on ties; at most 24.

        The last second is that of the last frame's start, rounded half to even. Frames are taken to follow each other
        at one rate.

        Raises:
            InvalidMediaError: If the rate is not known.
        """
        if fps is None:
            raise InvalidMediaError("frames are chosen by seconds: give the rate with media.Video(frames, fps)")
        starts = [number / fps for number in range(total)]
        seconds = range(min(round(starts[-1]) + 1, _MAX_FRAMES))
        return [min(range(total), key=lambda number: abs(starts[number] - second)) for second in seconds]

    def score_prepared(self, prepared: Sequence[tuple[Image.Image, ...]], texts: Sequence[str]) -> Scores:
        """See `RewardModel`."""
        questions = self.checklist.questions
        asked = [self._question(q, t, images) for images, t in zip(prepared, texts, strict=True) for q in questions]
        given = self.answerer.answer(asked)
        rows = [given[i : i + len(questions)] for i in range(0, len(given), len(questions))]
        values = torch.full((len(rows), len(questions)), torch.nan, dtype=torch.float64)
        errors: list[str | None] = []
        for row, answers in zip(values, rows, strict=True):
            read = [self._read(answer) for answer in answers]
            errors.append(_first_reason(read))
            row[:] = torch.tensor([torch.nan if isinstance(value, str) else value for value in read])
        alignment = None
        if self.alignment is not None:
            output = self.alignment.score([images[0] for images in prepared], list(texts), on_invalid="nan")
            alignment = output.score
            errors = [e or (a and f"alignment: {a}") for e, a in zip(errors, output.errors, strict=True)]
        masked = self.checklist.apply_masks(values)
        dims = {f"q{i:02d}": masked[:, i] for i in range(len(questions))}
        if alignment is not None:
            dims["alignment"] = alignment
        dims["overall"] = self.checklist.score(self.checklist.features(values, alignment))
        raw = [json.dumps([answer.text for answer in answers], ensure_ascii=False) for answers in rows]
        return Scores(dims, raw=raw, errors=errors)

    def settings(self) -> dict[str, str]:
        """See `RewardModel`."""
        own = {"mode": self.mode, "question_format": self.question_format}
        if self.alignment is not None:
            own["alignment"] = repr((self.alignment.info.name, sorted(self.alignment.settings().items())))
        return {**super().settings(), **own}

    def _question(self, question: str, prompt: str, images: tuple[Image.Image, ...]) -> Question:
        # The prompt goes in last: one that contains a placeholder stays as it is.
        text = self.question_format.replace("{question}", question).replace("[[prompt]]", prompt)
        if self.mode == "soft":
            return Question(text, images, 1, (YES, NO), self.info.name)
        return Question(text, images, _MAX_TOKENS, template=self.info.name)

    def _read(self, answer: Answer) -> float | str:
        """1 for yes, -1 for no, between them in the soft mode; or why that cannot be said."""
        if answer.error is not None:
            return answer.error
        if self.mode == "soft":
            yes, no = answer.probabilities.get(YES, 0.0), answer.probabilities.get(NO, 0.0)
            return (yes - no) / (yes + no) if yes + no > 0 else "neither 'yes' nor 'no' is among the likely tokens"
        return read_yes_no(answer.text)


def read_yes_no(text: str) -> float | str:
    """1.0 or -1.0 for an answer that begins with the word yes or no, in any case and after quotes; else why not."""
    found = re.match(r"[\s\"'`*]*(yes|no)\b", text, re.IGNORECASE)
    if found is None:
        return f"the answer is neither yes nor no: {text[:60]!r}"
    return 1.0 if found[1].lower() == YES else -1.0


def read_checklist(
    kind: Literal["image", "video"], folder: str | Path | None = None, local_files_only: bool | None = None
) -> Checklist:
    """The published checklist of a kind with its weights.

    Of pictures the lines are stripped (one ends in a space). Of videos they are not: all questions but the last end in
    a line break, which the model was trained to see.

    Raises:
        WeightsError: If a file is missing or not the published one.
    """
    files = (IMAGE_QUESTIONS, IMAGE_WEIGHTS) if kind == "image" else (VIDEO_QUESTIONS, VIDEO_WEIGHTS)
    questions, weights = (read_text(file, folder, local_files_only) for file in files)
    lines, values = questions.splitlines(keepends=True), json.loads(weights)
    if kind == "video":
        return Checklist(tuple(lines), tuple(values), {}, alignment=False, mean=True)
    stripped = tuple(line.strip() for line in lines)
    return Checklist(stripped, tuple(values["coef"]), IMAGE_MASKS, True, False, intercept=values["intercept"][0])


def _first_reason(read: Sequence[float | str]) -> str | None:
    reasons = [(number, value) for number, value in enumerate(read) if isinstance(value, str)]
    if not reasons:
        return None
    number, reason = reasons[0]
    more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    return f"question {number}: {reason}{more}"
