"""Conversion from top to bottom: read headers, plan, write."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

from gguf import GGUFWriter

from .ccq2 import native
from .checkpoint.config import ErnieConfig, read_config
from .checkpoint.find_k_order import KOrderFinding, find_k_order, raise_unclear
from .checkpoint.generation import NO_SAMPLING, Sampling, read_sampling
from .checkpoint.k_order import KOrder
from .checkpoint.names import collect
from .checkpoint.shards import TensorHeader, read_headers, stale_weights
from .checkpoint.source import checkpoint_folder
from .checkpoint.vision_config import read_preprocessor
from .checkpoint.vocab import Vocab, read_vocab
from .errors import CheckpointError, OutputError
from .files import free_bytes, replacing
from .gguf_file.outtype import Outtype, VisionTokens
from .gguf_file.split import add_split_keys, split_paths, split_sizes
from .gguf_file.types import GgmlType
from .gguf_file.writer import add_tensor, unfinished
from .mapping import map_tensors
from .metadata import repacks_two_bits, set_inexact_rows, write_layout, write_metadata, write_projector
from .plan import Choices, Plan, make_plans, resolve_auto
from .transform import Inexact
from .write import Progress, data_nbytes, write_tensors

_NUMPY_RATE = 48_000  # weights per second that numpy encodes as ccq2, whatever the threads: 65 s for the example
_SPLIT_NAME = re.compile(r"(ERNIE.*?)-TP(\d+)(-Paddle)?$", re.IGNORECASE)


@dataclass(frozen=True)
class Job:
    """Everything known before the first byte is written."""

    source: Path
    config: ErnieConfig
    vocab: Vocab
    plan: Plan
    projector: Plan | None = None  # of a VL checkpoint: the mmproj
    vision_tokens: VisionTokens = VisionTokens.ALL
    k_order: KOrder = KOrder.NATURAL  # to read its 2-bit experts in; AUTO: unclear, nothing can be written
    k_order_finding: KOrderFinding | None = None  # what their weights say; None without such experts
    sampling: Sampling = NO_SAMPLING
    weights_notes: tuple[str, ...] = ()

    @property
    def notes(self) -> list[str]:
        """What a user should know about the checkpoint's small files."""
        return [*self.weights_notes, *self.vocab.notes, *self.sampling.notes]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of all files."""
        return self.plan.nbytes + (self.projector.nbytes if self.projector else 0)


@dataclass(frozen=True)
class ConvertResult:
    """A finished conversion."""

    paths: tuple[Path, ...]
    nbytes: int
    seconds: float
    inexact: dict[str, Inexact]  # of the tensors that were repacked, not re-quantized


def model_name(source: Path) -> str:
    """The repository's name: the folder's, or in a download cache that of the folder above `snapshots`."""
    path = source.resolve()
    name = path.parents[1].name.rsplit("--", 1)[-1] if path.parent.name == "snapshots" else path.name
    return os.fsencode(name).decode(errors="replace")  # bytes of a path need not be text


def refuse_split(source: Path) -> None:
    """Refuse repositories that were split for several GPUs, by their names and folders."""
    named = _SPLIT_NAME.fullmatch(model_name(source))
    ranks = sorted(path.name for path in source.glob("rank*") if path.is_dir()) if source.is_dir() else []
    if not named and not ranks:
        return
    what = f"split for {named[2]} GPUs" if named else f"split into folders per GPU ({ranks[0]}, …)"
    use = (
        f"{named[1]}{named[3] or ''}"
        if named and "2Bits" in named[1]
        else "the -Paddle, -2Bits-Paddle or -PT repository"
    )
    raise CheckpointError(
        f"{source}: {what}: each part of down_proj has scales of its own along its rows, so the parts cannot be joined "
        f"into one matrix without quantizing again; use {use}"
    )


def read_checkpoint(source: Path, text_only: bool = False) -> tuple[ErnieConfig, dict[str, TensorHeader]]:
    """A checkpoint's configuration and tensor headers; raises an ErnieGgufError."""
    source = checkpoint_folder(source)
    refuse_split(source)
    return read_config(source, text_only), read_headers(source)


