"""Conversion and verification of ERNIE-4.5-300B-A47B-2Bits-Paddle's exact shapes: speed, memory, against `cp`.

    python benchmarks/convert_full_size.py --folder FOLDER [--dense 1 --int4 1 --ccq 2]

makes a checkpoint of so many layers of each kind (random codes, scales and code maps of a plausible model) and runs,
several times interleaved: `cp` of its files, `ernie-gguf convert` and, once, `ernie-gguf verify`. What an earlier run
wrote is flushed before the next begins, outside the time. A dry run of all 54 layers (headers over holes) is timed too.
"""

import os
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from common import (
    Run,
    add_folder,
    add_rounds,
    add_threads,
    benchmark_parser,
    machine,
    median_run,
    our_command,
    progress,
    report,
    run_observed,
)
from rich.table import Table

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from support.full_size import Entry, Size, nbytes, write_frame, write_header, write_sparse

POOL = 1 << 25  # random bytes that all codes are cut from


def values_of(entry: Entry, rng: np.random.Generator) -> npt.NDArray[np.generic] | None:
    """The values of a small tensor; None for codes and matrices."""
    name, dtype, shape = entry
    n = shape[-1]
    if name.endswith("code_scale"):
        return rng.uniform(100, 128, n).astype(np.float32)
    if name.endswith("code_zp"):
        return rng.uniform(0, 2000, n).astype(np.float32)
    if dtype == "F32":
        return rng.uniform(-0.02, 0.02, shape).astype(np.float32)
    if dtype == "BF16" and len(shape) == 1:
        values = rng.uniform(0.5, 1.5, n).astype(np.float32) * np.float32(1.0 if "norm" in name else 1e-4)
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return None


def fill(file: BinaryIO, entry: Entry, pool: npt.NDArray[np.uint8], rng: np.random.Generator) -> None:
    """Write one tensor."""
    values = values_of(entry, rng)
    if values is not None:
        file.write(values.tobytes())
        return
    # bfloat16 matrices: random sign, mantissa and lowest exponent bit, always finite
    source = pool
    if entry[1] == "BF16":
        source = (pool.view(np.uint16) & np.uint16(0x80FF) | np.uint16(0x3C00)).view(np.uint8)
    left = nbytes(entry)
    while left:
        start = int(rng.integers(POOL // 4)) & ~1
        piece = source[start : start + left]
        file.write(piece.data)
        left -= len(piece)


def make_checkpoint(folder: Path, size: Size) -> Path:
    """A checkpoint with data."""
    rng = np.random.default_rng(0)
    pool = rng.integers(0, 256, POOL, dtype=np.uint8)
    for path, part in progress(write_frame(folder, size), "making the checkpoint"):
        with path.open("wb") as file:
            write_header(file, part)
            for entry in part:
                fill(file, entry, pool, rng)
    os.sync()
    return folder


def timed(command: list[str | Path], made: Path) -> Run:
    """Run a command that makes a file or folder, and take that away."""
    run = run_observed(command)
    if made.is_dir():
        shutil.rmtree(made)
    else:
        made.unlink()
    os.sync()
    return run


def measure(source: Path, scratch: Path, threads: int, rounds: int) -> dict[str, Run]:
    """cp and convert interleaved, then verify."""
    program = our_command()
    out = scratch / "out.gguf"
    convert: list[str | Path] = [program, "convert", source, "--outfile", out, "--threads", str(threads)]
    runs: dict[str, list[Run]] = {"cp": [], "convert": []}
    for _ in progress(range(rounds), "measuring"):
        runs["cp"].append(timed(["cp", "-r", "--reflink=never", source, scratch / "copy"], scratch / "copy"))
        runs["convert"].append(timed(convert, out))
    run_observed(convert)
    runs["verify"] = [timed([program, "verify", source, out, "--threads", str(threads), "--json"], out)]
    whole = write_sparse(scratch / "300B")
    runs["dry run of 54 layers"] = [run_observed([program, "convert", whole, "--dry-run"])]
    shutil.rmtree(whole)
    return {name: median_run(each) for name, each in runs.items()}


def main() -> None:
    """Make, measure, report."""
    parser = benchmark_parser(__doc__ or "")
    for storage, default in (("dense", 1), ("int4", 1), ("ccq", 2)):
        parser.add_argument(f"--{storage}", type=int, default=default, help=f"layers so stored (default: {default})")
    add_threads(parser)
    add_rounds(parser, 3)
    add_folder(parser, "five times the checkpoint, 6 GB by default")
    options = parser.parse_args()
    size = Size(options.dense, options.int4, options.ccq)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        scratch = Path(name)
        source = make_checkpoint(scratch / "source", size)
        total = sum(path.stat().st_size for path in source.iterdir())
        runs = measure(source, scratch, options.threads, options.rounds)
    table = Table("", "seconds", "MB/s", "of cp", "CPU seconds", "peak memory, MB", "of it anonymous, MB")
    for each, run in runs.items():
        rate = total / run.wall / 1e6 if "dry" not in each else float("nan")
        share = runs["cp"].wall / run.wall if "dry" not in each else float("nan")
        memory = (f"{run.peak_rss / 1e6:.0f}", f"{run.peak_anonymous / 1e6:.0f}")
        table.add_row(each, f"{run.wall:.1f}", f"{rate:.0f}", f"{share:.2f}", f"{run.cpu:.1f}", *memory)
    results: dict[str, object] = {
        "machine": machine(),
        "layers": asdict(size),
        "bytes": total,
        "threads": options.threads,
        "runs": {each: asdict(run) for each, run in runs.items()},
    }
    report(results, table, options)


if __name__ == "__main__":
    main()
