"""One line per problem of a settings class, in the words of the configuration file."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from pydantic import ValidationError


def unknown_key(key: str, last: str, known: Collection[str]) -> str:
    """The line about a key nobody knows.

    Args:
        key: The whole dotted path.
        last: Its last part, the misspelt one.
        known: What could have been meant.
    """
    near = difflib.get_close_matches(last, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown config key {key!r}{hint} (available: {', '.join(sorted(known)) or 'none'})"


def explain(error: ValidationError, section: str, known: Collection[str]) -> str:
    """All problems of one section.

    Args:
        error: What its class says.
        section: Dotted path of the section, such as "trainer".
        known: Its keys.
    """
    lines = []
    for problem in error.errors():
        path = ".".join(str(part) for part in problem["loc"])
        key = f"{section}.{path}" if path else section
        if problem["type"] == "extra_forbidden" and len(problem["loc"]) == 1:
            lines.append(unknown_key(key, path, known))
        else:
            message = str(problem["msg"]).removeprefix("Value error, ")
            lines.append(f"config key {key!r}: {message}; found {problem['input']!r}")
    return "\n".join(lines)
