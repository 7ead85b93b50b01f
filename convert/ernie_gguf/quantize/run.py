"""The quantizer from top to bottom: plan, calibration text, layer by layer, file.

Every layer is run once: attention with the checkpoint's weights, then its experts, encoded as they are met. What the
next layer gets has gone through encoded experts, so that it can make up for what they lost.
"""

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoint import ShardReader
from ..convert import Job, header
from ..errors import ErnieGgufError
from ..execute import check_output, data_nbytes, pwrite, write_tensors
from ..gguf_io import padded
from ..packing import COLUMNS, FIRST_ROW, ROWS
from ..plan import Plan, TensorPlan
from ..pool import POOL
from .encoder import Pipeline
from .experts import ActivationError, EncodedExpert, ExpertEncoder, LayerInput
from .kernels import CompiledKernels, Kernels, TorchKernels, make_books
from .model import Layer, Weights, embed
from .needs import experts_at_once
from .settings import Settings
from .stats import MatrixStats
from .text import Calibration
from .workspace import Workspace

_SEQUENCE_TOKENS = 8192  # tokens that go through attention at once


class QuantizeError(ErnieGgufError):
    """The checkpoint has nothing to quantize, or is quantized already."""


@dataclass(frozen=True)
class Step:
    """Progress: matrices of an expert of `layer` are done; with `resumed` they were in an earlier run."""

    layer: int
    expert: int
    stats: tuple[MatrixStats, ...]
    resumed: bool = False


Listener = Callable[[Step], None]


@dataclass(frozen=True)
class Result:
    """A finished run; `seconds` are those of this process."""

    path: Path
    nbytes: int
    seconds: float
    matrices: tuple[MatrixStats, ...]


def check_source(job: Job) -> None:
    """Raises QuantizeError unless the checkpoint is a MoE in floats."""
    if job.config.moe is None:
        raise QuantizeError(
            f"{job.source}: a dense model: ccq2 is for experts, and it has none; use convert --outtype q8_0"
        )
    for tensor in job.plan.tensors:
        for part in tensor.parts:
            if part.source.packing not in (ROWS, COLUMNS, FIRST_ROW):
                raise QuantizeError(
                    f"{job.source}: is quantized already: {part.source.name} is {part.source.packing.name}; expected "
                    "a BF16, F16 or F32 checkpoint. To run it as it is, use convert"
                )


def _fingerprint(job: Job, chunks: np.ndarray[Any, Any], settings: Settings) -> dict[str, Any]:
    """What must be the same for a run to go on where another stopped."""
    shards = sorted({path for tensor in job.plan.tensors for part in tensor.parts for path in part.source.paths})
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in shards]
    tensors = [(tensor.name, tensor.shape, tensor.kind.name) for tensor in job.plan.tensors]

    def digest(value: object) -> str:
        return hashlib.sha256(repr(value).encode()).hexdigest()

    return {
        "checkpoint": digest((stats, tensors, job.config)),
        "calibration text": hashlib.sha256(chunks.tobytes()).hexdigest(),
        "settings": {"maps": settings.maps, "passes": settings.passes, "damping": settings.damping},
    }


