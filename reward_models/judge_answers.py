"""Reads scores and preferences from what a judge wrote.

Every function takes the whole text and raises `UnreadableAnswerError` where the answer is not there: nothing stands in
for it. Preferences are the share of the first of two media, in [0, 1]: 1 if it is better, 0 if the second is, 0.5 for a
tie.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

__all__ = [
    "UnreadableAnswerError",
    "better_sentence",
    "final_score",
    "json_winner",
    "named_scores",
    "pair_scores",
    "tagged_answer",
]

_NUMBER = r"(-?\d+(?:\.\d+)?)"
_COLON = r"\s*\**\s*:\s*\**\s*"
"""A colon, in bold or not: models like to write **Final Score:** 4."""


class UnreadableAnswerError(ValueError):
    """An answer in which what was asked for is missing or out of range."""


def final_score(text: str, low: float, high: float) -> float:
    """The number behind the last "Final Score:"."""
    found = re.findall(rf"Final Score{_COLON}{_NUMBER}", text, re.IGNORECASE)
    if not found:
        raise UnreadableAnswerError(f"no 'Final Score: x' in {_shown(text)}")
    return _within("Final Score", found[-1], low, high)


def named_scores(text: str, labels: Sequence[str], low: float, high: float) -> dict[str, float]:
    """The number behind each of `labels` and a colon; the last, where a label comes several times."""
    scores = {}
    for label in labels:
        found = re.findall(rf"{re.escape(label)}{_COLON}{_NUMBER}", text, re.IGNORECASE)
        if not found:
            raise UnreadableAnswerError(f"no '{label}: x' in {_shown(text)}")
        scores[label] = _within(label, found[-1], low, high)
    return scores


def better_sentence(text: str, noun: str) -> float:
    """The preference in the last of "Image 1 is better", "Image 2 is better", "Both images are equally good".

    Args:
        text: The answer.
        noun: "Image" or "Video".
    """
    found = re.findall(rf"\b{noun} ([12]) is better\b|(\bBoth {noun}s are equally good\b)", text, re.IGNORECASE)
    if not found:
        raise UnreadableAnswerError(f"no '{noun} 1 is better', nor any of the other verdicts, in {_shown(text)}")
    return {"1": 1.0, "2": 0.0, "": 0.5}[found[-1][0]]


def tagged_answer(text: str, noun: str) -> float:
    """The preference inside the last <answer> ... </answer>, which may hold nothing else."""
    found = re.findall(r"<answer>(.*?)</answer>", text, re.IGNORECASE | re.DOTALL)
    if not found:
        raise UnreadableAnswerError(f"no <answer>...</answer> in {_shown(text)}")
    verdict = re.fullmatch(rf"\s*{noun} ([12]) is better\.?\s*", found[-1], re.IGNORECASE)
    if verdict is None:
        raise UnreadableAnswerError(f"<answer> holds {found[-1][:60]!r} instead of '{noun} 1 is better' or '... 2 ...'")
    return 1.0 if verdict[1] == "1" else 0.0


def pair_scores(text: str, noun: str, names: Sequence[str]) -> dict[str, float]:
    """The preference in each block "Style Score: / Image 1: x / Image 2: y", x / (x + y), so that shares sum to 1."""
    shares = {}
    for name in names:
        lines = rf"{name} Score{_COLON}{noun} 1{_COLON}{_NUMBER}\s*{noun} 2{_COLON}{_NUMBER}"
        found = re.findall(lines, text, re.IGNORECASE)
        if not found:
            raise UnreadableAnswerError(
                f"no block '{name} Score:' with '{noun} 1: x' and '{noun} 2: y' in {_shown(text)}"
            )
        first, second = (_within(f"{name} Score", value, 0.0, 1.0) for value in found[-1])
        if first + second == 0:
            raise UnreadableAnswerError(f"both values of '{name} Score' are 0; they should sum to 1")
        shares[name] = first / (first + second)
    return shares


def json_winner(text: str, noun: str) -> float:
    """The preference under "winner" of the first JSON object that has it; without one, of the last such line.

    Models put JSON between words and fences, and write things in it that are no JSON.
    """
    for content in _objects(text):
        if "winner" in content:
            return _winner(str(content["winner"]), noun)
    found = re.findall(r"\"winner\"\s*:\s*\"([^\"]*)\"", text)
    if not found:
        raise UnreadableAnswerError(f'no JSON with a "winner" in {_shown(text)}')
    return _winner(found[-1], noun)


def _winner(value: str, noun: str) -> float:
    match = re.fullmatch(rf"\s*(?:{noun}\s*)?([12])\s*", value, re.IGNORECASE)
    if match is None:
        raise UnreadableAnswerError(f"\"winner\" is {value[:60]!r} instead of '{noun} 1' or '{noun} 2'")
    return 1.0 if match[1] == "1" else 0.0


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a text, from left to right; what is inside of one is not given again."""
    decoder, start = json.JSONDecoder(), text.find("{")
    while start >= 0:
        try:
            content, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            if isinstance(content, dict):
                yield content
        start = text.find("{", end)


def _within(name: str, value: str, low: float, high: float) -> float:
    number = float(value)
    if not low <= number <= high:
        raise UnreadableAnswerError(f"'{name}' is {value}, which is outside of {low:g} to {high:g}")
    return number


def _shown(text: str) -> str:
    """The end of an answer, where verdicts are, on one line."""
    line = " ".join(text.split())
    return repr(line if len(line) <= 80 else f"... {line[-80:]}")
