"""Video files: which frames are read of a clip, damaged clips, and files of videos that a model drew."""

from __future__ import annotations

import io
import struct
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from diffalign import videos
from diffalign.videos import VideoError, read_frames, to_mp4
from tests.clips import clip, counting, numbers, sound


def read(content: bytes, num_frames: int, fps: float) -> list[Image.Image]:
    return list(read_frames(io.BytesIO(content), num_frames, fps))


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (24, [0, 1, 2, 3, 4, 5, 6, 7]),
        (8, [0, 3, 6, 9, 12, 15]),
        (16, [0, 1, 3, 4, 6, 7, 9]),  # every second time lies between two frames; the earlier is taken
        (48, [0, 0, 1, 1, 2, 2]),
        (10, [0, 2, 5, 7, 10, 12, 14]),
        (30, [0, 1, 2, 2, 3, 4, 5]),
    ],
)
def test_frames_are_the_nearest_in_time(fps: int, expected: list[int]) -> None:
    content = clip(counting(18), fps=24)
    assert numbers(read(content, len(expected), fps)) == expected


@pytest.mark.parametrize(
    ("kind", "codec"),
    [
        ("mp4", "libx264"),
        ("mov", "libx264"),
        ("matroska", "libx264"),
        ("webm", "libvpx"),
        ("mpegts", "libx264"),  # its times do not begin at 0
        ("avi", "mpeg4"),
    ],
)
def test_containers_and_codecs(kind: str, codec: str) -> None:
    content = clip(counting(12), fps=8, kind=kind, codec=codec)
    assert numbers(read(content, 6, 4)) == [0, 2, 4, 6, 8, 10]


def test_an_animated_picture_is_a_clip() -> None:
    buffer = io.BytesIO()
    first, *others = counting(6)
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=250)
    assert numbers(read(buffer.getvalue(), 3, 2)) == [0, 2, 4]


def test_a_bare_stream_has_the_rate_that_its_header_or_ffmpeg_says() -> None:
    content = clip(counting(10), fps=25, kind="h264")
    assert numbers(read(content, 5, 12.5)) == [0, 2, 4, 6, 8]


def test_variable_frame_rate() -> None:
    """Times in tenths of a second, and gaps between them."""
    content = clip(counting(7), fps=10, times=[0, 1, 2, 10, 11, 12, 20])
    assert numbers(read(content, 5, 2)) == [0, 2, 3, 5, 6]  # at 0, 0.5, 1, 1.5 and 2 s


def test_broadcast_rates_do_not_drift() -> None:
    content = clip(counting(20), fps=Fraction(24000, 1001))
    assert numbers(read(content, 20, 23.976)) == list(range(20))


def test_size_and_colour() -> None:
    content = clip([Image.new("RGB", (48, 32), (200, 60, 120))] * 3)
    frame = read(content, 1, 8)[0]
    assert frame.size == (48, 32)
    assert np.abs(np.asarray(frame).astype(int) - (200, 60, 120)).max() <= 3


def rotated(content: bytes) -> bytes:
    """The file with the display matrix of a camera that was held upright: a quarter turn clockwise."""
    start = content.index(b"tkhd") + 4 + 40
    turn = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    return content[:start] + turn + content[start + len(turn) :]


def test_rotation_in_the_metadata_is_applied() -> None:
    picture = Image.new("RGB", (48, 32))
    picture.paste((255, 255, 255), (0, 0, 24, 16))  # upper left
    frame = read(rotated(clip([picture] * 3)), 1, 8)[0]
    assert frame.size == (32, 48)
    bright = np.asarray(frame)[..., 0] > 128
    assert bright[:24, 16:].mean() > 0.9  # now upper right
    assert bright.mean() == pytest.approx(0.25, abs=0.05)


