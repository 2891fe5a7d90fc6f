"""How media and scores travel between `diffalign serve-reward` and the reward model `remote`: JSON, nothing executable.

`POST /v1/score` takes {"model": name, "items": [{"prompt": text or null, and one of "image_b64", "video_b64",
"frames_b64"}]} and gives {"results": [{"valid", "dims": {name: number or null}, "uncertainty", "raw", "error"}]}, one
for each item in their order; the last two are null where there is nothing to say. Pictures are PNG files in base64,
since JPEG changes scores; a clip is its file, or the list of its frames with "fps" if that is known. `GET /v1/models`
gives {"models": [...]}: the fields of `RewardInfo`, "fingerprint" and "item_ndim". `GET /health` needs no token.
"""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffalign.reward_models.base import RewardInfo, RewardOutput, WeightSpec
from diffalign.reward_models.inputs import VIDEO_SUFFIXES
from diffalign.reward_models.media import InvalidMediaError, Media, Video, read_clip, to_rgb

__all__ = ["Limits", "decode_media", "encode_media", "info_from_json", "info_to_json", "results_to_json"]

FORMATS = ("PNG", "JPEG", "WEBP")
"""Files that a server opens, of all that Pillow knows."""


@dataclass(frozen=True)
class Limits:
    """What a server accepts.

    Attributes:
        body: Bytes of a request.
        pixels: Pixels of one picture, or of all frames of one video that comes as frames.
        items: Media in a request.
        prompt: Characters of a prompt.
    """

    body: int = 64_000_000
    pixels: int = 50_000_000
    items: int = 256
    prompt: int = 100_000


def encode_media(item: Media, kinds: frozenset[str]) -> dict[str, Any]:
    """A medium as fields of an item.

    Args:
        item: A picture of any kind; for models of videos also the path of one, a `Video`, or frames [T, 3, H, W].
        kinds: What the model scores. A path is a picture for a model that scores both, unless it ends like a video.

    Raises:
        InvalidMediaError: If it cannot be read.
    """
    is_clip = Path(item).suffix.lower() in VIDEO_SUFFIXES if isinstance(item, str | Path) else _has_frames(item)
    if "video" not in kinds or ("image" in kinds and not is_clip):
        return {"image_b64": _encode(_to_png(to_rgb(item)))}
    if isinstance(item, str | Path):
        try:
            content = Path(item).read_bytes()
        except OSError as error:
            raise InvalidMediaError(f"{item}: cannot be read ({error.strerror})") from error
        if not content:
            raise InvalidMediaError(f"{item}: the file is empty")
        return {"video_b64": _encode(content)}
    frames = read_clip(item, lambda count, fps: range(count))
    fps = item.fps if isinstance(item, Video) else None
    return {"frames_b64": [_encode(_to_png(frame)) for frame in frames], "fps": fps}


def _has_frames(item: Media) -> bool:
    return isinstance(item, Video) or (isinstance(item, torch.Tensor | np.ndarray) and item.ndim == 4)


def decode_media(item: Mapping[str, Any], limits: Limits, folder: Path) -> Media:
    """What a model takes, of the fields of an item.

    Sizes are read from the files' headers and compared with the limits before a pixel is decoded.

    Args:
        item: As `encode_media` gives it.
        limits: Of the server.
        folder: Where the file of a video may be put.

    Raises:
        InvalidMediaError: If there is not exactly one medium, or it is not as promised, or too large.
    """
    given = [name for name in ("image_b64", "video_b64", "frames_b64") if item.get(name) is not None]
    if len(given) != 1:
        raise InvalidMediaError(f"expected one of image_b64, video_b64 and frames_b64, got {given or 'none'}")
    value = item[given[0]]
    if given[0] == "image_b64":
        return _open(_decode(value), limits.pixels)
    if given[0] == "video_b64":
        number = sum(1 for _ in folder.iterdir())
        path = folder / f"{number}.mp4"
        path.write_bytes(_decode(value))
        return path
    if not isinstance(value, list) or not value:
        raise InvalidMediaError("frames_b64 must be a list of pictures, and not empty")
    frames, left = [], limits.pixels
    for text in value:
        frames.append(_open(_decode(text), left))
        left -= frames[-1].width * frames[-1].height
    fps = item.get("fps")
    if fps is not None and not (isinstance(fps, int | float) and 0 < fps < float("inf")):
        raise InvalidMediaError(f"fps must be a positive number, got {fps!r:.40}")
    return Video(frames, fps)


def results_to_json(output: RewardOutput) -> list[dict[str, Any]]:
    """One result per medium; a score that is not finite is null."""
    results = []
    for i, error in enumerate(output.errors):
        uncertainty = None if output.uncertainty is None else _finite(float(output.uncertainty[i]))
        results.append(
            {
                "valid": bool(output.valid[i]),
                "dims": {name: _finite(float(values[i])) for name, values in output.dims.items()},
                "uncertainty": uncertainty,
                "raw": None if output.raw is None else output.raw[i],
                "error": None if error is None else error.partition(": ")[2],
            }
        )
    return results


def info_to_json(info: RewardInfo) -> dict[str, Any]:
    """The fields of an info as JSON values."""
    return asdict(info) | {"kind": sorted(info.kind)}


def info_from_json(content: Mapping[str, Any]) -> RewardInfo:
    """The info in a server's answer; fields that this version does not know are left out.

    Raises:
        ValueError: If it is none.
    """
    try:
        known = {f.name: content[f.name] for f in fields(RewardInfo) if f.name in content}
        parts = [f.name for f in fields(WeightSpec)]
        known["weights"] = tuple(
            WeightSpec(**{name: spec[name] for name in parts if name in spec}) for spec in known.get("weights", ())
        )
        known["kind"], known["dims"] = frozenset(known["kind"]), tuple(known["dims"])
        if known.get("nominal_range") is not None:
            low, high = known["nominal_range"]
            known["nominal_range"] = (float(low), float(high))
        info = RewardInfo(**known)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not the description of a reward model: {error!r}") from error
    if not info.dims or not all(isinstance(name, str) for name in (info.name, *info.dims)):
        raise ValueError(f"not the description of a reward model: {content!s:.80}")
    return info


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None


def _encode(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _decode(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise InvalidMediaError(f"not base64 ({error})") from error


def _to_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)  # the strongest takes ten times as long, for a tenth less
    return buffer.getvalue()


def _open(content: bytes, most: int) -> Image.Image:
    """The picture in a file, its header read and nothing else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked below
            image = Image.open(io.BytesIO(content), formats=FORMATS)
    except (OSError, ValueError, SyntaxError) as error:
        raise InvalidMediaError(f"not a picture in one of the formats {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise InvalidMediaError(f"larger than the limit of {most} pixels") from error
    if image.width * image.height > most:
        raise InvalidMediaError(f"{image.width}x{image.height} is larger than the limit of {most} pixels")
    return image
