"""Quality of 2-bit experts: ccq2, plain and calibrated, beside llama.cpp's own types, each against bf16.

    python benchmarks/quality.py CHECKPOINT --calibration TEXT --evaluate OTHER_TEXT
    python benchmarks/quality.py examples/ernie-tiny --calibration convert --evaluate tests  # make quality

converts the checkpoint to bf16 and lets llama-perplexity keep its token probabilities on the first `--evaluate-bytes`
of the evaluation text. Then, for each type, it makes a file whose experts have that type and everything else q8_0, and
compares its probabilities with bf16's. `ernie-gguf convert` makes the plain ccq2, `ernie-gguf quantize` the calibrated
one, and llama-quantize ccq2-imatrix and llama.cpp's types, with an importance matrix from the same calibration text.
The rows bf16 and q8_0 are for reference: bf16 against itself shows what storing the probabilities in 16 bits costs.

A TEXT is a file, or a folder whose Python files are read in the order of their names: examples/ernie-tiny has learnt
Python, so this repository's own sources serve it. `--only` chooses rows; without torch, leave ccq2-calibrated out.

Disk: the probabilities take 2 bytes times vocabulary for every second token of the text (0.7 GB for ernie-mini, 7 GB
with ERNIE's 103,424 words), and the bf16 file and one quantized file lie beside them, in TMPDIR or --folder.
"""

import argparse
import codecs
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from common import (
    add_folder,
    add_llama_cpp,
    add_threads,
    benchmark_parser,
    leave,
    machine,
    our_command,
    positive,
    progress,
    report,
)
from ernie_gguf.ccq2.rows import ccq2_row_size
from ernie_gguf.gguf_file.reader import GgufFile, read_gguf
from rich.table import Table

TOOLS = ("llama-perplexity", "llama-imatrix", "llama-quantize")

CALIBRATED = "ccq2-calibrated"
WITH_IMATRIX = "ccq2-imatrix"
PEERS = ("iq2_xxs", "iq2_xs", "iq2_s", "q2_K", "iq3_xxs", "q4_0")
MORE_PEERS = ("iq3_s", "q3_K", "iq4_xs")  # with --only
OURS = tuple(f"{name}-calibrated" for name in ("iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs"))
MIXES = ("mix-2.30", "mix-2.70", "mix-3.00")  # quantize --bits
ROWS = ("bf16", "q8_0", "ccq2", WITH_IMATRIX, CALIBRATED, *OURS, *MIXES, *PEERS)
USE_IMATRIX = (WITH_IMATRIX, *PEERS, *MORE_PEERS)

EXPERTS, ROUTER = "_exps.", ".ffn_gate_inp."  # in the names of GGUF
_NUMBER = r"(-?\d+\.\d+)"
# What llama-perplexity --kl-divergence prints; the second number is the standard error.
FIGURES = {
    "mean PPL": rf"^Mean PPL\(Q\) +: +{_NUMBER} ± +{_NUMBER}$",
    "mean KLD": rf"^Mean +KLD: +{_NUMBER} ± +{_NUMBER}$",
    "99 % KLD": rf"^99\.0% +KLD: +{_NUMBER}$",
    "same top token": rf"^Same top p: +{_NUMBER} ± +{_NUMBER} %$",
}


@dataclass(frozen=True)
class Divergence:
    """A model against bf16 on one text: KLD in nats per token, same_top in percent of tokens."""

    ppl: float
    ppl_error: float
    kld: float
    kld_error: float
    kld_99: float
    same_top: float
    same_top_error: float


@dataclass(frozen=True)
class Row:
    """One file: its divergence, bits per weight of its expert tensors and of the whole file, seconds to make it."""

    name: str
    divergence: Divergence
    expert_bits: float
    file_bits: float
    file_bytes: int
    seconds: float


