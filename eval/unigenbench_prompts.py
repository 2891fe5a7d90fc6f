"""UniGenBench's prompts with their test points, and the text in which its judge is asked."""

from __future__ import annotations

import ast
import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from io import StringIO
from pathlib import Path
from typing import Any, Literal

from diffalign.reward_models.base import WeightsError
from diffalign.reward_models.published_texts import PublishedText, read_text

__all__ = [
    "LANGUAGES",
    "PRIMARIES",
    "JudgeTexts",
    "Language",
    "TestPoint",
    "Wanted",
    "primary",
    "read_judge_texts",
    "read_prompts",
]

Language = Literal["en", "en_long", "zh", "zh_long"]

HOME = "https://github.com/CodeGoat24/UniGenBench"
_REVISION = "49d0bce"
LANGUAGES: Mapping[str, PublishedText] = {
    language: PublishedText(
        f"test_prompts_{language}.csv",
        f"https://raw.githubusercontent.com/CodeGoat24/UniGenBench/{_REVISION}/data/test_prompts_{language}.csv",
        digest,
    )
    for language, digest in (
        ("en", "f82e8ce854985ef963378eaaf8ce12f2e3a57dd6f53e1aea84a61fbeadfe4459"),
        ("en_long", "5d2c3d642cc4923504b662ad15b425c2d161a137884701881e00c2691a697253"),
        ("zh", "7ff2d2131e68e6182f43a28ecf03d070f7735788f3c5420db3f83141492e8cb3"),
        ("zh_long", "6e281a5781878584db932a3bfd16dc51afb195566eb7a30c17fb9c09fd3b1776"),
    )
}
"""The four lists of 600 prompts; CC BY 4.0 (Tencent)."""

PRIMARIES: Mapping[str, str] = {
    "风格": "Style",
    "世界知识": "World Knowledge",
    "属性": "Attribute",
    "动作": "Action",
    "关系": "Relationship",
    "逻辑推理": "Logical Reasoning",
    "语法": "Grammar",
    "复合考点": "Compound",
    "实体布局": "Entity Layout",
    "文本生成": "Text Generation",
}
"""The ten primary dimensions, in the order of the leaderboard, under their names in the Chinese files."""

_KEYS = {
    "en": ("Primary Categories", "Testpoints", "Testpoint Description"),
    "zh": ("一级垂类", "考点", "考点对应描述"),
}
_HEADS = {"en": ("Checkpoints Defination", "Checkpoints Description"), "zh": ("考点说明", "考点描述说明")}
"""Of the two lists in the question, with the released spelling, since the judge was trained on it."""
_COLONS = {"en": ":", "zh": "："}
_SCRIPTS = {"en": "eval/gemini_en_eval.py", "zh": "eval/gemini_zh_eval.py"}
_TEXTS_FILE = "judge_prompts.json"
_DIGESTS = {
    "en": (
        "9554ee938feaaf928d9086ba959e19063bcb027be086821d7dcb45e55ad40f14",
        "c2b9166858dc16fae80b434965301473fbecd79237c4b78ea0ab5d1a4bbde215",
    ),
    "zh": (
        "03ccae681043f88291c14036b98ee99fbe34ac7659fe2186244afec075698926",
        "7e37242edf7d4755ea874ae714271edd811af55966a8461c1fe04e2b1b47f2dc",
    ),
}
"""SHA-256 of the template, and of the definitions."""


@dataclass(frozen=True)
class TestPoint:
    """One thing that is judged.

    Attributes:
        name: Sub-dimension, such as "Attribute - Color"; a primary dimension without parts has its name.
        description: What in the prompt it is about.
    """

    __test__ = False  # not a test class, whatever pytest thinks of the name

    name: str
    description: str


@dataclass(frozen=True)
class Wanted:
    """One prompt.

    Attributes:
        index: Its number, which names the pictures.
        prompt: The text.
        theme: Such as "Art".
        points: What is judged.
    """

    index: int
    prompt: str
    theme: str
    points: tuple[TestPoint, ...]


@dataclass(frozen=True)
class JudgeTexts:
    """How the released evaluation asks.

    Attributes:
        language: "en" or "zh".
        template: With {prompt}, {testpoint}, {explanation} and {test_explanation}.
        definitions: Of each test point's name.
    """

    language: str
    template: str
    definitions: Mapping[str, str]

    def question(self, wanted: Wanted) -> str:
        """What is asked about a picture of a prompt, byte for byte as the released script does.

        Raises:
            ValueError: If a test point has no definition.
        """
        names = [point.name for point in wanted.points]
        unknown = [name for name in names if name not in self.definitions]
        if unknown:
            raise ValueError(f"prompt {wanted.index}: there is no definition of test point {unknown[0]!r}")
        lists = ([self.definitions[name] for name in names], [point.description for point in wanted.points])
        texts = [
            f"{head}{_COLONS[self.language]}「"
            + "".join(f"\n{n}: {t}" for n, t in zip(names, of, strict=True))
            + "\n」"
            for head, of in zip(_HEADS[self.language], lists, strict=True)
        ]
        values = {
            "prompt": wanted.prompt,
            "testpoint": str(names),
            "explanation": texts[0],
            "test_explanation": texts[1],
        }
        # In one pass: what is put in may itself look like a field.
        return re.sub(r"\{(\w+)\}", lambda field: values[field[1]], self.template)


