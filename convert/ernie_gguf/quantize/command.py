"""The command `quantize`: its options, what it prints before, during and after a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..gguf_file.outtype import ExpertType, FloatType, Outtype, VisionTokens
from ..options import (
    AsJson,
    DryRun,
    Mmproj,
    MmprojType,
    OutputTensorType,
    Overwrite,
    TextOnly,
    TokenEmbeddingType,
    VisionTokensOption,
)

if TYPE_CHECKING:
    from ..convert import Job
    from ..plan import Choices, TensorPlan
    from .kernels import Kernels
    from .report import QuantizeSummary
    from .run import QuantizeResult
    from .settings import Settings
    from .target import Mix, MixRequest
    from .text import Calibration


OTHER_MODELS = (
    "quantize is for ERNIE-4.5; for other models with experts use the patched llama.cpp: "
    "`python BUILD_DIR/llama.cpp/convert_hf_to_gguf.py {source} --outtype bf16 --outfile bf16.gguf`, "
    "then `llama-quantize bf16.gguf ccq2.gguf CCQ2`"
)


class TypeSet(str, Enum):
    """Which types a mix may use."""

    ALL = "all"
    STOCK = "stock"


class Device(str, Enum):
    """Where torch computes."""

    CPU = "cpu"
    CUDA = "cuda"


def quantize(  # noqa: PLR0917 - typer makes options of the parameters
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of a BF16 checkpoint, -PT or -Paddle.")],
    calibration: Annotated[
        list[Path],
        typer.Option(metavar="TEXT", help="UTF-8 text like what the model will read; repeat for several files."),
    ],
    outfile: Annotated[
        Path | None,
        typer.Option(
            help="File to write, or a folder for NAME-CCQ2.gguf in it (default: the current one).", show_default=False
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write tables, plots and JSON of every matrix to this folder.", show_default=False
        ),
    ] = None,
    ctx_size: Annotated[int, typer.Option("--ctx-size", "-c", min=64, help="Tokens per calibration sequence.")] = 512,
    max_tokens: Annotated[
        int, typer.Option(min=64, help="Tokens to calibrate with; a longer text is sampled evenly.")
    ] = 262144,
    target_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="The best file of at most this size: 80G, 7.5G (powers of 1000). Chooses a type for every tensor.",
            show_default=False,
        ),
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(
            min=1,
            max=16,
            help="The best experts of at most this many bits per weight; everything else is q8_0.",
            show_default=False,
        ),
    ] = None,
    types: Annotated[
        TypeSet,
        typer.Option(help="stock: only types that every llama.cpp reads; without a size, iq2_s for the experts."),
    ] = TypeSet.ALL,
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=TYPE",
            help="Type of the tensors whose names a regular expression matches; overrides all else; repeatable.",
            show_default=False,
        ),
    ] = None,
    losses: Annotated[
        Path | None,
        typer.Option(
            metavar="REPORT",
            help="An earlier run's --report: its errors say which layers need more bits.",
            show_default=False,
        ),
    ] = None,
    maps: Annotated[
        int, typer.Option(min=1, max=16, help="Code maps tried on every row: 1 is three times as fast, 16 is better.")
    ] = 16,
    device: Annotated[
        Device | None, typer.Option(help="Default: cuda if torch sees an NVIDIA GPU, else cpu.", show_default=False)
    ] = None,
    threads: Annotated[int, typer.Option(min=1, max=256, help="Experts encoded at once on a CPU.")] = (
        os.cpu_count() or 1
    ),
    token_embedding_type: TokenEmbeddingType = None,
    output_tensor_type: OutputTensorType = None,
    mmproj: Mmproj = None,
    mmproj_type: MmprojType = FloatType.BF16,
    vision_experts: Annotated[
        ExpertType, typer.Option(help="Type of the vision experts, which are not calibrated.")
    ] = ExpertType.Q8_0,
    vision_tokens: VisionTokensOption = VisionTokens.ALL,
    text_only: TextOnly = False,
    dry_run: DryRun = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start over instead of resuming an interrupted run.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Quantize the experts of a checkpoint to ccq2 (2 bits), calibrated on TEXT; all other matrices to q8_0.

    With --target-size, --bits, --types or --tensor-type to a mix of types.
    An interrupted run leaves OUTFILE.partial; the same command resumes it.
    """
    from ..convert import check_mmproj, mmproj_outputs, output_path, prepare
    from ..errors import ArchitectureError, QuantizeError
    from ..files import check_output
    from ..plan import choose
    from ..tables import show
    from ..write import written
    from .mix_report import mix_table
    from .needs import needs
    from .preview import Preview, check_source
    from .report import check_report_folder, summary_json, summary_table, write_report
    from .settings import Settings, choose_device
    from .target import mix_json
    from .text import calibration_sequences

    choices = choose(token_embedding_type, output_tensor_type, vision_experts, mmproj_type)
    try:
        job = prepare(source, Outtype.CCQ2, text_only, choices, vision_tokens)
    except ArchitectureError as error:
        raise QuantizeError(f"{error}; {OTHER_MODELS.format(source=source)}") from error
    mix = _mix(job, choices, _mix_request(target_size, bits, types, tensor_type), losses)
    job = mix.job if mix else job
    settings = Settings(choose_device(device and device.value, torch_needed=not dry_run), threads, maps)
    check_source(job)
    path = output_path(job, outfile)
    check_output(path, overwrite)
    check_mmproj(job, path, mmproj)
    if report is not None:
        check_report_folder(report, overwrite)
    length = min(ctx_size, job.config.context)
    text = calibration_sequences(calibration, job.source, job.vocab, length, max_tokens)
    preview = Preview(job, path, text, settings, needs(job.config, text.sequences.size, job.plan.nbytes, settings))
    if dry_run:
        plan = {"mix": mix_json(mix)} if mix else {}
        show(preview.json() | plan if as_json else [*preview.lines(), *(["", *mix_table(mix)] if mix else [])])
        return
    from .progress import display  # these need torch
    from .run import run_quantize

    kernels, note = _prepared(settings)
    _say(*preview.lines(), *([f"note: {note}"] if note else []))
    preview.check_disk()
    vision = written(mmproj_outputs(job, mmproj), threads, overwrite, lambda _: None)
    with vision, display(job) as listen, _resume_note(path, job.config.layers):
        result = run_quantize(job, text, settings, kernels, path, overwrite=overwrite, restart=restart, listen=listen)
    summary = _summary(job, text, settings, result)
    try:
        if report is not None:
            write_report(report, summary)
    finally:
        show(summary_json(summary) if as_json else summary_table(summary))


