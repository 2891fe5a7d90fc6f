"""Reads media of any accepted kind: files, PIL images, arrays and tensors become 8-bit RGB, clips become frames."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from diffalign.videos import VideoError, choose_frames

__all__ = ["Frames", "InvalidMediaError", "Media", "MediaBatch", "Video", "as_list", "read_clip", "to_rgb"]

Array: TypeAlias = npt.NDArray[Any]
Frames: TypeAlias = Tensor | Array | Sequence[Image.Image | Array | Tensor | str | Path]


@dataclass(frozen=True, eq=False)
class Video:
    """A clip whose frames are at hand.

    Attributes:
        frames: A tensor [T, 3, H, W], an array [T, H, W, 3], or T pictures of one size; values as in `to_rgb`.
        fps: Frames per second, > 0; None if that is not known.
    """

    frames: Frames
    fps: float | None = None


Media: TypeAlias = Image.Image | Array | Tensor | str | Path | Video
MediaBatch: TypeAlias = Media | Sequence[Media | Sequence[Media]]


class InvalidMediaError(ValueError):
    """A picture or clip that cannot be read or does not hold RGB values in the expected range."""


def as_list(media: MediaBatch, item_ndim: int = 3) -> list[Media]:
    """One medium, a batch tensor or a sequence of media as a list.

    Where a medium is a clip (`item_ndim` 4), a list of pictures is one clip and a list of such lists is several. A
    list of paths is a list of video files: wrap the paths of a clip's frames in `Video`.
    """
    if isinstance(media, Tensor | np.ndarray):
        if media.ndim == item_ndim + 1:
            return list(media)
        return [media]
    if isinstance(media, str | Path | Image.Image | Video):
        return [media]
    items: list[Any] = list(media)
    if item_ndim == 4:
        if items and all(_is_picture(item) for item in items):
            return [Video(items)]
        return [Video(item) if isinstance(item, list | tuple) else item for item in items]
    return items


def _is_picture(item: object) -> bool:
    return isinstance(item, Image.Image) or (isinstance(item, Tensor | np.ndarray) and item.ndim == 3)


def read_clip(item: Media, choose: Callable[[int, float | None], Sequence[int]]) -> list[Image.Image]:
    """Chosen frames of any accepted clip as 8-bit RGB images of one size.

    Args:
        item: Path of a video file, `Video`, tensor [T, 3, H, W] or array [T, H, W, 3].
        choose: The numbers of the wanted frames, in rising order, given how many frames there are and how many per
            second (None for frames that do not say); may raise `InvalidMediaError`.

    Raises:
        InvalidMediaError: If a file cannot be decoded, the clip has no frames, or they differ in size.
        ValueError: If a video file is given and PyAV is not installed.
    """
    if isinstance(item, str | Path):
        images = _read_video(Path(item), choose)
    else:
        frames, fps = (item.frames, item.fps) if isinstance(item, Video) else (item, None)
        if isinstance(frames, Image.Image):
            raise InvalidMediaError("expected a clip, got a single picture")
        if isinstance(frames, Tensor | np.ndarray) and frames.ndim != 4:
            layout = "a tensor [T, 3, H, W]" if isinstance(frames, Tensor) else "an array [T, H, W, 3]"
            raise InvalidMediaError(f"expected {layout}, got shape {tuple(frames.shape)}")
        if fps is not None and not fps > 0:
            raise InvalidMediaError(f"frames per second must be positive, got {fps}")
        if not isinstance(frames, Sequence | Tensor | np.ndarray):
            raise InvalidMediaError(f"expected frames or the path of a video file, got {type(frames).__name__}")
        if len(frames) == 0:
            raise InvalidMediaError("the clip has no frames")
        images = [to_rgb(frames[number]) for number in choose(len(frames), fps)]
    if len({image.size for image in images}) > 1:
        raise InvalidMediaError(f"frames of one clip differ in size: {sorted({image.size for image in images})}")
    return images


def _read_video(path: Path, choose: Callable[[int, float | None], Sequence[int]]) -> list[Image.Image]:
    if not path.is_file():
        raise InvalidMediaError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise InvalidMediaError(f"{path}: the file is empty")
    try:
        with path.open("rb") as file:
            return choose_frames(file, choose)
    except InvalidMediaError as error:
        raise InvalidMediaError(f"{path}: {error}") from error
    except (VideoError, OSError) as error:
        raise InvalidMediaError(f"{path}: cannot be read as a video ({error})") from error


_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
_READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def to_rgb(item: Media) -> Image.Image:
    """Any accepted picture as an 8-bit RGB PIL image.

    Floats are rounded to 8 bits, so that a tensor and the PNG saved from it have the same score. Alpha is dropped,
    as PIL's `convert` does it (hidden colours become visible; composite first if you want another background);
    palettes are expanded, CMYK goes through PIL's plain formula, grey is repeated. Of an animation the first frame is
    read. EXIF orientation is not applied.

    Args:
        item: PIL image, path, array [H, W] or [H, W, 1|3|4], tensor [1|3|4, H, W]; arrays and tensors uint8, or
            floats in [0, 1].

    Raises:
        InvalidMediaError: If a file cannot be decoded, or the values, type or shape are others.
    """
    if isinstance(item, str | Path):
        return _read(Path(item))
    if isinstance(item, Image.Image):
        return _convert(item)
    if isinstance(item, Tensor):
        if item.ndim != 3 or item.shape[0] not in (1, 3, 4):
            raise InvalidMediaError(f"expected a tensor [3, H, W], got shape {tuple(item.shape)}")
        item = item.detach().cpu()
        item = (item.float() if item.is_floating_point() else item).permute(1, 2, 0).numpy()
    if not isinstance(item, np.ndarray):
        raise InvalidMediaError(f"expected an image, array, tensor or path, got {type(item).__name__}")
    if item.ndim not in (2, 3) or (item.ndim == 3 and item.shape[2] not in (1, 3, 4)) or 0 in item.shape:
        raise InvalidMediaError(f"expected an array [H, W, 3], got shape {item.shape}")
    pixels = _to_uint8(item)
    return _convert(Image.fromarray(pixels[..., 0] if item.ndim == 3 and item.shape[2] == 1 else pixels))


def _to_uint8(array: Array) -> npt.NDArray[np.uint8]:
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise InvalidMediaError(f"expected uint8 or floats in [0, 1], got {array.dtype}")
    low, high = float(array.min()), float(array.max())
    # The comparison is written so that NaN fails it; 1e-3 forgives rounding of half-precision pixels.
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise InvalidMediaError(f"expected floats in [0, 1], got values from {low:.4g} to {high:.4g}")
    return np.rint(array.clip(0, 1).astype(np.float32) * 255).astype(np.uint8)


def _read(path: Path) -> Image.Image:
    def load() -> Image.Image:
        with Image.open(path) as image:
            image.load()
            return _convert(image)

    return _checked(load, str(path))


def _convert(image: Image.Image) -> Image.Image:
    if image.mode not in _MODES:
        raise InvalidMediaError(f"expected an 8-bit picture, got PIL mode {image.mode}; convert it to 8 bits first")
    if 0 in image.size:
        raise InvalidMediaError(f"the picture is empty: size {image.size[0]}x{image.size[1]}")
    if "transparency" in image.info and image.mode == "P":
        image = image.convert("RGBA")
    return _checked(lambda: image.convert("RGB"), "image")


def _checked(action: Callable[[], Image.Image], name: str) -> Image.Image:
    try:
        return action()
    except InvalidMediaError as error:
        raise InvalidMediaError(f"{name}: {error}") from error
    except FileNotFoundError as error:
        raise InvalidMediaError(f"{name}: no such file") from error
    except _READ_ERRORS as error:
        raise InvalidMediaError(f"{name}: cannot be read as a picture ({error})") from error
