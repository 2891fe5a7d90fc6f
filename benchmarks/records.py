"""The end of every benchmark: its record on the disk, its table on the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffalign.resumable import write_atomically

__all__ = ["RESULTS", "publish"]

RESULTS = Path(__file__).resolve().parent / "results"
"""Where records lie unless another place is named."""


def publish(record: Mapping[str, Any], table: str, path: Path) -> None:
    """Writes a record as JSON and prints its table, and where the record is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())
    sys.stdout.write(f"{table}\n\nrecord: {path}\n")
