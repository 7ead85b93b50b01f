"""Conversion from top to bottom: read headers, plan, write."""

import re
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from gguf import GGUFWriter

from .checkpoint.config import ErnieConfig, read_config
from .checkpoint.shards import TensorHeader, read_headers
from .checkpoint.vocab import Vocab, read_vocab
from .errors import CheckpointError, OutputError
from .files import free_bytes, replacing
from .gguf_file.outtype import Outtype
from .gguf_file.split import add_split_keys, split_paths, split_sizes
from .gguf_file.types import GgmlType
from .gguf_file.writer import add_tensor, unfinished
from .metadata import repacks_two_bits, set_inexact_rows, write_layout, write_metadata
from .plan import Plan, make_plan
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
    source: Path, outtype: Outtype, text_only: bool = False, types: Mapping[str, GgmlType] | None = None
) -> Job:
    """Read a checkpoint's headers and tokenizer and plan its conversion; raises an ErnieGgufError, writes nothing."""
    config, headers = read_checkpoint(source, text_only)
    plan = make_plan(config, headers, outtype, types)
    return Job(source, config, read_vocab(source, config), plan)


def output_path(job: Job, outfile: Path) -> Path:
    """The file to write: in a folder, NAME-OUTTYPE.gguf (upstream's habit, without the size)."""
    if outfile.is_dir():
        return outfile / f"{model_name(job.source)}-{job.plan.outtype.value.upper()}.gguf"
    return outfile


def file_header(job: Job, files: list[Plan], number: int) -> GGUFWriter:
    """Metadata and tensor table of one file; files after the first carry only the split keys."""
    writer, part = GGUFWriter(None, job.config.arch), files[number]
    if number == 0:
        write_metadata(writer, model_name(job.source), job.config, job.vocab, job.plan)
    else:
        write_layout(writer, part)
    if len(files) > 1:
        add_split_keys(writer, number, len(files), len(job.plan.tensors))
    for tensor in part.tensors:
        add_tensor(writer, tensor.name, tensor.shape, tensor.ggml_type, tensor.nbytes)
    return writer


def split_plan(plan: Plan, max_bytes: int | None) -> list[Plan]:
    """The plan of each file."""
    parts = split_sizes([tensor.nbytes for tensor in plan.tensors], max_bytes)
    return [replace(plan, tensors=plan.tensors[part]) for part in parts]


def write_gguf(
    job: Job, outfile: Path, threads: int, overwrite: bool, progress: Progress, *, split_max_bytes: int | None = None
) -> ConvertResult:
    """Write a prepared conversion to `outfile`, or to several files; on failure nothing is left behind."""
    begin = time.monotonic()
    files = split_plan(job.plan, split_max_bytes)
    paths = split_paths(outfile, len(files))
    inexact: dict[str, Inexact] = {}
    with ExitStack() as stack:
        # Renamed in reverse, so that the file users load appears last.
        temporaries = [stack.enter_context(replacing(path, overwrite)) for path in paths]
        if (needed := sum(data_nbytes(part) for part in files)) > (free := free_bytes(outfile.parent)):
            raise OutputError(f"{outfile}: needs {needed} bytes, the disk has {free} free; nothing was written")
        for number, (temporary, part) in enumerate(zip(temporaries, files, strict=True)):
            with unfinished(temporary, file_header(job, files, number)) as (fd, data_offset):
                inexact |= write_tensors(part, fd, data_offset, threads, progress)
        if repacks_two_bits(job.plan):
            set_inexact_rows(temporaries[0], sum(each.missed_rows for each in inexact.values()))
        nbytes = sum(temporary.stat().st_size for temporary in temporaries)
    return ConvertResult(tuple(paths), nbytes, time.monotonic() - begin, inexact)
