"""Conversion and verification of ERNIE-4.5-300B-A47B-2Bits-Paddle's exact shapes: speed, memory, against `cp`.

    python benchmarks/convert_full_size.py --folder FOLDER [--dense 1 --int4 1 --ccq 2]

makes a checkpoint with that many dense, int4 and 2-bit layers (plausible random codes, scales and code maps). It runs
`cp` of its files and `ernie-gguf convert` in turn, several times, then `ernie-gguf verify` once. Output is flushed to
the disk between runs, outside the measured time. A dry run of all 54 layers, headers over holes, is timed too.
"""

import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

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
from random_checkpoint import make_checkpoint
from released import two_bits_300b, write_sparse
from rich.table import Table


def timed(command: list[str | Path], made: Path) -> Run:
    """Run a command that makes a file or folder, then remove it."""
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
    order = ("--ccq-k-order", "natural")  # random weights do not tell it
    convert: list[str | Path] = [program, "convert", source, "--outfile", out, "--threads", str(threads), *order]
    runs: dict[str, list[Run]] = {"cp": [], "convert": []}
    for _ in progress(range(rounds), "measuring"):
        runs["cp"].append(timed(["cp", "-r", "--reflink=never", source, scratch / "copy"], scratch / "copy"))
        runs["convert"].append(timed(convert, out))
    run_observed(convert)
    runs["verify"] = [timed([program, "verify", source, out, "--threads", str(threads), "--json"], out)]
    whole = write_sparse(scratch / "300B", two_bits_300b())
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
    layers = {"dense": options.dense, "int4": options.int4, "ccq": options.ccq}
    with tempfile.TemporaryDirectory(prefix="convert-full-size-", dir=options.folder) as name:
        scratch = Path(name)
        source = make_checkpoint(scratch / "source", two_bits_300b(**layers))
        total = sum(path.stat().st_size for path in source.iterdir())
        runs = measure(source, scratch, options.threads, options.rounds)
    title = (
        f"{options.dense} dense, {options.int4} int4 and {options.ccq} 2-bit layers of the 300B, {total / 1e9:.2f} GB"
    )
    table = Table("", "seconds", "MB/s", "of cp", "CPU seconds", "peak memory, MB", "of it anonymous, MB", title=title)
    for each, run in runs.items():
        moved = "dry" not in each
        rate = f"{total / run.wall / 1e6:.0f}" if moved else ""
        share = f"{runs['cp'].wall / run.wall:.2f}" if moved else ""
        memory = (f"{run.peak_rss / 1e6:.0f}", f"{run.peak_anonymous / 1e6:.0f}")
        table.add_row(each, f"{run.wall:.1f}", rate, share, f"{run.cpu:.1f}", *memory)
    results: dict[str, object] = {
        "machine": machine(),
        "layers": layers,
        "bytes": total,
        "threads": options.threads,
        "runs": {each: asdict(run) for each, run in runs.items()},
    }
    report(results, table, options)


if __name__ == "__main__":
    main()