def prepare(
    source: Path,
    outtype: Outtype,
    text_only: bool = False,
    choices: Choices | None = None,
    vision_tokens: VisionTokens = VisionTokens.ALL,
    *,
    k_order: KOrder = KOrder.AUTO,
    look: bool = True,
) -> Job:
    """Read a checkpoint's headers and tokenizer and plan its conversion; raises an ErnieGgufError, writes nothing.

    With 2-bit experts some of their weights are read too, to find their order of K; `k_order` overrules it. Without
    `look` headers are enough, and the plan is that of the natural order unless `k_order` says otherwise.
    """
    source = checkpoint_folder(source)
    config, headers = read_checkpoint(source, text_only)
    mapped = map_tensors(config, headers)
    finding = find_k_order(config, collect(headers, config).sources) if look else None
    order = k_order
    if k_order is KOrder.AUTO:
        order = finding.order if finding else KOrder.NATURAL
    plan, projector = make_plans(mapped, resolve_auto(headers), outtype, choices, order)
    return Job(
        source,
        config,
        read_vocab(source, config),
        plan,
        projector,
        vision_tokens,
        k_order=order,
        k_order_finding=finding,
        sampling=read_sampling(source),
        weights_notes=tuple(stale_weights(source)),
    )


def check_mmproj(job: Job, outfile: Path, mmproj: Path | None) -> None:
    """Raises OutputError unless there is a name for each file of the model, and no other."""
    if job.projector is not None and mmproj is None:
        raise OutputError(
            f"{job.source}: a vision-language model makes two files: give --mmproj FILE for its vision encoder, "
            "or --text-only"
        )
    if job.projector is None and mmproj is not None:
        raise OutputError(f"{mmproj}: --mmproj is for vision-language (VL) checkpoints, without --text-only")
    if mmproj is not None and mmproj.absolute() == outfile.absolute():
        raise OutputError(f"{mmproj}: --mmproj and --outfile name the same file")


def output_path(job: Job, outfile: Path | None) -> Path:
    """The file to write: in a folder, by default the current one, NAME-OUTTYPE.gguf (upstream's habit)."""
    if outfile is None:
        outfile = Path()
        if outfile.resolve() == job.source.resolve():
            raise OutputError("the current folder is the checkpoint, which is left as it is: give --outfile")
    if outfile.is_dir():
        return outfile / f"{model_name(job.source)}-{job.plan.label or job.plan.outtype.value.upper()}.gguf"
    return outfile


def file_header(job: Job, files: list[Plan], number: int) -> GGUFWriter:
    """Metadata and tensor table of one file; files after the first carry only the split keys."""
    writer, part = GGUFWriter(None, job.config.arch), files[number]
    if number == 0:
        name, sampling = model_name(job.source), job.sampling.settings
        write_metadata(writer, name, job.config, job.vocab, job.plan, tokens=job.vision_tokens, sampling=sampling)
    else:
        write_layout(writer, part)
    if len(files) > 1:
        add_split_keys(writer, number, len(files), len(job.plan.tensors))
    return _with_tensors(writer, part)


def projector_header(job: Job, plan: Plan) -> GGUFWriter:
    """Metadata and tensor table of the mmproj."""
    writer = GGUFWriter(None, "clip")
    write_projector(writer, model_name(job.source), job.config, read_preprocessor(job.source), plan)
    return _with_tensors(writer, plan)


@contextmanager
def projector_file(job: Job, mmproj: Path | None, threads: int, overwrite: bool) -> Iterator[None]:
    """Write the mmproj of a VL model; it appears under its name if the block succeeds."""
    if job.projector is None or mmproj is None:
        yield
        return
    with replacing(mmproj, overwrite) as temporary:
        with unfinished(temporary, projector_header(job, job.projector)) as (fd, data_offset):
            write_tensors(job.projector, fd, data_offset, threads, lambda _: None)
        yield