def run(command: Sequence[str | Path]) -> str:
    """What a command printed on both outputs; if it fails, exit with the end of that."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    output = done.stdout.decode(errors="replace")
    if done.returncode:
        leave(command, done.returncode, output)
    return output


def parse_divergence(output: str) -> Divergence:
    """The figures in the output of llama-perplexity --kl-divergence; exits if one is missing or not a number."""
    values: list[float] = []
    for name, pattern in FIGURES.items():
        found = re.findall(pattern, output, re.MULTILINE)
        if len(found) != 1:
            sys.exit(f"llama-perplexity printed no {name}, expected one line like {pattern}:\n{output[-3000:]}")
        numbers = found[0] if isinstance(found[0], tuple) else found
        values += map(float, numbers)
    return Divergence(*values)


def head(text: bytes, limit: int) -> bytes:
    """The first `limit` bytes, less the character that the cut would split. Raises UnicodeDecodeError."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    return decoder.decode(text[:limit], final=len(text) <= limit).encode()


def check_types(file: GgufFile, experts: str, others: str) -> None:
    """Exit unless every expert tensor has type `experts`, every router f32 and every other matrix `others`.

    llama-quantize takes another type, with no more than a warning, where the rows do not fit the one asked for.
    """
    if not any(EXPERTS in tensor.name for tensor in file.tensors):
        sys.exit(f"{file.path.name}: no expert tensor (…{EXPERTS}weight): this measures mixture-of-experts models")
    for tensor in file.tensors:
        if len(tensor.ne) < 2:
            continue
        expected = experts if EXPERTS in tensor.name else "f32" if ROUTER in tensor.name else others
        if tensor.type_name != expected.lower():
            sys.exit(
                f"{file.path.name}: tensor {tensor.name} with rows of {tensor.ne[0]} is {tensor.type_name}, "
                f"expected {expected.lower()}: leave {experts} out (--only)"
            )


def check_imatrix_was_used(output: str) -> None:
    """Exit if llama-quantize found nothing for an expert tensor in the importance matrix."""
    missing = re.search(rf"did not find weights for (\S*{re.escape(EXPERTS)}\S*)", output)
    if missing:
        sys.exit(f"llama-imatrix collected nothing for {missing[1]}: give more calibration text")


def types_of(name: str) -> tuple[str, str]:
    """Types of the experts and of the other matrices in a row's file."""
    return (name.split("-", maxsplit=1)[0], "bf16" if name == "bf16" else "q8_0")


def command_to_make(name: str, path: Path, options: argparse.Namespace) -> list[str | Path]:
    """The command that writes a row's file; from bf16.gguf, imatrix.gguf and calibration.txt beside it."""
    if name in (CALIBRATED, *OURS, *MIXES):
        text = path.with_name("calibration.txt")
        more = ["--threads", str(options.threads), *shlex.split(options.quantize_args)]
        if name in OURS:
            more += ["--tensor-type", f"_exps={types_of(name)[0]}"]
        elif name in MIXES:
            more += ["--bits", name.removeprefix("mix-")]
        return [our_command(), "quantize", options.checkpoint, "--calibration", text, "--outfile", path, *more]
    imatrix, source = path.with_name("imatrix.gguf"), path.with_name("bf16.gguf")
    tool = [options.llama_cpp / "llama-quantize", "--imatrix", imatrix]
    if name == WITH_IMATRIX:
        return [*tool, source, path, "CCQ2", str(options.threads)]
    if name not in (*PEERS, *MORE_PEERS):
        return [our_command(), "convert", options.checkpoint, "--outtype", name, "--outfile", path]
    types = ["--tensor-type", f"ffn_(gate|up|down)_exps={name}"]
    types += ["--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0"]
    return [*tool, *types, source, path, "Q8_0", str(options.threads)]


def make(name: str, folder: Path, options: argparse.Namespace) -> tuple[GgufFile, float]:
    """Write a row's file, checked to be what it is called; also returns the seconds that it took."""
    path = folder / f"{name}.gguf"
    begin = time.perf_counter()
    output = run(command_to_make(name, path, options))
    seconds = time.perf_counter() - begin
    if name in USE_IMATRIX:
        check_imatrix_was_used(output)
    file = read_gguf(path)
    if name not in MIXES:
        check_types(file, *types_of(name))
    return file, seconds


