"""The search for codewords on NVIDIA GPUs, in Triton, which comes with torch's CUDA builds.

Import it only where triton is. Torch writes 256 scores per target to the GPU's memory and reads them again; here they
stay in registers, and feedback on an H100 takes .45 of the time.
"""

import torch
import triton
import triton.language as tl

from .kernels import LANES, TorchKernels

_ROWS = 64  # of a program of two warps: one to a thread; 203 us on an H100 where twice as many take 209 and half 274


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _search(  # noqa: PLR0917 - a kernel has no keywords
    y: torch.Tensor,
    table: torch.Tensor,
    member: torch.Tensor,
    best: torch.Tensor,
    rows: int,
    matrix_stride: int,
    map_stride: int,
    lanes: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """`block` rows of one matrix; each thread goes through all codes for its own, so that nothing needs reducing."""
    b = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * block + tl.arange(0, block)
    there = row < rows
    entry = table + b * matrix_stride + tl.load(member + b * (rows // lanes) + row // lanes, there, 0) * map_stride
    x = y + 4 * b * rows + row
    y0, y1 = tl.load(x, there), tl.load(x + rows, there)
    y2, y3 = tl.load(x + 2 * rows, there), tl.load(x + 3 * rows, there)
    top = tl.full((block,), float("-inf"), tl.float32)
    found = tl.zeros((block,), tl.int32)
    for code in range(256):
        score = y3 * tl.load(entry + 3) + tl.load(entry + 4)
        score += y2 * tl.load(entry + 2)
        score += y1 * tl.load(entry + 1)
        score += y0 * tl.load(entry)
        better = score > top
        top = tl.where(better, score, top)
        found = tl.where(better, code, found)
        entry += 5
    tl.store(best + b * rows + row, found.to(tl.uint8), there)


class TritonKernels(TorchKernels):
    """TorchKernels with the search itself fused."""

    def try_out(self, device: str) -> None:
        """Compile and run it once; raises whatever Triton raises where it finds no C compiler, or the like."""
        y, member = torch.zeros(1, 4, LANES, device=device), torch.zeros(1, 1, dtype=torch.int32, device=device)
        self.search(y, torch.zeros(1, 1, 256, 5, device=device), member)

    def search(self, y: torch.Tensor, tables: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
        """See TorchKernels."""
        b, _, n = y.shape
        y, best = y.contiguous(), torch.empty(b, n, dtype=torch.uint8, device=y.device)
        grid, strides = (-(-n // _ROWS), b), (tables.stride(0), tables.stride(1))
        _search[grid](y, tables, member, best, n, *strides, lanes=LANES, block=_ROWS, num_warps=_ROWS // 32)
        return best
