"""Small real clips for tests; no test by itself."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
from PIL import Image

STEP = 12
"""Levels of grey between frames of `counting`: more than any codec here is off by."""


def counting(count: int, size: tuple[int, int] = (32, 48)) -> list[Image.Image]:
    """Frames of one grey each, by which `numbers` tells which is which; at most 20."""
    return [Image.new("RGB", size[::-1], (10 + STEP * i,) * 3) for i in range(count)]


def numbers(frames: Sequence[Image.Image]) -> list[int]:
    """Which frames of `counting` these are."""
    return [round((float(np.asarray(frame).mean()) - 10) / STEP) for frame in frames]


def clip(
    frames: Sequence[Image.Image],
    fps: int | Fraction = 8,
    kind: str = "mp4",
    codec: str = "libx264",
    times: Sequence[int] | None = None,
) -> bytes:
    """A file of these frames.

    Args:
        frames: Of one size.
        fps: Frames per second.
        kind: The container, by FFmpeg's name.
        codec: The encoder.
        times: When each frame is shown, in units of 1/fps; None shows one after the other.
    """
    buffer = io.BytesIO()
    quality = {"libx264": {"crf": "4"}, "libvpx": {"crf": "4", "b": "1M"}}.get(codec, {})
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=fps, options={"threads": "1", **quality})
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_image(image)
            frame.pts, frame.time_base = (number if times is None else times[number]), 1 / Fraction(fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def sound() -> bytes:
    """A file without video."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()
