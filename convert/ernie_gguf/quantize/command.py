"""The command `quantize`: what it reads, prints before it begins, shows while it runs, and says at its end."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ErnieGgufError
from ..gguf_file.outtype import FloatType, Outtype

if TYPE_CHECKING:
    from ..convert import Job
    from ..plan import TensorPlan
    from .report import QuantizeSummary
    from .run import Result
    from .settings import Settings
    from .text import Calibration


class Device(str, Enum):
    """Where torch computes."""

    CPU = "cpu"
    CUDA = "cuda"


class ExtraError(ErnieGgufError):
    """torch is not installed, or not able to do what was asked."""


def quantize(  # noqa: PLR0917 - typer makes options of the parameters
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of a BF16 checkpoint, -PT or -Paddle.")],
    calibration: Annotated[
        list[Path], typer.Option(metavar="TEXT", help="UTF-8 text like what the model will read; may be repeated.")
    ],
    outfile: Annotated[
        Path | None,
        typer.Option(help="File to write, or a folder for NAME-CCQ2.gguf in it (default: SRC).", show_default=False),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Leave tables, pictures and JSON of every matrix here.", show_default=False),
    ] = None,
    ctx_size: Annotated[int, typer.Option("--ctx-size", "-c", min=64, help="Tokens of a calibration sequence.")] = 512,
    max_tokens: Annotated[
        int, typer.Option(min=64, help="Tokens to calibrate with; of a longer text an even selection.")
    ] = 262144,
    maps: Annotated[
        int, typer.Option(min=1, max=16, help="Code maps tried on every row: 1 is three times as fast, 16 are better.")
    ] = 16,
    device: Annotated[
        Device | None, typer.Option(help="Default: cuda if torch sees an NVIDIA GPU, else cpu.", show_default=False)
    ] = None,
    threads: Annotated[int, typer.Option(min=1, max=256, help="Experts worked on at once on a CPU.")] = (
        os.cpu_count() or 1
    ),
    token_embedding_type: Annotated[
        FloatType | None, typer.Option(help="Type of token_embd.weight (default: q8_0).", show_default=False)
    ] = None,
    output_tensor_type: Annotated[
        FloatType | None, typer.Option(help="Type of output.weight (default: q8_0).", show_default=False)
    ] = None,
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Take the language model of a vision-language (VL) checkpoint.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it would take and write nothing.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin again where else an interrupted run would be taken up.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTFILE if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result, or the plan, as JSON.")] = False,
) -> None:
    """Quantize the experts of a checkpoint to ccq2 (2 bits), calibrated on TEXT; all other matrices to q8_0.

    An interrupted run leaves OUTFILE.partial; the same command goes on from there.
    """
    from ..convert import output_path, prepare
    from ..files import check_output
    from ..gguf_file.types import GgmlType
    from ..report import show

    chosen = {"token_embd.weight": token_embedding_type, "output.weight": output_tensor_type}
    types = {name: GgmlType[kind.name] for name, kind in chosen.items() if kind is not None}
    job = prepare(source, Outtype.CCQ2, text_only, types)
    settings = _settings(device, threads, maps)
    from .needs import needs
    from .preview import Preview
    from .progress import display
    from .report import check_report_folder, summary_json, summary_table, write_report
    from .run import check_source
    from .run import quantize as run
    from .text import calibration_chunks

    check_source(job)
    path = output_path(job, outfile or source)
    check_output(path, overwrite)
    if report is not None:
        check_report_folder(report, overwrite)
    text = calibration_chunks(calibration, source, job.config, min(ctx_size, job.config.context), max_tokens)
    preview = Preview(job, path, text, settings, needs(job.config, text.chunks.size, job.plan.nbytes, settings))
    if dry_run:
        show(preview.json() if as_json else preview.lines())
        return
    _say(*preview.lines())
    preview.check_disk()
    with display(job) as listen, _told_what_is_kept(path, job.config.layers):
        result = run(job, text, settings, path, overwrite=overwrite, restart=restart, listen=listen)
    summary = _summary(job, text, settings, result)
    try:
        if report is not None:
            write_report(report, summary)
    finally:
        show(summary_json(summary) if as_json else summary_table(summary))


@contextmanager
def _told_what_is_kept(outfile: Path, layers: int) -> Iterator[None]:
    """If the block fails, say on stderr what an interrupted run has left, and how to go on."""
    from .workspace import WorkspaceError, layers_done, partial_path

    try:
        yield
    except WorkspaceError:
        raise  # the folder is not of this run, or is damaged
    except BaseException:
        if done := layers_done(partial := partial_path(outfile)):
            _say(f"note: {done} of {layers} layers are done and kept in {partial}; the same command goes on from there")
        raise


def _settings(device: Device | None, threads: int, maps: int) -> Settings:
    try:
        import torch
    except ImportError as exc:
        raise ExtraError("quantize needs torch: pip install 'ernie-gguf[quantize]' (see README.md)") from exc
    from .settings import Settings

    gpu = torch.cuda.is_available()
    if device is Device.CUDA and not gpu:
        raise ExtraError("--device cuda: this torch sees no GPU; install a torch with CUDA, or give --device cpu")
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = False  # ten bits would drown the errors that are to be made small
    settings = Settings((device or (Device.CUDA if gpu else Device.CPU)).value, threads, maps)
    if settings.device == "cpu" and not settings.compiled:
        _say("note: the compiled search is not there, torch takes its place and six times as long: run make search")
    return settings


def _summary(job: Job, text: Calibration, settings: Settings, result: Result) -> QuantizeSummary:
    from .report import QuantizeSummary

    def bits(tensors: list[TensorPlan]) -> float:
        return round(8 * sum(tensor.nbytes for tensor in tensors) / sum(tensor.elements for tensor in tensors), 4)

    experts = [tensor for tensor in job.plan.tensors if tensor.is_expert]
    return QuantizeSummary(
        path=result.path,
        nbytes=result.nbytes,
        bits_per_weight=bits(list(job.plan.tensors)),
        expert_bits_per_weight=bits(experts),
        seconds=result.seconds,
        tokens=text.chunks.size,
        device=settings.device,
        settings={
            "maps": settings.maps,
            "passes": settings.passes,
            "damping": settings.damping,
            "sequence": text.chunks.shape[1],
        },
        matrices=result.matrices,
        tensor_bits_per_weight={tensor.name: bits([tensor]) for tensor in experts},
    )


def _say(*lines: str) -> None:
    sys.stderr.write("".join(f"{line}\n" for line in lines))
