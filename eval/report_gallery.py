"""The gallery of a report as data: samples of one prompt and seed side by side, small pictures, boxes, scores.

Everything is plain JSON, with pictures as data URIs; the page's script shows what is near the viewport.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image, features

from diffalign.eval.base import Row
from diffalign.eval.report_charts import evenly
from diffalign.eval.report_runs import Key, Side
from diffalign.shapes.scenes import IMAGE_SIZE

MAX_IMAGES = 4000
"""Pictures of one report, by default: all sides together."""
SIZES = ((120, 640), (600, 448), (2400, 288), (10**9, 224))
"""Up to so many pictures, their larger side in pixels."""
MAX_RATIO = 2.0
"""Height by width of the frames that pictures are shown in, at most."""
CRISP = 128
"""Pictures with a smaller side up to this are shown with crisp pixels."""
SMALL_BYTES = 24_000
CLIP_BYTES, ALL_CLIPS_BYTES = 1_000_000, 60_000_000
"""Clips up to this size are embedded, until all together reach the second number."""
VIDEO_SUFFIXES = frozenset({".mp4", ".webm", ".mov", ".m4v"})
MAX_EVIDENCE = 1500
DRAWN = ("objects", "read", "path")
"""Evidence that is drawn on the picture instead of written beside it."""


@dataclass(frozen=True)
class Sample:
    """One model's picture or clip of an item: number of the model, row, and file."""

    side: int
    row: Row
    path: Path | None


