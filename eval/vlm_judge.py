"""A vision-language model as the judge of a benchmark: who is asked, what that costs, and how much it wavers.

The model itself, in this process or behind a server with retries, cache and bounded concurrency, is the `Answerer` of
the reward models; benchmarks write the questions and read the answers.
"""

from __future__ import annotations

import logging
import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from diffalign.eval import statistics
from diffalign.eval.base import Benchmark, Case, Score
from diffalign.reward_models.answering import Answer, Answerer, Question
from diffalign.reward_models.base import RewardInfo, WeightSpec
from diffalign.reward_models.judge_answers import UnreadableAnswerError
from diffalign.reward_models.judging import Asked, find_answerer
from diffalign.reward_models.media import InvalidMediaError, Media, to_rgb

__all__ = ["Cost", "JudgedBenchmark", "Replies", "VLMJudge", "agreement", "key_of", "read_picture", "read_yes_no"]

logger = logging.getLogger("diffalign")

REPEATED = 0.1
"""Share of the calls to a server that are made twice."""
IMAGE_TOKENS = 1400
"""Tokens of one picture in an estimate: a square of 1024 pixels in patches of 28, as Qwen2.5-VL reads it."""
CHARACTERS_PER_TOKEN = 4
"""Of Latin letters in an estimate; any other character is taken for one token."""
_AGAIN = " (again)"


@dataclass(frozen=True)
class Cost:
    """A rough estimate of what judging takes; answers that a cache holds, and retries, are not known to it.

    Attributes:
        calls: Questions that are asked, those asked twice counted twice.
        input_tokens: Of texts and pictures.
        output_tokens: Of answers.
        price: In the currency of the prices given, or None without prices.
    """

    calls: int
    input_tokens: int
    output_tokens: int
    price: float | None = None

    def __str__(self) -> str:
        tokens = f"about {_thousands(self.input_tokens)} tokens in and {_thousands(self.output_tokens)} out"
        return f"{self.calls} calls, {tokens}" + ("" if self.price is None else f", about {self.price:.2f} to pay")


@dataclass(frozen=True)
class Replies:
    """What a judge said about one picture.

    Attributes:
        first: Its answers by the number of the question.
        second: Those to questions that were asked twice.
        unread: Why the picture could not be read, and nothing was asked.
    """

    first: Mapping[int, Answer]
    second: Mapping[int, Answer]
    unread: str | None = None


