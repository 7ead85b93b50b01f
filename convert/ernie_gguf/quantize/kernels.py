"""The inner loops of the encoder: in torch, which is the truth and runs on GPUs, and compiled, for CPUs.

Both work on a group of 64 columns of B matrices with N rows each, stored by columns. Rows come in lane blocks of 16,
which share a code map of the pool. A search takes the byte whose codeword c is nearest to a target y in a metric
A (4x4): the greatest (yA)·(cA) - |cA|²/2, of equals the lowest.
"""

import ctypes
import sys
from dataclasses import dataclass
from subprocess import SubprocessError
from typing import Protocol

import numpy as np
import torch

from ..ccq2.encode import BOOK_RMS, SCALE_STEPS
from ..ccq2.native import LIBRARY, load
from ..ccq2.rows import GROUP, codebook
from .metric import QUAD, GroupMetric

LANES = 16
QUADS = GROUP // QUAD  # code bytes of a group
LARGEST_SCALE = 15


@dataclass(frozen=True)
class Books:
    """The pool of P code maps: maps int64 [P, 2] (M, Z); their codewords words float32 [P, 256, 4]."""

    maps: torch.Tensor
    words: torch.Tensor

    def only(self, member: int) -> "Books":
        """One of them: tables need not be made for the others."""
        return Books(self.maps[member : member + 1], self.words[member : member + 1])


def make_books(pool: tuple[tuple[int, int], ...], device: str = "cpu") -> Books:
    """The code maps and their codewords."""
    words = np.stack([codebook(m, z) for m, z in pool]).astype(np.float32)
    return Books(torch.tensor(pool, dtype=torch.int64, device=device), torch.from_numpy(words).to(device))


def make_tables(books: Books, metric: torch.Tensor) -> torch.Tensor:
    """Codewords in a group's metrics, metric [B, 16, 4, 4] -> [B, P, 16, 256, 5]: cA and -|cA|²/2."""
    seen = torch.einsum("pcj,bqji->bpqci", books.words, metric)
    return torch.cat([seen, seen.square().sum(-1, keepdim=True) / -2], -1).contiguous()


@dataclass(frozen=True)
class RowGroup:
    """Views of the rows' arrays at one group: w, e = w - ŵ float32 [B, 64, N]; d [B, N]; codes uint8 [B, 16, N]; scales
    uint8 [B, N]; member int32 [B, N/16], the lane blocks' code maps. The last dimension is contiguous.
    """

    w: torch.Tensor
    e: torch.Tensor
    d: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    member: torch.Tensor


class Kernels(Protocol):
    """What the encoder asks for."""

    def feedback_group(
        self, rows: RowGroup, target: torch.Tensor, metric: GroupMetric, books: Books, cost: torch.Tensor
    ) -> None:
        """Choose scale and codes, feeding each byte's error into the rest of the group.

        `target` [B, 64, N] is w and what the errors of earlier groups add to it. Writes codes, scales and e; adds what
        the errors cost to `cost` [B, N].
        """

    def descend_group(
        self, rows: RowGroup, p: torch.Tensor, metric: GroupMetric, books: Books, cost: torch.Tensor
    ) -> None:
        """Revisit the scale, then each code with everything else fixed: never raises E H Eᵀ but by rounding.

        `p` [B, 64, N] is E H at the group's columns. Changes codes, scales and e; adds the change of E H Eᵀ to `cost`.
        """


