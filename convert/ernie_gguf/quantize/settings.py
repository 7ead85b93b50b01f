"""What decides a run besides checkpoint and text: the encoder's parameters, the device, and the kernels that run there.

Importing this needs no torch, so that --dry-run works without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from subprocess import SubprocessError
from typing import TYPE_CHECKING

from ..ccq2 import native
from ..ccq2.code_maps import CODE_MAPS
from ..errors import ExtraError, QuantizeError

if TYPE_CHECKING:
    from .kernels import Kernels
    from .stock_kernels import StockKernels

PASSES = 5  # of coordinate descent; more gained nothing
PERCDAMP = 0.3  # added to the diagonal of the Hessian, whose mean is 1


@dataclass(frozen=True)
class Settings:
    """`device` is cpu or cuda; `maps` says how many code maps are tried on every row."""

    device: str
    threads: int
    maps: int = len(CODE_MAPS)
    passes: int = PASSES
    percdamp: float = PERCDAMP

    @property
    def compiled(self) -> bool:
        """Whether the search runs compiled, on a CPU."""
        return self.device == "cpu" and native.library() is not None


def choose_device(wanted: str | None, torch_needed: bool) -> str:
    """`wanted`, or by default cuda if torch sees a GPU, else cpu.

    Raises ExtraError if torch is missing but needed, QuantizeError if it sees no GPU although cuda is wanted.
    """
    try:
        import torch
    except ImportError as error:
        if not torch_needed:
            return wanted or "cpu"
        raise ExtraError("torch") from error
    gpu = torch.cuda.is_available()
    if wanted == "cuda" and not gpu:
        raise QuantizeError("--device cuda: this torch sees no GPU; install a torch with CUDA, or give --device cpu")
    return wanted or ("cuda" if gpu else "cpu")


def stock_kernels_for(device: str) -> StockKernels:
    """The fastest kernels for llama.cpp's own types that work on a device."""
    library = native.library()
    if device == "cpu" and library is not None and hasattr(library, "stock_feedback_group"):  # else ccq2 alone
        from .stock_cpu import CpuStockKernels

        return CpuStockKernels(library)
    from .stock_torch import TorchStockKernels

    return TorchStockKernels()


def kernels_for(device: str) -> tuple[Kernels, str]:
    """The fastest kernels that work on a device, and a note for the user if they are not the fastest there are."""
    from .kernels_torch import TorchKernels

    if device == "cpu":
        from .kernels_cpu import CpuKernels

        if (library := native.library()) is not None:
            return CpuKernels(library), ""
        return TorchKernels(), "the compiled search is missing; torch takes six times as long: run make search"
    try:
        from .kernels_triton import TritonKernels

        kernels = TritonKernels()
        kernels.try_out(device)
    except (ImportError, OSError, RuntimeError, SubprocessError) as error:  # Triton compiles at its first use
        return TorchKernels(), f"Triton does not work here ({error}); torch is about half as fast"
    return kernels, ""