def tool(program: str, folder: Path, model: str, options: argparse.Namespace) -> list[str | Path]:
    """The start of a command: one of llama.cpp's programs, a model in the folder, context and threads."""
    shared = ("-c", str(options.context), "-t", str(options.threads))
    return [options.llama_cpp / program, "-m", folder / f"{model}.gguf", *shared]


def prepare(folder: Path, options: argparse.Namespace) -> float:
    """Write bf16.gguf, bf16.kld and, where a row needs it, imatrix.gguf; returns the seconds that bf16.gguf took."""
    _, seconds = make("bf16", folder, options)
    files = ("-f", folder / "evaluation.txt", "--kl-divergence-base", folder / "bf16.kld")
    output = run([*tool("llama-perplexity", folder, "bf16", options), *files])
    if "Final estimate: PPL" not in output:  # it exits with 0 even if the text is too short
        sys.exit(f"llama-perplexity printed no perplexity of {' '.join(map(str, options.evaluate))}:\n{output[-3000:]}")
    if any(name in USE_IMATRIX for name in options.only):
        files = ("-f", folder / "calibration.txt", "-o", folder / "imatrix.gguf")
        run([*tool("llama-imatrix", folder, "bf16", options), *files, "--no-ppl"])
    return seconds


def measure(name: str, file: GgufFile, seconds: float, folder: Path, options: argparse.Namespace) -> Row:
    """Compare a row's file with the probabilities kept of bf16."""
    base = ("--kl-divergence-base", folder / "bf16.kld", "--kl-divergence")
    divergence = parse_divergence(run([*tool("llama-perplexity", folder, name, options), *base]))
    experts = [tensor for tensor in file.tensors if EXPERTS in tensor.name]
    size = file.path.stat().st_size
    return Row(
        name,
        divergence,
        8 * sum(tensor.nbytes for tensor in experts) / sum(tensor.elements for tensor in experts),
        8 * size / sum(tensor.elements for tensor in file.tensors),
        size,
        seconds,
    )


def measure_all(folder: Path, options: argparse.Namespace) -> list[Row]:
    """All rows in turn; only bf16.gguf stays on the disk beside the row's file."""
    rows = []
    for name in progress(["preparing", *options.only], "measuring"):
        if name == "preparing":
            bf16_seconds = prepare(folder, options)
            continue
        bf16 = name == "bf16"
        file, seconds = (read_gguf(folder / "bf16.gguf"), bf16_seconds) if bf16 else make(name, folder, options)
        rows.append(measure(name, file, seconds, folder, options))
        if not bf16:
            file.path.unlink()
    return rows


def table_of(rows: Sequence[Row], title: str) -> Table:
    """One line per file."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("experts")
    for column in ("bits", "bits, file", "MB", "PPL", "mean KLD", "99 % KLD", "same top", "made in"):
        table.add_column(column, justify="right")
    for row in rows:
        found = row.divergence
        table.add_row(
            row.name,
            f"{row.expert_bits:.3f}",
            f"{row.file_bits:.2f}",
            f"{row.file_bytes / 1e6:,.1f}",
            f"{found.ppl:.3f} ± {found.ppl_error:.3f}",
            f"{found.kld:.4f} ± {found.kld_error:.4f}",
            f"{found.kld_99:.3f}",
            f"{found.same_top:.1f} %",
            f"{row.seconds:,.0f} s",
        )
    if any(row.name.startswith("ccq2") for row in rows):
        bits = " and ".join(f"{8 * ccq2_row_size(k) / k:.3f}" for k in (2560, 1536))
        table.caption = f"ccq2 counts its rows' header and padding: at the 21B's rows of 2560 and 1536, {bits} bits."
    return table


def curve(rows: Sequence[Row]) -> bytes:
    """A PNG: KL divergence (logarithmic) against bits per weight of the experts; a line for what is calibrated here."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - only the plot needs it

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    ours = sorted((r for r in rows if r.name in (CALIBRATED, *OURS, *MIXES)), key=lambda row: row.expert_bits)
    peers = sorted((r for r in rows if r.name in USE_IMATRIX), key=lambda row: row.expert_bits)
    for each, label, style in ((ours, "ernie-gguf quantize", "o-"), (peers, "llama-quantize with imatrix", "s--")):
        axes.plot([row.expert_bits for row in each], [row.divergence.kld for row in each], style, label=label)
        for row in each:
            place = (row.expert_bits, row.divergence.kld)
            axes.annotate(
                row.name.removesuffix("-calibrated"), place, fontsize=7, xytext=(4, 4), textcoords="offset points"
            )
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight of the experts")
    axes.set_ylabel("KL divergence from bf16")
    axes.grid(color="#dddddd")
    axes.legend(frameon=False)
    out = BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def files_of(texts: Sequence[Path]) -> list[Path]:
    """Files as they are given, for each folder the Python files in it."""
    return [file for text in texts for file in (sorted(text.rglob("*.py")) if text.is_dir() else [text])]


