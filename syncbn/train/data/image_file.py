"""An image file of the user's: it becomes RGB of 8 bits with the right range, or is refused by name."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from syncbn.train.config import ConfigError

_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of TIFF
_WHITE_IS_ZERO = 0
_SIXTEEN_BITS = ("PNG", "PPM")  # formats whose mode I, of 32 bits, has values up to 65,535


def opened_image(path: str, key: str) -> Any:
    """A file's PIL image, decoded, turned upright as its EXIF orientation says.

    Raises:
        ConfigError: the file cannot be read, or has more than one frame; the error has the configuration's ``key`` and
            names the file.
    """
    from PIL import ImageOps

    with _decoded(path, key) as file:
        return ImageOps.exif_transpose(file)


def rgb_image(path: str, key: str) -> Any:
    """The same as an RGB image of 8 bits.

    16-bit grey is divided by 257. Transparency shows white. Palettes, CMYK and what else Pillow converts to RGB are
    converted. Float and 32-bit values are refused, as nothing says what is white.
    """
    from PIL import Image, ImageOps

    with _decoded(path, key) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I;16") or (image.mode == "I" and file.format in _SIXTEEN_BITS):
            return _eight_bits(file, image).convert("RGB")
        if image.mode in ("I", "F"):
            raise ValueError(f"mode {image.mode} has no known range: save it with 8 or 16 bits")
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            white.alpha_composite(image.convert("RGBA"))
            image = white
        return image.convert("RGB")


@contextmanager
def _decoded(path: str, key: str) -> Iterator[Any]:
    from PIL import Image

    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("no regular file")  # to open a pipe would wait for its writer
        with Image.open(path) as opened:
            file: Any = opened  # its class depends on the format
            # MPO is a photograph with its previews.
            if getattr(file, "is_animated", False) and file.format != "MPO":
                raise ValueError(f"{file.n_frames} frames: save one of them, or each as a file")
            file.load()
            yield file
    except Exception as error:  # Pillow's errors for a damaged file depend on the format
        raise ConfigError(key, Path(path), f"an image that can be read ({error})") from error


def _eight_bits(file: Any, image: Any) -> Any:
    """A grey image of more than 8 bits as one of 8."""
    import numpy as np
    from PIL import Image

    bits = 16
    if file.format == "TIFF":
        bits = file.tag_v2.get(_BITS_PER_SAMPLE, (bits,))[0]
        if file.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            raise ValueError("its zero is white, which Pillow ignores at 16 bits: save it with black as zero")
    values = np.asarray(image).astype(np.float32) * (255 / (2**bits - 1))
    return Image.fromarray(values.round().astype(np.uint8))