def _mix_request(
    target_size: str | None, bits: float | None, types: TypeSet, tensor_type: list[str] | None
) -> MixRequest:
    """The options of a mix. Raises BadParameter."""
    from .mix import parse_override
    from .target import MixRequest, parse_target

    if target_size is not None and bits is not None:
        raise typer.BadParameter("give --target-size for the file or --bits for the experts, not both")
    try:
        target = None if target_size is None else parse_target(target_size)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--target-size") from error
    try:
        overrides = tuple(parse_override(each) for each in tensor_type or ())
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--tensor-type") from error
    return MixRequest(target, bits, types is TypeSet.STOCK, overrides)


def _mix(job: Job, choices: Choices, request: MixRequest, losses: Path | None) -> Mix | None:
    """The mix that was asked for, if one was."""
    from dataclasses import replace

    from .preview import check_source
    from .target import choose_mix, read_losses

    if not request.any:
        return None
    check_source(job)
    if losses is not None:
        request = replace(request, losses=read_losses(losses, job.plan))
    return choose_mix(job, request, choices.tensors)


@contextmanager
def _resume_note(outfile: Path, layers: int) -> Iterator[None]:
    """If the block fails, say on stderr what the run has left and how to resume it."""
    from ..errors import Stopped, WorkspaceError
    from ..partial import partial_path
    from .workspace import layers_done

    try:
        yield
    except WorkspaceError:
        raise  # the folder belongs to another run, or is damaged
    except BaseException as error:
        if isinstance(error, Stopped):
            error.left = "; no output was written, run the command again"
        if done := layers_done(partial := partial_path(outfile)):
            kept = f"{done} of {layers} layers are done and kept in {partial}; the same command resumes the run"
            if isinstance(error, Stopped):
                error.left = f": {kept}"
            else:
                _say(f"note: {kept}")
        raise


def _prepared(settings: Settings) -> tuple[Kernels, str]:
    """Set torch up, and choose the kernels."""
    import torch

    from .settings import kernels_for

    torch.set_num_threads(settings.threads)
    torch.backends.cuda.matmul.allow_tf32 = False  # its ten bits are coarser than the errors that the encoder compares
    return kernels_for(settings.device)


def _summary(job: Job, text: Calibration, settings: Settings, result: QuantizeResult) -> QuantizeSummary:
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
        tokens=text.sequences.size,
        device=settings.device,
        settings={
            "maps": settings.maps,
            "passes": settings.passes,
            "damping": settings.percdamp,
            "sequence": text.sequences.shape[1],
        },
        matrices=result.matrices,
        tensor_bits_per_weight={tensor.name: bits([tensor]) for tensor in experts},
        tensor_types={tensor.name: tensor.ggml_type.name.lower() for tensor in experts},
    )


def _say(*lines: str) -> None:
    sys.stderr.write("".join(f"{line}\n" for line in lines))
