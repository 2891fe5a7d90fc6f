"""UniGenBench: 600 prompts with test points in 27 sub-dimensions, judged by a vision-language model."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor

from diffalign.eval.base import Case, Report, Row, Score
from diffalign.eval.case_rows import check_counts, mean_of, missing_pictures, one_judge, rows_of, spread
from diffalign.eval.statistics import bootstrap_mean_of_tasks
from diffalign.eval.unigenbench_prompts import (
    LANGUAGES,
    PRIMARIES,
    Language,
    Wanted,
    primary,
    read_judge_texts,
    read_prompts,
)
from diffalign.eval.unigenbench_table import PUBLISHED
from diffalign.eval.vlm_judge import Cost, JudgedBenchmark, Replies, VLMJudge, agreement, key_of, read_yes_no
from diffalign.reward_models.answering import Answer
from diffalign.reward_models.judge_answers import UnreadableAnswerError
from diffalign.reward_models.media import Media

__all__ = ["UniGenBench", "read_points"]

Form = Literal["together", "each"]

EACH = (
    'A picture was drawn for this prompt: "{prompt}" Look at one point only, {name}: {description}. Does the picture '
)
EACH += "show it as the prompt asks? Answer with one word: yes or no."
"""What is asked about one test point where each is asked alone; our wording."""
_ANSWER_TOKENS = {"together": 4096, "each": 8}
RESAMPLES = 2000
"""Of each interval; there are 38 of them, over up to 600 prompts each."""
_EXPECTED_PER_POINT = 80  # tokens of the analysis of one test point, for the estimate


class UniGenBench(JudgedBenchmark):
    """The share of test points that pictures get right: in sub-dimensions, in ten primary dimensions, and their mean.

    Source: Wang et al. 2025, "Pref-GRPO: Pairwise Preference Reward-based GRPO for Stable Text-to-Image Reinforcement
    Learning" (arXiv:2508.20751), and with longer and Chinese prompts "UniGenBench++" (arXiv:2510.18701); the rules are
    those of the released evaluation. A sub-dimension is the share of right test points over all pictures, a primary
    dimension the same over all its sub-dimensions, the overall score the unweighted mean of the ten. The released code
    does not compute the last one; the leaderboard does.

    Different from the released code: the judge decodes greedily, pictures come before the text, an answer is read by
    its list of scores alone, and one that cannot be read is missing, where the original asks again without end.

    Args:
        num_prompts: How many prompts, an equal part of every theme; None takes all.
        samples: Pictures per prompt; the original has 4.
        seed: Sample k of every prompt has `seed + k`.
        language: Which list of prompts: "en", "en_long", "zh" or "zh_long".
        form: "together" asks about all test points of a picture at once, in the released words. "each" asks about one
            at a time, in ours, for judges that cannot keep to the released format; its scores are others.
        judge: Who answers: a `VLMJudge`, or its options.
        texts: A clone of the released repository, for its question; needed to judge "together".
        data: Folder with the prompts; None reads them from the cache, or fetches them once.
        local_files_only: Never ask the network; None follows HF_HUB_OFFLINE.

    Raises:
        ValueError: If a number is not positive, an option unknown, or the budget exceeded.
        WeightsError: If the prompts, or with a judge the question, are not at hand.
    """

    name = "unigenbench"
    version = "1"
    reference: ClassVar[tuple[Mapping[str, Any], ...]] = PUBLISHED
    score_batch_size = 64  # so that a server has many questions at once
    reads_files = True

    def __init__(
        self,
        num_prompts: int | None = None,
        samples: int = 4,
        seed: int = 0,
        language: Language = "en",
        form: Form = "together",
        *,
        judge: VLMJudge | Mapping[str, Any] | None = None,
        texts: str | Path | None = None,
        data: str | Path | None = None,
        local_files_only: bool | None = None,
    ) -> None:
        check_counts(num_prompts, samples)
        if form not in _ANSWER_TOKENS:
            raise ValueError(f"unknown form {form!r} (available: together, each)")
        self.samples, self.seed, self.language, self.form = samples, seed, language, form
        everything = read_prompts(language, data, local_files_only)
        self.wanted = [everything[number] for number in spread([w.theme for w in everything], num_prompts)]
        self._by_prompt = {wanted.prompt: wanted for wanted in self.wanted}
        self.judge = VLMJudge.of(judge)
        self._texts = read_judge_texts(language, texts) if self.judge.given and form == "together" else None
        self.announce()

    def cases(self) -> list[Case]:
        """All samples of the first prompt, then of the second, and so on; ids are the original's file names."""
        return [
            Case(id=f"{wanted.index}_{sample}", prompt=wanted.prompt, seed=self.seed + sample, task=wanted.theme)
            for wanted in self.wanted
            for sample in range(self.samples)
        ]

    def estimate(self) -> Cost:
        """What judging all pictures takes."""
        return self.judge.estimate(
            (
                key_of(case, place),
                text,
                1 if self.form == "each" else _EXPECTED_PER_POINT * len(self._by_prompt[case.prompt].points),
            )
            for case in self.cases()
            for place, text in enumerate(self._questions(self._by_prompt[case.prompt]))
        )

    def score(self, media: Tensor | Sequence[Media], cases: Sequence[Case]) -> list[Row]:
        """A row for each picture: the share of right test points, and in the evidence the verdict on each.

        A picture that cannot be read, or an answer about it, gets a row without a score, which says why and counts as
        missing.

        Args:
            media: RGB [B, 3, H, W] in [0, 1], or B pictures of any kind that reward models read, such as paths.
            cases: What they were made for.

        Raises:
            ValueError: If there are not as many pictures as cases, or a prompt is unknown.
            WeightsError: If nobody was named to judge.
        """
        wanted = [self._of(case.prompt) for case in cases]
        questions = [dict(enumerate(self._questions(w))) for w in wanted]
        tokens = _ANSWER_TOKENS[self.form]
        replies = self.judge.ask_about(media, cases, questions, tokens, f"unigenbench {self.form}")
        identity = self.judge.identity
        return [self._row(*one, identity) for one in zip(cases, wanted, replies, strict=True)]

    def aggregate(self, rows: Sequence[Row]) -> Report:
        """The overall score, 0..100, and those of the dimensions, from the stored verdicts alone.

        Intervals resample prompts, for the overall score within each primary dimension.

        Raises:
            ValueError: If rows are no cases of this benchmark, were judged by different judges, or carry other test
                points.
        """
        cases = self.cases()
        found = rows_of(cases, rows)
        judge = one_judge(list(found.values()))
        good = [row for row in found.values() if row.evidence.get("verdicts") is not None]
        missing = len(cases) - len(good)
        points: list[tuple[str, str, float]] = []  # prompt, test point, 100 or 0
        pairs: list[tuple[str, bool, bool | None]] = []
        for row in good:
            verdicts, names = self._verdicts(row)
            points += [(row.prompt, name, 100.0 * right) for name, right in zip(names, verdicts, strict=True)]
            for place, second in dict(row.evidence.get("again", {})).items():
                pairs.append((row.prompt, verdicts[int(place)], second))
        expected = Counter(p.name for w in self.wanted for p in w.points for _ in range(self.samples))
        groups = {name: [p for p in points if primary(p[1]) == name] for name in PRIMARIES.values()}
        groups |= {name: [p for p in points if p[1] == name] for name in sorted(expected) if name not in groups}
        sizes = Counter(expected)
        for name, n in expected.items():
            if primary(name) != name:
                sizes[primary(name)] += n
        warnings = missing_pictures(len(cases), missing, len(found) - len(good))
        return Report(
            benchmark=self.name if self.language == "en" else f"{self.name}_{self.language}",
            benchmark_version=self.version,
            protocol=self.protocol() | {"judge": judge},
            scores={"overall": _overall(points, missing), "judge_agreement": agreement(pairs)},
            groups={
                name: {"correct": mean_of([p[2] for p in of], [p[0] for p in of], sizes[name], resamples=RESAMPLES)}
                for name, of in groups.items()
                if sizes[name]
            },
            n_expected=len(cases),
            n_missing=missing,
            warnings=tuple(warnings),
            sampling={"seed_rule": f"{self.seed} + sample, the same for every prompt", "samples": self.samples},
            reference=self.reference if self.language == "en" else (),
        )

    def export_media(self, rows: Sequence[Row], pictures: Path, folder: Path) -> int:
        """See `unigenbench_files.write_folder`."""
        from diffalign.eval.unigenbench_files import write_folder  # which builds on this module

        return write_folder(folder, rows, pictures, self)

    def protocol(self) -> dict[str, Any]:
        """What a score depends on besides pictures and judge."""
        return {
            "form": self.form,
            "question": EACH if self.form == "each" else "as released",
            "language": self.language,
            "metadata": LANGUAGES[self.language].sha256[:16],
            "prompts": sha256("\n".join(w.prompt for w in self.wanted).encode()).hexdigest()[:16],
            "num_prompts": len(self.wanted),
            "bootstrap": {"resamples": RESAMPLES, "seed": 0, "clusters": "prompt"},
        }

    def _questions(self, wanted: Wanted) -> list[str]:
        if self.form == "together":
            return [] if self._texts is None else [self._texts.question(wanted)]
        return [EACH.format(prompt=wanted.prompt, name=p.name, description=p.description) for p in wanted.points]

    def _of(self, prompt: str) -> Wanted:
        if prompt not in self._by_prompt:
            raise ValueError(f"prompt {prompt!r:.80} is none of the {len(self.wanted)} of this benchmark")
        return self._by_prompt[prompt]

    def _row(self, case: Case, wanted: Wanted, replies: Replies, judge: str) -> Row:
        blank = Row(case.id, case.prompt, case.seed, wanted.theme, scores={self.name: None}, evidence={"judge": judge})
        if replies.unread is not None:
            return replace(blank, reason=replies.unread)
        read = self._read(list(replies.first.values()), len(wanted.points))
        if isinstance(read, str):
            return replace(blank, reason=read)
        again: dict[str, bool | None] = {}
        for place, answer in replies.second.items():
            verdicts = self._read([answer], 1 if self.form == "each" else len(wanted.points))
            for offset in range(1 if self.form == "each" else len(wanted.points)):
                again[str(place + offset)] = None if isinstance(verdicts, str) else verdicts[offset]
        names = [point.name for point in wanted.points]
        wrong = [f"{p.name} ({p.description})" for p, right in zip(wanted.points, read, strict=True) if not right]
        return replace(
            blank,
            scores={self.name: sum(read) / len(read)},
            reason=f"wrong: {' | '.join(wrong)}" if wrong else "every test point is right",
            evidence={"judge": judge, "points": names, "verdicts": read, "again": again},
        )

    def _read(self, answers: Sequence[Answer], points: int) -> list[bool] | str:
        """The verdicts in the answers about one picture, or why they cannot be read."""
        verdicts: list[bool] = []
        for answer in answers:
            if answer.error is not None:
                return answer.error
            try:
                verdicts += [read_yes_no(answer.text)] if self.form == "each" else read_points(answer.text, points)
            except UnreadableAnswerError as error:
                return str(error)
        return verdicts

    def _verdicts(self, row: Row) -> tuple[list[bool], list[str]]:
        names = [point.name for point in self._of(row.prompt).points]
        verdicts = row.evidence["verdicts"]
        if list(row.evidence.get("points", ())) != names or len(verdicts) != len(names):
            raise ValueError(f"row {row.id!r} has verdicts on other test points than its prompt; judge it again")
        return [bool(value) for value in verdicts], names


