"""DPG-Bench: 1065 long prompts, each with a graph of questions that a vision-language model answers about the picture.

The question graphs are not in this package, and as their checksum is not known here they are not fetched: pass the file
that the authors published, `dpg_bench.csv`. Judged by the original's mPLUG or by any other model: the judge's name
belongs to the score.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from diffalign.eval.base import Case, Report, Row, Score
from diffalign.eval.case_rows import check_counts, mean_of, missing_pictures, one_judge, rows_of, spread
from diffalign.eval.dpg_graph import PROMPTS, Graph, Mode, picture_score, read_graphs, read_prompts
from diffalign.eval.dpg_table import PUBLISHED
from diffalign.eval.statistics import RESAMPLES, bootstrap_mean
from diffalign.eval.vlm_judge import Cost, JudgedBenchmark, Replies, VLMJudge, agreement, key_of, read_yes_no
from diffalign.reward_models.answering import Answer
from diffalign.reward_models.judge_answers import UnreadableAnswerError
from diffalign.reward_models.media import Media
from diffalign.reward_models.published_texts import PublishedText

__all__ = ["DPG"]

MPLUG = "mplug"
"""The judge of rows that the original tool made."""
ASK = "{} Answer with one word: yes or no."
"""What another judge is asked; our wording."""
CATEGORY_RESAMPLES = 2000
"""Of the intervals of categories, of which there are some twenty."""
NO_GRAPHS = (
    "DPG-Bench's questions are not part of this package, and no checksum is known to fetch them by: download "
    "dpg_bench/dpg_bench.csv of github.com/TencentQQGYLab/ELLA and name it, with --option dpg.graphs=FILE"
)
_ANSWER_TOKENS = 8


class DPG(JudgedBenchmark):
    """How much of a long prompt a picture shows.

    Source: Hu et al. 2024, "ELLA: Equip Diffusion Models with LLM for Enhanced Semantic Alignment" (arXiv:2403.05135),
    with the rules of the released evaluation. A picture's score is the mean of its answers, after those whose parents
    are 0 were set to 0; the benchmark's is 100 times the mean over prompts of the mean over their pictures. Categories
    are means of the answers as they were given, before zeros are handed down.

    "official" mirrors two things the released code does with the whole file: its first row is lost, and with it the
    first prompt if another of its questions depends on that row; and categories use the last of a prompt's pictures
    only. "fixed" uses everything. Pictures that fail are missing in both, never left out silently.

    Args:
        num_prompts: How many prompts, evenly spaced; None takes all.
        samples: Pictures per prompt; the original has 4.
        seed: Sample k of every prompt has `seed + k`.
        mode: See above.
        graphs: The file `dpg_bench.csv`, or a part of it, which then gives the prompts; None can draw, not judge.
        judge: Who answers: a `VLMJudge`, or its options.
        data: Folder with the prompts; None reads them from the cache, or fetches them once.
        local_files_only: Never ask the network; None follows HF_HUB_OFFLINE.

    Raises:
        ValueError: If a number is not positive, the mode unknown, the file malformed, or the budget exceeded.
        WeightsError: If the prompts are not at hand.
    """

    name = "dpg"
    version = "1"
    metadata: ClassVar[PublishedText] = PROMPTS
    reference: ClassVar[tuple[Mapping[str, Any], ...]] = PUBLISHED
    score_batch_size = 64  # so that a server has many questions at once
    reads_files = True

    def __init__(
        self,
        num_prompts: int | None = None,
        samples: int = 4,
        seed: int = 0,
        mode: Mode = "fixed",
        *,
        graphs: str | Path | None = None,
        judge: VLMJudge | Mapping[str, Any] | None = None,
        data: str | Path | None = None,
        local_files_only: bool | None = None,
    ) -> None:
        check_counts(num_prompts, samples)
        if mode not in ("fixed", "official"):
            raise ValueError(f"unknown mode {mode!r} (available: fixed, official)")
        self.samples, self.seed, self.mode = samples, seed, mode
        everything = read_prompts(data, local_files_only)
        self.graphs: dict[str, Graph] | None = None
        if graphs is not None:
            self.graphs = read_graphs(graphs, mode)
            unknown = sorted(set(self.graphs) - set(everything))
            if unknown:
                raise ValueError(
                    f"{graphs}: {len(unknown)} items are no prompt of DPG-Bench, such as {unknown[0]!r}; expected the "
                    "item_id to be the name of the prompt's file without its ending"
                )
            everything = {item: prompt for item, prompt in everything.items() if item in self.graphs}
        items = list(everything)
        numbers = spread(["all"] * len(items), num_prompts)
        self.prompts = {items[number]: everything[items[number]] for number in numbers}
        self._items = {prompt: item for item, prompt in self.prompts.items()}
        self.judge = VLMJudge.of(judge)
        if self.graphs is not None:
            self.announce()

    def cases(self) -> list[Case]:
        """All samples of the first prompt, then of the second, and so on; the id begins with the prompt's."""
        return [
            Case(id=f"{item}-{sample:02d}", prompt=prompt, seed=self.seed + sample, meta={"item": item})
            for item, prompt in self.prompts.items()
            for sample in range(self.samples)
        ]

    def estimate(self) -> Cost:
        """What judging all pictures takes."""
        return self.judge.estimate(
            (key_of(case, p.number), ASK.format(p.question), 1) for case in self.cases() for p in self._graph(case)
        )

    def check(self) -> None:
        """See `Benchmark`: the file with the questions and a judge."""
        if self.graphs is None:
            raise ValueError(NO_GRAPHS)
        super().check()

    def score(self, media: Tensor | Sequence[Media], cases: Sequence[Case]) -> list[Row]:
        """A row for each picture: its score in 0..1, and in the evidence the answer to every question.

        A picture that cannot be read, or of which one answer is not yes or no, gets a row without a score, which says
        why and counts as missing.

        Args:
            media: RGB [B, 3, H, W] in [0, 1], or B pictures of any kind that reward models read, such as paths.
            cases: What they were made for; one without `meta` is looked up by its prompt.

        Raises:
            ValueError: If there are not as many pictures as cases, a prompt is unknown, or there are no graphs.
            WeightsError: If nobody was named to judge.
        """
        graphs = [self._graph(case) for case in cases]
        questions = [{p.number: ASK.format(p.question) for p in graph} for graph in graphs]
        replies = self.judge.ask_about(media, cases, questions, _ANSWER_TOKENS, "dpg")
        identity = self.judge.identity
        return [_row(*one, identity) for one in zip(cases, graphs, replies, strict=True)]

    def aggregate(self, rows: Sequence[Row]) -> Report:
        """The score, 0..100, and those of the categories, from the stored answers alone.

        Intervals resample prompts.

        Raises:
            ValueError: If rows are no cases of this benchmark, were judged by different judges, or lack an answer.
        """
        cases = self.cases()
        found = rows_of(cases, rows)
        judge = one_judge(list(found.values()))
        good = {key: row for key, row in found.items() if row.evidence.get("answers")}
        missing = len(cases) - len(good)
        by_item: dict[str, list[tuple[int, dict[int, bool]]]] = defaultdict(list)
        scores: dict[str, list[float]] = defaultdict(list)
        for row in good.values():
            item = self._items[row.prompt]
            answers = _stored(row, self._graph(Case(row.id, row.prompt, row.seed)))
            by_item[item].append((row.seed, answers))
            scores[item].append(picture_score(self._graph_of(item), answers))
        means = {item: float(np.mean(values)) for item, values in scores.items()}
        warnings = missing_pictures(len(cases), missing, len(found) - len(good))
        if self.graphs is not None and len(self.graphs) < (1064 if self.mode == "official" else 1065):
            warnings.append(f"the file with the questions has {len(self.graphs)} prompts of DPG-Bench's 1065")
        pairs = [
            (row.prompt, bool(row.evidence["answers"][number]), again)
            for row in good.values()
            for number, again in dict(row.evidence.get("again", {})).items()
        ]
        return Report(
            benchmark=self.name if judge in (None, MPLUG) else f"{self.name}_{_slug(str(judge))}",
            benchmark_version=self.version,
            protocol=self.protocol() | {"judge": judge},
            scores={
                "dpg": _hundred(list(means.values()), list(means), len(good), missing),
                "judge_agreement": agreement(pairs),
            },
            groups=self._categories(by_item),
            n_expected=len(cases),
            n_missing=missing,
            warnings=tuple(warnings),
            sampling={"seed_rule": f"{self.seed} + sample, the same for every prompt", "samples": self.samples},
            reference=self.reference,
        )

    def import_media(self, folder: Path, target: Path) -> dict[str, Path]:
        """Pictures made elsewhere: by their ids, or cut out of the original's grids, `<item>.png`."""
        from diffalign.eval.dpg_files import unpack_grids  # which builds on this module

        return self.find_media(folder) or unpack_grids(self, folder, target)

    def export_media(self, rows: Sequence[Row], pictures: Path, folder: Path) -> int:
        """See `dpg_files.write_grids`."""
        from diffalign.eval.dpg_files import write_grids  # which builds on this module

        return write_grids(folder, rows, pictures, self)

    def protocol(self) -> dict[str, Any]:
        """What a score depends on besides pictures and judge."""
        graphs = [] if self.graphs is None else [repr(self.graphs[item]) for item in self.prompts]
        return {
            "mode": self.mode,
            "question": ASK,
            "prompts": sha256("\n".join(self.prompts.values()).encode()).hexdigest()[:16],
            "num_prompts": len(self.prompts),
            "graphs": sha256("\n".join(graphs).encode()).hexdigest()[:16],
            "bootstrap": {"resamples": RESAMPLES, "categories": CATEGORY_RESAMPLES, "seed": 0, "clusters": "prompt"},
        }

    def _categories(self, by_item: Mapping[str, list[tuple[int, dict[int, bool]]]]) -> dict[str, dict[str, Score]]:
        """Means of the answers as given, by broad and by detailed category."""
        values: dict[str, list[tuple[str, float]]] = defaultdict(list)
        last = self.seed + self.samples - 1
        for item, pictures in by_item.items():
            for seed, answers in pictures:
                if self.mode == "official" and seed != last:
                    continue
                for p in self._graph_of(item):
                    for name in dict.fromkeys((p.broad, p.category)):
                        values[name].append((item, 100 * float(answers[p.number])))
        return {
            name: {
                "answers": mean_of(
                    [v for _, v in found], [item for item, _ in found], len(found), resamples=CATEGORY_RESAMPLES
                )
            }
            for name, found in sorted(values.items())
        }

    def _graph(self, case: Case) -> Graph:
        item = case.meta.get("item") or self._items.get(case.prompt)
        if item is None:
            raise ValueError(f"prompt {case.prompt!r:.80} is none of the {len(self.prompts)} of this benchmark")
        return self._graph_of(str(item))

    def _graph_of(self, item: str) -> Graph:
        if self.graphs is None:
            raise ValueError(NO_GRAPHS)
        if item not in self.graphs:
            raise ValueError(f"the file with the questions has none for prompt {item!r}")
        return self.graphs[item]


