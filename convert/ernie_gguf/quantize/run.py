"""The quantizer from top to bottom: plan, calibration text, layer by layer, file.

Each layer runs once: attention with the checkpoint's weights, then its experts, which are encoded on the way. The next
layer gets what the encoded experts give, so it can make up for their errors.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..arrays import I32
from ..checkpoint.config import MoeConfig
from ..checkpoint.shards import ShardReader
from ..convert import Job, file_header, model_name
from ..errors import ActivationError, OutputError, QuantizeError
from ..files import check_output, pwrite
from ..gguf_file.types import GgmlType
from ..partial import partial_path
from ..write import data_nbytes, offsets, write_tensors
from .encoders import encode_rest, make_encoders
from .experts import EncodedExpert, ExpertEncoder, LayerInput
from .kernels import Kernels
from .model import Layer, Weights, embed
from .needs import experts_at_once, fits_device
from .settings import Settings
from .stats import PROJECTIONS, MatrixStats
from .text import Calibration
from .workers import Workers
from .workspace import Workspace

_EMBED_TOKENS = 8192  # at once
_SEQUENCE_TOKENS = {"cpu": 1024, "cuda": 8192}  # tokens that a worker carries through attention at once

# Metadata that tells a calibrated file from a plain one: how much text it saw, and how many code maps each row tried.
TOKENS_KEY = "ernie_gguf.calibration.tokens"
MAPS_KEY = "ernie_gguf.calibration.maps"


@dataclass(frozen=True)
class Step:
    """Progress: an expert of `layer` is done. `expert` is None if an interrupted run had done all layers up to it."""

    layer: int
    expert: int | None
    stats: tuple[MatrixStats, ...]


Listener = Callable[[Step], None]


@dataclass(frozen=True)
class QuantizeResult:
    """A finished run. `seconds` include the interrupted runs that it resumed."""

    path: Path
    nbytes: int
    seconds: float
    matrices: tuple[MatrixStats, ...]


def _fingerprint(job: Job, sequences: I32, settings: Settings) -> dict[str, Any]:
    """What must be the same to resume a run. Device and thread count may differ; at most rounding changes."""
    paths = {path for tensor in job.plan.tensors for part in tensor.parts for path in part.source.paths}
    paths |= {path for path in job.source.iterdir() if path.suffix in (".json", ".model")}
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(paths)]
    types = [(tensor.name, tensor.shape, tensor.ggml_type.name) for tensor in job.plan.tensors]

    def digest(value: object) -> str:
        return hashlib.sha256(repr(value).encode()).hexdigest()

    return {
        "checkpoint": digest((model_name(job.source), files)),
        "tensor types": digest(types),
        "calibration text": digest((sequences.shape, hashlib.sha256(sequences.tobytes()).hexdigest())),
        "settings": {"maps": settings.maps, "passes": settings.passes, "damping": settings.percdamp},
    }


@dataclass(frozen=True)
class _Attended:
    """Some sequences before a layer's experts: `out` [T, hidden] is the layer's output without theirs.

    `routed` is the experts' input, h [T, hidden], experts and weights [T, used]; None in a dense layer.
    """

    out: torch.Tensor
    routed: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None


def _attend(layer: Layer, x: torch.Tensor) -> _Attended:
    """Run a decoder layer up to its experts, x [S, L, hidden]."""
    attended = layer.attend(x).flatten(0, 1)
    h = layer.ffn_norm(attended)
    if layer.moe is None:
        return _Attended(attended + layer.mlp(h))
    return _Attended(attended + layer.shared(h), (h, *layer.route(h)))


class _Run:
    """One run: its settings, weights, folder and threads."""

    def __init__(  # noqa: PLR0917 - an object each
        self, job: Job, settings: Settings, kernels: Kernels, reader: ShardReader, work: Workspace, workers: Workers
    ) -> None:
        self.job = job
        self.settings = settings
        self.weights = Weights(job.plan, reader, settings.device)
        self.work = work
        self.workers = workers
        self.types = {tensor.name: tensor.ggml_type for tensor in job.plan.tensors if tensor.is_expert}
        self.encoders = make_encoders(self.types.values(), settings, kernels, workers)

    def layer(self, number: int, x: torch.Tensor, out: torch.Tensor) -> Iterator[EncodedExpert]:
        """Carry the activations x [S, L, hidden] through a layer into `out`; yield each expert once it is encoded."""
        layer = Layer(self.weights, self.job.config, number)
        flat_out = out.flatten(0, 1)  # [T, hidden], the same memory
        inputs = None if layer.moe is None else self._inputs(len(flat_out), layer.moe)
        self._attention(layer, number, x, flat_out, inputs)
        if layer.moe is not None and inputs is not None:
            types = {p: self.types[f"blk.{number}.ffn_{p}_exps.weight"] for p in PROJECTIONS}
            encoders = {projection: self.encoders[ggml_type] for projection, ggml_type in types.items()}
            encoder = ExpertEncoder(self.weights, number, inputs, encoders)
            total = torch.zeros_like(inputs.h) if inputs.h.is_cuda else flat_out
            for encoded in self._encoded(encoder, layer.moe.experts, inputs):
                # An expert gets a token once, so no row is written twice.
                total[encoded.tokens.to(total.device)] += encoded.y.to(total.device)
                yield encoded
            if total is not flat_out:
                flat_out += total.to(flat_out.device)
        _check_finite(flat_out, number, "its output is")

    def _inputs(self, tokens: int, moe: MoeConfig) -> LayerInput:
        """Room for the input of a layer's experts: on the GPU if that takes little of its memory, else in a file."""
        shape, device = (tokens, self.job.config.hidden), self.settings.device
        if device == "cuda" and fits_device(8 * tokens * self.job.config.hidden, _free_gpu_bytes()):  # input and output
            h = torch.empty(shape, device=device)
        else:
            h = torch.from_numpy(self.work.mapped("scratch.f32", shape, new=True))
        chosen = torch.empty(tokens, moe.used, dtype=torch.int64, device=h.device)
        return LayerInput(h, chosen, torch.empty(tokens, moe.used, device=h.device), device)

    def _attention(
        self, layer: Layer, number: int, x: torch.Tensor, out: torch.Tensor, inputs: LayerInput | None
    ) -> None:
        """Fill `out` [T, hidden] except for the experts' part, and `inputs`."""
        device, length = self.settings.device, x.shape[1]
        step = max(1, _SEQUENCE_TOKENS[device] // length)
        calls = (partial(_attend, layer, x[s : s + step].to(device)) for s in range(0, len(x), step))
        at = 0
        for part in self.workers.in_order(calls):
            _check_finite(part.out, number, "the output of attention is")
            tokens = slice(at, at := at + len(part.out))
            out[tokens] = part.out.to(out.device)
            if inputs is not None and part.routed is not None:
                for target, values in zip((inputs.h, inputs.experts, inputs.weights), part.routed, strict=True):
                    target[tokens] = values.to(target.device)
        if inputs is not None:
            _check_finite(inputs.weights, number, "the router's weights for the experts are")

    def _encoded(self, encoder: ExpertEncoder, count: int, inputs: LayerInput) -> Iterator[EncodedExpert]:
        """All experts in order: on a CPU one per thread, on a GPU as many at once as its memory holds."""
        tokens = inputs.experts.numel() // count
        on_cpu = self.settings.device == "cpu"
        at_once = 1 if on_cpu else experts_at_once(self.job.config, tokens, _free_gpu_bytes())
        batches = (range(e, min(e + at_once, count)) for e in range(0, count, at_once))
        for batch in self.workers.in_order(partial(encoder.encode, batch) for batch in batches):
            yield from batch


def _free_gpu_bytes() -> int:
    free, _ = torch.cuda.mem_get_info()
    return int(free)


def _embed(run: _Run, sequences: torch.Tensor, out: torch.Tensor) -> None:
    step = max(1, _EMBED_TOKENS // sequences.shape[1])
    for s in range(0, len(sequences), step):
        out[s : s + step] = embed(run.weights, sequences[s : s + step]).to(out.device)


def _write_expert(fd: int, starts: dict[str, int], layer: int, encoded: EncodedExpert) -> None:
    for projection, rows in encoded.data.items():
        name = f"blk.{layer}.ffn_{projection}_exps.weight"
        pwrite(fd, memoryview(rows.data).cast("B"), starts[name] + encoded.expert * rows.nbytes)


def _check_finite(x: torch.Tensor, layer: int, what: str) -> None:
    # The sum is finite if all terms are, since none comes near the limit of float64; it needs no mask of x's size.
    if not bool(torch.isfinite(x.sum(dtype=torch.float64))):
        raise ActivationError(
            f"layer {layer}: {what} not finite for the calibration text; the checkpoint's weights up to there are "
            "damaged, or overflow float32"
        )


@contextmanager
def _as_output_errors(outfile: Path) -> Iterator[None]:
    """Turn a lack of disk, memory or permission into a line. Finished layers are kept; this is not an input error."""
    try:
        yield
    except BrokenPipeError:
        raise  # our own output: main() handles it
    except OSError as error:
        raise OutputError(
            f"{error.filename or outfile}: {error.strerror or error}; the model was not written"
        ) from error
    except torch.cuda.OutOfMemoryError as error:
        raise QuantizeError(
            f"{outfile}: the GPU's memory is too small; stop other programs that use it, or give --device cpu; "
            "the model was not written"
        ) from error
    except RuntimeError as error:
        if "not enough memory" in str(error) or "can't allocate memory" in str(
            error
        ):  # torch has no exception class for it
            raise MemoryError from error
        raise


def run_quantize(
    job: Job,
    calibration: Calibration,
    settings: Settings,
    kernels: Kernels,
    outfile: Path,
    *,
    overwrite: bool,
    restart: bool,
    listen: Listener,
) -> QuantizeResult:
    """Quantize a checkpoint that passes `check_source` to `outfile`, or resume an interrupted run.

    Raises an ErnieGgufError if the input is bad, and then leaves nothing behind. If anything else stops the run after
    its first layer, it keeps the folder `partial_path`.
    """
    check_output(outfile, overwrite)
    with _as_output_errors(outfile):
        fingerprint = _fingerprint(job, calibration.sequences, settings)
        with (
            torch.inference_mode(),
            ShardReader() as reader,
            Workspace(partial_path(outfile), fingerprint, restart) as work,
            Workers(settings.device, settings.threads) as workers,
        ):
            run = _Run(job, settings, kernels, reader, work, workers)
            return _all_layers(run, torch.from_numpy(calibration.sequences).long(), outfile, listen)


def _all_layers(run: _Run, sequences: torch.Tensor, outfile: Path, listen: Listener) -> QuantizeResult:
    job, work, begun, earlier = run.job, run.work, time.monotonic(), run.work.seconds
    shape = (*sequences.shape, job.config.hidden)
    if work.done == 0:
        writer = file_header(job, [job.plan], 0)
        writer.add_uint32(TOKENS_KEY, sequences.numel())
        if GgmlType.CCQ2 in run.types.values():
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
                encode=encode_rest,
            )
            _embed(run, sequences, torch.from_numpy(work.activations(0, shape, new=True)))
        else:
            listen(Step(work.done - 1, None, tuple(work.stats)))
        starts = offsets(job.plan, work.data_offset)
        for number in range(work.done, job.config.layers):
            layer_begun = time.monotonic()
            x = torch.from_numpy(work.activations(number, shape))
            out = torch.from_numpy(work.activations(number + 1, shape, new=True))
            found: list[MatrixStats] = []
            for encoded in run.layer(number, x, out):
                _write_expert(fd, starts, number, encoded)
                found += encoded.stats
                listen(Step(number, encoded.expert, encoded.stats))
            work.finish_layer(number, found, time.monotonic() - layer_begun, fd)
        work.publish(fd, outfile)
    seconds = earlier + time.monotonic() - begun
    return QuantizeResult(outfile, outfile.stat().st_size, seconds, tuple(work.stats))
