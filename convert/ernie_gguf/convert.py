"""Conversion from top to bottom: read headers, plan, write."""

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from gguf import GGUFWriter

from .checkpoint.config import ErnieConfig, read_config
from .checkpoint.shards import TensorHeader, read_headers
from .checkpoint.vision_config import read_preprocessor
from .checkpoint.vocab import Vocab, read_vocab
from .errors import CheckpointError, OutputError
from .files import free_bytes, replacing
from .gguf_file.outtype import Outtype, VisionTokens
from .gguf_file.split import add_split_keys, split_paths, split_sizes
from .gguf_file.writer import add_tensor, unfinished
from .metadata import repacks_two_bits, set_inexact_rows, write_layout, write_metadata, write_projector
from .plan import Choices, Plan, make_plans
from .transform import Inexact
from .write import Progress, data_nbytes, write_tensors

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
    if path.parent.name == "snapshots":
        return path.parents[1].name.rsplit("--", 1)[-1]
    return path.name


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
    refuse_split(source)
    return read_config(source, text_only), read_headers(source)


def prepare(
    source: Path,
    outtype: Outtype,
    text_only: bool = False,
    choices: Choices | None = None,
    vision_tokens: VisionTokens = VisionTokens.ALL,
) -> Job:
    """Read a checkpoint's headers and tokenizer and plan its conversion; raises an ErnieGgufError, writes nothing."""
    config, headers = read_checkpoint(source, text_only)
    plan, projector = make_plans(config, headers, outtype, choices)
    return Job(source, config, read_vocab(source, config), plan, projector, vision_tokens)


def check_mmproj(job: Job, outfile: Path, mmproj: Path | None) -> None:
    """Raises OutputError unless there is a name for each file of the model, and no other."""
    if job.projector is not None and mmproj is None:
        raise OutputError(
            f"{job.source}: a vision-language model makes two files: give --mmproj FILE for its eyes, or --text-only"
        )
    if job.projector is None and mmproj is not None:
        raise OutputError(f"{mmproj}: --mmproj is for vision-language (VL) checkpoints, without --text-only")
    if mmproj is not None and mmproj.absolute() == outfile.absolute():
        raise OutputError(f"{mmproj}: --mmproj and --outfile name the same file")


def output_path(job: Job, outfile: Path) -> Path:
    """The file to write: in a folder, NAME-OUTTYPE.gguf (upstream's habit, without the size)."""
    if outfile.is_dir():
        return outfile / f"{model_name(job.source)}-{job.plan.label or job.plan.outtype.value.upper()}.gguf"
    return outfile


def file_header(job: Job, files: list[Plan], number: int) -> GGUFWriter:
    """Metadata and tensor table of one file; files after the first carry only the split keys."""
    writer, part = GGUFWriter(None, job.config.arch), files[number]
    if number == 0:
        write_metadata(writer, model_name(job.source), job.config, job.vocab, job.plan, tokens=job.vision_tokens)
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
    """Write a prepared conversion to `outfile`, or to several files, and the eyes of a VL model to `mmproj`.

    On failure nothing is left behind.
    """
    begin = time.monotonic()
    check_mmproj(job, outfile, mmproj)
    parts = split_plan(job.plan, split_max_bytes)
    writers = [file_header(job, parts, number) for number in range(len(parts))]
    paths = split_paths(outfile, len(parts))
    if job.projector is not None and mmproj is not None:
        parts.append(job.projector)
        writers.append(projector_header(job, job.projector))
        paths.append(mmproj)
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
