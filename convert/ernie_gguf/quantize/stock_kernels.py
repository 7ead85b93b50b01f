"""The inner loops of the encoder for llama.cpp's own types: what they compute, on which arrays.

As in `kernels`: a group of 64 columns of B matrices with N rows, stored by columns. `stock_torch` is the truth and
runs on any device, `stock_cpu` (compiled) is tested against it.

The search for a target y in a metric M takes the codeword v with the least (y - v) M (y - v)ᵀ. Codewords of a grid have
the signs of the target; where the type wants an even number of minus signs and the target has an odd one, each of the
eight weights is tried with the other sign. Of equals the lowest entry wins.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from ..stock.types import StockType
from .hessian import GroupHessian


@dataclass(frozen=True)
class StockGroup:
    """Views of one group of the rows' arrays; the last dimension is contiguous.

    w, e = w - ŵ float32 [B, 64, N]; d, dmin [B, N] those of the block; codes int32 [B, 64/dim, N] as in `pack`;
    step, minimum, scales, mins float32 [B, 64/sub, N]. ŵ = step * codeword - minimum, step = d * (a * scale + c) and
    minimum = dmin * min; a type without a rule has any step.
    """

    w: torch.Tensor
    e: torch.Tensor
    d: torch.Tensor
    dmin: torch.Tensor
    codes: torch.Tensor
    step: torch.Tensor
    minimum: torch.Tensor
    scales: torch.Tensor
    mins: torch.Tensor


class StockKernels(Protocol):
    """What the encoder calls, one group of columns at a time."""

    def feedback_group(
        self, kind: StockType, rows: StockGroup, target: torch.Tensor, hessian: GroupHessian, cost: torch.Tensor
    ) -> None:
        """LDLQ: for each run choose the step and the codes from left to right, feeding errors into the rest.

        `target` [B, 64, N] is w plus what the errors of earlier groups add to it. Writes all but w, d and dmin; adds
        the cost of the errors to `cost` [B, N].
        """

    def descend_group(self, kind: StockType, rows: StockGroup, eh: torch.Tensor, hessian: GroupHessian) -> None:
        """Coordinate descent: improve each run's step and minimum, then its codes, with everything else fixed.

        `eh` [B, 64, N] is E H at the group's columns. Only rounding can raise E H Eᵀ.
        """