def read_texts(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple[bytes, bytes]:
    """The calibration texts one after another, and the part of the evaluation texts that is used."""
    names = " ".join(map(str, options.evaluate))
    calibration_files, evaluation_files = files_of(options.calibration), files_of(options.evaluate)
    try:
        calibration = b"".join(path.read_bytes() for path in calibration_files)
        evaluation = head(b"".join(path.read_bytes() for path in evaluation_files), options.evaluate_bytes)
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")
    except UnicodeDecodeError as error:
        parser.error(f"{names}: not UTF-8 at byte {error.start}")
    shared = {file.resolve() for file in calibration_files} & {file.resolve() for file in evaluation_files}
    if shared or evaluation in calibration:
        parser.error(f"{names}: this text is empty or was used for calibration; give another")
    return calibration, evaluation


def make_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder of a BF16 ERNIE-4.5-MoE")
    parser.add_argument("--calibration", type=Path, nargs="+", required=True, metavar="TEXT")
    parser.add_argument(
        "--evaluate", type=Path, nargs="+", required=True, metavar="TEXT", help="not used for calibration"
    )
    parser.add_argument(
        "--evaluate-bytes", type=positive, default=250_000, help="of the evaluation text (default: %(default)s)"
    )
    parser.add_argument("--context", type=positive, default=512, help="tokens (default: %(default)s)")
    add_llama_cpp(parser)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=(*ROWS, *MORE_PEERS),
        default=list(ROWS),
        metavar="TYPE",
        help=" ".join((*ROWS, *MORE_PEERS)),
    )
    parser.add_argument(
        "--quantize-args", default="", metavar="ARGS", help='more for ernie-gguf quantize: --quantize-args="--device …"'
    )
    parser.add_argument("--plot", type=Path, help="draw KL divergence against the experts' bits to this PNG")
    add_threads(parser)
    add_folder(parser, "see above")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Make the files one by one, measure, print."""
    parser = make_parser()
    options = parser.parse_args(argv)
    for program in TOOLS:
        if not (options.llama_cpp / program).exists():
            parser.error(f"{options.llama_cpp} holds no {program} (make build)")
    calibration, evaluation = read_texts(parser, options)
    where = machine()
    with tempfile.TemporaryDirectory(prefix="quality-", dir=options.folder) as name:
        folder = Path(name)
        (folder / "calibration.txt").write_bytes(calibration)
        (folder / "evaluation.txt").write_bytes(evaluation)
        rows = measure_all(folder, options)
    results: dict[str, object] = {
        "machine": where,
        "checkpoint": str(options.checkpoint),
        "calibration": [str(path) for path in options.calibration],
        "evaluation": [str(path) for path in options.evaluate],
        "evaluation_bytes": len(evaluation),
        "context": options.context,
        "quantize_args": options.quantize_args,
        "rows": rows,
    }
    if options.plot:
        options.plot.write_bytes(curve(rows))
    names = ", ".join(path.name for path in options.evaluate)
    title = f"{options.checkpoint.name} against bf16, {len(evaluation):,} bytes of {names}"
    report(results, table_of(rows, title), options, page=f"Quality: {options.checkpoint.name}")


if __name__ == "__main__":
    main()
