"""Image files of every kind: the right 8-bit RGB values, or an error that names the file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from syncbn.train.config import ConfigError, DataConfig
from syncbn.train.data.datasets import load_data
from syncbn.train.data.image_file import opened_image, rgb_image

GREY = np.arange(0, 256, 2, dtype=np.uint8).reshape(8, 16)
COLOURS = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
ALPHA = np.where(np.arange(16) < 8, 255, 0).astype(np.uint8) * np.ones((8, 1), np.uint8)


def three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[:, :, None], 3, 2)


def palette() -> Image.Image:
    return Image.fromarray(COLOURS // 64 * 64).quantize(64, dither=Image.Dither.NONE)


# File name, image, what is read; options of saving.
GOOD: dict[str, tuple[str, Image.Image, np.ndarray, dict[str, Any]]] = {
    "rgb": ("a.png", Image.fromarray(COLOURS), COLOURS, {}),
    "grey": ("a.png", Image.fromarray(GREY), three(GREY), {}),
    "bits": ("a.png", Image.fromarray(GREY > 100), three(np.where(GREY > 100, 255, 0)), {}),
    "palette": ("a.png", palette(), np.asarray(palette().convert("RGB")), {}),
    "16-bit png": ("a.png", Image.fromarray(GREY.astype(np.uint16) * 257), three(GREY), {}),
    "16-bit png, rounded": ("a.png", Image.fromarray(GREY.astype(np.uint16) * 257 + 128), three(GREY), {}),
    "16-bit tiff": ("a.tif", Image.fromarray(GREY.astype(np.uint16) * 257), three(GREY), {}),
    "16-bit tiff, big-endian": (
        "a.tif",
        Image.fromarray((GREY.astype(np.uint16) * 257).astype(">u2")),
        three(GREY),
        {},
    ),
    "16-bit pgm": ("a.pgm", Image.fromarray(GREY.astype(np.uint16) * 257), three(GREY), {}),
    "rgba, half transparent": (
        "a.png",
        Image.fromarray(np.dstack((COLOURS, ALPHA))),
        np.where(ALPHA[:, :, None] == 255, COLOURS, 255),
        {},
    ),
    "grey with alpha": (
        "a.png",
        Image.fromarray(np.dstack((GREY, ALPHA))),
        three(np.where(ALPHA == 255, GREY, 255)),
        {},
    ),
    "a transparent colour": (
        "a.png",
        Image.fromarray(GREY),
        three(np.where(GREY == 40, 255, GREY)),
        {"transparency": 40},
    ),
    "cmyk": ("a.tif", Image.fromarray(COLOURS).convert("CMYK"), COLOURS, {}),
    "bmp": ("a.bmp", Image.fromarray(COLOURS), COLOURS, {}),
    "webp": ("a.webp", Image.fromarray(COLOURS), COLOURS, {"lossless": True}),
    "gif of one frame": ("a.gif", Image.fromarray(GREY), three(GREY), {}),
    "ycbcr": ("a.tif", Image.fromarray(COLOURS).convert("YCbCr"), COLOURS, {}),
}
ROUNDED = {"ycbcr": 3}  # the conversion to another colour space and back, of integers


@pytest.mark.parametrize("kind", GOOD)
def test_right_values(tmp_path: Path, kind: str) -> None:
    name, image, expected, options = GOOD[kind]
    image.save(tmp_path / name, **options)
    read = rgb_image(str(tmp_path / name), "data.root")
    assert read.mode == "RGB"
    difference = np.abs(np.asarray(read).astype(int) - expected.astype(int)).max()
    assert difference <= ROUNDED.get(kind, 0)


def test_sixteen_bit_colours_are_divided(tmp_path: Path) -> None:
    """Pillow reads them as 8 bits; this holds it to the upper ones."""
    wide = COLOURS.astype(">u2") * 257
    header = b"P6 16 8 65535\n"
    (tmp_path / "a.ppm").write_bytes(header + wide.tobytes())
    assert np.array_equal(np.asarray(rgb_image(str(tmp_path / "a.ppm"), "data.root")), COLOURS)


def test_fewer_bits_than_sixteen(tmp_path: Path) -> None:
    """12 bits in a TIFF: 4,095 is white."""
    values = (GREY.astype(np.uint16) * 16 + 8).reshape(-1, 2)
    packed = np.stack((values[:, 0] >> 4, (values[:, 0] & 15) << 4 | values[:, 1] >> 8, values[:, 1] & 255), 1)
    data = packed.astype(np.uint8).tobytes()
    tags = [
        (256, 16),
        (257, 8),
        (258, 12),
        (259, 1),
        (262, 1),
        (273, 8 + 2 + 9 * 12 + 4),
        (277, 1),
        (278, 8),
        (279, len(data)),
    ]
    entries = b"".join(
        np.array([tag, 4], "<u2").tobytes() + np.array([1, value], "<u4").tobytes() for tag, value in tags
    )
    header = b"II*\0" + np.array([8], "<u4").tobytes() + np.array([len(tags)], "<u2").tobytes()
    (tmp_path / "a.tif").write_bytes(header + entries + b"\0" * 4 + data)
    expected = np.round((GREY.astype(float) * 16 + 8) * 255 / 4095)
    assert np.array_equal(np.asarray(rgb_image(str(tmp_path / "a.tif"), "data.root")), three(expected.astype(np.uint8)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(tmp_path: Path, orientation: int) -> None:
    upright = Image.fromarray(COLOURS)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # how the camera stored it: Image.Transpose, by orientation
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    for read in (rgb_image, opened_image):
        assert np.array_equal(np.asarray(read(str(tmp_path / "a.png"), "data.root")), COLOURS)


def frames(path: Path) -> None:
    first, *rest = [Image.fromarray(GREY + i) for i in range(3)]
    first.save(path, save_all=True, append_images=rest)


BAD: dict[str, tuple[str, Any, str]] = {
    "float": ("a.tif", lambda path: Image.fromarray(GREY.astype(np.float32) / 255).save(path), "mode F has no known"),
    "32 bits": ("a.tif", lambda path: Image.fromarray(GREY.astype(np.int32)).save(path), "mode I has no known range"),
    "gif": ("a.gif", frames, "3 frames: save one of them"),
    "stack": ("a.tif", frames, "3 frames: save one of them"),
    "animated png": ("a.png", frames, "3 frames: save one of them"),
    "white is zero": (
        "a.tif",
        lambda path: Image.fromarray(GREY.astype(np.uint16)).save(path, tiffinfo={262: 0}),
        "its zero is white",
    ),
    "pipe": ("a.png", os.mkfifo, "no regular file"),
    "folder": ("a.png", os.mkdir, "no regular file"),
    "text": ("a.png", lambda path: path.write_text("no image"), "cannot identify image file"),
    "cut off": ("a.png", lambda path: (Image.fromarray(COLOURS).save(path), os.truncate(path, 60)), ""),
    "empty": ("a.png", lambda path: path.touch(), "cannot identify image file"),
    "missing": ("a.png", lambda path: None, "No such file"),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", BAD)
def test_refused_by_name(tmp_path: Path, kind: str) -> None:
    name, make, words = BAD[kind]
    make(tmp_path / name)
    with pytest.raises(ConfigError, match="an image that can be read") as error:
        rgb_image(str(tmp_path / name), "data.root")
    assert str(error.value).startswith(f"data.root: got '{tmp_path / name}'")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_any_error_of_pillow_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*arguments: Any) -> Any:
        raise TypeError("Missing dimensions")  # of a TIFF whose directory is damaged

    Image.fromarray(GREY).save(tmp_path / "a.tif")
    monkeypatch.setattr(Image, "open", damaged)
    with pytest.raises(ConfigError, match=r"a.tif', expected an image that can be read \(Missing dimensions\)"):
        rgb_image(str(tmp_path / "a.tif"), "data.root")


def image_folder(root: Path, factor: int) -> DataConfig:
    for part in ("train", "test"):
        for label in ("a", "b"):
            folder = root / part / label
            folder.mkdir(parents=True)
            for number in range(2):
                pixels = np.roll(GREY, 3 * number + (label == "b"), 1)[:, :8].astype([np.uint8, np.uint16][factor > 1])
                Image.fromarray(pixels * factor).save(folder / f"{number}.png")
    return DataConfig(name="imagefolder", root=str(root), image_size=8)


def test_the_same_pictures_in_8_and_16_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    keys = [(0, i) for i in range(4)]
    narrow, wide = (load_data(image_folder(tmp_path / str(factor), factor), seed=0) for factor in (1, 257))
    assert np.array_equal(narrow.train.__getitems__(keys)[0], wide.train.__getitems__(keys)[0])


def test_a_link_to_a_folder_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would count every image many times, under a wrong label."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = image_folder(tmp_path / "images", 1)
    (tmp_path / "images/train/b/loop").symlink_to(tmp_path / "images/train", target_is_directory=True)
    with pytest.raises(
        ConfigError, match=r"data.root: got '.*/train/b/loop/.*', expected a folder of its own; it is a"
    ):
        load_data(config, seed=0)
    (tmp_path / "images/train/b/loop").unlink()
    (tmp_path / "images/train/c").symlink_to(tmp_path / "images/train/a", target_is_directory=True)
    with pytest.raises(ConfigError, match=r"train/c', expected a folder of its own; it is a link to .*train/a"):
        load_data(config, seed=0)
