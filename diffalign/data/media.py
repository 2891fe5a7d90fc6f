"""From a pair's files to training pixels: images or clips, whichever the model draws."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor

from diffalign.data.buckets import bucket_sizes, nearest_bucket
from diffalign.data.config import DataConfig
from diffalign.data.images import (
    CENTRE,
    DECODER_ERRORS,
    TRANSFORM_VERSION,
    CorruptImageError,
    ImageSource,
    pixels,
)
from diffalign.data.pairs import Pair, PairSet
from diffalign.randomness import Draw
from diffalign.videos import VideoError, read_frames, require_av

CLIP_VERSION = 1
"""Part of the cache's key: raise it whenever `clip_pixels` could give other numbers."""
Member = Literal["chosen", "rejected"]
_LOOK_AT = 4
"""Pairs that are looked at to tell images from clips; the first may be damaged."""


class Media(Protocol):
    """The part of a policy, or of its class, that says what it draws."""

    @property
    def is_video(self) -> bool:
        """Whether that is videos."""
        ...


class MediaSize(Media, Protocol):
    """The part of a policy that says what its pixels are like."""

    @property
    def size(self) -> tuple[int, int]:
        """Default height and width."""
        ...

    @property
    def num_frames(self) -> int:
        """Frames of a clip."""
        ...

    @property
    def frame_rate(self) -> float:
        """Default frames per second of a clip."""
        ...


@dataclass(frozen=True)
class Decoded:
    """A pair's images, uint8 [3, H, W], or clips [T, 3, H, W]; or why there are none.

    Chosen then rejected, each plain and, if wanted, mirrored; of winners the chosen one alone.

    Attributes:
        pair: The pair.
        images: The pixels.
        reason: Why there are none.
        bucket: Which of `Preparation.buckets` they have, if there are any.
    """

    pair: Pair
    images: tuple[Tensor, ...] = ()
    reason: str = ""
    bucket: int = 0


class Preparation:
    """What is done to both halves of a pair alike: frames, scale, crop, mirror image.

    Args:
        config: Size, crop, mirror images.
        model: What it draws.
        winners_only: Whether there are only chosen images; see `PairSet`.

    Attributes:
        batch_size: Images or clips per call of the autoencoder.
        members: The halves that there are.
        buckets: Heights and widths of `aspect_ratio_buckets`; empty where everything has one size.

    Raises:
        ValueError: If random crops of images are wanted, or buckets that there cannot be.
    """

    def __init__(self, config: DataConfig, model: MediaSize, *, winners_only: bool = False) -> None:
        self.members: tuple[Member, ...] = ("chosen",) if winners_only else ("chosen", "rejected")
        check_crop(config, model)
        self._center_crop, self._mirrored = config.center_crop, config.random_flip
        self._size = config.size or model.size
        self.buckets = bucket_sizes(self._size, config.bucket_step) if config.aspect_ratio_buckets else ()
        self._clip = (model.num_frames, float(config.fps or model.frame_rate)) if model.is_video else None
        self.batch_size = config.encode_batch_size or (1 if model.is_video else 8)

    def key(self) -> dict[str, Any]:
        """Everything that decides the pixels, as JSON values."""
        clips = {} if self._clip is None else {"clips": CLIP_VERSION, "num_frames": self._clip[0], "fps": self._clip[1]}
        return {
            "transform": TRANSFORM_VERSION,
            "size": list(self._size),
            **({"buckets": [list(size) for size in self.buckets]} if self.buckets else {}),
            "crop": "center" if self._center_crop else "one place for each pair",
            "views": 2 if self._mirrored else 1,
            **({"members": list(self.members)} if len(self.members) == 1 else {}),
            **clips,
        }

    def decode(self, pair: Pair) -> Decoded:
        """The pixels of the halves; a reason in their place if one cannot be read."""
        place = CENTRE
        if not self._center_crop:
            draw = Draw(0, 0, pair.pair_id)
            place = (draw.uniform("crop/down"), draw.uniform("crop/right"))
        images: list[Tensor] = []
        size, bucket = self._size, 0
        for member in self.members:
            source: ImageSource = getattr(pair, member)
            try:
                if self._clip is not None:
                    image = clip_pixels(source, *self._clip, size, place)
                else:
                    picture = source.decode()
                    if self.buckets and member == "chosen":  # the first one, which decides for both
                        bucket = nearest_bucket(self.buckets, picture.height, picture.width)
                        size = self.buckets[bucket]
                    image = pixels(picture, size, place)
            except CorruptImageError as error:
                return Decoded(pair, reason=f"{member}: {error}")
            images += [image, image.flip(-1)] if self._mirrored else [image]
        return Decoded(pair, tuple(images), bucket=bucket)


