"""The inner loops of the encoder: what they compute, on which arrays. `settings` chooses who computes it.

`kernels_torch` is the truth and runs on any device; `kernels_cpu` (compiled) and `kernels_triton` (NVIDIA GPUs) are
tested against it.

Each works on a group of 64 columns of B matrices with N rows, stored by columns. Rows come in lane blocks of 16 that
share a code map. The search for a target y in a 4x4 metric A takes the byte whose codeword c is nearest: it has the
greatest score (yA)·(cA) - |cA|²/2. Ties go to the lowest byte.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ..ccq2.rows import GROUP, codebook
from .hessian import BLOCK, GroupHessian

LANES = 16
CODE_BYTES = GROUP // BLOCK  # code bytes of a group
LARGEST_SCALE = 15


@dataclass(frozen=True)
class Codebooks:
    """P code maps, int64 [P, 2] (M, Z), and their codewords, float32 [P, 256, 4]."""

    code_maps: torch.Tensor
    codewords: torch.Tensor

    def only(self, map_index: int) -> "Codebooks":
        """One of them, so that no tables are made for the others."""
        return Codebooks(self.code_maps[map_index : map_index + 1], self.codewords[map_index : map_index + 1])

    def words(self, codes: torch.Tensor, map_index: torch.Tensor) -> torch.Tensor:
        """Codewords of code bytes [B, Q, N] -> [B, Q, 4, N]; map_index int32 [B, N/16]."""
        of_row = map_index.long().repeat_interleave(LANES, 1)[:, None]  # [B, 1, N]
        return self.codewords[of_row, codes.long()].movedim(3, 2)

    def tables(self, root: torch.Tensor) -> torch.Tensor:
        """The search's tables for the metrics root [B, 16, 4, 4] of a group: [B, P, 16, 256, 5], cA and -|cA|²/2."""
        transformed = torch.einsum("pcj,bqji->bpqci", self.codewords, root)
        return torch.cat([transformed, transformed.square().sum(-1, keepdim=True) / -2], -1).contiguous()


def make_codebooks(code_maps: tuple[tuple[int, int], ...], device: str = "cpu") -> Codebooks:
    """The codewords of code maps (M, Z)."""
    codewords = np.stack([codebook(m, z) for m, z in code_maps]).astype(np.float32)
    return Codebooks(torch.tensor(code_maps, dtype=torch.int64, device=device), torch.from_numpy(codewords).to(device))


@dataclass(frozen=True)
class RowGroup:
    """Views of one group of the rows' arrays; the last dimension is contiguous.

    w, e = w - ŵ float32 [B, 64, N]; d [B, N]; codes uint8 [B, 16, N]; scales uint8 [B, N]; map_index int32 [B, N/16],
    the code map of each lane block.
    """

    w: torch.Tensor
    e: torch.Tensor
    d: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    map_index: torch.Tensor


class Kernels(Protocol):
    """What the encoder calls, one group of columns at a time."""

    def feedback_group(
        self, rows: RowGroup, target: torch.Tensor, hessian: GroupHessian, codebooks: Codebooks, cost: torch.Tensor
    ) -> None:
        """LDLQ: choose the scale and codes from left to right, feeding each byte's error into the rest of the group.

        `target` [B, 64, N] is w plus what the errors of earlier groups add to it. Writes codes, scales and e; adds the
        cost of the errors to `cost` [B, N].
        """

    def descend_group(
        self, rows: RowGroup, eh: torch.Tensor, hessian: GroupHessian, codebooks: Codebooks, cost: torch.Tensor
    ) -> None:
        """Coordinate descent: improve the scale, then each code, with everything else fixed.

        `eh` [B, 64, N] is E H at the group's columns. Changes codes, scales and e; adds the change of E H Eᵀ to `cost`
        [B, N]. Only rounding can raise E H Eᵀ.
        """