def read_points(text: str, count: int) -> list[bool]:
    """The verdicts in an answer in the released format: a list of 0 and 1 in <score>, one for each test point.

    Raises:
        UnreadableAnswerError: If the list is not there, of another length, or holds anything else.
    """
    match = re.search(r"<score>(.*?)</score>", text, re.DOTALL)
    if match is None:
        raise UnreadableAnswerError(f"no <score>...</score> in {text[-60:]!r}")
    try:
        values = ast.literal_eval(match[1].strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise UnreadableAnswerError(f"<score> holds no list: {match[1][:60]!r}") from error
    if not isinstance(values, list) or len(values) != count:
        raise UnreadableAnswerError(f"<score> holds {match[1].strip()[:60]!r}, expected a list of {count} verdicts")
    if any(isinstance(value, bool) or value not in (0, 1) for value in values):
        raise UnreadableAnswerError(f"<score> holds {values!r:.60}, expected only 0 and 1")
    return [value == 1 for value in values]


def _overall(points: Sequence[tuple[str, str, float]], missing: int) -> Score:
    """The mean of the ten primary dimensions; None while one of them has no verdict, for it would be another mean."""
    tasks = [primary(name) for _, name, _ in points]
    if set(tasks) != set(PRIMARIES.values()):
        return Score(None, None, len(points), missing)
    values, prompts = [value for *_, value in points], [prompt for prompt, *_ in points]
    means = [np.mean([v for v, t in zip(values, tasks, strict=True) if t == task]) for task in PRIMARIES.values()]
    return Score(
        float(np.mean(means)),
        bootstrap_mean_of_tasks(values, tasks, prompts, resamples=RESAMPLES),
        len(points),
        missing,
    )
