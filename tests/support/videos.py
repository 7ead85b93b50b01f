"""Videos for tests: drawn frames, files that ffmpeg makes of them, and libmtmd's chunk of either."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from ctypes import c_int32, c_void_p
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from ernie_llama._engine.vision import Image, VisionEncoder
from ernie_llama._lib import mtmd

Frames = npt.NDArray[np.uint8]  # [frames, height, width, 3]
needs_ffmpeg = pytest.mark.skipif(
    shutil.which("ffmpeg") is None or shutil.which("ffprobe") is None, reason="ffmpeg is not installed"
)


def drawn(count: int, width: int, height: int, seed: int = 0) -> Frames:
    """Noise that changes from frame to frame."""
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def ffmpeg(*arguments: str | Path) -> None:
    """Run it."""
    subprocess.run(["ffmpeg", "-v", "error", "-y", *map(str, arguments)], check=True, timeout=60)


def encoded(path: Path, frames: Frames, rate: str = "2", *options: str) -> bytes:
    """A file of these frames without loss; the container is that of the name's ending."""
    height, width = frames.shape[1:3]
    command = ["ffmpeg", "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
    command += ["-r", rate, "-i", "-", "-c:v", "png", *options, str(path)]
    subprocess.run(command, input=frames.tobytes(), check=True, timeout=60)
    return path.read_bytes()


def _part(eyes: VisionEncoder, bitmap: int, digest: str) -> Image:
    parts = eyes._tokenize(eyes.marker, [bitmap], False, [digest])
    (found,) = (part for part in parts if not isinstance(part, int))
    return found


class lazy:  # noqa: N801 - as closing() and suppress()
    """Frames in memory as libmtmd takes them, one by one; to be kept until it has."""

    def __init__(self, frames: Frames | Sequence[Frames], times: Sequence[float] = ()) -> None:
        lib = mtmd.load()

        def emit(i: int, _user: object, out: ctypes._Pointer[c_void_p], _text: object) -> int:
            if i == len(frames):
                return -1
            height, width = frames[i].shape[:2]
            out[0] = bitmap = lib.mtmd_bitmap_init(width, height, np.ascontiguousarray(frames[i]).tobytes())
            if times:
                lib.mtmd_bitmap_set_time(bitmap, times[i])
            return 0

        self._callback = mtmd.mtmd_bitmap_lazy_callback(emit)

    def bitmap(self, eyes: VisionEncoder) -> int:
        """To be freed."""
        return int(mtmd.load().mtmd_bitmap_init_lazy(eyes.pointer, None, None, self._callback))


def of_frames(eyes: VisionEncoder, frames: Frames | Sequence[Frames], times: Sequence[float] = ()) -> Image:
    """The chunk of frames in memory; without times none is drawn."""
    held = lazy(frames, times)
    bitmap = held.bitmap(eyes)
    try:
        return _part(eyes, bitmap, "0" * 64)
    finally:
        mtmd.load().mtmd_bitmap_free(bitmap)


def of_file(eyes: VisionEncoder, data: bytes, fps: float = -1) -> Image:
    """The chunk of a file in memory.

    Raises:
        ValueError: with libmtmd's reason.
    """
    lib = mtmd.load()
    params = lib.mtmd_helper_init_opt_default()
    params.video_params.fps_target = fps
    found = lib.mtmd_helper_bitmap_init_from_buf(eyes.pointer, data, len(data), False, params)
    if not found.bitmap:
        raise ValueError(lib.mtmd_helper_get_error().decode())
    try:
        return _part(eyes, found.bitmap, "1" * 64)
    finally:
        lib.mtmd_bitmap_free(found.bitmap)
        if found.video_ctx:
            lib.mtmd_helper_video_free(found.video_ctx)


def chosen(eyes: VisionEncoder, count: int, fps: float, target: float = -1) -> list[int]:
    """The numbers of the frames that the model is shown of so many."""
    lib = mtmd.load()
    out = (c_int32 * 1000)()
    n = lib.mtmd_helper_video_frames(eyes.pointer, count, fps, target, out, len(out))
    return out[: max(n, 0)]


def embeddings(eyes: VisionEncoder, chunk: Image, hidden: int) -> npt.NDArray[np.float32]:
    """[tokens, hidden]."""
    return np.ctypeslib.as_array(eyes.encode(chunk), (chunk.tokens, hidden)).copy()