class VLMJudge:
    """Who judges. Nothing is loaded or asked before the first question.

    Args:
        path_or_id: Folder or Hub id of a chat VLM of transformers, for a judge in this process.
        answerer: One that is there already.
        server: Address of an OpenAI-compatible server, such as http://localhost:8000/v1.
        served_model: Name of the model there.
        server_options: Further arguments of `ChatServer`, such as cache, concurrency, retries and timeout.
        repeat: Share of the calls that are made twice, to see whether the judge agrees with itself. None is 0.1 for a
            server, and 0 for a model in this process, which decodes greedily.
        price: Price of a million input tokens, and of a million output tokens.
        budget: Highest estimated price that is accepted.
        image_tokens: Tokens of one picture, for the estimate.
        device: As in `RewardModel.from_pretrained`.
        dtype: As `device`.
        local_files_only: As `device`.

    Raises:
        ValueError: If a number is out of range, or there is a budget without a price.
    """

    def __init__(
        self,
        path_or_id: str | Path | None = None,
        *,
        answerer: Answerer | None = None,
        server: str | None = None,
        served_model: str | None = None,
        server_options: Mapping[str, Any] | None = None,
        repeat: float | None = None,
        price: Sequence[float] | None = None,
        budget: float | None = None,
        image_tokens: int = IMAGE_TOKENS,
        device: str | torch.device = "auto",
        dtype: torch.dtype | Literal["auto"] = "auto",
        local_files_only: bool | None = None,
    ):
        if repeat is not None and not 0 <= repeat <= 1:
            raise ValueError(f"repeat is a share of the calls, in [0, 1], got {repeat}")
        if price is not None and (len(price) != 2 or min(price) < 0):
            raise ValueError(f"expected the prices of a million tokens in and of a million out, got {price!r}")
        if budget is not None and price is None:
            raise ValueError("a budget needs the price of a million tokens in and out")
        self.repeat = repeat if repeat is not None else 0.0 if server is None else REPEATED
        self.price, self.budget, self.image_tokens = price, budget, image_tokens
        self._answerer = answerer
        self._given = answerer is not None or server is not None or path_or_id is not None
        self._asked: Asked = {
            "server": server,
            "served_model": served_model,
            "server_options": server_options,
            "device": device,
            "dtype": dtype,
            "local_files_only": local_files_only,
        }
        self._path_or_id = path_or_id

    @classmethod
    def of(cls, judge: VLMJudge | Mapping[str, Any] | None) -> VLMJudge:
        """A judge from its options, as a configuration holds them; None is one that nobody named yet."""
        return judge if isinstance(judge, VLMJudge) else cls(**(judge or {}))

    @property
    def given(self) -> bool:
        """Whether it was said who judges."""
        return self._given

    def check(self, benchmark: str) -> None:
        """Refuses to go on while it was not said who judges.

        Raises:
            ValueError: If it was not.
        """
        if not self._given:
            raise ValueError(
                f"{benchmark} is judged by a vision-language model, and none was named: --option "
                f"{benchmark}.judge.server=URL and --option {benchmark}.judge.served_model=NAME for one behind an "
                f"OpenAI-compatible server, or --option {benchmark}.judge.path_or_id=FOLDER_OR_ID"
            )

    @property
    def is_served(self) -> bool:
        """Whether it is behind a server, which tells the probabilities of the likeliest words alone."""
        return self._asked["server"] is not None

    @property
    def name(self) -> str:
        """The model's name, without spaces: that of the server's model, of the folder, or of the answerer."""
        if self._asked["served_model"] is not None:
            name = self._asked["served_model"]
        elif self._path_or_id is None:
            name = "nobody" if self._answerer is None else self._answerer.identity
        else:
            path = Path(self._path_or_id)
            name = path.name if path.exists() else str(self._path_or_id)
        return name.replace(" ", "_")

    @property
    def answerer(self) -> Answerer:
        """Who answers, loaded when first asked for.

        Raises:
            WeightsError: If nobody was named, or weights cannot be loaded.
        """
        if self._answerer is None:
            self._answerer = find_answerer(_INFO, self._path_or_id, self._asked)
        return self._answerer

    @property
    def identity(self) -> str:
        """The model's name and all that is known to change its answers."""
        own = self.answerer.identity
        return own if own == self.name else f"{self.name} {own}"

    def ask(self, questions: Sequence[Question], keys: Sequence[str]) -> tuple[list[Answer], dict[int, Answer]]:
        """The answers in their order, and the second ones, by place, of those asked twice.

        Args:
            questions: About one picture each.
            keys: A name of each, on which alone depends whether it is asked twice.
        """
        twice = [place for place, key in enumerate(keys) if _share_of(key) < self.repeat]
        # Another template is another entry of a cache, so that the second answer is a new one.
        again = [replace(questions[place], template=questions[place].template + _AGAIN) for place in twice]
        answers = self.answerer.answer([*questions, *again])
        return answers[: len(questions)], dict(zip(twice, answers[len(questions) :], strict=True))

    def ask_about(
        self,
        media: Tensor | Sequence[Media],
        cases: Sequence[Case],
        questions: Sequence[Mapping[int, str]],
        max_tokens: int,
        template: str,
        words: Sequence[Mapping[int, tuple[str, ...]]] | None = None,
    ) -> list[Replies]:
        """What is said about each picture.

        Args:
            media: RGB [B, 3, H, W] in [0, 1], or B pictures of any kind that reward models read, such as paths.
            cases: What they were made for.
            questions: About each of them, by number.
            max_tokens: Longest answer.
            template: Which form of question it is.
            words: Of each question, the words whose probability of being the whole first token is asked.

        Raises:
            ValueError: If there are not as many pictures as cases.
            WeightsError: If nobody was named to judge.
        """
        if len(media) != len(cases):
            raise ValueError(f"expected one picture per case, got {len(media)} for {len(cases)} cases")
        pictures = [read_picture(picture) for picture in media]
        asked = [
            (place, number, Question(text, (picture,), max_tokens, words[place][number] if words else (), template))
            for place, (picture, texts) in enumerate(zip(pictures, questions, strict=True))
            if not isinstance(picture, str)
            for number, text in texts.items()
        ]
        keys = [key_of(cases[place], number) for place, number, _ in asked]
        answers, again = self.ask([question for *_, question in asked], keys)
        first: list[dict[int, Answer]] = [{} for _ in cases]
        second: list[dict[int, Answer]] = [{} for _ in cases]
        for position, (place, number, _) in enumerate(asked):
            first[place][number] = answers[position]
            if position in again:
                second[place][number] = again[position]
        unread = [picture if isinstance(picture, str) else None for picture in pictures]
        return [Replies(*found) for found in zip(first, second, unread, strict=True)]

    def estimate(self, questions: Iterable[tuple[str, str, int]]) -> Cost:
        """What asking costs, roughly.

        Args:
            questions: Key, text and expected tokens of the answer, of each question about one picture.
        """
        calls = tokens_in = tokens_out = 0
        for key, text, answer in questions:
            times = 1 + (_share_of(key) < self.repeat)
            calls += times
            tokens_in += times * (self.image_tokens + _tokens(text))
            tokens_out += times * answer
        price = None
        if self.price is not None:
            price = (tokens_in * self.price[0] + tokens_out * self.price[1]) / 1e6
        return Cost(calls, tokens_in, tokens_out, price)

    def announce(self, benchmark: str, cost: Cost) -> None:
        """Says what judging takes, before it starts.

        Raises:
            ValueError: If that is more than the budget.
        """
        logger.info("%s asks %s: %s (estimated)", benchmark, self.name, cost)
        if self.budget is not None and cost.price is not None and cost.price > self.budget:
            raise ValueError(
                f"{benchmark}: judging would cost about {cost.price:.2f} ({cost}), more than the budget of "
                f"{self.budget:.2f}; take fewer prompts or samples, or raise the budget"
            )


