"""What a run's files may say outside of this machine: folders of its owner are left out.

An absolute path becomes its last part; one into the Hub's cache becomes the name on the Hub that it stands for.
Everything else stays as it is, relative paths too.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

_CACHED = re.compile(r"(?:models|datasets)--([^/]+?)--([^/]+)/snapshots/[^/]+/?(.*)")
_WHOLE = re.compile(r"(?:~|[A-Za-z]:)?[/\\][^\s][^\n]*")
_WITHIN = re.compile(r"(?<![\w:/.~-])(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\'\",;:()\[\]]+){2,}[/\\]?")


def public(value: Any) -> Any:
    """JSON values with every local path in their texts shortened, keys included."""
    if isinstance(value, dict):
        return {public(key): public(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    if isinstance(value, str):
        return _short(value) if _WHOLE.fullmatch(value) else _WITHIN.sub(lambda found: _short(found[0]), value)
    return value


def public_bytes(path: Path) -> bytes | None:
    """Content of a run's YAML, JSON or JSON-lines file as it may be published; None where the file may go as it is."""
    if path.suffix not in (".yaml", ".json", ".jsonl"):
        return None
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        lines = text.splitlines()
        changed = [_line(line) for line in lines]
        return None if changed == lines else "".join(line + "\n" for line in changed).encode("utf-8")
    content = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    if public(content) == content:
        return None
    if path.suffix == ".yaml":
        return yaml.safe_dump(public(content), sort_keys=False).encode("utf-8")
    return (json.dumps(public(content), indent=2) + "\n").encode("utf-8")


def _line(text: str) -> str:
    try:
        content = json.loads(text)
    except json.JSONDecodeError:  # a line that a killed run left torn
        return str(public(text))
    return text if public(content) == content else json.dumps(public(content))


def _short(path: str) -> str:
    cached = _CACHED.search(path.replace("\\", "/"))
    if cached:
        return "/".join(part for part in cached.groups() if part)
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or path
