"""Speed of the calibrated encoder at the shapes of the 21B: python benchmarks/quantize_speed.py [--device cuda].

One expert's gate and up (3072 rows of 2560, which share their inputs) and down (2560 rows of 1536) are encoded, or as
many experts at once as `--experts` says, on Gaussian weights and correlated inputs. "Search" is feedback for each code
map and coordinate descent; "all" is everything from the Hessians to ccq2 rows: factoring, search, packing, and
the plain encoding that the report compares with. The time for the whole model is weights over the rate of all; it
leaves out reading the checkpoint and the forward pass, which benchmarks/quantize_model.py has.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec

import torch
from common import benchmark_parser, machine, report
from ernie_gguf.ccq2.code_maps import CODE_MAPS
from ernie_gguf.quantize.encoder import Pipeline, encode_calibrated, start
from ernie_gguf.quantize.hessian import factor
from ernie_gguf.quantize.kernels import Kernels, make_codebooks
from ernie_gguf.quantize.kernels_torch import TorchKernels
from ernie_gguf.quantize.settings import PERCDAMP, kernels_for
from released import SHAPES
from rich.table import Table

P = ParamSpec("P")

MODEL = SHAPES["21b"]
MATRICES = {"gate, up": (2 * MODEL.expert_ffn, MODEL.hidden), "down": (MODEL.hidden, MODEL.expert_ffn)}  # rows, weights
MODEL_WEIGHTS = (MODEL.layers - MODEL.dense) * MODEL.experts * 3 * MODEL.hidden * MODEL.expert_ffn


@dataclass(frozen=True)
class Timing:
    """Seconds for `weights` weights: of the search alone, and of all."""

    shape: str
    maps: int
    weights: int
    search_seconds: float
    seconds: float


def problem(experts: int, rows: int, k: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian matrices w [experts, rows, k] and Hessians h [experts, k, k] of inputs with a decaying spectrum."""
    torch.manual_seed(0)
    mix = torch.randn(k, k, device=device) * torch.logspace(0, -1.5, k, device=device)
    x = torch.randn(4 * k, k, device=device) @ mix
    h = (x.T @ x / len(x)).expand(experts, k, k)
    return torch.randn(experts, rows, k, device=device), h


def measure(device: str, experts: int, maps: int, kernels: Kernels) -> list[Timing]:
    """One run per shape, after one to warm up."""
    pipeline = Pipeline(make_codebooks(CODE_MAPS[:maps], device), kernels)
    found = []
    for name, (rows, k) in MATRICES.items():
        w, h = problem(experts, rows, k, device)
        pipeline.encode(w[:1, :64], h[:1])
        hessian = factor(h, PERCDAMP)
        begun, _ = start(w, hessian)
        search = _seconds(device, encode_calibrated, begun, hessian, pipeline.codebooks, kernels)
        del begun, hessian
        whole = _seconds(device, pipeline.encode, w, h)
        found.append(Timing(name, maps, w.numel(), search, whole))
    return found


def _seconds(device: str, call: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> float:
    _wait(device)
    begin = time.perf_counter()
    call(*args, **kwargs)
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def main() -> None:
    """Measure and print."""
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--experts", type=int, help="at once (default: 1 on a CPU, 32 on a GPU)")
    parser.add_argument("--maps", type=int, nargs="*", default=[1, len(CODE_MAPS)], help="code maps tried per row")
    parser.add_argument("--torch", action="store_true", help="plain torch instead of the compiled or Triton search")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a rate per core
    experts = options.experts or (1 if options.device == "cpu" else 32)
    kernels = TorchKernels() if options.torch else kernels_for(options.device)[0]
    with torch.inference_mode():
        timings = [timing for maps in options.maps for timing in measure(options.device, experts, maps, kernels)]
    what = "one core" if options.device == "cpu" else torch.cuda.get_device_name()
    table = Table("shape", "code maps", "search, M weights/s", "all, M weights/s", f"the 21B's experts on {what}")
    for timing in timings:
        rates = (timing.weights / seconds / 1e6 for seconds in (timing.search_seconds, timing.seconds))
        left = f"{timing.seconds * MODEL_WEIGHTS / timing.weights / 60:,.0f} min"
        table.add_row(timing.shape, str(timing.maps), *(f"{rate:.2f}" for rate in rates), left)
    results: dict[str, object] = {"machine": machine(), "device": what, "experts": experts, "timings": timings}
    report(results, table, options)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
