"""The command `ernie-gguf`. Heavy imports happen inside the commands, so that --help is quick."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from .checkpoint.k_order import KOrder
from .errors import ErnieGgufError, Stopped, leaving
from .gguf_file.outtype import ExpertType, FloatType, Outtype, VisionTokens
from .hub.lazy import takes_names
from .llama_build.command import build
from .messages import fail, os_error, print_anything
from .options import (
    AsJson,
    DryRun,
    KOrderOption,
    Mmproj,
    MmprojType,
    OutputTensorType,
    Overwrite,
    TextOnly,
    Threads,
    TokenEmbeddingType,
    VisionTokensOption,
)
from .plain_help import PlainCommand
from .progress import progress_bar as _progress
from .quantize.command import quantize
from .serving.chat import chat
from .serving.evaluate import evaluate
from .serving.info import info
from .serving.run import run
from .serving.serve import serve

if TYPE_CHECKING:
    from .checkpoint.find_k_order import KOrderFinding

_THREADS = min(os.cpu_count() or 1, 4)

app = typer.Typer(
    help="ERNIE-4.5 checkpoints in llama.cpp: convert, quantize, verify, serve, chat, evaluate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: at 80 columns it cuts no option's name and breaks no list of choices
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"ernie-gguf {version('ernie-gguf')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(cls=PlainCommand)
def convert(  # noqa: PLR0917 - typer makes options of the parameters
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="Folder of a Hugging Face checkpoint, or a name on the Hub.")
    ],
    outfile: Annotated[
        Path | None,
        typer.Option(
            help="File to write, or a folder for NAME-OUTTYPE.gguf in it (default: the current one).",
            show_default=False,
        ),
    ] = None,
    outtype: Annotated[
        Outtype,
        typer.Option(
            help="auto: as the checkpoint is stored, bf16 or f16 (f16 for f32 too, as in llama.cpp); what is quantized "
            "is repacked without loss: 2-bit to ccq2, int4 to q4_0, int8 to q8_0. "
            "ccq2, q4_0: experts in that type, other linears q8_0. "
            "Norms, router and its bias are f32 in every type."
        ),
    ] = Outtype.AUTO,
    token_embedding_type: TokenEmbeddingType = None,
    output_tensor_type: OutputTensorType = None,
    mmproj: Mmproj = None,
    mmproj_type: MmprojType = FloatType.BF16,
    vision_experts: Annotated[
        ExpertType | None,
        typer.Option(
            help="Type of the vision experts (default: q8_0 with ccq2 and q4_0, else as the other experts).",
            show_default=False,
        ),
    ] = None,
    vision_tokens: VisionTokensOption = VisionTokens.ALL,
    ccq_k_order: KOrderOption = KOrder.AUTO,
    split_max_size: Annotated[
        str | None,
        typer.Option(
            help="Write several files, none larger unless one tensor is: 40G, 500M (powers of 1000).",
            show_default=False,
        ),
    ] = None,
    text_only: TextOnly = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Store nothing of SRC, a name: fetch a part, convert it, drop it.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="With --stream: start over instead of resuming an interrupted run.")
    ] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    overwrite: Overwrite = False,
    threads: Threads = _THREADS,
) -> None:
    """Convert a checkpoint to a GGUF file, or to several."""
    from . import report
    from .convert import check_mmproj, output_path, prepare, slow_note, split_plan, write_gguf
    from .gguf_file.split import parse_size, split_paths
    from .hub.k_order import fetch_for_k_order
    from .hub.source import opened
    from .hub.space import announce, downloaded
    from .hub.stream import check_disk, convert_stream, plan_stream
    from .plan import choose
    from .tables import show

    try:
        split_bytes = None if split_max_size is None else parse_size(split_max_size)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="--split-max-size") from exc
    choices = choose(token_embedding_type, output_tensor_type, vision_experts, mmproj_type)
    with opened(source) as place:
        look = place.repository is None or dry_run or stream
        if look:
            fetch_for_k_order(place, text_only)
        job = prepare(place.folder, outtype, text_only, choices, vision_tokens, k_order=ccq_k_order, look=look)
        if look:
            _mention_k_order(source, job.k_order_finding, ccq_k_order)
        path = output_path(job, outfile)
        check_mmproj(job, path, mmproj)
        if stream and place.repository is None:
            raise typer.BadParameter(f"{source} is here already: it is for names on the Hub", param_hint="--stream")
        if dry_run:
            paths = split_paths(path, len(split_plan(job.plan, split_bytes)))
            show(report.job_json(job, paths, mmproj) if as_json else report.job_table(job, paths, mmproj))
            announce(job, place, path, mmproj)
            return
        _mention_leftovers(path.parent)
        if slow := slow_note(job.plan):
            sys.stderr.write(f"note: {slow}\n")
        if stream and place.repository is not None:
            streamed = plan_stream(job, place.repository, path, split_bytes, mmproj)
            check_disk(streamed)
            result = convert_stream(streamed, threads, overwrite, restart, _progress)
        else:
            if place.repository is not None:
                folder = downloaded(job, place, path, overwrite, mmproj)
                job = prepare(folder, outtype, text_only, choices, vision_tokens, k_order=ccq_k_order)
                _mention_k_order(source, job.k_order_finding, ccq_k_order)
            stopped = leaving("; no output was written, run the command again")
            with stopped, _progress(job.nbytes, even=not slow) as progress:
                result = write_gguf(job, path, threads, overwrite, progress, split_max_bytes=split_bytes, mmproj=mmproj)
        show(report.result_json(job, result) if as_json else report.result_text(job, result))


@app.command(cls=PlainCommand, short_help="Show what a GGUF file, or a checkpoint, holds.")
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A GGUF file, or a checkpoint: a folder or a name.")],
    as_json: AsJson = False,
) -> None:
    """Show a GGUF file's metadata, tensors, sizes and bits per weight, or those of a checkpoint from its headers."""
    from .gguf_file.reader import read_gguf
    from .hub.describe import checkpoint_json, checkpoint_table
    from .hub.names import is_checkpoint
    from .hub.source import opened
    from .inspection import file_json, file_table
    from .tables import show

    if is_checkpoint(file):
        with opened(file) as place:
            show(checkpoint_json(place) if as_json else checkpoint_table(place))
        return
    gguf = read_gguf(file)
    show(file_json(gguf) if as_json else file_table(gguf))


