"""UnifiedReward: vision-language models that write a judgement of a picture or video, or of two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Unpack

import torch
from PIL import Image
from torch import Tensor

from diffalign.reward_models.answering import Answer, Question
from diffalign.reward_models.base import (
    OnInvalid,
    PairOutput,
    RewardInfo,
    Scores,
    broadcast,
)
from diffalign.reward_models.judge_answers import UnreadableAnswerError
from diffalign.reward_models.judge_tasks import TASKS, read_template
from diffalign.reward_models.judging import Asked, Judge, find_answerer, somebody_is_asked
from diffalign.reward_models.media import InvalidMediaError, MediaBatch, as_list

__all__ = ["UnifiedReward", "JudgedPairs"]

_MAX_TOKENS = 4096


@dataclass(frozen=True)
class JudgedPairs(PairOutput):
    """Judgement of N pairs by a judge that sees both media at once.

    Attributes:
        dims: p_a by dimension, each float32 [N].
        position_bias: What being shown first adds: share of the first place in both orders together, minus 1, in
            [-1, 1]; 0 if the orders agree, [N]. NaN where `valid` is False or only one order was asked.
        errors: Why a pair is invalid; None for valid ones.
        raw: The answers in both orders (or the one that was asked), per pair.
    """

    dims: dict[str, Tensor]
    position_bias: Tensor
    errors: tuple[str | None, ...]
    raw: tuple[tuple[str, ...], ...]


class UnifiedReward(Judge):
    """Scores or preferences that a vision-language model writes down.

    Source: Wang et al. 2025, "Unified Reward Model for Multimodal Understanding and Generation" (arXiv:2503.05236);
    Think: "Unified Multimodal Chain-of-Thought Reward Model through Reinforcement Fine-Tuning" (arXiv:2505.03318).
    The templates are those of the released scripts, byte for byte.

    Tasks that begin with "point" score media: the total is the final score over its maximum, for 2.0 the mean of its
    three grades over 5 (a mean of ours; the grades themselves are in `dims`). Tasks with "pair" judge two media: call
    `compare`, or `win_rates` for a group; `score` then explains itself. An answer that does not hold what was asked
    for, or was cut, is invalid.

    The frames of a video are sent as pictures, int(i * total / n) for 2.0 and evenly from first to last for Flex. What
    the scripts of 1.0 and Think do, which hand over the file, depends on their video reader and is not repeated here:
    they get the frames of 2.0.
    """

    info = RewardInfo(
        name="unified_reward-point_image",
        license="MIT (code; that of the weights is not confirmed here)",
        weights=(TASKS["point_image"].weights,),
        differentiable=False,
        generative=True,
        nominal_range=(0.2, 1.0),
        min_vram_gb=40.0,
    )

    def __init__(
        self,
        path_or_id: str | Path | None = None,
        *,
        task: str = "point_image",
        texts: str | Path | None = None,
        **asked: Unpack[Asked],
    ):
        """Reads the template and finds who answers.

        Args:
            path_or_id: Folder or Hub id of a chat VLM of transformers, if it answers in this process; None is the
                published model of the task, unless somebody else is asked.
            task: The form of judgement; the keys are named in the error for an unknown one.
            texts: Folder with `unifiedreward_templates.json`, or a checkout of the official repository, from whose
                scripts the template is read (nothing is executed).
            asked: Who answers, and where a model in this process runs; see `judging.Asked`.

        Raises:
            ValueError: If the task is unknown, or an option does not fit the others.
            WeightsError: If template or weights are missing, damaged or others.
        """
        info, form = self.describe(task), TASKS[task]
        template = read_template(form, texts)
        if path_or_id is None and not somebody_is_asked(asked):
            path_or_id = form.weights.repo
        super().__init__(info, find_answerer(info, path_or_id, asked))
        self.task, self.template, self.even_frames = form, template, task.startswith("flex")

    @classmethod
    def describe(cls, task: str = "point_image") -> RewardInfo:
        """See `RewardModel`."""
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r} of unified_reward (available: {', '.join(TASKS)})")
        form = TASKS[task]
        lowest = {"point_image": 0.2, "point_video": 0.1, "point_image_acs": 0.2, "point_video_aps": 0.2}
        return replace(
            UnifiedReward.info, name=f"unified_reward-{task}", weights=(form.weights,), dims=form.dims,
            kind=frozenset({form.kind}), pairwise_native=form.pair,
            nominal_range=(lowest.get(task, 0.0), 1.0),
        )  # fmt: skip

    def choose_frames(self, total: int, fps: float | None) -> list[int]:
        """See the class; a video of fewer frames shows some of them twice."""
        count = self.task.frames
        if self.even_frames:
            # That the script cuts its linspace to integers, as numpy does, is not confirmed here.
            return [int(i * (total - 1) / (count - 1)) for i in range(count)]
        return [int(i * total / count) for i in range(count)]

    def score_prepared(self, prepared: Sequence[tuple[Image.Image, ...]], texts: Sequence[str]) -> Scores:
        """See `RewardModel`; tasks that judge pairs have no score of one medium."""
        if self.task.pair:
            raise NotImplementedError(f"{self.info.name} judges pairs: call compare(), or win_rates() for a group")
        answers = self.answerer.answer([self._question(i, t) for i, t in zip(prepared, texts, strict=True)])
        values, errors = self._read(answers)
        return Scores(values, raw=[answer.text for answer in answers], errors=errors)

    def compare(
        self,
        a: MediaBatch,
        b: MediaBatch,
        prompts: str | Sequence[str],
        *,
        batch_size: int = 32,
        on_invalid: OnInvalid = "raise",
        orders: Literal["both", "given"] = "both",
    ) -> PairOutput:
        """Probability that each `a` is better than the `b` beside it.

        For tasks that judge pairs it is a `JudgedPairs`. Both orders are asked, a first and b first, and p_a is the
        mean of a's share in the first and in the second place; where the orders name different winners, `tie` is set.
        Swapping a and b gives one minus the result. For other tasks see `RewardModel.compare`.

        Args:
            a: As in `score`.
            b: As many.
            prompts: One for all pairs, or one for each.
            batch_size: Pairs that are asked about at once, >= 1.
            on_invalid: As in `score`.
            orders: "given" asks with a first only; half the cost, and the judge's bias for a place stays in.

        Raises:
            InvalidMediaError: With "raise", on the first pair that cannot be judged.
            ValueError: If there are not as many `a` as `b`, or an argument is out of range.
        """
        if not self.task.pair:
            return super().compare(a, b, prompts, batch_size=batch_size, on_invalid=on_invalid)
        first, second = as_list(a, self.item_ndim), as_list(b, self.item_ndim)
        if len(first) != len(second):
            raise ValueError(f"compare needs as many a as b, got {len(first)} and {len(second)}")
        if batch_size < 1 or on_invalid not in ("raise", "nan") or orders not in ("both", "given"):
            raise ValueError(
                "expected batch_size >= 1, on_invalid 'raise' or 'nan' and orders 'both' or 'given', got "
                f"{batch_size}, {on_invalid!r} and {orders!r}"
            )
        texts = broadcast(prompts, len(first))
        count = len(first)
        shares = {name: torch.full((2, count), torch.nan) for name in self.info.dims}
        errors: list[str | None] = [None] * count
        raw: list[tuple[str, ...]] = [()] * count
        for start in range(0, count, batch_size):
            rows = range(start, min(start + batch_size, count))
            shown_a = dict(zip(*self._prepare(first, rows, errors, on_invalid), strict=True))
            shown_b = dict(zip(*self._prepare(second, rows, errors, on_invalid), strict=True))
            good = [row for row in rows if row in shown_a and row in shown_b]
            asked = [self._question(shown_a[row] + shown_b[row], texts[row]) for row in good]
            if orders == "both":
                asked += [self._question(shown_b[row] + shown_a[row], texts[row]) for row in good]
            answers = self.answerer.answer(asked)
            values, reasons = self._read(answers)
            for number, row in enumerate(good):
                mine = range(number, len(asked), len(good))
                raw[row] = tuple(answers[i].text for i in mine)
                reason = next((reasons[i] for i in mine if reasons[i] is not None), None)
                errors[row] = None if reason is None else f"pair {row}: {reason}"
                if reason is not None and on_invalid == "raise":
                    raise InvalidMediaError(errors[row])
                for name, column in values.items():
                    shares[name][: len(mine), row] = column[list(mine)].float()
        return _judged(shares, orders == "both", errors, raw)

    def win_rates(
        self, media: MediaBatch, prompt: str, *, batch_size: int = 32, on_invalid: OnInvalid = "raise"
    ) -> Tensor:
        """Mean p_a of each of N media of one prompt against the N - 1 others, float32 [N].

        The reward of Pref-GRPO (Wang et al. 2025, arXiv:2508.20751). N (N - 1) questions, both orders of every pair.
        A pair that could not be judged is left out of the mean; a medium without any has NaN.

        Raises:
            ValueError: If there are fewer than two media.
        """
        items = as_list(media, self.item_ndim)
        if len(items) < 2:
            raise ValueError(f"win rates need a group of two or more media, got {len(items)}")
        pairs = [(i, j) for i in range(len(items)) for j in range(i + 1, len(items))]
        left, right = [items[i] for i, _ in pairs], [items[j] for _, j in pairs]
        judged = self.compare(left, right, prompt, batch_size=batch_size, on_invalid=on_invalid)
        table = torch.full((len(items), len(items)), torch.nan)
        for (i, j), p_a in zip(pairs, judged.p_a.tolist(), strict=True):
            table[i, j], table[j, i] = p_a, 1 - p_a
        return table.nanmean(1)

    def settings(self) -> dict[str, str]:
        """See `RewardModel`."""
        return {**super().settings(), "template": self.task.digest}

    def _question(self, images: tuple[Image.Image, ...], prompt: str) -> Question:
        return Question(self.template.replace("{prompt}", prompt), images, _MAX_TOKENS, template=self.task.key)

    def _read(self, answers: Sequence[Answer]) -> tuple[dict[str, Tensor], list[str | None]]:
        """Values by dimension [N], NaN where there are none, and the reasons why."""
        values = {name: torch.full((len(answers),), torch.nan) for name in self.info.dims}
        errors: list[str | None] = []
        for i, answer in enumerate(answers):
            try:
                if answer.error is not None:
                    raise UnreadableAnswerError(answer.error)
                if not answer.finished:
                    raise UnreadableAnswerError(f"the answer was cut at {_MAX_TOKENS} tokens")
                for name, value in self.task.read(answer.text).items():
                    values[name][i] = value
            except UnreadableAnswerError as error:
                errors.append(str(error))
            else:
                errors.append(None)
        return values, errors


def _judged(
    shares: Mapping[str, Tensor], both: bool, errors: Sequence[str | None], raw: Sequence[tuple[str, ...]]
) -> JudgedPairs:
    """What both orders say together; `shares` are those of the medium in the first place, [2, N] by dimension."""
    valid = torch.tensor([error is None for error in errors], dtype=torch.bool)
    nan = torch.full((len(errors),), torch.nan)
    dims = {}
    for name, (given, swapped) in shares.items():
        p_a = (given + (1 - swapped)) / 2 if both else given.clone()
        dims[name] = p_a.masked_fill(~valid, torch.nan)
    name = list(shares)[-1]
    given, swapped = shares[name]
    agree = ((given - 0.5).sign() == (0.5 - swapped).sign()) if both else torch.ones_like(valid)
    return JudgedPairs(
        p_a=dims[name],
        tie=valid & (~agree | (dims[name] == 0.5)),
        valid=valid,
        dims=dims,
        position_bias=(given + swapped - 1).masked_fill(~valid, torch.nan) if both else nan,
        errors=tuple(errors),
        raw=tuple(raw),
    )