def _with_tensors(writer: GGUFWriter, plan: Plan) -> GGUFWriter:
    for tensor in plan.tensors:
        add_tensor(writer, tensor.name, tensor.file_shape or tensor.shape, tensor.ggml_type, tensor.nbytes)
    return writer


def slow_note(plan: Plan) -> str:
    """That numpy has to encode ccq2, how long it takes and how to mend it; nothing if the compiled encoder is there."""
    weights = sum(
        tensor.elements
        for tensor in plan.tensors
        if tensor.ggml_type is GgmlType.CCQ2 and not any(part.source.storage.quantized for part in tensor.parts)
    )
    if not weights or native.library() is not None:
        return ""
    return (
        f"the compiled encoder is missing, and numpy takes about {timedelta(seconds=weights // _NUMPY_RATE)} for "
        f"{weights:,} weights, 80 times as long: `make search` in a checkout or `ernie-gguf build` compiles it"
    )


def _check_disk(paths: list[Path], plans: list[Plan]) -> None:
    """Raises OutputError if a disk has no room for what goes there."""
    needed: dict[int, int] = {}
    for path, plan in zip(paths, plans, strict=True):
        device = path.parent.stat().st_dev
        needed[device] = needed.get(device, 0) + data_nbytes(plan)
        if needed[device] > (free := free_bytes(path.parent)):
            raise OutputError(f"{path}: needs {needed[device]} bytes, the disk has {free} free; nothing was written")


def split_plan(plan: Plan, max_bytes: int | None) -> list[Plan]:
    """The plan of each file."""
    parts = split_sizes([tensor.nbytes for tensor in plan.tensors], max_bytes)
    return [replace(plan, tensors=plan.tensors[part]) for part in parts]


def output_files(
    job: Job, outfile: Path, split_max_bytes: int | None, mmproj: Path | None
) -> tuple[list[Path], list[Plan], list[GGUFWriter]]:
    """Name, plan and header of every file: the model's, then that of its eyes."""
    check_mmproj(job, outfile, mmproj)
    parts = split_plan(job.plan, split_max_bytes)
    writers = [file_header(job, parts, number) for number in range(len(parts))]
    paths = split_paths(outfile, len(parts))
    if job.projector is not None and mmproj is not None:
        parts.append(job.projector)
        writers.append(projector_header(job, job.projector))
        paths.append(mmproj)
    return paths, parts, writers


def require_k_order(job: Job) -> None:
    """Raises CheckpointError where 2-bit experts do not tell their order of K and nobody has said it."""
    if job.k_order is KOrder.AUTO and job.k_order_finding is not None:
        raise_unclear(job.k_order_finding, str(job.source))


def write_gguf(
    job: Job,
    outfile: Path,
    threads: int,
    overwrite: bool,
    progress: Progress,
    *,
    split_max_bytes: int | None = None,
    mmproj: Path | None = None,
) -> ConvertResult:
    """Write a prepared conversion to `outfile`, or to several files, and the vision encoder of a VL model to `mmproj`.

    On failure nothing is left behind.
    """
    begin = time.monotonic()
    require_k_order(job)
    paths, parts, writers = output_files(job, outfile, split_max_bytes, mmproj)
    inexact: dict[str, Inexact] = {}
    with ExitStack() as stack:
        # Renamed in reverse, so that the file users load appears last.
        temporaries = [stack.enter_context(replacing(path, overwrite)) for path in paths]
        _check_disk(paths, parts)
        for temporary, part, writer in zip(temporaries, parts, writers, strict=True):
            with unfinished(temporary, writer) as (fd, data_offset):
                inexact |= write_tensors(part, fd, data_offset, threads, progress)
        if repacks_two_bits(job.plan):
            set_inexact_rows(temporaries[0], sum(each.missed_rows for each in inexact.values()))
        nbytes = sum(temporary.stat().st_size for temporary in temporaries)
    return ConvertResult(tuple(paths), nbytes, time.monotonic() - begin, inexact)