def build_gallery(
    sides: Sequence[Side], root: Path, *, thumbnail: int | None = None, max_images: int = MAX_IMAGES
) -> dict[str, Any]:
    """The data of the page's gallery.

    Args:
        sides: The models, in the order shown.
        root: Folder that exported votes name files relative to.
        thumbnail: Larger side of the embedded pictures, in pixels; None chooses by their number.
        max_images: Of more pictures, an evenly spread part is taken.

    Returns:
        "sides", "sets", "tasks" and "scorers" (names), "items" (what is shown together), "images" (data URIs, with
        the size of the original), "total" (how many items there would be) and "ratio" (height by width of the tallest).
    """
    held: dict[tuple[str, Key], list[Sample]] = {}
    for number, side in enumerate(sides):
        for name, rows in side.sets.items():
            for key, row in rows.rows.items():
                held.setdefault((name, key), []).append(Sample(number, row, rows.media(row)))
    total, pictures = len(held), sum(map(len, held.values()))
    if pictures > max_images:
        kept = set(evenly(total, max(1, total * max_images // pictures)))
        held = {key: samples for i, (key, samples) in enumerate(held.items()) if i in kept}
    samples = [sample for group in held.values() for sample in group]
    files = list(dict.fromkeys(sample.path for sample in samples if sample.path is not None))
    images = _embed(files, thumbnail or next(size for most, size in SIZES if len(files) <= most))
    numbers = {path: number for number, path in enumerate(images)}
    names = {
        "sets": list(dict.fromkeys(name for name, _ in held)),
        "tasks": list(dict.fromkeys(sample.row.task for sample in samples if sample.row.task is not None)),
        "scorers": list(dict.fromkeys(scorer for sample in samples for scorer in sample.row.scores)),
    }
    items = []
    for (name, key), group in held.items():
        cells = [_cell(sample, names["scorers"], numbers, images, root.resolve()) for sample in group]
        identity = json.dumps([name, *key, [cell.get("file") for cell in cells]])
        item = {
            "id": hashlib.blake2b(identity.encode(), digest_size=8).hexdigest(),
            "prompt": group[0].row.prompt,
            "seed": group[0].row.seed,
            "set": names["sets"].index(name),
            "task": None if group[0].row.task is None else names["tasks"].index(group[0].row.task),
            "cells": cells,
        }
        items.append(item)
    ratio = max((image["size"][1] / image["size"][0] for image in images.values()), default=1.0)
    return {
        "sides": [side.label for side in sides],
        **names,
        "items": items,
        "images": list(images.values()),
        "total": total,
        "ratio": round(min(MAX_RATIO, ratio), 4),
    }


def _cell(
    sample: Sample,
    scorers: Sequence[str],
    numbers: Mapping[Path, int],
    images: Mapping[Path, Mapping[str, Any]],
    root: Path,
) -> dict[str, Any]:
    """What is shown of one sample; entries that say nothing are left out."""
    row, path = sample.row, sample.path
    cell: dict[str, Any] = {"side": sample.side}
    if path is not None and path.is_relative_to(root):
        cell["file"] = path.relative_to(root).as_posix()
    if path is not None and path in images:
        cell["image"] = numbers[path]
        drawn = {"boxes": find_boxes(row.evidence, images[path]["size"]), "path": find_path(row.evidence)}
        cell |= {key: value for key, value in drawn.items() if value}
    if row.correct is not None:
        cell["right"] = row.correct
    if row.reason:
        cell["reason"] = row.reason
    if row.scores:
        scores = [row.scores.get(scorer) for scorer in scorers]
        cell["scores"] = [None if score is None else float(f"{score:.6g}") for score in scores]
    rest = {key: value for key, value in row.evidence.items() if key not in DRAWN}
    if rest:
        cell["evidence"] = {key: _short(value) for key, value in rest.items()}
    return cell


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_EVIDENCE else text[:MAX_EVIDENCE] + " ..."


def find_boxes(evidence: Mapping[str, Any], size: Sequence[int]) -> list[list[Any]]:
    """The boxes that a verdict rests on: [label, left, top, width, height], as shares of the picture's sides.

    A detector's `objects` are class -> [x1, y1, x2, y2, score] in pixels of the picture; what the embedded judge `read`
    are places and sizes in its own pixels. Entries of another form are passed by.

    Args:
        evidence: Of a row.
        size: Width and height of the picture that was judged.
    """
    boxes = []
    objects = evidence.get("objects")
    for name, found in objects.items() if isinstance(objects, Mapping) else ():
        for box in found if isinstance(found, list) else ():
            if isinstance(box, list) and len(box) >= 4 and all(isinstance(v, int | float) for v in box):
                label = f"{name} {box[4]:.2f}" if len(box) > 4 else str(name)
                boxes.append(_box(label, *box[:4], *size))
    things = evidence.get("read")
    for thing in things if isinstance(things, list) else ():
        if isinstance(thing, Mapping) and all(isinstance(thing.get(k), int | float) for k in ("x", "y", "size")):
            x, y, half = thing["x"], thing["y"], thing["size"] / 2
            label = " ".join(str(thing[k]) for k in ("color", "shape") if k in thing)
            boxes.append(_box(label, x - half, y - half, x + half, y + half, IMAGE_SIZE, IMAGE_SIZE))
    return boxes


def find_path(evidence: Mapping[str, Any]) -> list[list[float]]:
    """Where the embedded judge of clips saw the object, frame by frame, as shares of the picture's sides."""
    places = evidence.get("path")
    return [
        [round(place[0] / IMAGE_SIZE, 4), round(place[1] / IMAGE_SIZE, 4)]
        for place in (places if isinstance(places, list) else ())
        if isinstance(place, list) and len(place) == 2 and all(isinstance(v, int | float) for v in place)
    ]


def _box(label: str, x1: float, y1: float, x2: float, y2: float, width: int, height: int) -> list[Any]:
    left, right = (min(max(x / width, 0.0), 1.0) for x in (x1, x2))
    top, bottom = (min(max(y / height, 0.0), 1.0) for y in (y1, y2))
    return [label, *(round(v, 4) for v in (left, top, right - left, bottom - top))]


# --- pictures and clips ------------------------------------------------------------------------------------------


def _embed(paths: Sequence[Path], side: int) -> dict[Path, dict[str, Any]]:
    """Every picture or clip that can be read, as data URIs."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        made = zip(paths, pool.map(lambda path: embed(path, side), paths), strict=True)
        images = {path: image for path, image in made if image is not None}
    spent = 0
    for path, image in images.items():
        if path.suffix.lower() in VIDEO_SUFFIXES:
            size = path.stat().st_size
            clip = player(path) if spent + size <= ALL_CLIPS_BYTES else None
            if clip is not None:
                spent += size
                image["clip"] = clip
            else:
                image["note"] = f"clip of {size / 1e6:.1f} MB, too large to embed"
    return images


def embed(path: Path, side: int) -> dict[str, Any] | None:
    """A picture, or the first frame of a clip, whose larger side is at most `side` pixels.

    Returns:
        "src" (a data URI; None for a clip without a first frame), "size" (width and height of the original) and, where
        true, "crisp"; None where the file cannot be read. Small files are embedded as they are.
    """
    try:
        if path.suffix.lower() in VIDEO_SUFFIXES:
            frame = _first_frame(path)
            return {"src": None, "size": [1, 1]} if frame is None else _describe(_shrunk(frame, side), frame.size)
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as opened:
            kind, size = str(opened.format), opened.size
            opened.draft("RGB", (side, side))  # large JPEGs are decoded at a fraction of their size
            image = opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    if kind in ("PNG", "JPEG", "WEBP") and len(content) <= SMALL_BYTES and max(size) <= side:
        return _describe(_uri(f"image/{kind.lower()}", content), size)
    return _describe(_shrunk(image, side), size)


def _describe(src: str, size: tuple[int, int]) -> dict[str, Any]:
    return {"src": src, "size": list(size)} | ({"crisp": True} if min(size) <= CRISP else {})


def _shrunk(image: Image.Image, side: int) -> str:
    """A picture as a data URI, made smaller where it is larger than `side`."""
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    kind = "WEBP" if features.check("webp") else "JPEG"
    buffer = io.BytesIO()
    small.save(buffer, kind, quality=82)
    return _uri(f"image/{kind.lower()}", buffer.getvalue())


def player(path: Path) -> str | None:
    """A clip as a data URI for the page's player; None where it is larger than `CLIP_BYTES`."""
    kind = "webm" if path.suffix.lower() == ".webm" else "mp4"
    return _uri(f"video/{kind}", path.read_bytes()) if path.stat().st_size <= CLIP_BYTES else None


def _first_frame(path: Path) -> Image.Image | None:
    """The first frame of a clip; None without the extra `video`, when the player has to do without.

    Raises:
        ValueError: If the clip cannot be read.
    """
    from diffalign.videos import read_frames

    if find_spec("av") is None:
        return None
    with path.open("rb") as file:
        return next(read_frames(file, 1, 1.0))


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
