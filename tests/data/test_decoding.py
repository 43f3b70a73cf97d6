"""Laws of a picture file: it is decoded to the values that it holds, or one DataError names it; nothing hangs, or is run."""

from __future__ import annotations

import io
import os
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nmfx.data.decoding import BYTES, decode, to_mode
from nmfx.data.listing import FolderSource
from nmfx.data.pictures import FilePictures
from nmfx.errors import DataError

many = settings(max_examples=60, deadline=None, derandomize=True)


def png(values: np.ndarray, color: int, depth: int) -> bytes:
    """A PNG of ``(height, width, channels)``, written by hand: PIL writes few of them with 16 bits."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + row.astype(">u2" if depth == 16 else "u1").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def pixels(content: bytes, mode: str = "RGB") -> np.ndarray:
    return np.asarray(decode(io.BytesIO(content), mode)).astype(int)


def saved(picture: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


@many
@given(st.sampled_from([(0, 1), (2, 3), (4, 2), (6, 4)]), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32))
def test_sixteen_bits_are_scaled(kind: tuple[int, int], height: int, width: int, seed: int) -> None:
    color, channels = kind
    values = np.random.default_rng(seed).integers(0, 65536, (height, width, channels))
    colors = values[..., :3] if channels > 2 else values[..., :1].repeat(3, -1)
    assert np.abs(pixels(png(values, color, 16)) - colors / 257).max() <= 1  # PIL keeps the high byte of colour
    grey = pixels(png(values, color, 16), "L")
    expected = colors / 257 @ (0.299, 0.587, 0.114)
    assert np.abs(grey - expected).max() <= 2


@pytest.mark.parametrize("value", [0, 1, 128, 129, 257, 30_000, 65_406, 65_407, 65_535])
def test_sixteen_bits_of_grey_round_to_the_nearest(value: int) -> None:
    assert pixels(png(np.full((1, 1, 1), value), 0, 16), "L") == round(value / 257)


@many
@given(st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "PA", "RGBX"]), st.integers(0, 2**32))
def test_eight_bits_are_as_pil_converts_them(mode: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    colors = Image.fromarray(generator.integers(0, 256, (*generator.integers(1, 12, 2), 3), dtype=np.uint8))
    picture = colors.convert("P").convert("PA") if mode == "PA" else colors.convert(mode)
    assert np.array_equal(np.asarray(to_mode(picture, "RGB")), np.asarray(picture.convert("RGB")))
    assert to_mode(picture, "L").mode == "L"


def test_palettes_with_transparency_keep_their_colours() -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.putpixel((1, 0), 1)
    for transparency in (b"\x00\x80", 1):
        for form in ("PNG", "GIF") if transparency == 1 else ("PNG",):
            assert pixels(saved(picture, form, transparency=transparency)).tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_the_first_frame_is_the_picture() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "green", "blue")]
    for form in ("GIF", "PNG", "WEBP"):
        content = saved(frames[0], form, save_all=True, append_images=frames[1:])
        assert np.abs(pixels(content) - (255, 0, 0)).max() <= 8


def test_exif_orientation_is_left_alone_as_in_torchvision() -> None:
    picture = Image.new("RGB", (6, 3))
    exif = picture.getexif()
    exif[0x0112] = 6
    assert pixels(saved(picture, "JPEG", exif=exif)).shape == (3, 6, 3)


def test_tiff_counts_from_white_or_black() -> None:
    values = np.array([[0, 30_000, 65_535]], dtype=np.uint16)
    for photometric, expected in ((1, [[0, 117, 255]]), (0, [[255, 138, 0]])):
        content = saved(Image.fromarray(values), "TIFF", tiffinfo={262: photometric})
        assert pixels(content, "L").tolist() == expected


@pytest.mark.parametrize("mode", ["I", "F", "I;12"])
def test_values_without_a_range_are_refused(mode: str) -> None:
    picture = Image.new("I;16" if mode == "I;12" else mode, (4, 4))
    content = bytearray(saved(picture, "TIFF"))
    if mode == "I;12":
        place = content.index(struct.pack("<HHII", 258, 3, 1, 16))
        content[place + 8] = 12
    with pytest.raises(DataError, match="nothing says which is white"):
        pixels(bytes(content))
    assert mode not in BYTES


def test_no_program_is_started() -> None:
    with pytest.raises(DataError, match="not one of JPEG, PNG"):
        pixels(saved(Image.new("RGB", (4, 4)), "EPS"))


# --- files that are no picture


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path is short
        try:
            one.bind(path.name)
        finally:
            os.chdir(here)


def a_bomb(path: Path) -> None:
    content = png(np.zeros((1, 1, 1)), 0, 8)
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    content = content[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + content[33:]
    path.write_bytes(content)


def a_truncated_jpeg(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path.write_bytes(saved(Image.fromarray(noise), "JPEG")[:1500])


FOREIGN = {
    "a pipe": (a_pipe, "a named pipe, not a file"),
    "a socket": (a_socket, "No such device|not a file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "a device, not a file"),
    "a folder": (Path.mkdir, "Is a directory|a folder, not a file"),
    "a broken link": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "a loop": (lambda path: path.symlink_to(path.name), "symbolic links"),
    "nothing": (Path.touch, "an empty file"),
    "a text": (lambda path: path.write_text("hello"), "not one of JPEG, PNG"),
    "a bomb": (a_bomb, "exceeds limit"),
    "a truncated JPEG": (a_truncated_jpeg, "truncated"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_picture_is_named(kind: str, tmp_path: Path) -> None:
    make, says = FOREIGN[kind]
    make(tmp_path / "x.jpg")
    pictures = FilePictures(FolderSource(tmp_path, ("a",), ((str(tmp_path / "x.jpg"), 0),)))
    with pytest.raises(DataError, match=rf"x\.jpg: the picture cannot be read: .*({says})"):
        pictures.read(0, "RGB")


@pytest.mark.filterwarnings("ignore")  # PIL's, of odd sizes and data
@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"]), st.data())
def test_damaged_pictures_give_pixels_or_one_error(form: str, data: st.DataObject) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    content = bytearray(saved(Image.fromarray(noise), form))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=6)):
        content[place] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(1, len(content)))]
    pictures = FilePictures([(io.BytesIO(content), 0)])
    said = ""
    try:
        picture, label = pictures.read(0, "RGB")
    except DataError as error:
        said = str(error)
    assert said.startswith("picture 0: the picture cannot be read: ") if said else (picture.mode, label) == ("RGB", 0)
