"""Speed of ccq2's plain encoder on one core, beside the 2-bit types of llama.cpp: python benchmarks/encode_speed.py.

Gaussian rows of the lengths that matter (K = 2048 to 8192) and an importance matrix go through ggml_quantize_chunk, as
llama-quantize calls it, eight rows at a time; ccq2 also through its code for narrower vector registers than this
machine's. Everything runs in turn, `--rounds` times; the median counts, of seconds of the processor, so that other work
on the machine matters little. The peer is iq2_xs, llama.cpp's type of about ccq2's size.
"""

import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from common import add_llama_cpp, add_rounds, benchmark_parser, machine, progress, report
from ernie_gguf.arrays import F32, U8
from ernie_gguf.ccq2 import native
from ernie_gguf.ccq2.rows import ccq2_row_size
from rich.table import Table

PEER = "iq2_xs"
PEERS = ("iq2_xxs", PEER, "q2_K")
CCQ2 = 180  # ggml's number of the type
WIDTHS = {16: "128-bit registers", 32: "AVX2", 64: "AVX-512"}
LENGTHS = (2048, 4096, 8192)
ROWS_AT_ONCE = 8
ROWS = 64

Encode = Callable[[F32, F32, U8], None]  # rows, importance, room for the result


@dataclass(frozen=True)
class Timing:
    """Median seconds for ROWS rows of k weights."""

    encoder: str
    k: int
    seconds: float

    @property
    def rate(self) -> float:
        """Million weights per second."""
        return ROWS * self.k / self.seconds / 1e6


def of_ggml(library: ctypes.CDLL, type_number: int) -> Encode:
    """ggml_quantize_chunk for a type."""

    def encode(w: F32, importance: F32, out: U8) -> None:
        src, weights, dst = (a.ctypes.data_as(ctypes.c_void_p) for a in (w, importance, out))
        n, k = w.shape
        library.ggml_quantize_chunk(type_number, src, dst, *map(ctypes.c_int64, (0, n, k)), weights)

    return encode


def of_width(compiled: ctypes.CDLL, width: int) -> Encode:
    """ccq2's encoder with registers of so many bytes."""
    return lambda w, importance, out: native.encode_rows(compiled, w, importance, out, width)


def encoders(folder: Path) -> dict[str, Encode]:
    """All by name: ccq2 at each width that the machine has, llama.cpp's types."""
    library = ctypes.CDLL(str(folder / "libggml-base.so"))
    if (compiled := native.library()) is None:
        sys.exit(f"{native.LIBRARY} is missing: run make search")
    widths = [width for width in native.WIDTHS if width <= native.vector_width(compiled)]
    narrower = {f"ccq2, {WIDTHS[width]}": of_width(compiled, width) for width in widths}
    types = {name: of_ggml(library, gguf.GGMLQuantizationType[name.upper()].value) for name in PEERS}
    return {"ccq2 in ggml": of_ggml(library, CCQ2), **narrower, **types}


def seconds(encode: Encode, w: F32, importance: F32) -> float:
    """Encode all rows once."""
    out = np.empty((ROWS_AT_ONCE, ccq2_row_size(w.shape[1]) * 2), np.uint8)  # room for any of the types
    begin = time.thread_time()
    for i in range(0, len(w), ROWS_AT_ONCE):
        encode(w[i : i + ROWS_AT_ONCE], importance, out)
    return time.thread_time() - begin


def measure(found: dict[str, Encode], k: int, rounds: int) -> list[Timing]:
    """Median times of all encoders at one row length."""
    rng = np.random.default_rng(k)
    w, importance = rng.standard_normal((ROWS, k), np.float32), rng.standard_normal(k, np.float32) ** 2
    for encode in found.values():
        seconds(encode, w[:ROWS_AT_ONCE], importance)  # llama.cpp's types make tables at their first use
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, encode in found.items():
            times[name].append(seconds(encode, w, importance))
    return [Timing(name, k, statistics.median(all_)) for name, all_ in times.items()]


def main() -> None:
    """Measure and print."""
    parser = benchmark_parser(__doc__ or "")
    add_llama_cpp(parser)
    add_rounds(parser, 3)
    options = parser.parse_args()
    where = machine()
    found = encoders(options.llama_cpp)
    timings = [timing for k in progress(LENGTHS, "encoding") for timing in measure(found, k, options.rounds)]
    rates = {(timing.encoder, timing.k): timing.rate for timing in timings}
    table = Table("encoder", *(f"K = {k}" for k in LENGTHS), f"times {PEER}", title="Million weights a second and core")
    for name in found:
        ratio = statistics.mean(rates[name, k] / rates[PEER, k] for k in LENGTHS)
        table.add_row(name, *(f"{rates[name, k]:.2f}" for k in LENGTHS), f"{ratio:.1f}")
    report({"machine": where, "timings": timings}, table, options)


if __name__ == "__main__":
    main()
