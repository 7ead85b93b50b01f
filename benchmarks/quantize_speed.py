"""Speed of the calibrated encoder at the shapes of the 21B: python benchmarks/quantize_speed.py [--device cuda].

One expert's gate and up (3072 rows of 2560, which share their inputs) and down (2560 rows of 1536) are encoded, or as
many experts at once as `--experts` says, on Gaussian weights and correlated inputs. Counted is everything from the
second moments to ccq2 rows: factoring, feedback for each code map, coordinate descent, packing, and the plain encoding
that the report compares with. The time for the whole model is weights over rate; it leaves out reading the checkpoint
and the forward pass, which `ernie-gguf quantize` shows on the real thing.
"""

import argparse
import os
import time
from dataclasses import dataclass

import torch
from common import machine, report
from ernie_gguf.pool import POOL
from ernie_gguf.quantize.encoder import Pipeline
from ernie_gguf.quantize.kernels import Kernels, TorchKernels, kernels_for, make_books
from rich.table import Table

SHAPES = {"gate, up": (3072, 2560), "down": (2560, 1536)}  # rows, weights per row
MODEL_WEIGHTS = 27 * 64 * 3 * 2560 * 1536  # the experts of the 21B


@dataclass(frozen=True)
class Timing:
    """Seconds for `weights` weights."""

    shape: str
    maps: int
    weights: int
    seconds: float

    @property
    def rate(self) -> float:
        """Weights per second."""
        return self.weights / self.seconds


def problem(experts: int, rows: int, k: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian matrices w [experts, rows, k] and moments h [experts, k, k] of inputs with a decaying spectrum."""
    torch.manual_seed(0)
    mix = torch.randn(k, k, device=device) * torch.logspace(0, -1.5, k, device=device)
    x = torch.randn(4 * k, k, device=device) @ mix
    h = (x.T @ x / len(x)).expand(experts, k, k)
    return torch.randn(experts, rows, k, device=device), h


def measure(device: str, experts: int, maps: int, kernels: Kernels) -> list[Timing]:
    """One run per shape, after one to warm up."""
    pipeline = Pipeline(make_books(POOL[:maps], device), kernels)
    found = []
    for name, (rows, k) in SHAPES.items():
        w, h = problem(experts, rows, k, device)
        pipeline.encode(w[:1, :64], h[:1])
        _wait(device)
        begin = time.perf_counter()
        pipeline.encode(w, h)
        _wait(device)
        found.append(Timing(name, maps, w.numel(), time.perf_counter() - begin))
    return found


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--experts", type=int, help="at once (default: 1 on a CPU, 32 on a GPU)")
    parser.add_argument("--maps", type=int, nargs="*", default=[1, len(POOL)], help="code maps tried per row")
    parser.add_argument("--torch", action="store_true", help="plain torch instead of the compiled or Triton search")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a rate per core
    experts = args.experts or (1 if args.device == "cpu" else 32)
    kernels = TorchKernels() if args.torch else kernels_for(args.device)
    with torch.inference_mode():
        timings = [timing for maps in args.maps for timing in measure(args.device, experts, maps, kernels)]
    what = "one core" if args.device == "cpu" else torch.cuda.get_device_name()
    table = Table("shape", "code maps", "seconds", "million weights/s", f"the 21B's experts on {what}")
    for timing in timings:
        left = MODEL_WEIGHTS / timing.rate / 60
        table.add_row(
            timing.shape, str(timing.maps), f"{timing.seconds:.2f}", f"{timing.rate / 1e6:.2f}", f"{left:,.0f} min"
        )
    results: dict[str, object] = {"machine": machine(), "device": what, "experts": experts, "timings": timings}
    report(results, table, as_json=args.json)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
