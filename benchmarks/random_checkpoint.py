"""Checkpoints of true shapes, filled with random values: plausible codes and scales, finite weights."""

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from common import progress
from released import Entry, Frame, header, write_frame

NOISE = 1 << 25  # random bytes that all large tensors are cut from

U8 = npt.NDArray[np.uint8]


def make_checkpoint(folder: Path, frame: Frame) -> Path:
    """Write a checkpoint and flush it to the disk; returns its folder."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, NOISE, dtype=np.uint8)
    # random sign, mantissa and lowest exponent bit: magnitudes from 2^-7 to 2^-5, always finite
    bf16 = (noise.view(np.uint16) & np.uint16(0x80FF) | np.uint16(0x3C00)).view(np.uint8)
    for path, entries in progress(write_frame(folder, frame), "making the checkpoint"):
        with path.open("wb") as file:
            file.write(header(entries))
            for entry in entries:
                small = _small_values(entry, rng)
                if small is not None:
                    file.write(small.tobytes())
                else:
                    _cut(file, entry.nbytes, bf16 if entry.dtype == "BF16" else noise, rng)
    os.sync()
    return folder


def _small_values(entry: Entry, rng: np.random.Generator) -> npt.NDArray[np.generic] | None:
    """The values of a vector or of a float32 matrix; None for codes and other matrices."""
    n = entry.shape[-1]
    if entry.name.endswith("code_scale"):
        return rng.uniform(100, 128, n).astype(np.float32)
    if entry.name.endswith("code_zp"):
        return rng.uniform(0, 2000, n).astype(np.float32)
    if entry.dtype == "F32":
        return rng.uniform(-0.02, 0.02, entry.shape).astype(np.float32)
    if entry.dtype == "BF16" and len(entry.shape) == 1:
        values = rng.uniform(0.5, 1.5, n).astype(np.float32) * np.float32(1.0 if "norm" in entry.name else 1e-4)
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return None


def _cut(file: BinaryIO, nbytes: int, noise: U8, rng: np.random.Generator) -> None:
    """Write bytes that begin at a random place of the noise, again and again."""
    while nbytes:
        begin = int(rng.integers(NOISE // 4)) & ~1
        piece = noise[begin : begin + nbytes]
        file.write(piece.data)
        nbytes -= len(piece)