class _Run:
    """One run: the open files and what they are used with."""

    def __init__(self, job: Job, settings: Settings, reader: ShardReader, work: Workspace, listen: Listener) -> None:
        self.job = job
        self.settings = settings
        self.weights = Weights(job.plan, reader, settings.device)
        self.work = work
        self.listen = listen
        books = make_books(POOL[: settings.maps], settings.device)
        kernels: Kernels = CompiledKernels() if settings.compiled else TorchKernels()
        self.pipeline = Pipeline(books, kernels, settings.passes, settings.damping)

    def layer(self, number: int, x: torch.Tensor, out: torch.Tensor) -> Iterator[EncodedExpert]:
        """Carry the activations x [S, L, hidden] through a layer into `out`; gives each expert as it is encoded."""
        layer = Layer(self.weights, self.job.config, number)
        step = max(1, _SEQUENCE_TOKENS // x.shape[1])
        hidden = x.shape[2]
        h = torch.empty(0)
        if layer.moe is not None:
            h = self.work.mapped("scratch.f32", (x.shape[0] * x.shape[1], hidden), new=True)
        experts, shares = [], []
        for s in range(0, len(x), step):
            attended = layer.attend(x[s : s + step].to(self.settings.device))
            normed = layer.ffn_norm(attended)
            if layer.moe is None:
                out[s : s + step] = (attended + layer.mlp(normed)).to(out.device)
                continue
            out[s : s + step] = (attended + layer.shared(normed)).to(out.device)
            flat = normed.flatten(0, 1)
            h[s * x.shape[1] :][: len(flat)] = flat.to(h.device)
            chosen, share = layer.route(flat)
            experts.append(chosen)
            shares.append(share)
        if layer.moe is None:
            return
        inputs = LayerInput(
            h,
            torch.cat(experts).to(h.device),
            torch.cat(shares).to(h.device),
            self.settings.device,
        )
        encoder = ExpertEncoder(self.weights, number, inputs, self.pipeline)
        flat_out = out.view(-1, hidden)
        for encoded in self._encoded(encoder, layer.moe.experts, inputs):
            flat_out[encoded.tokens] += encoded.y.to(flat_out.device)  # an expert sees a token once: no two writes
            yield encoded

    def _encoded(self, encoder: ExpertEncoder, count: int, inputs: LayerInput) -> Iterator[EncodedExpert]:
        """All experts in order: on the CPU one per thread, on a GPU as many at once as its memory holds."""
        config, on_cpu = self.job.config, self.settings.device == "cpu"
        at_once = 1 if on_cpu else experts_at_once(config, inputs.experts.numel() // count)
        batches = [range(e, min(e + at_once, count)) for e in range(0, count, at_once)]
        with _workers(self.settings) as pool:
            pending: deque[Future[list[EncodedExpert]]] = deque()
            try:
                for batch in batches:
                    pending.append(pool.submit(_without_gradients, encoder.encode, batch))
                    if len(pending) > (self.settings.threads if on_cpu else 0):
                        yield from pending.popleft().result()
                while pending:
                    yield from pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()


def _without_gradients(
    encode: Callable[[Sequence[int]], list[EncodedExpert]], batch: Sequence[int]
) -> list[EncodedExpert]:
    with torch.inference_mode():
        return encode(batch)


def _workers(settings: Settings) -> ThreadPoolExecutor:
    """On the CPU workers whose torch uses one thread each; on a GPU one."""
    if settings.device == "cpu":
        return ThreadPoolExecutor(settings.threads, initializer=torch.set_num_threads, initargs=(1,))
    return ThreadPoolExecutor(1)


def _offsets(plan: Plan, data_offset: int) -> dict[str, int]:
    offsets, at = {}, data_offset
    for tensor in plan.tensors:
        offsets[tensor.name] = at
        at += padded(tensor.nbytes)
    return offsets


def is_expert(tensor: TensorPlan) -> bool:
    """Whether it is quantized here; all others are written as `convert` writes them."""
    return "_exps." in tensor.name


def _embed(run: _Run, chunks: torch.Tensor, out: torch.Tensor) -> None:
    step = max(1, _SEQUENCE_TOKENS // chunks.shape[1])
    for s in range(0, len(chunks), step):
        out[s : s + step] = embed(run.weights, chunks[s : s + step]).to(out.device)


def _write_expert(fd: int, plan: Plan, offsets: dict[str, int], layer: int, encoded: EncodedExpert) -> None:
    for projection, rows in encoded.data.items():
        name = f"blk.{layer}.ffn_{projection}_exps.weight"
        pwrite(fd, memoryview(rows.data).cast("B"), offsets[name] + encoded.expert * rows.nbytes)


def _check_finite(x: torch.Tensor, layer: int) -> None:
    # A sum is finite if all of its terms are (their squares are far from overflow), and needs no mask of x's size.
    if not bool(torch.isfinite(x.sum(dtype=torch.float64))):
        raise ActivationError(
            f"layer {layer}: its result is not finite for the calibration text; the checkpoint's weights up to there "
            "are damaged, or overflow float32"
        )


def quantize(
    job: Job,
    calibration: Calibration,
    settings: Settings,
    outfile: Path,
    *,
    overwrite: bool,
    restart: bool,
    listen: Listener,
) -> Result:
    """Make `outfile` of a checkpoint that `check_source` takes; an earlier interrupted run is taken up.

    Raises an ErnieGgufError for anything wrong with the input, and then leaves nothing behind.
    """
    check_output(outfile, overwrite)
    chunks = torch.from_numpy(calibration.chunks).long()
    shape = (*chunks.shape, job.config.hidden)
    begun = time.monotonic()
    fingerprint = _fingerprint(job, calibration.chunks, settings)
    path = outfile.with_name(outfile.name + ".partial")
    with torch.inference_mode(), ShardReader() as reader, Workspace(path, fingerprint, restart) as work:
        run = _Run(job, settings, reader, work, listen)
        if work.done == 0:
            work.begin_model(header(job, [job.plan], 0), data_nbytes(job.plan))
        fd = os.open(work.model, os.O_RDWR | os.O_CLOEXEC)
        try:
            if work.done == 0:
                write_tensors(job.plan, fd, work.data_offset, settings.threads, lambda _: None, skip=is_expert)
                _embed(run, chunks, work.activations(0, shape, new=True))
            offsets = _offsets(job.plan, work.data_offset)
            for stats in work.stats:
                listen(Step(stats.layer, stats.expert, (stats,), resumed=True))
            for number in range(work.done, job.config.layers):
                layer_begun = time.monotonic()
                out = work.activations(number + 1, shape, new=True)
                found: list[MatrixStats] = []
                for encoded in run.layer(number, work.activations(number, shape), out):
                    _write_expert(fd, job.plan, offsets, number, encoded)
                    found += encoded.stats
                    listen(Step(number, encoded.expert, encoded.stats))
                _check_finite(out, number)
                work.finish_layer(number, found, time.monotonic() - layer_begun, fd)
            work.publish(fd, outfile)
        finally:
            os.close(fd)
        return Result(outfile, outfile.stat().st_size, time.monotonic() - begun, tuple(work.stats))