def check_crop(config: DataConfig, model: Media) -> None:
    """Raises ValueError for what cached latents cannot follow, random crops of images, and for buckets of clips."""
    if config.aspect_ratio_buckets and model.is_video:
        raise ValueError("data.aspect_ratio_buckets are for images, and the model draws videos; leave them out")
    if not config.center_crop and not model.is_video:
        raise ValueError(
            "data.center_crop is false: a random crop of images changes at every visit, which cached latents cannot "
            "follow; set center_crop: true"
        )


def clip_pixels(
    source: ImageSource, num_frames: int, fps: float, size: tuple[int, int], place: tuple[float, float] = CENTRE
) -> Tensor:
    """The first frames of a clip at a fixed rate, each scaled and cropped as `pixels` does it.

    A clip begins with its first frame: that is the one moment that two clips of different lengths share.

    Args:
        source: The clip.
        num_frames: How many frames.
        fps: How many of them make a second; see `diffalign.videos.read_frames`.
        size: Height and width of the result.
        place: Which part of the frames to crop, the same for all.

    Returns:
        Values 0..255, [num_frames, 3, height, width], uint8.

    Raises:
        CorruptImageError: If the clip is missing, damaged, without video or too short.
    """
    with source.open() as file:
        try:
            return torch.stack([pixels(frame, size, place) for frame in read_frames(file, num_frames, fps)])
        except VideoError as error:
            raise CorruptImageError(str(error)) from error


def check_media(pairs: PairSet, model: Media) -> None:
    """Looks at the first pairs for images where the model needs clips, or the other way round.

    Args:
        pairs: The data.
        model: A policy, or the class of one.

    Raises:
        ValueError: If they are of the wrong kind, or clips are needed and PyAV is not installed.
    """
    if model.is_video:
        require_av()
    for pair in islice(pairs, _LOOK_AT):
        for source in (pair.chosen, pair.rejected):
            kind = _kind(source)
            if model.is_video and kind == "image":
                raise ValueError(
                    f"pair {pair.pair_id!r} of {pairs.name} is of still images, and the model draws videos; "
                    "give pairs of clips, or take an image model"
                )
            if not model.is_video and kind == "clip":
                raise ValueError(
                    f"pair {pair.pair_id!r} of {pairs.name} is of clips, and the model draws images; "
                    "give pairs of images, or take a video model"
                )


def _kind(source: ImageSource) -> Literal["image", "clip", "unknown"]:
    """What a medium is by its first bytes; "unknown" if it is damaged, or a picture file with several frames."""
    if isinstance(source.data, Image.Image):
        return "image"
    try:
        with source.open() as file:
            if _looks_like_video(file.read(12)):
                return "clip"
            with Image.open(file) as image:
                return "image" if getattr(image, "n_frames", 1) == 1 else "unknown"
    except (CorruptImageError, *DECODER_ERRORS):  # the encoding will say what is wrong with it
        return "unknown"


def _looks_like_video(start: bytes) -> bool:
    """Whether it is that of an mp4 or mov, a webm or mkv, or an avi."""
    still = start[8:12] in (b"avif", b"heic", b"mif1")  # kept in the same boxes as mp4
    boxes = start[4:8] == b"ftyp" and not still
    return boxes or start[:4] == b"\x1a\x45\xdf\xa3" or start[8:12] == b"AVI "
