"""Speed of ccq2 against llama.cpp's own types on layers of ERNIE-4.5, on a CPU or a GPU, by llama-bench.

    python benchmarks/speed.py                                     # 4 MoE layers of the 21B on the CPU
    python benchmarks/speed.py --device cuda --llama-cpp build/cuda/bin --layers 8    # of the 300B, on a GPU
    python benchmarks/speed.py --against ik=FOLDER --against-types iq2_xxs iq2_ks     # beside another build

writes one synthetic GGUF per type (random weights, the experts in that type, everything else q8_0) and runs llama-bench
on it. On a CPU all files are measured in turn, several rounds, so that a slow minute of the machine meets all of them;
there the model has a small vocabulary and no dense layer, which weigh as little in the 28 layers of the real one. On a
GPU, where files are large, each is written, measured and deleted before the next. No flash attention.

--against measures the llama-bench of another build (of ik_llama.cpp, say) in the same rounds. The last column of a GPU
is the bytes of weights that a token needs, times tokens per second, over what a copy on the device moves (with torch).
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from common import add_folder, add_llama_cpp, add_rounds, benchmark_parser, llama_bench, machine, progress, report
from released import SHAPES, Shape
from rich.table import Table
from synthetic import IK_TYPES, TYPES, Mix, bytes_per_token, write_model

ALL_TYPES = TYPES | IK_TYPES
OURS = "ours"


@dataclass(frozen=True)
class Defaults:
    """What a device's measurement is unless options say otherwise; `repetitions` within one run of llama-bench."""

    shape: str
    layers: int | None  # None: all MoE layers
    dense: bool
    vocab: int
    types: tuple[str, ...]
    baselines: tuple[str, ...]
    prompt: int
    generate: int
    rounds: int
    repetitions: int


DEFAULTS = {
    "cpu": Defaults("21b", 4, False, 4096, ("ccq2", "iq2_xxs", "q2_k", "q4_0"), ("iq2_xxs",), 64, 32, 3, 2),
    "cuda": Defaults(
        "300b",
        None,
        True,
        103424,
        ("ccq2", "iq2_xxs", "iq2_xs", "q2_k", "q4_0"),
        ("iq2_xxs", "q4_0"),
        512,
        128,
        1,
        5,
    ),
}


@dataclass(frozen=True)
class Contender:
    """A build of llama.cpp (its name and its folder of programs) with one type of experts."""

    build: str
    folder: Path
    ggml_type: str

    @property
    def name(self) -> str:
        """As the table says it."""
        return self.ggml_type if self.build == OURS else f"{self.build}: {self.ggml_type}"


@dataclass(frozen=True)
class Test:
    """A prompt of `prompt` tokens or a generation of `generate`, one of them 0; threads count on a CPU only."""

    prompt: int
    generate: int
    threads: int

    def title(self, device: str) -> str:
        """Column header."""
        name = f"pp{self.prompt}" if self.prompt else f"tg{self.generate}"
        return name if device == "cuda" else f"{name}, {self.threads} thread{'s' if self.threads > 1 else ''}"


Samples = dict[Contender, dict[Test, list[float]]]  # tokens per second, in the order of the rounds


def bench(contender: Contender, model: Path, options: argparse.Namespace) -> tuple[dict[Test, list[float]], str]:
    """One run of llama-bench over all tests; also the GPU's name."""
    arguments = ["-fa", "0", "-r", str(DEFAULTS[options.device].repetitions)]
    for flag, sizes in (("-p", options.prompt), ("-n", options.generate)):
        arguments += [flag, ",".join(map(str, sizes or [0]))]
    if options.device == "cpu":
        arguments += ["-ngl", "0", "-t", ",".join(map(str, options.threads))]
    else:
        arguments += ["-ngl", "99"]
    rows = llama_bench(contender.folder, model, *arguments)
    samples = {Test(row["n_prompt"], row["n_gen"], row["n_threads"]): row["samples_ts"] for row in rows}
    return samples, str(rows[0].get("gpu_info", ""))


def measure(contenders: list[Contender], shape: Shape, options: argparse.Namespace) -> tuple[Samples, str]:
    """Tokens per second of everybody, and the GPU's name."""
    samples: Samples = {contender: {} for contender in contenders}
    gpu = ""
    types = list(dict.fromkeys(contender.ggml_type for contender in contenders))
    with tempfile.TemporaryDirectory(prefix="speed-", dir=options.folder) as name:
        folder = Path(name)
        for on_disk in [types] if options.device == "cpu" else [[each] for each in types]:
            models = {
                each: write_model(folder / f"{each}.gguf", shape, Mix(ALL_TYPES[each]))
                for each in progress(on_disk, "writing")
            }
            here = [contender for contender in contenders if contender.ggml_type in models]
            for contender in progress(here * options.rounds, "measuring"):
                found, gpu = bench(contender, models[contender.ggml_type], options)
                for test, speeds in found.items():
                    samples[contender].setdefault(test, []).extend(speeds)
            for path in models.values():
                path.unlink()
    return samples, gpu


