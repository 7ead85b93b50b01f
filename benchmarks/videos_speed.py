"""How long a video takes: ERNIE-4.5-VL-28B's tower and resampler with fewer blocks, beside Qwen2-VL's tower.

For each number of frames: milliseconds of all pairs through the tower and resampler, beside Qwen2-VL's tower of the
same widths and patches, whose two convolutions make one frame of a pair, so that its blocks run half as often; MB that
the prepared frames take until they are encoded, and MB that either takes to work. Weights are random.

    python benchmarks/videos_speed.py --frames 16 64
    python benchmarks/videos_speed.py --device cuda --blocks 32 --rounds 10
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from common import add_folder, add_rounds, add_threads, benchmark_parser, machine, nvidia_smi, positive, report
from ernie_llama import Llama
from ernie_llama._engine.vision import Image, VisionEncoder
from ernie_llama._lib import mtmd
from pictures_speed import make_files, memory, milliseconds, table, work_memory


def pixels(side: int) -> bytes:
    """A square frame of noise."""
    return np.random.default_rng(2).integers(0, 256, (side, side, 3), dtype=np.uint8).tobytes()


def prepared(eyes: VisionEncoder, bitmaps: list[int]) -> Image:
    """The chunk of a video, or of the frames of a pair."""
    try:
        parts = eyes._tokenize(eyes.marker * len(bitmaps), bitmaps, False, ["0" * 64])
    finally:
        for bitmap in bitmaps:
            mtmd.load().mtmd_bitmap_free(bitmap)
    (chunk,) = (part for part in parts if not isinstance(part, int))
    return chunk


def video(eyes: VisionEncoder, frames: int, side: int) -> Image:
    """So many frames as ERNIE takes them."""
    library, data = mtmd.load(), pixels(side)

    def emit(i: int, _user: object, out: ctypes._Pointer[ctypes.c_void_p], _text: object) -> int:
        if i == frames:
            return -1
        out[0] = library.mtmd_bitmap_init(side, side, data)
        return 0

    callback = mtmd.mtmd_bitmap_lazy_callback(emit)
    return prepared(eyes, [library.mtmd_bitmap_init_lazy(eyes.pointer, None, None, callback)])


def pair(eyes: VisionEncoder, side: int) -> Image:
    """Two frames as Qwen2-VL takes them."""
    library, data = mtmd.load(), pixels(side)
    library.mtmd_bitmap_set_mergeable.argtypes = [ctypes.c_void_p, ctypes.c_bool]
    library.mtmd_bitmap_set_mergeable.restype = None
    bitmaps = [library.mtmd_bitmap_init(side, side, data) for _ in range(2)]
    for bitmap in bitmaps:
        library.mtmd_bitmap_set_mergeable(bitmap, True)
    return prepared(eyes, bitmaps)


def repeated(call: Callable[[], object], times: int) -> Callable[[], None]:
    """The call, so many times."""

    def all_of_them() -> None:
        for _ in range(times):
            call()

    return all_of_them


def rows(own: VisionEncoder, peer: VisionEncoder, options: argparse.Namespace) -> list[list[Any]]:
    """The figures of each number of frames."""
    gpu, out = options.device == "cuda", []
    theirs = pair(peer, options.side)
    for frames in sorted(options.frames):
        before = memory(False)
        chunk = video(own, frames, options.side)
        held = round(memory(False) - before)
        calls: list[Callable[[], object]] = [
            lambda chunk=chunk: own.encode(chunk),  # type: ignore[misc]
            repeated(lambda: peer.encode(theirs), frames // 2),
        ]
        working = [work_memory([call], gpu)[0] for call in calls]
        ours, qwen = milliseconds(calls, options.rounds)
        times = [round(ours, 1), round(qwen, 1), round(ours / qwen, 2)]
        out.append([frames, chunk.tokens, *times, held, *working])
    return out


def main() -> None:
    """Make the files and measure."""
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--frames", type=positive, nargs="+", default=[16, 64, 180])
    parser.add_argument("--side", type=positive, default=504, help="of square frames, pixels; default: %(default)s")
    parser.add_argument("--blocks", type=positive, default=2, help="of the tower, which has 32 in the 28B")
    parser.add_argument("--files", type=Path, help="folder of files that an earlier run made; they are kept")
    add_rounds(parser, 1)
    add_threads(parser)
    add_folder(parser, "4 GB")
    options = parser.parse_args()
    if options.files:
        options.files.mkdir(exist_ok=True)
    gpu = options.device == "cuda"
    with nullcontext(options.files) if options.files else tempfile.TemporaryDirectory(dir=options.folder) as name:
        files = make_files(Path(name), options.blocks)
        common: dict[str, Any] = {"n_ctx": 512, "n_threads": options.threads, "n_gpu_layers": 99 if gpu else 0}
        with Llama(files.vl, mmproj_path=files.eyes, **common) as seeing, Llama(files.text, **common) as reading:
            own = seeing._engine.images.encoder
            if own is None:
                raise ValueError("the mmproj was not loaded")
            peer = VisionEncoder(files.qwen, reading._model, options.threads)
            found = rows(own, peer, options)
    results = {"machine": machine(nvidia_smi("name")[0] if gpu else ""), "blocks": options.blocks, "videos": found}
    columns = ("frames", "tokens", "tower ms", "Qwen2-VL's ms", "ratio", "frames MB", "MB", "Qwen2-VL's MB")
    title = f"videos of {options.side} x {options.side}: {options.blocks} of 32 blocks"
    report(results, table(title, columns, found), options)


if __name__ == "__main__":
    main()
