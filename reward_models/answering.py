"""What a vision-language model is asked about pictures, what comes back, and who may answer.

A judge (`vision_reward`, `unified_reward`, `vqa_score`) writes the questions and reads the answers; who answers is an
`Answerer`: `local_vlm.LocalVLM`, a model in this process, or `chat_server.ChatServer`, which asks a server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from PIL import Image

__all__ = ["Answer", "Answerer", "Question"]


@dataclass(frozen=True)
class Question:
    """One question about pictures; the pictures come before the text, in their order.

    Attributes:
        text: What is asked, byte for byte.
        images: RGB pictures, at least one; of a video its frames, of a pair first those of one medium, then the other.
        max_tokens: Longest answer, >= 1.
        words: Words of which the probability of being the whole first token is asked; only with `max_tokens` 1.
        template: Which form of question it is, for the cache and for people who read it.
    """

    text: str
    images: tuple[Image.Image, ...]
    max_tokens: int
    words: tuple[str, ...] = ()
    template: str = ""

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or (self.words and self.max_tokens != 1):
            raise ValueError(f"max_tokens must be >= 1, and 1 if words are asked for, got {self.max_tokens}")
        if not self.images:
            raise ValueError("a question needs at least one picture")


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        text: The answer; "" where there is none.
        finished: Whether the model ended it itself, rather than the limit of tokens.
        probabilities: Of the asked words, those whose probability is known, in [0, 1].
        error: Why there is no answer; None if there is one.
    """

    text: str = ""
    finished: bool = True
    probabilities: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None


@runtime_checkable
class Answerer(Protocol):
    """Whoever answers. An `nn.Module` is moved and fingerprinted with the judge that holds it."""

    @property
    def identity(self) -> str:
        """What makes its answers differ from those of another, beside the weights of a module."""
        ...

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """One answer per question, in order; a failure is an `Answer` with `error`, never an exception."""
        ...
