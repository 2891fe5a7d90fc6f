"""GenEval 2: prompts of three to ten atoms, each with a question that a vision-language model answers in one word.

The prompts and questions are under a licence for non-commercial use (CC BY-NC 4.0) and not part of this package; pass
the file that the authors published, `geneval2_data.jsonl`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from diffalign.eval.base import Case, Report, Row, Score, read_jsonl
from diffalign.eval.case_rows import check_counts, mean_of, missing_pictures, one_judge, rows_of, spread
from diffalign.eval.statistics import RESAMPLES
from diffalign.eval.vlm_judge import Cost, JudgedBenchmark, Replies, VLMJudge, agreement, key_of
from diffalign.reward_models.answering import Answer
from diffalign.reward_models.media import Media

__all__ = ["GenEval2", "answer_forms", "read_atoms", "soft_tifa"]

FILENAME = "geneval2_data.jsonl"
ASK = "{} Answer in one word."
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_YES = ("Yes", "yes", " yes", " Yes")
_COUNTING = "How many"


@dataclass(frozen=True)
class Atoms:
    """A prompt and the questions about what it says.

    Attributes:
        prompt: The prompt.
        count: Its number of atoms, as the file counts them.
        questions: Each with its right answer.
        skills: What each question is about: object, count, attribute, position or verb.
    """

    prompt: str
    count: int
    questions: tuple[tuple[str, str], ...]
    skills: tuple[str, ...]


class GenEval2(JudgedBenchmark):
    """Soft-TIFA: how probable the right answers to the questions about a picture are.

    Source: the released evaluation of "GenEval 2" (Meta 2025, arXiv:2512.16853). The headline is 100 times the mean
    over pictures of the geometric mean over their questions, which one impossible answer makes 0; beside it the
    arithmetic mean, and TIFA, the share of questions whose likeliest first word is right.

    The original's judge is Qwen/Qwen3-VL-8B-Instruct. Different from the original: a form of an answer that is several
    tokens does not count, where there its first token does; two forms that begin with the same token are not counted
    twice. A server tells the 20 likeliest first words; a form that is not among them has probability 0.

    Args:
        num_prompts: How many prompts, an equal part of every number of atoms; None takes all 800.
        samples: Pictures per prompt; the original has 1.
        seed: Sample k of every prompt has `seed + k`.
        judge: Who answers: a `VLMJudge`, or its options.
        data: `geneval2_data.jsonl`, or the folder with it.

    Raises:
        ValueError: If a number is not positive, the file is not there or malformed, or the budget exceeded.
    """

    name = "geneval2"
    version = "1"
    score_batch_size = 64  # so that a server has many questions at once
    reads_files = True

    def __init__(
        self,
        num_prompts: int | None = None,
        samples: int = 1,
        seed: int = 0,
        *,
        judge: VLMJudge | Mapping[str, Any] | None = None,
        data: str | Path | None = None,
    ) -> None:
        check_counts(num_prompts, samples)
        self.samples, self.seed = samples, seed
        everything = read_atoms(data)
        self.numbers = spread([str(atoms.count) for atoms in everything], num_prompts)
        self.atoms = {number: everything[number] for number in self.numbers}
        self._by_prompt = {atoms.prompt: atoms for atoms in self.atoms.values()}
        self.judge = VLMJudge.of(judge)
        self.announce()

    def cases(self) -> list[Case]:
        """All samples of the first prompt, then of the second, and so on."""
        return [
            Case(f"{number:03d}-{sample:02d}", atoms.prompt, self.seed + sample, task=f"{atoms.count} atoms")
            for number, atoms in self.atoms.items()
            for sample in range(self.samples)
        ]

    def estimate(self) -> Cost:
        """What judging all pictures takes."""
        return self.judge.estimate(
            (key_of(case, number), ASK.format(question), 1)
            for case in self.cases()
            for number, (question, _) in enumerate(self._of(case.prompt).questions)
        )

    def score(self, media: Tensor | Sequence[Media], cases: Sequence[Case]) -> list[Row]:
        """A row for each picture: both means in 0..1, and in the evidence the probability of every right answer.

        A picture that cannot be read, or a question about it without an answer, gives a row without a score, which
        says why and counts as missing.

        Args:
            media: RGB [B, 3, H, W] in [0, 1], or B pictures of any kind that reward models read, such as paths.
            cases: What they were made for.

        Raises:
            ValueError: If there are not as many pictures as cases, or a prompt is unknown.
            WeightsError: If nobody was named to judge.
        """
        atoms = [self._of(case.prompt) for case in cases]
        texts = [{n: ASK.format(question) for n, (question, _) in enumerate(a.questions)} for a in atoms]
        words = [{n: answer_forms(*pair) for n, pair in enumerate(a.questions)} for a in atoms]
        replies = self.judge.ask_about(media, cases, texts, 1, "geneval2", words)
        identity = self.judge.identity
        return [self._row(*one, identity) for one in zip(cases, atoms, replies, strict=True)]

    def aggregate(self, rows: Sequence[Row]) -> Report:
        """The three scores, 0..100, from the stored probabilities alone.

        Groups are the skills, with the mean over all their questions, and the numbers of atoms, with the mean of the
        geometric means. Intervals resample prompts.

        Raises:
            ValueError: If rows are no cases of this benchmark, were judged by different judges, or answer other
                questions.
        """
        cases = self.cases()
        found = rows_of(cases, rows)
        judge = one_judge(list(found.values()))
        good = [row for row in found.values() if row.evidence.get("probabilities")]
        values: dict[str, list[float]] = defaultdict(list)
        skills: dict[str, list[tuple[str, float]]] = defaultdict(list)
        by_count: dict[int, list[tuple[str, float]]] = defaultdict(list)
        pairs: list[tuple[str, bool, bool | None]] = []
        for row in good:
            atoms, chances, right = self._stored(row)
            arithmetic, geometric = soft_tifa(chances)
            for name, value in (("gm", geometric), ("am", arithmetic), ("hard", sum(right) / len(right))):
                values[name].append(100 * value)
            for skill, chance in zip(atoms.skills, chances, strict=True):
                skills[skill].append((row.prompt, 100 * chance))
            by_count[atoms.count].append((row.prompt, 100 * geometric))
            again = dict(row.evidence.get("again", {}))
            pairs += [(row.prompt, right[int(number)], second) for number, second in again.items()]
        prompts = [row.prompt for row in good]
        names = {"soft_tifa_gm": "gm", "soft_tifa_am": "am", "tifa": "hard"}
        scores = {name: mean_of(values[key], prompts, len(cases)) for name, key in names.items()}
        counts = {f"{count} atoms": of for count, of in sorted(by_count.items())}
        return Report(
            benchmark=self.name,
            benchmark_version=self.version,
            protocol=self.protocol() | {"judge": judge},
            scores={**scores, "judge_agreement": agreement(pairs)},
            groups={
                **{name: {"soft_tifa_am": _mean(of)} for name, of in sorted(skills.items())},
                **{name: {"soft_tifa_gm": _mean(of)} for name, of in counts.items()},
            },
            n_expected=len(cases),
            n_missing=len(cases) - len(good),
            warnings=tuple(missing_pictures(len(cases), len(cases) - len(good), len(found) - len(good))),
            sampling={"seed_rule": f"{self.seed} + sample, the same for every prompt", "samples": self.samples},
        )

    def protocol(self) -> dict[str, Any]:
        """What a score depends on besides pictures and judge."""
        asked = repr([(atoms.prompt, atoms.questions, atoms.skills) for atoms in self.atoms.values()])
        return {
            "question": ASK,
            "forms": "single tokens",
            "prompts": sha256(asked.encode()).hexdigest()[:16],
            "num_prompts": len(self.atoms),
            "bootstrap": {"resamples": RESAMPLES, "seed": 0, "clusters": "prompt"},
        }

    def _of(self, prompt: str) -> Atoms:
        if prompt not in self._by_prompt:
            raise ValueError(f"prompt {prompt!r:.80} is none of the {len(self.atoms)} of this benchmark")
        return self._by_prompt[prompt]

    def _row(self, case: Case, atoms: Atoms, replies: Replies, judge: str) -> Row:
        empty = {"soft_tifa_gm": None, "soft_tifa_am": None}
        blank = Row(case.id, case.prompt, case.seed, case.task, scores=empty, evidence={"judge": judge})
        if replies.unread is not None:
            return replace(blank, reason=replies.unread)
        chances: list[float] = []
        for number, pair in enumerate(atoms.questions):
            chance = self._chance(replies.first[number])
            if isinstance(chance, str):
                return replace(blank, reason=f"question {pair[0]!r}: {chance}")
            chances.append(chance)
        right = [_is_right(replies.first[number], pair) for number, pair in enumerate(atoms.questions)]
        again = {
            str(number): None if answer.error is not None else _is_right(answer, atoms.questions[number])
            for number, answer in replies.second.items()
        }
        arithmetic, geometric = soft_tifa(chances)
        least = min(range(len(chances)), key=chances.__getitem__)
        return replace(
            blank,
            scores={"soft_tifa_gm": geometric, "soft_tifa_am": arithmetic},
            reason=f"least sure: {atoms.questions[least][0]} ({atoms.questions[least][1]}: {chances[least]:.2f})",
            evidence={"judge": judge, "probabilities": chances, "right": right, "again": again},
        )

    def _chance(self, answer: Answer) -> float | str:
        """The probability of the right answer, or why it is not known."""
        if answer.error is not None:
            return answer.error
        if not answer.probabilities and not self.judge.is_served:
            return "no form of the right answer is one token of the judge"
        return min(1.0, sum(answer.probabilities.values()))

    def _stored(self, row: Row) -> tuple[Atoms, list[float], list[bool]]:
        atoms, chances, right = self._of(row.prompt), row.evidence["probabilities"], row.evidence.get("right", ())
        if not len(chances) == len(right) == len(atoms.questions):
            raise ValueError(f"row {row.id!r} answers {len(chances)} questions, not {len(atoms.questions)}: judge it")
        return atoms, [float(chance) for chance in chances], [bool(value) for value in right]


def soft_tifa(probabilities: Sequence[float]) -> tuple[float, float]:
    """Arithmetic and geometric mean of the probabilities of the right answers; the latter is 0 where one of them is.

    Args:
        probabilities: Of each question, in [0, 1]; at least one.
    """
    logs = [math.log(p) if p > 0 else -math.inf for p in probabilities]
    return sum(probabilities) / len(probabilities), math.exp(sum(logs) / len(logs))


def answer_forms(question: str, answer: str) -> tuple[str, ...]:
    """How the right answer may begin: a number in words and digits where the question counts, else a yes."""
    if not question.startswith(_COUNTING):
        return _YES
    word = answer.strip().lower()
    word = _NUMBERS[int(word)] if word.isdecimal() and int(word) < len(_NUMBERS) else word
    forms = [word, word.capitalize(), f" {word}", f" {word.capitalize()}"]
    if word in _NUMBERS:
        forms += [str(_NUMBERS.index(word)), f" {_NUMBERS.index(word)}"]
    return tuple(forms)


def read_atoms(data: str | Path | None) -> list[Atoms]:
    """The prompts and questions of `geneval2_data.jsonl`, or of the folder with it.

    Raises:
        ValueError: If there is no such file, or a row is malformed; the message names it.
    """
    path = None if data is None else Path(data).expanduser()
    path = path / FILENAME if path is not None and path.is_dir() else path
    if path is None or not path.is_file():
        found = "none was given" if path is None else f"there is no {str(path)!r}"
        raise ValueError(
            f"GenEval 2's prompts are under a non-commercial licence and not fetched, and {found}; download {FILENAME} "
            "of github.com/facebookresearch/GenEval2, and name it, with --option geneval2.data=FILE"
        )
    rows = []
    for number, row in enumerate(read_jsonl(path)):
        try:
            questions = tuple((str(question), str(answer)) for question, answer in row["vqa_list"])
            atoms = Atoms(row["prompt"], int(row["atom_count"]), questions, tuple(map(str, row["skills"])))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}, row {number}: expected prompt, atom_count, vqa_list and skills ({error!r:.80})"
            ) from error
        if not questions or len(questions) != len(atoms.skills):
            raise ValueError(f"{path}, row {number}: {len(questions)} questions and {len(atoms.skills)} skills")
        rows.append(atoms)
    if len({atoms.prompt for atoms in rows}) < len(rows) or not rows:
        raise ValueError(f"{path} holds {len(rows)} prompts, and some twice or none; expected different ones")
    return rows


def _is_right(answer: Answer, pair: tuple[str, str]) -> bool:
    """Whether the likeliest first word is a form of the right answer."""
    return answer.text.strip().lower() in {form.strip().lower() for form in answer_forms(*pair)}


def _mean(found: Sequence[tuple[str, float]]) -> Score:
    return mean_of([value for _, value in found], [prompt for prompt, _ in found], len(found))
