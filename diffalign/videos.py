"""Video files, through PyAV: the frames of a clip at given times, and a file of a video that a model drew.

Nothing here imports torch or PyAV before a function needs it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, BinaryIO

from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

ENCODERS = (
    # Nearly without loss, since files are scored and looked at; one thread, since the bytes depend on their number.
    ("libx264", {"crf": "12", "preset": "medium", "threads": "1"}),
    ("mpeg4", {"qmin": "2", "qmax": "2", "threads": "1"}),
)
"""What mp4 files are written with, the first that this build of PyAV has: H.264, or MPEG-4 part 2."""
BT709 = 1
"""Colour space, primaries and transfer of ITU-R BT.709, as H.273 numbers them."""
LIMITED_RANGE = 1
"""Luma in 16..235, as players expect it."""


class VideoError(ValueError):
    """A clip that cannot be decoded, or ends too early."""


def require_av() -> Any:
    """The package `av`.

    Raises:
        ValueError: If it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ValueError("videos are read and written with PyAV: pip install 'diffalign[video]'") from error
    return av


def read_frames(file: BinaryIO, num_frames: int, fps: float) -> Iterator[Image.Image]:
    """The frames that a clip shows 0, 1, 2, ... intervals of 1/fps seconds after its first one; RGB and upright.

    Each is the frame with the nearest presentation time, the earlier of two as near; a clip of fewer frames per second
    than `fps` therefore gives some of them twice. A rotation in the file's metadata is applied, as players do.
    Decoding stops behind the last frame that is wanted.

    Args:
        file: An mp4, webm, mov, mkv, gif or whatever else FFmpeg reads, at its beginning.
        num_frames: How many frames, >= 1.
        fps: At how many per second.

    Yields:
        `num_frames` images of one size.

    Raises:
        VideoError: If the file is damaged or has no video, or the last frame is not shown any more at the last time.
    """
    av = require_av()
    interval = 1 / _rate(fps)
    given = 0
    before: tuple[Fraction, Any] | None = None
    end = Fraction(0)
    try:
        # A playlist names other files, and a clip of somebody's data set has no business to open them.
        with av.open(file, metadata_errors="ignore", options={"protocol_whitelist": "none"}) as container:
            for time, length, frame in _timed_frames(container):
                while given < num_frames and given * interval <= time:
                    wanted = given * interval
                    early = before is not None and wanted - before[0] <= time - wanted
                    yield _upright(before[1] if early and before is not None else frame)
                    given += 1
                if given == num_frames:
                    return
                before, end = (time, frame), time + length
            # A tenth of an interval forgives times that were rounded, in Matroska to milliseconds.
            while before is not None and given < num_frames and given * interval <= end + interval / 10:
                yield _upright(before[1])
                given += 1
    except av.FFmpegError as error:
        raise VideoError(f"no readable video ({error.strerror})") from error
    if given < num_frames:
        raise VideoError(
            f"{float(end):.2f} s of video, too short for {num_frames} frames at {fps:g} per second "
            f"({float((num_frames - 1) * interval):.2f} s)"
        )


def read_all_frames(file: BinaryIO) -> list[Image.Image]:
    """Every frame of a clip, in order; RGB and upright.

    Args:
        file: As in `read_frames`.

    Raises:
        VideoError: If the file is damaged or has no video.
    """
    av = require_av()
    try:
        with av.open(file, metadata_errors="ignore", options={"protocol_whitelist": "none"}) as container:
            return [_upright(frame) for _, _, frame in _timed_frames(container)]
    except av.FFmpegError as error:
        raise VideoError(f"no readable video ({error.strerror})") from error


def choose_frames(file: BinaryIO, choose: Callable[[int, float | None], Sequence[int]]) -> list[Image.Image]:
    """The frames of a clip with given numbers, chosen when it is known how many there are; RGB and upright.

    The file is decoded twice, once to count, so that only the chosen frames are ever held as pictures: what containers
    say about their number of frames is not reliable.

    Args:
        file: As in `read_frames`; it must be seekable.
        choose: Numbers of frames, in rising order, from how many there are and how many per second.

    Raises:
        VideoError: If the file is damaged or has no video.
    """
    av = require_av()
    options = {"protocol_whitelist": "none"}
    try:
        with av.open(file, metadata_errors="ignore", options=options) as container:
            total = sum(1 for _ in _timed_frames(container))
            rate = container.streams.video[0].average_rate
        if not total:
            raise VideoError("a video without frames")
        wanted = list(choose(total, float(rate) if rate else None))
        chosen: dict[int, Image.Image] = {}
        file.seek(0)
        with av.open(file, metadata_errors="ignore", options=options) as container:
            for number, (_, _, frame) in enumerate(_timed_frames(container)):
                if number in wanted:
                    chosen[number] = _upright(frame)
                if wanted and number == wanted[-1]:
                    break
    except av.FFmpegError as error:
        raise VideoError(f"no readable video ({error.strerror})") from error
    return [chosen[number] for number in wanted]


def _timed_frames(container: Any) -> Iterator[tuple[Fraction, Fraction, Any]]:
    """Decoded frames, each with its time from the first one on and how long it is shown, in seconds."""
    if not container.streams.video:
        raise VideoError("a file without video")
    stream = container.streams.video[0]
    usual = 1 / stream.average_rate if stream.average_rate else None
    first = latest = None
    for number, frame in enumerate(container.decode(stream)):
        if frame.is_corrupt:  # the frames after it are built on it
            raise VideoError(f"frame {number} is damaged")
        if frame.pts is not None:
            time = frame.pts * frame.time_base
        elif usual is not None:  # a bare stream without a container
            time = number * usual
        else:
            raise VideoError("a file that says neither times nor rate of its frames")
        first = time if first is None else first
        if latest is not None and time <= latest:
            continue  # broken times; a player would not show it either
        length = frame.duration * frame.time_base if frame.duration else usual
        yield time - first, length or Fraction(0), frame
        latest = time


def _upright(frame: Any) -> Image.Image:
    image: Image.Image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def _rate(fps: float) -> Fraction:
    """Frames per second as containers store them; 1001 makes room for 30000/1001 and its kin."""
    return Fraction(fps).limit_denominator(1001)


def to_mp4(video: Tensor, fps: float) -> bytes:
    """A video [T, 3, H, W] in [0, 1] as the bytes of an mp4 file, T frames at `fps` per second; H and W are even.

    H.264 where this build of PyAV has an encoder for it, else MPEG-4 part 2; 4:2:0, BT.709, labelled as such. Equal
    videos give equal bytes with one version of PyAV.
    """
    av = require_av()
    pixels = (video.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()
    name, options = _encoder()
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream(name, rate=_rate(fps), options=options)
        stream.height, stream.width, stream.pix_fmt = pixels.shape[1], pixels.shape[2], "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED_RANGE
        for number, picture in enumerate(pixels):
            rgb = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = rgb.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            frame.pts, frame.time_base = number, 1 / _rate(fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def _encoder() -> tuple[str, dict[str, str]]:
    """The first of `ENCODERS` that is there."""
    av = require_av()
    for name, options in ENCODERS:
        try:
            av.codec.Codec(name, "w")
        except av.codec.codec.UnknownCodecError:
            continue
        return name, options
    names = " or ".join(name for name, _ in ENCODERS)
    raise ValueError(f"this build of PyAV {av.__version__} can write no mp4: it has no encoder {names}; reinstall av")
