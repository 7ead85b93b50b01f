"""The quantizer from top to bottom: plan, calibration text, layer by layer, file.

Every layer is run once: attention with the checkpoint's weights, then its experts, encoded as they are met. What the
next layer gets has gone through encoded experts, so that it can make up for what they lost.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..ccq2.code_maps import CODE_MAPS
from ..checkpoint.config import MoeConfig
from ..checkpoint.shards import ShardReader
from ..convert import Job, file_header, model_name
from ..errors import ErnieGgufError, OutputError
from ..files import check_output, pwrite
from ..write import data_nbytes, offsets, write_tensors
from .encoder import Pipeline
from .experts import ActivationError, EncodedExpert, ExpertEncoder, LayerInput
from .kernels import kernels_for, make_books
from .model import Layer, Weights, embed
from .needs import experts_at_once, fits_device
from .settings import Settings
from .stats import MatrixStats
from .text import Calibration
from .workers import Workers
from .workspace import Workspace, partial_path

_EMBED_TOKENS = 8192  # at once
_SEQUENCE_TOKENS = {"cpu": 1024, "cuda": 8192}  # tokens that a worker carries through attention at once

# In the file, so that nobody takes it for a plain one: how much text it saw, how many code maps each row could take.
TOKENS_KEY = "ernie_gguf.calibration.tokens"
MAPS_KEY = "ernie_gguf.calibration.maps"


class QuantizeError(ErnieGgufError):
    """The checkpoint has nothing to quantize, or is quantized already."""


@dataclass(frozen=True)
class Step:
    """Progress: an expert of `layer` is done; without an expert, the layers up to there were, by an interrupted run."""

    layer: int
    expert: int | None
    stats: tuple[MatrixStats, ...]


Listener = Callable[[Step], None]


@dataclass(frozen=True)
class Result:
    """A finished run; `seconds` are with those of the interrupted runs that it took up."""

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
            if part.source.storage.quantized:
                raise QuantizeError(
                    f"{job.source}: is quantized already: {part.source.name} is {part.source.storage.name}; expected "
                    "a BF16, F16 or F32 checkpoint. To run it as it is, use convert"
                )


def _fingerprint(job: Job, chunks: np.ndarray[Any, Any], settings: Settings) -> dict[str, Any]:
    """What must be the same for a run to go on where another stopped.

    Device and threads may differ: that changes nothing, or roundings.
    """
    paths = {path for tensor in job.plan.tensors for part in tensor.parts for path in part.source.paths}
    paths |= {path for path in job.source.iterdir() if path.suffix in (".json", ".model")}
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(paths)]
    kinds = [(tensor.name, tensor.shape, tensor.ggml_type.name) for tensor in job.plan.tensors]

    def digest(value: object) -> str:
        return hashlib.sha256(repr(value).encode()).hexdigest()

    return {
        "checkpoint": digest((model_name(job.source), files)),
        "tensor types": digest(kinds),
        "calibration text": digest((chunks.shape, hashlib.sha256(chunks.tobytes()).hexdigest())),
        "settings": {"maps": settings.maps, "passes": settings.passes, "damping": settings.damping},
    }


@dataclass(frozen=True)
class _Attended:
    """Some sequences before a layer's experts: out [T, hidden] lacks their results.

    `routed` is None in a dense layer, else what the experts get: h [T, hidden], experts and weights [T, used].
    """

    out: torch.Tensor
    routed: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None


def _attend(layer: Layer, x: torch.Tensor) -> _Attended:
    """A decoder layer without its experts, x [S, L, hidden]."""
    attended = layer.attend(x).flatten(0, 1)
    h = layer.ffn_norm(attended)
    if layer.moe is None:
        return _Attended(attended + layer.mlp(h))
    return _Attended(attended + layer.shared(h), (h, *layer.route(h)))


class _Run:
    """One run: the open files and what they are used with."""

    def __init__(self, job: Job, settings: Settings, reader: ShardReader, work: Workspace, workers: Workers) -> None:
        self.job = job
        self.settings = settings
        self.weights = Weights(job.plan, reader, settings.device)
        self.work = work
        self.workers = workers
        books = make_books(CODE_MAPS[: settings.maps], settings.device)
        kernels = kernels_for(settings.device)
        self.pipeline = Pipeline(books, workers.stoppable(kernels), settings.passes, settings.damping)

    def layer(self, number: int, x: torch.Tensor, out: torch.Tensor) -> Iterator[EncodedExpert]:
        """Carry the activations x [S, L, hidden] through a layer into `out`; gives each expert as it is encoded."""
        layer = Layer(self.weights, self.job.config, number)
        flat_out = out.flatten(0, 1)  # [T, hidden], the same memory
        inputs = None if layer.moe is None else self._inputs(len(flat_out), layer.moe)
        self._attention(layer, number, x, flat_out, inputs)
        if layer.moe is not None and inputs is not None:
            encoder = ExpertEncoder(self.weights, number, inputs, self.pipeline)
            gained = torch.zeros_like(inputs.h) if inputs.h.is_cuda else flat_out
            for encoded in self._encoded(encoder, layer.moe.experts, inputs):
                # An expert sees a token once: no two writes to the same place.
                gained[encoded.tokens.to(gained.device)] += encoded.y.to(gained.device)
                yield encoded
            if gained is not flat_out:
                flat_out += gained.to(flat_out.device)
        _check_finite(flat_out, number, "what it gives is")

    def _inputs(self, tokens: int, moe: MoeConfig) -> LayerInput:
        """Room for what the experts of a layer get: on the GPU if little of its memory is enough, else in a file."""
        shape, device = (tokens, self.job.config.hidden), self.settings.device
        if fits_device(8 * tokens * self.job.config.hidden, device):  # and for what they give
            h = torch.empty(shape, device=device)
        else:
            h = self.work.mapped("scratch.f32", shape, new=True)
        chosen = torch.empty(tokens, moe.used, dtype=torch.int64, device=h.device)
        return LayerInput(h, chosen, torch.empty(tokens, moe.used, device=h.device), device)

    def _attention(
        self, layer: Layer, number: int, x: torch.Tensor, out: torch.Tensor, inputs: LayerInput | None
    ) -> None:
        """Fill `out` [T, hidden] but for the experts' part, and `inputs`."""
        device, length = self.settings.device, x.shape[1]
        step = max(1, _SEQUENCE_TOKENS[device] // length)
        calls = (partial(_attend, layer, x[s : s + step].to(device)) for s in range(0, len(x), step))
        at = 0
        for part in self.workers.in_order(calls):
            _check_finite(part.out, number, "what attention gives is")
            here = slice(at, at := at + len(part.out))
            out[here] = part.out.to(out.device)
            if inputs is not None and part.routed is not None:
                for whole, piece in zip((inputs.h, inputs.experts, inputs.weights), part.routed, strict=True):
                    whole[here] = piece.to(whole.device)
        if inputs is not None:
            _check_finite(inputs.weights, number, "the router's weights for the experts are")

    def _encoded(self, encoder: ExpertEncoder, count: int, inputs: LayerInput) -> Iterator[EncodedExpert]:
        """All experts in order: on the CPU one per thread, on a GPU as many at once as its memory holds."""
        on_cpu = self.settings.device == "cpu"
        at_once = 1 if on_cpu else experts_at_once(self.job.config, inputs.experts.numel() // count)
        batches = (range(e, min(e + at_once, count)) for e in range(0, count, at_once))
        for batch in self.workers.in_order(partial(encoder.encode, batch) for batch in batches):
            yield from batch


def _embed(run: _Run, chunks: torch.Tensor, out: torch.Tensor) -> None:
    step = max(1, _EMBED_TOKENS // chunks.shape[1])
    for s in range(0, len(chunks), step):
        out[s : s + step] = embed(run.weights, chunks[s : s + step]).to(out.device)


def _write_expert(fd: int, starts: dict[str, int], layer: int, encoded: EncodedExpert) -> None:
    for projection, rows in encoded.data.items():
        name = f"blk.{layer}.ffn_{projection}_exps.weight"
        pwrite(fd, memoryview(rows.data).cast("B"), starts[name] + encoded.expert * rows.nbytes)


def _check_finite(x: torch.Tensor, layer: int, what: str) -> None:
    # A sum is finite if all of its terms are (their squares are far from overflow), and needs no mask of x's size.
    if not bool(torch.isfinite(x.sum(dtype=torch.float64))):
        raise ActivationError(
            f"layer {layer}: {what} not finite for the calibration text; the checkpoint's weights up to there are "
            "damaged, or overflow float32"
        )


@contextmanager
def _short_of_something(outfile: Path) -> Iterator[None]:
    """Disk, memory or permission that a run lacks, in a line. What is done is kept by then: it is no bad input."""
    try:
        yield
    except BrokenPipeError:
        raise  # of the program's own output
    except OSError as exc:
        raise OutputError(f"{exc.filename or outfile}: {exc.strerror or exc}; the model was not written") from exc
    except torch.cuda.OutOfMemoryError as exc:
        raise QuantizeError(
            f"{outfile}: the GPU's memory is not enough; end what else uses it, or give --device cpu; the model was "
            "not written"
        ) from exc
    except RuntimeError as exc:
        if "not enough memory" in str(exc) or "can't allocate memory" in str(exc):  # torch has no class for it
            raise MemoryError from exc
        raise


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

    Raises an ErnieGgufError for anything wrong with the input, and then leaves nothing behind. If anything else stops
    it, and a layer is done, the folder `partial_path` is kept.
    """
    check_output(outfile, overwrite)
    with _short_of_something(outfile):
        fingerprint = _fingerprint(job, calibration.chunks, settings)
        with (
            torch.inference_mode(),
            ShardReader() as reader,
            Workspace(partial_path(outfile), fingerprint, restart) as work,
            Workers(settings.device, settings.threads) as workers,
        ):
            run = _Run(job, settings, reader, work, workers)
            return _all_layers(run, torch.from_numpy(calibration.chunks).long(), outfile, listen)


def _all_layers(run: _Run, chunks: torch.Tensor, outfile: Path, listen: Listener) -> Result:
    job, work, begun, earlier = run.job, run.work, time.monotonic(), run.work.seconds
    shape = (*chunks.shape, job.config.hidden)
    if work.done == 0:
        writer = file_header(job, [job.plan], 0)
        writer.add_uint32(TOKENS_KEY, chunks.numel())
        writer.add_uint32(MAPS_KEY, run.settings.maps)
        work.begin_model(writer, data_nbytes(job.plan))
    with work.open_model() as fd:
        if work.done == 0:
            write_tensors(
                job.plan,
                fd,
                work.data_offset,
                run.settings.threads,
                lambda _: None,
                skip=lambda tensor: tensor.is_expert,
            )
            _embed(run, chunks, work.activations(0, shape, new=True))
        else:
            listen(Step(work.done - 1, None, tuple(work.stats)))
        starts = offsets(job.plan, work.data_offset)
        for number in range(work.done, job.config.layers):
            layer_begun = time.monotonic()
            out = work.activations(number + 1, shape, new=True)
            found: list[MatrixStats] = []
            for encoded in run.layer(number, work.activations(number, shape), out):
                _write_expert(fd, starts, number, encoded)
                found += encoded.stats
                listen(Step(number, encoded.expert, encoded.stats))
            work.finish_layer(number, found, time.monotonic() - layer_begun, fd)
        work.publish(fd, outfile)
    seconds = earlier + time.monotonic() - begun
    return Result(outfile, outfile.stat().st_size, seconds, tuple(work.stats))
