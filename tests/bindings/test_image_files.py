"""Image files become the pixels that transformers' image loader makes of them, or an error."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from ernie_llama._engine.image_file import decoded
from PIL import Image, features
from support import png

Pixels = npt.NDArray[np.uint8]

RGB = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
RGBA = np.concatenate([RGB, RGB[..., :1]], axis=2)
SMOOTH = np.linspace(0, 255, 24 * 16 * 3).astype(np.uint8).reshape(24, 16, 3)


def saved(image: Image.Image, form: str, **options: Any) -> bytes:  # noqa: ANN401
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def oriented(orientation: int, form: str = "PNG", pixels: Pixels = RGB) -> bytes:
    """A file that says how to turn it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(Image.fromarray(pixels), form, exif=exif)


def deep(pixels: npt.NDArray[np.uint16], colour: int) -> bytes:
    """A PNG of 16 bits; 0 is grey, 2 RGB."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def transparent_palette() -> bytes:
    image = Image.fromarray(RGB).quantize(8)
    return saved(image, "PNG", transparency=3)


def frames() -> list[Image.Image]:
    return [Image.fromarray(np.roll(SMOOTH, i, axis=0)) for i in range(3)]


FILES: dict[str, bytes] = {
    "png": png.encode(RGB),
    "png rgba": saved(Image.fromarray(RGBA), "PNG"),
    "png grey": saved(Image.fromarray(RGB).convert("L"), "PNG"),
    "png grey and alpha": saved(Image.fromarray(RGBA).convert("LA"), "PNG"),
    "png one bit": saved(Image.fromarray(RGB).convert("1"), "PNG"),
    "png palette": saved(Image.fromarray(RGB).quantize(16), "PNG"),
    "png transparent palette": transparent_palette(),
    "png 16 bits grey": deep(RGB[..., 0].astype(np.uint16) * 257, 0),
    "png 16 bits rgb": deep(RGB.astype(np.uint16) * 257 + 3, 2),
    "jpeg": saved(Image.fromarray(SMOOTH), "JPEG", quality=90),
    "jpeg progressive": saved(Image.fromarray(SMOOTH), "JPEG", progressive=True),
    "jpeg grey": saved(Image.fromarray(SMOOTH).convert("L"), "JPEG"),
    "jpeg cmyk": saved(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG"),
    "gif": saved(Image.fromarray(RGB), "GIF"),
    "gif animated": saved(frames()[0], "GIF", save_all=True, append_images=frames()[1:]),
    "bmp": saved(Image.fromarray(RGB), "BMP"),
    "bmp palette": saved(Image.fromarray(RGB).quantize(16), "BMP"),
    "tiff": saved(Image.fromarray(RGB), "TIFF"),
    "tiff cmyk": saved(Image.fromarray(RGB).convert("CMYK"), "TIFF"),
    "ppm": saved(Image.fromarray(RGB), "PPM"),
    **{f"jpeg orientation {i}": oriented(i, "JPEG", SMOOTH) for i in range(1, 9)},
    **{f"png orientation {i}": oriented(i) for i in range(9)},
}
if features.check("webp"):
    FILES |= {
        "webp": saved(Image.fromarray(RGB), "WEBP", lossless=True),
        "webp rgba": saved(Image.fromarray(RGBA), "WEBP", lossless=True),
        "webp animated": saved(frames()[0], "WEBP", save_all=True, append_images=frames()[1:]),
        "webp orientation": oriented(6, "WEBP"),
    }
if features.check("avif"):
    FILES["avif"] = saved(Image.fromarray(SMOOTH), "AVIF")

# What an EXIF orientation says is to be done with the stored pixels.
UPRIGHT = {
    1: RGB,
    2: RGB[:, ::-1],
    3: RGB[::-1, ::-1],
    4: RGB[::-1],
    5: RGB.transpose(1, 0, 2),
    6: RGB.transpose(1, 0, 2)[:, ::-1],
    7: RGB.transpose(1, 0, 2)[::-1, ::-1],
    8: RGB.transpose(1, 0, 2)[::-1],
}


def pixels_of(data: bytes) -> Pixels:
    width, height, pixels = decoded(data)
    return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_images_are_upright(orientation: int) -> None:
    np.testing.assert_array_equal(pixels_of(oriented(orientation)), UPRIGHT[orientation])


def test_transparency_is_dropped() -> None:
    np.testing.assert_array_equal(pixels_of(FILES["png rgba"]), RGB)


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_of_transformers(name: str) -> None:
    image_utils = pytest.importorskip("transformers.image_utils", reason="needs transformers")
    with Image.open(io.BytesIO(FILES[name])) as image:
        np.testing.assert_array_equal(pixels_of(FILES[name]), np.asarray(image_utils.load_image(image)))


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("ppm")])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_a_truncated_file_is_refused(name: str, part: float) -> None:
    """Where Pillow can tell: a format may end with what no pixel needs."""
    data = FILES[name]
    cut = data[: int(len(data) * part)]
    try:
        found = pixels_of(cut)
    except ValueError as error:
        assert str(error).startswith(("is damaged, or too large: ", "is not a JPEG"))
    else:
        np.testing.assert_array_equal(found, pixels_of(data))


@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_a_truncated_jpeg_is_refused(part: float) -> None:
    data = saved(Image.fromarray(np.tile(SMOOTH, (8, 8, 1))), "JPEG")
    with pytest.raises(ValueError, match="is damaged, or too large: image file is truncated"):
        decoded(data[: int(len(data) * part)])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a JPEG, PNG, GIF, WebP, BMP or TIFF file"),
        (b"RIFF\0\0\0\0WAVE", "is not a JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a JPEG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not a JPEG"),
        (png.encode(RGB)[:16] + struct.pack(">II", 60_000, 60_000) + png.encode(RGB)[24:], "^is not|^is damaged"),
    ],
)
def test_what_is_no_image_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoded(data)
