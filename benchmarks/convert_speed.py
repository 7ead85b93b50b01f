"""Conversion speed: a large synthetic checkpoint, converted side by side with `cp` and with upstream's converter.

    python benchmarks/convert_speed.py --upstream TREE --upstream-python PYTHON_WITH_TORCH

makes a checkpoint with the layers of ERNIE-4.5-21B-A3B, as many as fit `--size`. It runs in turn, several times: cp of
its shards, `ernie-gguf convert --outtype bf16`, and convert_hf_to_gguf.py --outtype bf16 of a llama.cpp tree. The
checkpoint is in the page cache. Output is flushed to the disk between runs, outside the measured time. ccq2 is measured
apart, on one MoE layer: computing limits it, not copying.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from common import (
    Run,
    add_folder,
    add_rounds,
    benchmark_parser,
    machine,
    median_run,
    our_command,
    progress,
    report,
    run_observed,
)
from random_checkpoint import make_checkpoint
from released import SHAPES, bf16_21b
from rich.table import Table


def layers_that_fit(size: int) -> int:
    """At least the dense layer and one MoE layer."""
    layers = 2
    while bf16_21b(layers + 1).nbytes <= size:
        layers += 1
    return layers


@dataclass(frozen=True)
class Contender:
    """Something that turns the checkpoint into `output`."""

    name: str
    command: list[str | Path]
    output: Path


def contenders(checkpoint: Path, scratch: Path, upstream: list[str | Path] | None) -> list[Contender]:
    """cp, ours, and upstream's if there is one."""
    shards: list[str | Path] = [*sorted(checkpoint.glob("*.safetensors"))]
    copy, ours, theirs = scratch / "copy", scratch / "ours.gguf", scratch / "upstream.gguf"
    found = [
        # a copy on write would copy nothing
        Contender("cp", ["cp", "--reflink=never", "-t", copy, *shards], copy),
        Contender("ernie-gguf", [our_command(), "convert", checkpoint, "--outfile", ours, "--outtype", "bf16"], ours),
    ]
    if upstream:
        found.append(Contender("upstream", [*upstream, checkpoint, "--outfile", theirs, "--outtype", "bf16"], theirs))
    return found


def clear(path: Path) -> None:
    """Remove an earlier output and let the disk come to rest."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if path.name == "copy":
        path.mkdir()
    os.sync()


def upstream_command(tree: Path | None, python: Path) -> tuple[list[str | Path] | None, str]:
    """How to run upstream's converter, or None and why not."""
    if tree is None:
        return None, "no --upstream TREE given"
    script = tree / "convert_hf_to_gguf.py"
    if not script.exists():
        return None, f"{script} does not exist"
    probe = subprocess.run([python, "-c", "import torch, transformers"], capture_output=True, text=True, check=False)
    if probe.returncode:
        return None, f"{python}: {probe.stderr.strip().splitlines()[-1]} (see --upstream-python)"
    return [python, script], ""


def measure(competitors: list[Contender], rounds: int) -> dict[str, list[Run]]:
    """Run everybody in turn, `rounds` times, after one copy that does not count.

    In a virtual machine the first use of a page of memory is slow (measured: cp five times slower), whoever makes it.
    """
    runs: dict[str, list[Run]] = {c.name: [] for c in competitors}
    clear(competitors[0].output)
    run_observed(competitors[0].command)
    for competitor in progress(competitors * rounds, "measuring"):
        clear(competitor.output)
        runs[competitor.name].append(run_observed(competitor.command))
    for competitor in competitors:
        clear(competitor.output)
    return runs


def measure_ccq2(folder: Path, repeat: int) -> tuple[int, Run]:
    """Weights of one MoE layer's experts, and the median run of `--outtype ccq2` on a checkpoint of two layers."""
    shape = SHAPES["21b"]
    checkpoint = make_checkpoint(folder / "ccq2", bf16_21b(shape.dense + 1))
    output = folder / "ccq2.gguf"
    runs = []
    for _ in range(repeat):
        clear(output)
        runs.append(run_observed([our_command(), "convert", checkpoint, "--outfile", output, "--outtype", "ccq2"]))
    return shape.experts * 3 * shape.hidden * shape.expert_ffn, median_run(runs)


def table_of(results: dict[str, Run], size: int) -> Table:
    """Throughput counts the bytes of the checkpoint; the ratios are of median times."""
    table = Table(title=f"to BF16 GGUF, {size / 1e9:.2f} GB of ERNIE-4.5-21B-A3B layers")
    for column in ("", "seconds", "CPU s", "MB/s", "of cp", "of upstream", "peak anonymous", "peak RSS"):
        table.add_column(column, justify="left" if not column else "right")
    for name, run in results.items():
        against = f"{results['upstream'].wall / run.wall:.2f}x" if "upstream" in results else "-"
        table.add_row(
            name,
            f"{run.wall:.2f}",
            f"{run.cpu:.2f}",
            f"{size / run.wall / 1e6:,.0f}",
            f"{results['cp'].wall / run.wall:.2f}x",
            against,
            f"{run.peak_anonymous / 1e6:,.0f} MB",
            f"{run.peak_rss / 1e6:,.0f} MB",
        )
    return table


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--size", type=float, default=4, help="gigabytes of checkpoint (default: %(default)s)")
    add_rounds(parser, 3)
    add_folder(parser, "three times the size")
    parser.add_argument("--upstream", type=Path, metavar="TREE", help="llama.cpp source tree")
    parser.add_argument("--upstream-python", type=Path, default=Path(sys.executable), help="a Python with torch")
    parser.add_argument("--ccq2", action="store_true", help="also measure --outtype ccq2 on two layers (slow)")
    return parser.parse_args()


def main() -> None:
    """Make the checkpoint, measure, print."""
    options = parse_arguments()
    upstream, missing = upstream_command(options.upstream, options.upstream_python)
    if missing:
        print(f"upstream's converter is skipped: {missing}", file=sys.stderr)
    where = machine()
    with tempfile.TemporaryDirectory(prefix="convert-speed-", dir=options.folder) as temporary:
        folder = Path(temporary)
        layers = layers_that_fit(int(options.size * 1e9))
        checkpoint = make_checkpoint(folder / "checkpoint", bf16_21b(layers))
        size = sum(shard.stat().st_size for shard in checkpoint.glob("*.safetensors"))
        runs = measure(contenders(checkpoint, folder, upstream), options.rounds)
        medians = {name: median_run(each) for name, each in runs.items()}
        results: dict[str, object] = {
            "machine": where,
            "checkpoint_bytes": size,
            "layers": layers,
            "median": {name: asdict(run) for name, run in medians.items()},
            "runs": {name: [asdict(run) for run in each] for name, each in runs.items()},
            "upstream_skipped": missing or None,
        }
        table = table_of(medians, size)
        if options.ccq2:
            weights, run = measure_ccq2(folder, 1)
            results["ccq2"] = {"expert_weights": weights, **asdict(run)}
            table.caption = (
                f"ccq2: {weights / 1e6:,.0f} million expert weights in {run.wall:.1f} s "
                f"({weights / run.wall / 1e6:,.1f} M/s), peak anonymous {run.peak_anonymous / 1e6:,.0f} MB"
            )
    report(results, table, options)


if __name__ == "__main__":
    main()
