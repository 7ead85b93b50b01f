"""PNG files of noise, without a library for pictures."""

import struct
import zlib

import numpy as np
import numpy.typing as npt


def encode(pixels: npt.NDArray[np.uint8]) -> bytes:
    """[height, width, 3] -> a PNG."""
    height, width, _ = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes())) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def noise(width: int, height: int, seed: int) -> bytes:
    """Smooth noise, so that resizing keeps most of it."""
    coarse = np.random.default_rng(seed).uniform(0, 255, (height // 14 + 2, width // 14 + 2, 3))
    y, x = np.arange(height)[:, None] / 14, np.arange(width)[None] / 14
    top, left = y.astype(int), x.astype(int)
    dy, dx = (y - top)[..., None], (x - left)[..., None]
    upper = coarse[top, left] * (1 - dx) + coarse[top, left + 1] * dx
    lower = coarse[top + 1, left] * (1 - dx) + coarse[top + 1, left + 1] * dx
    return encode((upper * (1 - dy) + lower * dy).astype(np.uint8))