def test_a_clip_may_end_with_the_last_time_but_not_before() -> None:
    content = clip(counting(16), fps=8)  # two seconds
    assert numbers(read(content, 16, 8))[-1] == 15
    assert numbers(read(content, 9, 4))[-1] == 15  # at 2 s
    with pytest.raises(VideoError, match=r"2.00 s of video, too short for 10 frames at 4 per second \(2.25 s\)"):
        read(content, 10, 4)


def test_rounded_times_of_matroska_are_forgiven() -> None:
    content = clip(counting(19), fps=24, kind="matroska")  # times in whole milliseconds
    assert len(read(content, 20, 24)) == 20
    with pytest.raises(VideoError, match="too short"):
        read(content, 21, 24)


def noise(count: int) -> list[Image.Image]:
    values = np.random.default_rng(0).integers(0, 256, (count, 8, 12, 3), dtype=np.uint8)
    return [Image.fromarray(value).resize((96, 64)) for value in values]


def test_damaged_files() -> None:
    whole = clip(noise(24), fps=24)
    middle, early = len(whole) // 2, len(whole) * 2 // 5
    garbage = bytes(np.random.default_rng(1).integers(0, 256, 200, dtype=np.uint8))
    assert len(read(whole, 24, 24)) == 24
    for content, reason in (
        (b"", "no readable video"),
        (b"no video at all" * 20, "no readable video"),
        (whole[:middle], "no readable video"),
        (whole[:middle] + garbage + whole[middle + 200 :], "no readable video|is damaged"),
        (whole[:early] + bytes(8) + whole[early + 8 :], "is damaged"),  # which the decoder patches over
        (sound(), "a file without video"),
    ):
        with pytest.raises(VideoError, match=reason) as caught:
            read(content, 24, 24)
        assert "\n" not in str(caught.value)


def test_a_clip_cannot_make_us_open_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.mp4").write_bytes(clip(counting(4)))
    for name in ("other.mp4", tmp_path / "other.mp4"):
        with pytest.raises(VideoError, match="no readable video"):
            read(f"ffconcat version 1.0\nfile {name}\n".encode(), 2, 8)


def test_frames_behind_the_last_wanted_one_are_not_decoded() -> None:
    whole = bytearray(clip(noise(60), fps=24, codec="mpeg4"))
    end = whole.rindex(b"moov")
    whole[end - 4000 : end - 4] = bytes(3996)
    assert len(read(bytes(whole), 3, 24)) == 3
    with pytest.raises(VideoError):
        read(bytes(whole), 60, 24)


def test_without_pyav_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    for call in (lambda: read(b"", 1, 8), lambda: to_mp4(torch.zeros(1, 3, 16, 16), 8)):
        with pytest.raises(ValueError, match=r"PyAV: pip install 'diffalign\[video\]'"):
            call()


VIDEO = torch.nn.functional.interpolate(torch.rand(10, 3, 2, 3, generator=torch.Generator().manual_seed(0)), (64, 96))


@pytest.mark.parametrize("first", [0, 1])
def test_a_written_video_reads_back(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos, "ENCODERS", (("no such encoder", {}), *videos.ENCODERS[first:]))
    content = to_mp4(VIDEO, 12)
    assert content == to_mp4(VIDEO, 12)
    with av.open(io.BytesIO(content)) as container:
        stream = container.streams.video[0]
        assert (stream.average_rate, stream.frames) == (12, 10)
        assert stream.codec_context.name == ("h264", "mpeg4")[first]
        assert stream.codec_context.colorspace == videos.BT709
    back = torch.stack([pil_to_tensor(frame) for frame in read(content, 10, 12)]) / 255
    error = (back - VIDEO).abs()
    inside = error.reshape(10, 3, 2, 32, 3, 32)[:, :, :, 4:-4, :, 4:-4]  # away from edges, where colour is coarser
    assert float(inside.max()) < 0.05


def test_an_av_without_encoders_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos, "ENCODERS", (("none", {}), ("neither", {})))
    with pytest.raises(ValueError, match="it has no encoder none or neither"):
        to_mp4(VIDEO, 12)