def copy_bandwidth() -> float | None:
    """Bytes read and written per second by a copy of 4 GiB on the GPU, or None without torch."""
    try:
        import torch  # noqa: PLC0415 - not a dependency
    except ImportError:
        return None
    source = torch.zeros(1 << 32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    target.copy_(source)
    start.record()
    for _ in range(10):
        target.copy_(source)
    stop.record()
    torch.cuda.synchronize()
    return float(10 * 2 * source.numel() / (start.elapsed_time(stop) / 1e3))


def table_of(
    medians: dict[Contender, dict[Test, float]],
    per_token: dict[str, int],
    bandwidth: float | None,
    title: str,
    options: argparse.Namespace,
) -> Table:
    """Median tokens per second with their ratios to our build's baseline types."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("experts")
    tests = list(next(iter(medians.values())))
    for test in tests:
        table.add_column(test.title(options.device), justify="right")
    table.add_column("GB per token", justify="right")
    if bandwidth:
        table.add_column("of copy bandwidth", justify="right")
    baselines = [c for name in options.baseline for c in medians if (c.build, c.ggml_type) == (OURS, name)]
    longest = max((test for test in tests if test.generate), key=lambda test: test.generate, default=None)
    for contender, speeds in medians.items():
        cells = []
        for test in tests:
            ratios = ", ".join(f"{speeds[test] / medians[baseline][test]:.2f}x" for baseline in baselines)
            cells.append(f"{speeds[test]:,.1f} ({ratios})")
        size = per_token[contender.ggml_type]
        cells.append(f"{size / 1e9:.2f}")
        if bandwidth and longest:
            cells.append(f"{size * speeds[longest] / bandwidth:.0%}")
        table.add_row(contender.name, *cells)
    table.caption = f"tokens per second; in brackets against {' and '.join(options.baseline)}"
    return table


def builds(options: argparse.Namespace) -> Iterator[tuple[str, Path, list[str]]]:
    """Name, folder and types of our build and of those to compare with."""
    yield OURS, options.llama_cpp, options.types
    for each in options.against:
        name, _, folder = each.partition("=")
        yield name, Path(folder), options.against_types


def parse_arguments() -> argparse.Namespace:
    """Command line, with the device's defaults filled in."""
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--device", choices=DEFAULTS, default="cpu", help="default: %(default)s")
    add_llama_cpp(parser)
    our_types = [name for name in TYPES if name != "f32"]
    parser.add_argument("--types", nargs="+", choices=our_types, help="of the experts (default: by device)")
    parser.add_argument("--against", nargs="+", default=[], metavar="NAME=BIN", help="folders of other builds")
    parser.add_argument(
        "--against-types",
        nargs="+",
        choices=[*our_types, *IK_TYPES],
        default=["iq2_xxs"],
        help="of the experts with the other builds (default: iq2_xxs)",
    )
    parser.add_argument("--baseline", nargs="+", choices=our_types, help="types to give ratios to (default: by device)")
    parser.add_argument("--shape", choices=SHAPES, help="default: 21b on a CPU, 300b on a GPU")
    parser.add_argument("--layers", type=int, help="MoE layers (default: 4 on a CPU, all on a GPU)")
    parser.add_argument("--prompt", type=int, nargs="*", help="tokens of prompts (default: 64 on a CPU, 512 on a GPU)")
    parser.add_argument("--generate", type=int, nargs="*", help="tokens to generate (default: 32 on a CPU, 128)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="on a CPU (default: 1 2)")
    add_rounds(parser, None)
    add_folder(parser, "1 GB per type on a CPU, the largest file on a GPU")
    options = parser.parse_args()

    defaults = DEFAULTS[options.device]
    options.shape = options.shape or defaults.shape
    options.layers = options.layers or defaults.layers or SHAPES[options.shape].layers - SHAPES[options.shape].dense
    options.types = options.types or list(defaults.types)
    options.baseline = options.baseline or [name for name in defaults.baselines if name in options.types]
    options.prompt = [defaults.prompt] if options.prompt is None else options.prompt
    options.generate = [defaults.generate] if options.generate is None else options.generate
    options.rounds = options.rounds or defaults.rounds
    if not options.baseline or not {*options.baseline} <= {*options.types}:
        parser.error("--types must include the types of --baseline, which the ratios are to")
    if not options.prompt and not options.generate:
        parser.error("--prompt and --generate are both empty: nothing to measure")
    for name, folder, _ in builds(options):
        if not (folder / "llama-bench").exists():
            parser.error(f"{name}: {folder} holds no llama-bench (make build; --against takes NAME=FOLDER)")
    return options


def main() -> None:
    """Write the files, measure, report."""
    options = parse_arguments()
    dense = SHAPES[options.shape].dense if DEFAULTS[options.device].dense else 0
    vocab = DEFAULTS[options.device].vocab
    shape = replace(SHAPES[options.shape], dense=dense, layers=dense + options.layers, vocab=vocab)
    contenders = [Contender(name, folder, each) for name, folder, types in builds(options) for each in types]
    bandwidth = copy_bandwidth() if options.device == "cuda" else None
    where = machine()
    samples, gpu = measure(contenders, shape, options)
    if gpu and options.device == "cuda":
        where["gpu"] = gpu
    per_token = {
        name: bytes_per_token(shape, Mix(ALL_TYPES[name])) for name in {contender.ggml_type for contender in contenders}
    }
    medians = {
        contender: {test: statistics.median(speeds) for test, speeds in by_test.items()}
        for contender, by_test in samples.items()
    }
    results: dict[str, object] = {
        "machine": where,
        "shape": shape,
        "bytes_per_token": per_token,
        "copy_bytes_per_second": bandwidth,
        "tokens_per_second": [
            {"build": contender.build, "experts": contender.ggml_type, "test": test.title(options.device), "samples": s}
            for contender, by_test in samples.items()
            for test, s in by_test.items()
        ],
    }
    title = f"{shape.name}: {options.layers} MoE and {shape.dense} dense layers"
    report(results, table_of(medians, per_token, bandwidth, title, options), options)


if __name__ == "__main__":
    main()
