"""The benchmarks that `diffalign evaluate MODEL --benchmark ... --option ...` names, made and checked."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from diffalign import plugins
from diffalign.config import ConfigError

if TYPE_CHECKING:
    from diffalign.eval.base import Benchmark


@dataclass(frozen=True)
class Opened:
    """A benchmark and what it was made with.

    Attributes:
        benchmark: Ready to give its cases.
        arguments: Of its constructor, by the user.
    """

    benchmark: Benchmark
    arguments: Mapping[str, Any]

    @property
    def folder(self) -> str:
        """Its folder's name: different arguments, different folders."""
        if not self.arguments:
            return self.benchmark.name
        digest = hashlib.sha256(json.dumps(self.arguments, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.benchmark.name}-{digest}"

    def settings(self) -> dict[str, Any]:
        """What its folder is tied to."""
        return {"benchmark": self.benchmark.name, "version": self.benchmark.version, "arguments": dict(self.arguments)}


def open_benchmarks(
    names: Sequence[str], options: Sequence[str] = (), *, limit: int | None = None, samples: int | None = None
) -> list[Opened]:
    """The benchmarks of these names.

    Args:
        names: As `plugins.find` knows them.
        options: Arguments of their constructors, as "name.argument=value", the value in YAML; "name.argument.key=value"
            for one that takes a mapping.
        limit: Their `num_prompts`.
        samples: Their `samples`.

    Raises:
        ConfigError: If a name occurs twice, or an option is of none of them, or unknown, or of another type.
        ValueError: If there is no such benchmark, or it refuses an argument.
    """
    if len(set(names)) < len(names):
        raise ConfigError(f"--benchmark names one of {', '.join(names)} twice; each is evaluated once")
    given: dict[str, dict[str, Any]] = {name: {} for name in names}
    for text in options:
        path, equals, value = text.partition("=")
        if not equals or not all(path.split(".")) or "." not in path:
            raise ConfigError(f"--option {text!r} is not of the form benchmark.name=value, such as geneval.mode=strict")
        name = next((name for name in names if path.startswith(f"{name}.")), None)
        if name is None:
            raise ConfigError(f"--option {text!r} is for none of the benchmarks {', '.join(names)}")
        *outer, last = path.removeprefix(f"{name}.").split(".")
        place = given[name]
        for key in outer:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise ConfigError(f"--option {text!r}: {key!r} has a value already, and nothing can be inside of it")
        try:
            place[last] = yaml.safe_load(value)
            json.dumps(place[last])
        except (yaml.YAMLError, TypeError) as error:
            raise ConfigError(f"--option {text!r}: the value cannot be used ({str(error).splitlines()[0]})") from error
    opened = []
    for name, arguments in given.items():
        kind = plugins.find("eval", name)
        parameters = inspect.signature(kind.__init__).parameters
        for argument, flag, number in (("num_prompts", "--limit", limit), ("samples", "--samples", samples)):
            if number is not None and not _takes(parameters, argument):
                raise ConfigError(f"benchmark {name!r} has no argument {argument!r}, which {flag} sets; leave it out")
            if number is not None:
                arguments.setdefault(argument, number)
        for argument, value in arguments.items():
            _check_argument(name, argument, value, parameters)
        try:
            opened.append(Opened(kind(**arguments), dict(sorted(arguments.items()))))
        except TypeError as error:
            raise ConfigError(f"benchmark {name!r} cannot be made: {error}") from error
    return opened


_PLAIN: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "Path": (str,),
    "bool": (bool,),
    "None": (type(None),),
}


def _check_argument(name: str, argument: str, value: object, parameters: Mapping[str, inspect.Parameter]) -> None:
    """Refuses an argument that a constructor does not have, or whose plain annotation says another type."""
    named = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    known = {key: p for key, p in parameters.items() if key != "self" and p.kind in named}
    if not _takes(parameters, argument):
        near = difflib.get_close_matches(argument, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"unknown option {name + '.' + argument!r}{hint} (available: {', '.join(sorted(known)) or 'none'})"
        )
    annotation = known[argument].annotation if argument in known else None
    parts = [part.strip() for part in annotation.split("|")] if isinstance(annotation, str) else []
    if not parts or any(part not in _PLAIN for part in parts):
        return
    fits = isinstance(value, tuple(kind for part in parts for kind in _PLAIN[part]))
    if not fits or (isinstance(value, bool) and "bool" not in parts):
        raise ConfigError(f"option {name + '.' + argument!r} must be of type {annotation}, found {value!r}")


def _takes(parameters: Mapping[str, inspect.Parameter], argument: str) -> bool:
    """Whether a constructor has an argument of that name, or passes all on."""
    return argument in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
