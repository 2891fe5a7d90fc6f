"""Images and clips that are not decoded before they are needed, and the one way they become training pixels."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import fsspec  # type: ignore[import-untyped]
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

TRANSFORM_VERSION = 1
"""Part of the cache's key: raise it whenever `pixels` could give other numbers."""

CENTRE = (0.5, 0.5)
"""Place of a crop, down and to the right, as a share of what is left over."""

_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
DECODER_ERRORS = (
    OSError,
    SyntaxError,  # how Pillow reports a broken PNG
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow raises for damaged files."""


class CorruptImageError(ValueError):
    """An image or a clip is missing or cannot be decoded."""


@dataclass(frozen=True, eq=False)
class ImageSource:
    """Where an image or a clip comes from: encoded bytes, a file, an address of a data set, or a Pillow image.

    Attributes:
        data: The bytes, the path, the address (a string with "://"), the image, or None for an empty cell.
    """

    data: bytes | Path | str | Image.Image | None

    @staticmethod
    def of(cell: object, base: Path | None = None) -> ImageSource:
        """The image in one cell of a data set.

        Args:
            cell: Encoded bytes, a Pillow image, a path, or the undecoded value of a `datasets.Image` or
                `datasets.Video` column.
            base: The folder that file names in text columns are relative to; None refuses them, because a data set
                from elsewhere has no business naming files of this machine.

        Raises:
            ValueError: If the cell holds something else, or a file outside of `base`.
        """
        if isinstance(cell, Mapping):
            data, path = cell.get("bytes"), cell.get("path")
            if data is None and isinstance(path, str):
                return ImageSource(path if "://" in path else Path(path))
            return ImageSource.of(data, base)
        if isinstance(cell, bytearray | memoryview):
            return ImageSource(bytes(cell))
        if isinstance(cell, str):
            if base is None:
                raise ValueError(
                    f"found the text {cell[:80]!r} in an image column, expected encoded images or clips; "
                    "for file names set train_data_dir to their folder and index to this file"
                )
            return ImageSource(file_inside(base, cell))
        if cell is None or isinstance(cell, bytes | Path | Image.Image):
            return ImageSource(cell)
        raise ValueError(
            f"found {type(cell).__name__} in an image column, expected encoded images, clips or file names"
        )

    def read(self) -> bytes:
        """The encoded bytes; for a Pillow image its mode, size and raw pixels.

        Raises:
            CorruptImageError: If there is nothing to read. Trouble with the disk itself stays an `OSError`.
        """
        if self.data is None:
            raise CorruptImageError("no image")
        if isinstance(self.data, Image.Image):
            return f"{self.data.mode} {self.data.size} ".encode() + self.data.tobytes()
        if isinstance(self.data, bytes):
            return self.data
        try:
            if isinstance(self.data, Path):
                return self.data.read_bytes()
            with fsspec.open(self.data, "rb") as file:
                return bytes(file.read())
        except (FileNotFoundError, IsADirectoryError) as error:
            raise CorruptImageError(f"no file {self.data}") from error

    def open(self) -> io.BufferedReader | io.BytesIO:
        """What `read` gives as a file: one on the disk is not read as a whole.

        Raises:
            CorruptImageError: As `read`.
        """
        if not isinstance(self.data, Path):
            return io.BytesIO(self.read())
        try:
            return self.data.open("rb")
        except (FileNotFoundError, IsADirectoryError) as error:
            raise CorruptImageError(f"no file {self.data}") from error

    def digest(self) -> str:
        """A hash of what `read` gives; an image that is not there has one of its own."""
        try:
            with self.open() as file:
                return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        except CorruptImageError:
            return "missing"

    def decode(self) -> Image.Image:
        """The image in RGB: transparency is dropped, an EXIF rotation is not applied, as in the original trainers.

        Raises:
            CorruptImageError: If the data is empty, cut short or no image.
        """
        if isinstance(self.data, Image.Image):
            return _rgb(self.data)
        encoded = self.read()
        try:
            with Image.open(io.BytesIO(encoded)) as image:
                image.load()
                return _rgb(image)
        except UnidentifiedImageError as error:  # its text holds a memory address, which no report should
            raise CorruptImageError(f"{len(encoded)} bytes that are no image of a known format") from error
        except DECODER_ERRORS as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CorruptImageError(f"{len(encoded)} bytes that are no readable image ({reason})") from error


def file_inside(base: Path, name: str) -> Path:
    """The file `name` below the folder `base`.

    Raises:
        ValueError: If the name leads out of the folder ("..", an absolute path, a link).
    """
    root = base.resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise ValueError(f"file {name!r} lies outside of {base}; expected a path inside, relative to that folder")
    return path


def pixels(image: Image.Image, size: tuple[int, int], place: tuple[float, float] = CENTRE) -> Tensor:
    """A part of an RGB image that is scaled, with its proportions, until it just covers `size`.

    Bilinear with antialiasing, sizes and offsets rounded as torchvision's `Resize` and `CenterCrop` do.

    Args:
        image: The image.
        size: Height and width of the result.
        place: Which part, from (0, 0), the upper left, to (1, 1), the lower right; both images of a pair and all
            frames of a clip get the same.

    Returns:
        Values 0..255, [3, height, width], uint8.
    """
    (height, width), (full_width, full_height) = size, image.size
    if width * full_height >= height * full_width:
        covering = (width, width * full_height // full_width)
    else:
        covering = (height * full_width // full_height, height)
    scaled = image if covering == image.size else image.resize(covering, Image.Resampling.BILINEAR)
    top, left = (round((covering[1] - height) * place[0]), round((covering[0] - width) * place[1]))
    cropped = scaled.crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(cropped, dtype=np.uint8)).permute(2, 0, 1).contiguous()


def to_unit_range(images: Tensor) -> Tensor:
    """Pixels 0..255 as float32 in [0, 1], same shape."""
    return images.to(torch.float32) / 255.0


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in _DEEP_MODES:  # Pillow would clip every value above 255 to white
        raise CorruptImageError(f"pixels of type {image.mode}; expected 8 bits per channel")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