class TorchKernels:
    """The slow path: plain torch, any device."""

    def feedback_group(
        self, rows: RowGroup, target: torch.Tensor, metric: GroupMetric, books: Books, cost: torch.Tensor
    ) -> None:
        """See Kernels. All S scales are tried side by side: the rows stand there S times, [B, ..., S*N]."""
        tables, tries = make_tables(books, metric.forward), len(SCALE_STEPS)
        b, _, n = target.shape
        rms = target.square().mean(1).sqrt()
        steps = torch.tensor(SCALE_STEPS, device=target.device)[:, None]
        guess = (rms / (BOOK_RMS * rows.d)).clamp(0, 100).round()
        scale = (guess[:, None] + steps).clamp(0, LARGEST_SCALE).flatten(1)
        w, d, member = (a.repeat(*[1] * (a.ndim - 1), tries) for a in (rows.w, rows.d, rows.member))
        unit, step = (d * scale.clamp(min=1))[:, None], (d * scale)[:, None]
        left = target.repeat(1, 1, tries)  # the targets, as errors are fed in
        error, total = torch.empty_like(left), torch.zeros_like(scale)
        code = torch.empty(b, QUADS, tries * n, dtype=torch.uint8, device=target.device)
        for q in range(QUADS):
            here, rest = slice(QUAD * q, QUAD * (q + 1)), slice(QUAD * (q + 1), GROUP)
            forward = metric.forward[:, q].mT  # from the left
            code[:, q] = found = self.search(forward @ left[:, here] / unit, tables[:, :, q], member)
            value = step * _words(found[:, None], books, member)[:, 0]
            torch.sub(w[:, here], value, out=error[:, here])
            total += (forward @ (left[:, here] - value)).square().sum(1)
            if q < QUADS - 1:
                left[:, rest].baddbmm_(metric.feed[:, here, rest].mT, error[:, here])
        best = total.unflatten(1, (tries, n)).argmin(1)  # [B, N]
        at = best * n + torch.arange(n, device=best.device)
        cost += total.gather(1, at)
        rows.scales.copy_(scale.gather(1, at))
        rows.codes.copy_(code.gather(2, at[:, None].expand(-1, QUADS, -1)))
        rows.e.copy_(error.gather(2, at[:, None].expand(-1, GROUP, -1)))

    def descend_group(
        self, rows: RowGroup, p: torch.Tensor, metric: GroupMetric, books: Books, cost: torch.Tensor
    ) -> None:
        """See Kernels."""
        tables = make_tables(books, metric.around)
        h, e = metric.h, rows.e
        v = _words(rows.codes, books, rows.member).flatten(1, 2)  # [B, 64, N]
        vh = h.mT @ v
        old = rows.scales.float()
        slope, bend = (p * v).sum(1), (vh * v).sum(1)
        scale = (old + slope / (rows.d * bend)).clamp(0, LARGEST_SCALE).round()
        moved = ((scale - old) * rows.d)[:, None]
        cost += moved[:, 0] * (moved[:, 0] * bend - 2 * slope)
        e -= moved * v
        p = p - moved * vh
        rows.scales.copy_(scale)
        unit, step = (rows.d * scale.clamp(min=1))[:, None], (rows.d * scale)[:, None]
        for q in range(QUADS):
            here = slice(QUAD * q, QUAD * (q + 1))
            others = p[:, here] - h[:, here, here].mT @ e[:, here]
            y = metric.around[:, q].mT @ (rows.w[:, here] + metric.inverse[:, q].mT @ others) / unit
            rows.codes[:, q] = found = self.search(y, tables[:, :, q], rows.member)
            moved = step * (_words(found[:, None], books, rows.member)[:, 0] - v[:, here])
            e[:, here] -= moved
            before = p[:, here].clone()
            p.baddbmm_(h[:, here].mT, moved, alpha=-1)
            cost -= (moved * (before + p[:, here])).sum(1)

    def search(self, y: torch.Tensor, tables: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
        """The bytes with the greatest scores [B, n], for targets in the metric y [B, 4, n] of lane blocks [B, n/16].

        tables [B, P, 256, 5] are those of one place in the group; their last two dimensions are contiguous.
        """
        b, _, n = y.shape
        lanes = torch.nn.functional.pad(y, (0, 0, 0, 1), value=1)  # [B, 5, n]: times a table's entry it is a score
        lanes = lanes.unflatten(2, (-1, LANES)).permute(0, 2, 3, 1).flatten(0, 1)  # [B*n/16, 16, 5]
        table = tables.gather(1, member.long()[:, :, None, None].expand(-1, -1, *tables.shape[2:])).flatten(0, 1)
        scores = lanes @ table.mT  # [B*n/16, 16, 256]
        return scores.argmax(2).reshape(b, n).to(torch.uint8)


def kernels_for(device: str) -> Kernels:
    """The fastest that work: compiled on a CPU, Triton on a GPU, else torch."""
    if device == "cpu":
        return CompiledKernels() if CompiledKernels.available() else TorchKernels()
    try:
        from .kernels_triton import TritonKernels

        kernels = TritonKernels()
        kernels.try_out(device)
    except (ImportError, OSError, RuntimeError, SubprocessError) as exc:  # it compiles at its first use
        sys.stderr.write(f"note: Triton does not work here ({exc}); torch takes its place, about half as fast\n")
        return TorchKernels()
    return kernels


def _words(codes: torch.Tensor, books: Books, member: torch.Tensor) -> torch.Tensor:
    """Codewords of code bytes [B, Q, N] -> [B, Q, 4, N]."""
    of_row = member.long().repeat_interleave(LANES, 1)[:, None]  # [B, 1, N]
    return books.words[of_row, codes.long()].movedim(3, 2)


class CompiledKernels:
    """The same by ccq_search.cpp, on the CPU: six to eight times as fast there (quantize_speed.py)."""

    def __init__(self) -> None:
        self._library = load()

    @staticmethod
    def available() -> bool:
        """Whether `make` has compiled it."""
        return LIBRARY.exists()

    def feedback_group(
        self, rows: RowGroup, target: torch.Tensor, metric: GroupMetric, books: Books, cost: torch.Tensor
    ) -> None:
        """See Kernels."""
        small = [a.contiguous() for a in (metric.forward, metric.feed, make_tables(books, metric.forward))]
        outputs = (rows.codes, rows.scales, rows.e, cost)
        self._call("ccq_feedback_group", rows, books, (rows.w, target, rows.d, *small, rows.member, *outputs))

    def descend_group(
        self, rows: RowGroup, p: torch.Tensor, metric: GroupMetric, books: Books, cost: torch.Tensor
    ) -> None:
        """See Kernels."""
        tables = make_tables(books, metric.around)
        small = [a.contiguous() for a in (metric.h, metric.inverse, metric.around, tables)]
        outputs = (rows.codes, rows.scales, rows.e, cost)
        self._call("ccq_descend_group", rows, books, (rows.w, p, rows.d, *small, rows.member, *outputs))

    def _call(self, name: str, rows: RowGroup, books: Books, arrays: tuple[torch.Tensor, ...]) -> None:
        """Call `name`(rows, stride of columns, code maps, arrays …) for each matrix."""
        function = getattr(self._library, name)
        maps = books.maps.to(torch.uint32)
        n, stride = rows.w.shape[2], rows.w.stride(1)
        for b in range(len(rows.w)):
            pointers = (ctypes.c_void_p(a[b].data_ptr()) for a in arrays)
            function(ctypes.c_int64(n), ctypes.c_int64(stride), ctypes.c_void_p(maps.data_ptr()), *pointers)
