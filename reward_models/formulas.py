"""Reads the names of composed reward models: "hpsv2.1:0.7+pickscore:0.3", "majority_vote(hpsv2.1+clipscore)".

Such a name can stand wherever a reward model is named: in a config, on the command line, in `load_reward_model`. The
grammar is

    sum  = term { "+" term }
    term = name [ "[" dimension "]" ] [ ":" weight ]
    name = a reward model | combination "(" sum ")"

where a weight is a number (1 if left out; negative ones are allowed), and a dimension is one of the model's scores, its
primary one if left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

__all__ = ["Term", "read_name", "terms"]

# A weight starts like a number, which a class in "module:Class" cannot.
_TERM = re.compile(r"(?P<name>.+?)(?:\[(?P<dim>[^\[\]]+)\])?(?:\s*:\s*(?P<weight>[-.\d][^:()]*))?")
_CALL = re.compile(r"(?P<name>\w+)\s*\((?P<inside>.+)\)")


@dataclass(frozen=True)
class Term:
    """One summand: a reward model's name, which of its scores, and the weight."""

    name: str
    dim: str | None = None
    weight: float = 1.0


def terms(text: str) -> list[Term]:
    """The summands of a formula.

    Raises:
        ValueError: If it cannot be read.
    """
    found = []
    for piece in _split(text):
        match = _TERM.fullmatch(piece)
        if match is None:
            raise ValueError(
                f"cannot read {piece!r} in reward {text!r}: expected name, name:weight or name[dim]:weight"
            )
        try:
            weight = float(match["weight"] or 1.0)
        except ValueError as error:
            raise ValueError(
                f"the weight of {match['name']!r} in reward {text!r} must be a number such as 0.3, got "
                f"{match['weight']!r}"
            ) from error
        found.append(Term(match["name"].strip(), match["dim"], weight))
    return found


def read_name(text: str) -> tuple[str, dict[str, Any]]:
    """The name of a model and the options that the rest of the text stands for; none for a plain name.

    Raises:
        ValueError: If it is a formula that cannot be read.
    """
    found = terms(text)
    if len(found) > 1 or found[0] != Term(text.strip()):
        return "weighted", {"of": text}
    call = _CALL.fullmatch(text.strip())
    return (call["name"], {"of": call["inside"].strip()}) if call else (text, {})


def _split(text: str) -> list[str]:
    """The pieces between plus signs that are in no parentheses."""
    pieces, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if depth < 0:
            break
        if character == "+" and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    if depth != 0:
        raise ValueError(f"parentheses do not match in reward {text!r}")
    pieces = [piece.strip() for piece in pieces]
    if not all(pieces):
        raise ValueError(f"a summand is missing in reward {text!r}")
    return pieces
