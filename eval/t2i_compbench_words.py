"""What T2I-CompBench's scorers read out of a prompt: noun phrases, words without adjectives, two objects, counts.

The released evaluation parses prompts with spaCy's `en_core_web_sm`. `Spacy` does the same where spaCy is installed;
`Rules` needs nothing and is meant for the benchmark's own prompts, most of which follow a few patterns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from itertools import pairwise
from typing import Any, Protocol

__all__ = ["LOCALITIES", "Language", "Rules", "Spacy", "clean_question", "counts", "locality", "singular_names"]

SKIPPED = ("top", "the side", "the left", "the right")
"""Noun phrases that name a place, not a thing; no question is asked about them."""
MOST_PHRASES = 8
LOCALITIES = (
    "on side of",
    "next to",
    "near",
    "on the left of",
    "on the right of",
    "on the bottom of",
    "on the top of",
    "on top of",
)
"""Relations, in the order in which the released code looks for them."""
NUMBERS: Mapping[str, int] = {
    "a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8,
}  # fmt: skip
_COMPLEX = ("on top of", "on bottom of", "on the left", "on the right", "next to", "on side of", "near")


class Language(Protocol):
    """Whoever parses prompts."""

    name: str

    def noun_phrases(self, prompt: str) -> list[str]:
        """The first noun phrases of a prompt, without those that only name a place."""
        ...

    def without_adjectives(self, prompt: str) -> str:
        """The prompt's words that are no adjectives, with a space between any two."""
        ...

    def objects(self, prompt: str, *, is_complex: bool) -> tuple[str, str] | None:
        """The two things whose places a prompt relates; None if it does not say two."""
        ...


class Rules:
    """Noun phrases by word lists made for the prompts of this benchmark.

    A phrase begins at an article or number, or at any word that is none of the lists', and ends before a preposition,
    conjunction, verb or adverb. Prompts of the pattern "a green bench and a red car" give the phrases that any parser
    finds; in sentences some differ from spaCy's, which also takes pronouns for phrases. Sentences of the category
    "complex" are beyond these lists.
    """

    name = "rules"

    def noun_phrases(self, prompt: str) -> list[str]:
        """See `Language`."""
        words = re.findall(r"[A-Za-z0-9][\w'’-]*|[^\w\s]", prompt)
        phrases: list[list[str]] = [[]]
        for place, word in enumerate(words):
            low, now = word.lower(), phrases[-1]
            following = words[place + 1].lower() if place + 1 < len(words) else "."
            joins = low in (",", "and") and _all_adjectives(now) and following not in _OPENERS and following.isalpha()
            if joins:
                now.append(word)
            elif low in _OPENERS:
                phrases.append([word])
            elif low in _ENDERS or not word[0].isalnum() or (low in _VERBS and not _is_noun(now, following)):
                phrases.append([])
            else:
                now.append(word)
        texts = [
            " ".join(words).replace(" ,", ",") for words in phrases if any(w.lower() not in _OPENERS for w in words)
        ]
        return [text for text in texts if text not in SKIPPED][:MOST_PHRASES]

    def without_adjectives(self, prompt: str) -> str:
        """Not to be had from word lists.

        Raises:
            ValueError: Always.
        """
        raise ValueError("adjectives of sentences are told by a parser: install spaCy and take language 'spacy'")

    def objects(self, prompt: str, *, is_complex: bool) -> tuple[str, str] | None:
        """See `Language`; the last words before and behind the relation, which is right for simple prompts."""
        if is_complex:
            raise ValueError("the objects of sentences are told by a parser: install spaCy and take language 'spacy'")
        relation = locality(prompt)
        if relation is None:
            return None
        before, _, behind = prompt.partition(relation)
        first, last = re.findall(r"[\w'-]+", before), re.findall(r"[\w'-]+", behind)
        return (first[-1], last[-1]) if first and last else None


class Spacy:
    """The released evaluation's parser.

    Args:
        model: Name or folder of spaCy's pipeline, or a loaded one.

    Raises:
        ValueError: If spaCy or the pipeline is not installed.
    """

    name = "spacy"

    def __init__(self, model: Any = "en_core_web_sm"):
        if not isinstance(model, str):
            self.nlp = model
            return
        try:
            self.nlp = import_module("spacy").load(model)
        except (ImportError, OSError) as error:
            raise ValueError(
                f"cannot load spaCy's {model!r} ({type(error).__name__}): pip install spacy, then "
                f"python -m spacy download {model}; or take language 'rules'"
            ) from error
        meta = self.nlp.meta
        self.name = f"spacy {meta['lang']}_{meta['name']}-{meta['version']}"

    def noun_phrases(self, prompt: str) -> list[str]:
        """See `Language`."""
        return [c.text for c in self.nlp(prompt).noun_chunks if c.text not in SKIPPED][:MOST_PHRASES]

    def without_adjectives(self, prompt: str) -> str:
        """See `Language`."""
        return " ".join(token.text for token in self.nlp(prompt) if token.pos_ != "ADJ")

    def objects(self, prompt: str, *, is_complex: bool) -> tuple[str, str] | None:
        """See `Language`.

        The first and the last noun; of sentences the nearest noun before and the next one behind each relation, if that
        makes two in all.
        """
        words = list(self.nlp(prompt))
        if not is_complex:
            nouns = [word.text for word in words if word.pos_ == "NOUN"]
            return (nouns[0], nouns[-1]) if nouns else None
        found: list[str] = []
        for place in range(len(words)):
            size = next((k for k in (3, 2, 1) if _text(words[place : place + k]) in _COMPLEX), None)
            if size is not None:
                before = [w.text for w in words[:place] if w.pos_ in ("NOUN", "PROPN")]
                rest = words[place + size :]
                behind = [w.text for w in rest if w.pos_ == "NOUN"]
                # Without a noun: the last word of the first proper name that something follows.
                behind += [w.text for w, after in pairwise(rest) if w.pos_ == "PROPN" != after.pos_]
                found += before[-1:] + behind[:1]
        return (found[0], found[1]) if len(found) == 2 else None


