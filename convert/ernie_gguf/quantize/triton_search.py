"""The search for codewords on NVIDIA GPUs, in Triton, which comes with torch's CUDA builds.

Import it only where triton is. On an H100 a search over 64 experts' rows writes a byte per target where torch writes
256 scores, reads them again and lets most of the time go by on that.
"""

import torch
import triton
import triton.language as tl

from .kernels import LANES, TorchKernels


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _search(  # noqa: PLR0917 - a kernel has no keywords
    y: torch.Tensor,
    table: torch.Tensor,
    member: torch.Tensor,
    best: torch.Tensor,
    rows: int,
    matrix_stride: int,
    map_stride: int,
    targets: tl.constexpr,
    lanes: tl.constexpr,
) -> None:
    """One lane block of one matrix: so many lanes, so many targets each."""
    block, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = block * lanes + tl.arange(0, lanes)
    code = tl.arange(0, 256)
    entry = table + b * matrix_stride + tl.load(member + b * (rows // lanes) + block) * map_stride + 5 * code
    e0, e1, e2 = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    e3, e4 = tl.load(entry + 3), tl.load(entry + 4)
    for s in range(targets):
        at = (b * targets + s) * rows
        x = y + 4 * at + row
        score = tl.load(x + 3 * rows)[:, None] * e3[None, :] + e4[None, :]
        score += tl.load(x + 2 * rows)[:, None] * e2[None, :]
        score += tl.load(x + rows)[:, None] * e1[None, :]
        score += tl.load(x)[:, None] * e0[None, :]
        tl.store(best + at + row, tl.argmax(score, axis=1).to(tl.uint8))


class TritonKernels(TorchKernels):
    """TorchKernels with the search itself fused."""

    def search(self, y: torch.Tensor, tables: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
        """See TorchKernels."""
        b, s, _, n = y.shape
        y, best = y.contiguous(), torch.empty(b, s, n, dtype=torch.uint8, device=y.device)
        strides = (tables.stride(0), tables.stride(1))
        _search[(n // LANES, b)](y, tables, member, best, n, *strides, targets=s, lanes=LANES)
        return best
