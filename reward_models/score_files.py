"""The file that `diffalign score` leaves: JSONL or parquet by its ending, the same rows in both.

A row in memory, as in JSONL: {"id", "prompt", "image", "sha256", "valid", "scores": {model: value or null}, "errors":
{model: reason}, "models": {model: fingerprint}}, and where models give them "dims": {model: {name: value}},
"uncertainty": {model: value} and "raw": {model: text}. In parquet a model's values are the columns `model`,
`model/DIMENSION`, `model/uncertainty`, `model/raw` and `model/error`; fingerprints are in the schema's metadata.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["ScoreRow", "check_suffix", "columns_of", "read_lines", "read_rows", "write_rows"]

ScoreRow = Mapping[str, Any]

SUFFIXES = (".jsonl", ".parquet")
_MODELS = b"diffalign.models"
_PLAIN = ("id", "prompt", "image", "sha256", "valid")
_ROWS = 10_000
"""Rows that are held while parquet is written or read."""


def check_suffix(path: Path) -> None:
    """Raises ValueError if there is no kind of output that ends so."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"scores are written as {' or '.join(SUFFIXES)}, got {path.name!r}")


def columns_of(row: ScoreRow) -> dict[str, float | None]:
    """The numbers of a row by column: scores, dimensions, uncertainties."""
    columns: dict[str, float | None] = {}
    for model, score in row["scores"].items():
        columns[model] = score
        columns |= {f"{model}/{name}": value for name, value in row.get("dims", {}).get(model, {}).items()}
        if model in row.get("uncertainty", {}):
            columns[f"{model}/uncertainty"] = row["uncertainty"][model]
    return columns


def write_rows(path: Path, rows: Iterable[ScoreRow], dims: Mapping[str, Sequence[str]], extras: Iterable[str]) -> None:
    """Writes all rows, by way of a temporary file beside it: the output is there complete or not at all.

    Args:
        path: Ends with one of `SUFFIXES`.
        rows: In their order; read once.
        dims: Names of each model's dimensions beside its score; none for a model with a single one.
        extras: Which of "MODEL/uncertainty" and "MODEL/raw" any row has.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            if path.suffix.lower() == ".parquet":
                _write_parquet(file, rows, dims, set(extras))
            else:
                file.writelines(to_line(row).encode() for row in rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def to_line(row: ScoreRow) -> str:
    """A row as JSON with its line break; a value that is not finite is a mistake of ours."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def read_rows(path: Path) -> Iterator[ScoreRow]:
    """The rows of an earlier output, if there is one; damaged lines, or a damaged parquet file, give none."""
    if not path.exists():
        return
    if path.suffix.lower() == ".parquet":
        try:
            yield from _read_parquet(path)
        except (pa.ArrowException, OSError, ValueError, KeyError):
            return
    else:
        yield from read_lines(path)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file; a line that is torn or damaged is left out, and so computed again."""
    if not path.exists():
        return
    with path.open("rb") as stream:
        for line in stream:
            try:
                content = json.loads(line)
            except ValueError:
                continue
            if line.endswith(b"\n") and isinstance(content, dict):
                yield content


def _write_parquet(file: Any, rows: Iterable[ScoreRow], dims: Mapping[str, Sequence[str]], extras: set[str]) -> None:
    fields = [pa.field(name, pa.bool_() if name == "valid" else pa.string()) for name in _PLAIN]
    for model, names in dims.items():
        fields += [pa.field(name, pa.float32()) for name in (model, *(f"{model}/{dim}" for dim in names))]
        if f"{model}/uncertainty" in extras:
            fields.append(pa.field(f"{model}/uncertainty", pa.float32()))
        if f"{model}/raw" in extras:
            fields.append(pa.field(f"{model}/raw", pa.string()))
        fields.append(pa.field(f"{model}/error", pa.string()))
    schema, writer, batch = pa.schema(fields), None, []
    try:
        for row in rows:
            if writer is None:
                about = {m: {"fingerprint": row["models"][m], "dims": list(names)} for m, names in dims.items()}
                schema = schema.with_metadata({_MODELS: json.dumps(about).encode()})
                writer = pq.ParquetWriter(file, schema, compression="zstd")
            batch.append(_flat(row))
            if len(batch) == _ROWS:
                writer.write_table(pa.Table.from_pylist(batch, schema))
                batch = []
        if writer is not None and batch:
            writer.write_table(pa.Table.from_pylist(batch, schema))
    finally:
        if writer is not None:
            writer.close()


def _flat(row: ScoreRow) -> dict[str, Any]:
    flat = {name: row[name] for name in _PLAIN} | columns_of(row)
    flat |= {f"{model}/raw": text for model, text in row.get("raw", {}).items()}
    return flat | {f"{model}/error": reason for model, reason in row["errors"].items()}


def _read_parquet(path: Path) -> Iterator[ScoreRow]:
    file = pq.ParquetFile(path)
    models = json.loads(file.schema_arrow.metadata[_MODELS])
    prints = {model: about["fingerprint"] for model, about in models.items()}
    for batch in file.iter_batches(batch_size=_ROWS):
        for flat in batch.to_pylist():
            dims = {m: {name: flat[f"{m}/{name}"] for name in about["dims"]} for m, about in models.items()}
            yield {
                **{name: flat[name] for name in _PLAIN},
                "scores": {model: flat[model] for model in models},
                "errors": _present(flat, models, "error"),
                "models": prints,
                "dims": {model: values for model, values in dims.items() if values},
                "uncertainty": _present(flat, models, "uncertainty"),
                "raw": _present(flat, models, "raw"),
            }


def _present(flat: Mapping[str, Any], models: Iterable[str], what: str) -> dict[str, Any]:
    """The values by model of the columns `MODEL/what` that are there and not null."""
    found = {model: flat.get(f"{model}/{what}") for model in models}
    return {model: value for model, value in found.items() if value is not None}
