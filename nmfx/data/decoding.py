"""One picture file, decoded as it is meant or refused: never by a program, never endlessly, never with other values."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from nmfx.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # decoded in this process; PIL's EPS would start ghostscript
BYTES = ("L", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "1", "LA", "P", "PA", "RGBa")  # modes of eight bits or less
TIFF_BITS, TIFF_PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0


def open_file(path: str | Path) -> IO[bytes]:
    """A regular file to read from, or one behind links; opening a named pipe or a device would wait or worse.

    Raises:
        DataError: it is none.
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size:
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise DataError("an empty file" if stat.S_ISREG(status.st_mode) else f"{kind_of(status.st_mode)}, not a file")


def kind_of(mode: int) -> str:
    """What an entry of a folder is, by its ``st_mode``."""
    kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder", stat.S_IFREG: "a file"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def decode(file: Any, mode: str) -> Image.Image:
    """The picture in a file, its first frame, in PIL's `mode` (``RGB`` or ``L``).

    As in torchvision's ImageFolder and timm, the orientation that EXIF data ask for is not applied, colour profiles are not
    followed, and transparency is left out. Grey of 16 bits is scaled (PIL would cut it off at 255).

    Raises:
        DataError: another format, or pixels of a range that nothing says.
        Exception: PIL's; damaged files raise almost anything.
    """
    try:
        with Image.open(file, formats=FORMATS) as picture:
            return to_mode(picture, mode)
    except UnidentifiedImageError:
        raise DataError(f"not one of {', '.join(FORMATS)}") from None


def to_mode(picture: Image.Image, mode: str) -> Image.Image:
    """A PIL picture in `mode`.

    Raises:
        DataError: nothing says which of its values is white: floats, 32-bit integers, TIFF's 12 bits.
    """
    if picture.mode.startswith("I;16") and getattr(picture, "tag_v2", {}).get(TIFF_BITS, (16,)) == (16,):
        picture = _sixteen_bits(picture)
    elif picture.mode not in BYTES:
        kind = {"I": "32-bit integers", "F": "floating-point numbers"}.get(picture.mode, f"of mode {picture.mode}")
        raise DataError(f"its pixels are {kind}, and nothing says which is white; save it with 8 or 16 bits a channel")
    if picture.mode in ("P", "PA"):  # PIL warns of a palette with transparency unless this step is taken
        picture = picture.convert("RGBA")
    if picture.mode == "LAB":  # it has no way from there to grey
        picture = picture.convert("RGB")
    return picture.convert(mode)


def _sixteen_bits(picture: Image.Image) -> Image.Image:
    values = np.asarray(picture).astype(np.uint32)  # height width, 0 to 65535
    if getattr(picture, "tag_v2", {}).get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO:
        values = 65535 - values
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