def _row(case: Case, graph: Graph, replies: Replies, judge: str) -> Row:
    blank = Row(case.id, case.prompt, case.seed, case.task, scores={"dpg": None}, evidence={"judge": judge})
    if replies.unread is not None:
        return replace(blank, reason=replies.unread)
    read = {p.number: _verdict(replies.first[p.number]) for p in graph}
    bad = [(p, read[p.number]) for p in graph if isinstance(read[p.number], str)]
    if bad:
        why = f"{len(bad)} of {len(graph)} answers are unreadable; question {bad[0][0].number}: {bad[0][1]}"
        return replace(blank, reason=why, evidence={"judge": judge, "unreadable": len(bad)})
    answers = {number: bool(value) for number, value in read.items()}
    verdicts = {number: _verdict(answer) for number, answer in replies.second.items()}
    again = {str(number): None if isinstance(value, str) else value for number, value in verdicts.items()}
    wrong = [p.question for p in graph if not answers[p.number]]
    return replace(
        blank,
        scores={"dpg": picture_score(graph, answers)},
        reason=f"no: {' | '.join(wrong)}" if wrong else "all questions are answered yes",
        evidence={"judge": judge, "answers": {str(number): value for number, value in answers.items()}, "again": again},
    )


def _verdict(answer: Answer) -> bool | str:
    """Yes or no, or why it is neither."""
    if answer.error is not None:
        return answer.error
    try:
        return read_yes_no(answer.text)
    except UnreadableAnswerError as error:
        return str(error)


def _stored(row: Row, graph: Graph) -> dict[int, bool]:
    stored = row.evidence["answers"]
    lacking = [p.number for p in graph if not isinstance(stored.get(str(p.number)), bool)]
    if lacking:
        raise ValueError(f"row {row.id!r} has no answer to question {lacking[0]}; judge the picture again")
    return {p.number: stored[str(p.number)] for p in graph}


def _hundred(values: Sequence[float], clusters: Sequence[str], n: int, missing: int) -> Score:
    if not values:
        return Score(None, None, 0, missing)
    hundred = [100 * value for value in values]
    return Score(float(np.mean(hundred)), bootstrap_mean(hundred, clusters), n, missing)


def _slug(judge: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", judge.split(" ")[0].rsplit("/", 1)[-1].lower()).strip("-") or "judge"