class JudgedBenchmark(Benchmark):
    """A benchmark whose questions a vision-language model answers."""

    judge: VLMJudge

    @abstractmethod
    def estimate(self) -> Cost:
        """What judging all pictures takes."""

    def check(self) -> None:
        """See `Benchmark`: a judge."""
        self.judge.check(self.name)

    def announce(self) -> None:
        """Says what judging takes, once everything that decides it is known, if somebody was named to judge."""
        if self.judge.given:
            self.judge.announce(self.name, self.estimate())


def key_of(case: Case, number: int) -> str:
    """The name of a question about a sample, on which alone depends whether it is asked twice."""
    return f"{case.prompt}\n{case.seed}\n{number}"


def read_yes_no(text: str) -> bool:
    """Whether an answer says yes.

    Read is one word, "yes" or "no" in any case, at the beginning; punctuation may follow it, and after that anything.
    "No idea" is neither.

    Raises:
        UnreadableAnswerError: If the answer is neither.
    """
    match = re.match(r"[\s*\"'`]*(yes|no)[\s*\"'`]*(?:$|[.,;:!\n])", text, re.IGNORECASE)
    if match is None:
        raise UnreadableAnswerError(f"neither yes nor no: {text[:60]!r}")
    return match[1].lower() == "yes"


def read_picture(picture: Media) -> Image.Image | str:
    """A picture as a judge is shown it, or why it cannot be read, without naming a folder."""
    try:
        return to_rgb(picture)
    except InvalidMediaError as error:
        if isinstance(picture, str | Path):
            return str(error).replace(str(picture), Path(picture).name)
        return str(error)


def agreement(pairs: Sequence[tuple[str, bool, bool | None]]) -> Score:
    """How often the judge said the same when it was asked twice; Cohen's kappa is in the details.

    Args:
        pairs: Prompt, first and second verdict; None where the second answer could not be read, which counts as
            missing.
    """
    read = [pair for pair in pairs if pair[2] is not None]
    missing = len(pairs) - len(read)
    if not read:
        return Score(None, None, 0, missing, is_share=True)
    found = statistics.agreement([first for _, first, _ in read], [second for *_, second in read])
    interval = statistics.bootstrap_mean([float(a == b) for _, a, b in read], [prompt for prompt, *_ in read])
    return Score(found.share, interval, found.n, missing, details={"kappa": found.kappa}, is_share=True)


def _share_of(key: str) -> float:
    """A number in [0, 1) that belongs to the key."""
    return int.from_bytes(sha256(key.encode()).digest()[:6], "big") / 2**48


def _tokens(text: str) -> int:
    latin = sum(character.isascii() for character in text)
    return len(text) - latin + -(-latin // CHARACTERS_PER_TOKEN)


def _thousands(number: int) -> str:
    return (
        str(number) if number < 1000 else f"{number / 1000:.0f} thousand" if number < 1e6 else f"{number / 1e6:.1f} M"
    )


_INFO = RewardInfo(
    name="the judge",
    license="that of the weights",
    weights=(WeightSpec("Qwen/Qwen2.5-VL-7B-Instruct", "model.safetensors.index.json"),),
    differentiable=False,
    generative=True,
)