def primary(name: str) -> str:
    """The primary dimension of a test point, under its English name."""
    first = name.split("-", 1)[0].strip()
    return PRIMARIES.get(first, first)


def read_prompts(language: str, folder: str | Path | None = None, local_files_only: bool | None = None) -> list[Wanted]:
    """The prompts of one list in its order; arguments as in `published_texts.read_text`.

    Row 509 of en_long is no JSON as published: a comma between two strings is missing. It is put in.

    Raises:
        ValueError: If the language is unknown, or a row malformed.
        WeightsError: If the file is not at hand or not the published one.
    """
    if language not in LANGUAGES:
        raise ValueError(f"unknown language {language!r} (available: {', '.join(LANGUAGES)})")
    short = language[:2]
    text = read_text(LANGUAGES[language], folder, local_files_only)
    rows = csv.DictReader(StringIO(text, newline=""))
    return [_wanted(row, short) for row in rows]


def read_judge_texts(language: str, folder: str | Path | None) -> JudgeTexts:
    """The question's template and the definitions, from a clone of the repository.

    Args:
        language: "en" or "zh", or with "_long".
        folder: The clone, or a folder with `judge_prompts.json`, which holds the same under names of the script.

    Raises:
        WeightsError: If they are not there or not the published ones.
    """
    short = language[:2]
    how = f"clone {HOME} and pass its folder as `texts`"
    if folder is None:
        raise WeightsError(f"the question of UniGenBench's judge is not part of this package: {how}; or ask 'each'")
    table, script = Path(folder).expanduser() / _TEXTS_FILE, Path(folder).expanduser() / _SCRIPTS[short]
    try:
        if table.is_file():
            content = json.loads(table.read_bytes())
            found: list[Any] = [content[f"SYSTEM_PROMPT_{short.upper()}_TEMPLATE"]]
            found += [content[f"EXPLANATION_DICT_{short.upper()}"]]
        elif script.is_file():
            found = list(_constants(ast.parse(script.read_bytes())))
        else:
            raise WeightsError(f"{str(folder)!r} has neither {_TEXTS_FILE!r} nor {_SCRIPTS[short]!r}; {how}")
    except (ValueError, KeyError, TypeError, SyntaxError) as error:
        raise WeightsError(f"cannot read the judge's question in {str(folder)!r}: {error!r:.100}; {how}") from error
    template = [v for v in found if isinstance(v, str) and _digest(v) == _DIGESTS[short][0]]
    definitions = [v for v in found if isinstance(v, dict) and _digest(v) == _DIGESTS[short][1]]
    if not template or not definitions:
        what = "template" if not template else "definitions"
        raise WeightsError(
            f"the {what} of the judge's question in {str(folder)!r} are not the published ones; answers to another "
            f"question are those of another judge; {how}"
        )
    return JudgeTexts(short, template[0], definitions[0])


def _wanted(row: Mapping[str, str], language: str) -> Wanted:
    theme, names, descriptions = _KEYS[language]
    index = row["index"]
    try:
        dims = _json(row[f"sub_dims_{language}"])
        points = tuple(TestPoint(*pair) for pair in zip(dims[names], dims[descriptions], strict=True))
        return Wanted(int(index), row[f"prompt_{language}"], dims[theme], points)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"row {index!r} of UniGenBench's prompts is malformed: {error!r:.150}") from error


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        # Two strings with nothing but white space between them: a comma is missing.
        return json.loads(re.sub(r'(?<=[^\\:,\[{ ]")\s+(?=")', ", ", text))


def _digest(value: str | Mapping[str, str]) -> str:
    """Of a template; of definitions by name, with plain apostrophes, since copies differ in one."""
    if isinstance(value, str):
        return sha256(value.encode()).hexdigest()
    if not all(isinstance(text, str) for pair in value.items() for text in pair):
        return ""
    return sha256(json.dumps(sorted(value.items()), ensure_ascii=False).replace("’", "'").encode()).hexdigest()


def _constants(tree: ast.AST) -> Iterator[str | dict[str, str]]:
    """The f-strings of a script, with the names of their variables in braces, and its dictionaries of texts."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts: Sequence[ast.expr] = node.values
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}"
                for part in parts
                if isinstance(part, ast.Constant | ast.FormattedValue)
            )
        elif isinstance(node, ast.Dict) and all(isinstance(key, ast.Constant) for key in node.keys):
            try:
                yield ast.literal_eval(node)
            except ValueError:
                continue  # a dictionary with something computed in it
