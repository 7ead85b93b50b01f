"""The command `quantize`: what it reads, prints before it begins, shows while it runs, and says at its end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ErnieGgufError, OutputError
from ..outtype import FloatType, Outtype

if TYPE_CHECKING:
    from ..convert import Job
    from ..plan import TensorPlan
    from .needs import Needs
    from .report import QuantizeSummary
    from .run import Result
    from .settings import Settings
    from .text import Calibration

_FEW_TOKENS = 5000  # per expert; from some 20,000 on more text gains little


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
        int, typer.Option(min=1, max=16, help="Code maps tried on every row: 1 is 4 times as fast, 16 a little better.")
    ] = 16,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, or cuda for a GPU (default: a GPU if torch sees one).", show_default=False),
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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it would take and do nothing.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin again, even if an interrupted run could be taken up.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTFILE if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Quantize the experts of a checkpoint to ccq2 (2 bits), calibrated on TEXT; all other matrices to q8_0."""
    from ..convert import output_path, prepare  # noqa: PLC0415 - as all commands, see cli
    from ..execute import check_output  # noqa: PLC0415
    from ..report import human, show  # noqa: PLC0415
    from ..types import GgmlType  # noqa: PLC0415

    chosen = {"token_embd.weight": token_embedding_type, "output.weight": output_tensor_type}
    types = {name: GgmlType[kind.name] for name, kind in chosen.items() if kind is not None}
    job = prepare(source, Outtype.CCQ2, text_only, types)
    settings = _settings(device, threads, maps)
    from .needs import needs  # noqa: PLC0415
    from .progress import display  # noqa: PLC0415
    from .report import check_report_folder, summary_json, summary_table, write_report  # noqa: PLC0415
    from .run import check_source  # noqa: PLC0415
    from .run import quantize as run  # noqa: PLC0415
    from .text import calibration_chunks  # noqa: PLC0415

    check_source(job)
    path = output_path(job, outfile or source)
    check_output(path, overwrite)
    if report is not None:
        check_report_folder(report, overwrite)
    text = calibration_chunks(calibration, source, job.config, min(ctx_size, job.config.context), max_tokens)
    required = needs(job.config, text.chunks.size, job.plan.nbytes, settings)
    _say(_plan_text(job, text, required, settings, human))
    if dry_run:
        return
    _check_disk(path, required, human)
    with display(job) as listen:
        result = run(job, text, settings, path, overwrite=overwrite, restart=restart, listen=listen)
    summary = _summary(job, text, settings, result)
    if report is not None:
        write_report(report, summary)
    show(summary_json(summary) if as_json else summary_table(summary))


def _settings(device: str | None, threads: int, maps: int) -> Settings:
    try:
        import torch  # noqa: PLC0415
    except ImportError as exc:
        raise ExtraError("quantize needs torch: pip install 'ernie-gguf[quantize]' (see README.md)") from exc
    from .settings import Settings  # noqa: PLC0415

    if device not in (None, "cpu", "cuda"):
        raise typer.BadParameter(f"{device!r} is neither cpu nor cuda", param_hint="--device")
    gpu = torch.cuda.is_available()
    if device == "cuda" and not gpu:
        raise ExtraError("--device cuda: this torch sees no GPU; install a torch with CUDA, or give --device cpu")
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = False  # ten bits would drown the errors that are to be made small
    settings = Settings(device or ("cuda" if gpu else "cpu"), threads, maps)
    if settings.device == "cpu" and not settings.compiled:
        _say("note: the compiled search is not there, torch takes its place and is 30 times as slow: run make build")
    return settings


def _plan_text(job: Job, text: Calibration, required: Needs, settings: Settings, human: Callable[[float], str]) -> str:
    moe = job.config.moe
    experts = moe.experts if moe else 0
    per_expert = text.chunks.size * (moe.used if moe else 0) // max(1, experts)
    few = "" if per_expert >= _FEW_TOKENS else "\nnote: that is little; some 20,000 per expert are a good measure"
    gpu = f", {human(required.device)} on the GPU" if required.device else ""
    return (
        f"{job.config.layers} layers, {experts} experts; {text.chunks.size:,} of {text.tokens:,} tokens of text, about "
        f"{per_expert:,} per expert{few}\n"
        f"needs about {human(required.memory)} of memory{gpu} and {human(required.disk)} on the disk "
        f"(the file: {human(job.plan.nbytes)}); device {settings.device}, {settings.threads} threads"
    )


def _check_disk(path: Path, required: Needs, human: Callable[[float], str]) -> None:
    from ..gguf_io import free_bytes  # noqa: PLC0415

    partial = path.with_name(path.name + ".partial")
    taken = sum(file.stat().st_blocks * 512 for file in partial.iterdir()) if partial.is_dir() else 0
    if required.disk > (free := free_bytes(path.parent)) + taken:
        raise OutputError(f"{path}: needs {human(required.disk)}, the disk has {human(free)} free; nothing was written")


def _summary(job: Job, text: Calibration, settings: Settings, result: Result) -> QuantizeSummary:
    from .report import QuantizeSummary  # noqa: PLC0415
    from .run import is_expert  # noqa: PLC0415

    def bits(tensors: list[TensorPlan]) -> float:
        return round(8 * sum(tensor.nbytes for tensor in tensors) / sum(tensor.elements for tensor in tensors), 4)

    experts = [tensor for tensor in job.plan.tensors if is_expert(tensor)]
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


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
