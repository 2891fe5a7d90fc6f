from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional

from diffalign.data import CorruptImageError, ImageSource
from diffalign.data.images import file_inside, pixels, to_unit_range


@pytest.mark.parametrize("size", [(40, 32), (32, 40), (32, 32), (97, 61), (33, 200), (20, 15)])
def test_pixels_equal_torchvision_resize_and_center_crop(helpers: Any, size: tuple[int, int]) -> None:
    image = helpers.picture(0, size)
    resized = functional.resize(image, 32, functional.InterpolationMode.BILINEAR)
    expected = functional.pil_to_tensor(functional.center_crop(resized, [32, 32]))
    torch.testing.assert_close(pixels(image, (32, 32)), expected, rtol=0, atol=0)


def test_unit_range_is_exact_at_both_ends() -> None:
    assert to_unit_range(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK", "P", "1"])
def test_every_8_bit_mode_becomes_rgb(helpers: Any, mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    source = ImageSource(helpers.encoded(helpers.picture(1).convert(mode), kind))
    assert source.decode().mode == "RGB"


def test_palette_with_transparency_warns_nothing(helpers: Any) -> None:
    image = helpers.picture(1).convert("P")
    image.info["transparency"] = bytes(range(256))
    assert ImageSource(image).decode().mode == "RGB"


def test_sixteen_bit_images_are_not_clipped_to_white() -> None:
    deep = Image.fromarray(np.full((8, 8), 30000, dtype=np.uint16))
    with pytest.raises(CorruptImageError, match="expected 8 bits"):
        ImageSource(deep).decode()


def test_exif_rotation_is_not_applied(helpers: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    buffer = io.BytesIO()
    helpers.picture(1, (40, 20)).save(buffer, "JPEG", exif=exif)
    assert ImageSource(buffer.getvalue()).decode().size == (40, 20)


@pytest.mark.parametrize("broken", [None, b"", b"no image", "cut JPEG", "cut PNG", "damaged PNG", Path("nowhere.png")])
def test_broken_images_are_corrupt(helpers: Any, broken: Any, tmp_path: Path) -> None:
    if isinstance(broken, str):
        whole = helpers.encoded(helpers.picture(1), broken.split()[1])
        middle = len(whole) // 2
        broken = whole[:middle] if broken.startswith("cut") else whole[:60] + b"\0\0\0\0" + whole[64:]
    elif isinstance(broken, Path):
        broken = tmp_path / broken
    with pytest.raises(CorruptImageError):
        ImageSource(broken).decode()


def test_cells_of_every_kind_give_the_same_image(helpers: Any, tmp_path: Path) -> None:
    data = helpers.encoded(helpers.picture(3))
    (tmp_path / "a.png").write_bytes(data)
    sources = [
        ImageSource.of(data),
        ImageSource.of(memoryview(data)),
        ImageSource.of({"bytes": data, "path": "elsewhere.png"}),
        ImageSource.of({"bytes": None, "path": str(tmp_path / "a.png")}),
        ImageSource.of({"bytes": None, "path": f"file://{tmp_path}/a.png"}),
        ImageSource.of("a.png", base=tmp_path),
        ImageSource.of(helpers.picture(3)),
    ]
    assert {source.decode().tobytes() for source in sources} == {helpers.picture(3).tobytes()}
    assert len({source.digest() for source in sources[:-1]}) == 1
    assert ImageSource.of(helpers.encoded(helpers.picture(4))).digest() != sources[0].digest()


@pytest.mark.parametrize("cell", [3, [1, 2], 0.5])
def test_cells_of_another_type_are_refused(cell: object) -> None:
    with pytest.raises(ValueError, match="expected encoded images"):
        ImageSource.of(cell)


def test_text_is_a_file_name_only_where_a_folder_is_given() -> None:
    with pytest.raises(ValueError, match="set train_data_dir"):
        ImageSource.of("/etc/hostname")


@pytest.mark.parametrize("name", ["../outside.png", "a/../../outside.png", "/etc/hostname", "link/outside.png"])
def test_paths_out_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="outside of"):
        file_inside(folder, name)


def test_paths_may_turn_inside_the_folder(tmp_path: Path) -> None:
    assert file_inside(tmp_path, "a/../b.png") == tmp_path.resolve() / "b.png"