def locality(prompt: str) -> str | None:
    """The first of `LOCALITIES` that a prompt contains."""
    return next((relation for relation in LOCALITIES if relation in prompt), None)


def clean_question(phrase: str) -> str:
    """The question about a noun phrase, as BLIP was trained to read questions: small letters, few marks, 50 words."""
    text = re.sub(r"[.!\"()*#:;~]", "", f"{phrase}?".lower()).rstrip(" ")
    return " ".join(text.split(" ")[:50])


def singular_names(vocabulary: str) -> dict[str, str]:
    """Plural -> singular, from the lines "cup - cups" of `new_objects.txt`; the first of equal plurals counts."""
    pairs = [line.split(" - ") for line in vocabulary.splitlines() if line.strip()]
    names: dict[str, str] = {}
    for one, many in ((a.strip().lower(), b.strip().lower()) for a, b in pairs):
        names.setdefault(many, one)
    return names


def counts(prompt: str, singular: Mapping[str, str]) -> list[tuple[str, int]]:
    """The things that a prompt counts, with their numbers, in its order.

    A number word counts the one or two words behind it if they are in the vocabulary: behind "a", "an" and "one" in the
    singular, behind others in the plural.

    Args:
        prompt: The text.
        singular: See `singular_names`.
    """
    words = re.findall(r"[\w'-]+|[^\w\s]", prompt)
    ones = set(singular.values())
    found = []
    for place, word in enumerate(words):
        if word not in NUMBERS:
            continue
        for size in (2, 1):
            name = " ".join(words[place + 1 : place + 1 + size])
            if NUMBERS[word] == 1 and name in ones:
                found.append((name, 1))
                break
            if name in singular:
                found.append((singular[name], NUMBERS[word]))
                break
    return found


def _text(words: Sequence[Any]) -> str:
    return " ".join(word.text for word in words)


def _is_noun(phrase: Sequence[str], following: str) -> bool:
    """Whether a word that may be a verb is a noun: behind nothing but adjectives, or before what nouns end with."""
    return _all_adjectives(phrase) or (bool(phrase) and following in (".", "and", "of"))


def _all_adjectives(words: Sequence[str]) -> bool:
    own = [word.lower() for word in words if word.lower() not in _OPENERS and word not in (",", "and")]
    return bool(own) and all(word in _ADJECTIVES for word in own)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_OPENERS = _words(
    "a an the this that these those its his her their my your our some many several few other another all each both "
    "every no any one two three four five six seven eight nine ten"
)
_ADJECTIVES = _words(
    "black white red green blue yellow brown orange pink purple grey gray gold silver beige tan big small large tall "
    "short long round square oval circular triangular rectangular oblong cubic cylindrical conical spherical pyramidal "
    "pentagonal teardrop diamond crescent wooden metallic leather glass plastic rubber fabric fluffy bold bright dark "
    "soft hard smooth rough"
)
_ENDERS = _words(
    "of on in at by with to from for near next over under above below behind beside between into onto through around "
    "across against along inside outside up down off out as like without within upon atop amid among about after "
    "before during and or but while which who whom whose that it they them he she him there where when than if so "
    "because is are was were be been being am has have had having do does did could will would may might must should "
    "not only nearby together neatly just also very too otherwise down back away apart visible"
)
"""Prepositions, conjunctions, pronouns, auxiliary verbs, adverbs."""
_VERBS = _words(
    "arranged attached attract attracts attracted bake beat blow boil build built can change clean contrast contrasted "
    "contrasting controlled cook covered covers craft create creates created cut cuts cutting decorate decorates "
    "decorated decorating defining display displays displayed dominated fascinated features featuring filled flash "
    "float floated floats flowed hang hangs hanging held hold holds holding hung hydrated illuminate illuminated jot "
    "keep keeps kept leads led leaves lit made make makes matching measure measures measuring mix mounted nap parked "
    "pound propelled provide provides provided reaching read reads reading release rest rested rests roll sat serve "
    "serves serving set sets shape shine shines shone showed shows sit sits sitting slice sparkled squash stacked "
    "stand stands standing stir stood struggled study surrounded used using watering wearing waving write writes "
    "sailing flying flew taking placed covering adds added"
)
"""Verbs, many of which are nouns elsewhere."""