@app.command(cls=PlainCommand, short_help="Compare every weight of a GGUF with its checkpoint.")
@takes_names
def verify(  # noqa: PLR0917 - typer makes options of the parameters
    source: Annotated[Path, typer.Argument(metavar="SRC", help="The checkpoint's folder.")],
    file: Annotated[Path, typer.Argument(metavar="GGUF", help="The file made from it.")],
    as_json: AsJson = False,
    text_only: TextOnly = False,
    ccq_k_order: KOrderOption = KOrder.AUTO,
    threads: Threads = _THREADS,
) -> None:
    """Compare every weight of a GGUF with the checkpoint it was made from.

    The GGUF may be an mmproj. The exit code is 1 if a weight is wrong.
    """
    from .checkpoint.find_k_order import find_k_order
    from .convert import read_checkpoint
    from .gguf_file.reader import read_gguf
    from .mapping import map_tensors
    from .tables import show
    from .verify.compare import tensors_of
    from .verify.compare import verify as compare
    from .verify.report import k_orders, verdicts_json, verdicts_table

    gguf = read_gguf(file)
    config, headers = read_checkpoint(source, text_only)
    mapping = map_tensors(config, headers)
    mapped = tensors_of(mapping, gguf)
    finding = find_k_order(config, mapping.sources)
    _mention_k_order(source, finding, ccq_k_order)
    order = finding.order if finding and ccq_k_order is KOrder.AUTO else ccq_k_order
    with _progress(sum(tensor.expected.elements for tensor in mapped), "Comparing", bytes_=False) as progress:
        verdicts = compare(mapped, gguf, threads, progress, order)
    orders = k_orders(gguf, finding, order)
    show(verdicts_json(gguf, verdicts, orders) if as_json else verdicts_table(gguf, verdicts, orders))
    if not all(verdict.ok for verdict in verdicts):
        raise typer.Exit(1)


app.command(cls=PlainCommand, short_help="Quantize the experts of a checkpoint to ccq2 (2 bits).")(
    takes_names(quantize)
)
app.command(cls=PlainCommand, short_help="Build the patched llama.cpp and install it for this user.")(build)
app.command(cls=PlainCommand, short_help="Show the llama.cpp in use; say whether a file fits.")(info)
app.command(
    cls=PlainCommand,
    short_help="Serve a file over HTTP: the OpenAI API, a page for browsers.",
    context_settings={"ignore_unknown_options": True},
)(serve)
app.command(cls=PlainCommand, short_help="From a name on the Hub to a chat: download, convert, talk.")(run)
app.command(cls=PlainCommand)(chat)
app.command("eval", cls=PlainCommand, short_help="Evaluate a file with tasks of lm-evaluation-harness.")(evaluate)


def _mention_k_order(source: Path, finding: "KOrderFinding | None", asked: KOrder) -> None:
    """Say where --ccq-k-order goes against what the weights say, or says nothing."""
    if asked is KOrder.AUTO:
        return
    if finding is None:
        sys.stderr.write(f"note: {source} has no 2-bit experts: --ccq-k-order {asked.value} changes nothing\n")
    elif finding.order not in (KOrder.AUTO, asked):
        sys.stderr.write(f"warning: {source}: read as {asked.value}, as asked, but its weights say {finding}\n")


def _mention_leftovers(folder: Path) -> None:
    """Name the files that killed runs left behind; their names and magic show that they are not models."""
    from .files import leftovers

    for path in leftovers(folder):
        sys.stderr.write(f"note: {path} is left from a killed run; remove it\n")


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)  # cleaning up takes no longer than one piece
    raise Stopped(number)


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 bad input or output, 2 wrong usage, 130 and 143 interrupted."""
    print_anything()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        app()
    except ErnieGgufError as exc:
        fail(str(exc), 1)
    except BrokenPipeError:
        # The reader of our output has gone; keep the interpreter from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as exc:
        fail(os_error(exc), 1)
    except MemoryError:
        fail("out of memory", 1)
    except Stopped as stop:
        fail(f"stopped by {signal.Signals(stop.number).name}{stop.left}", 128 + stop.number)
