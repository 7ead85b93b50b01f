"""The inner loops in plain torch, on any device. Slow, and the truth that the other kernels are tested against."""

import torch

from ..ccq2.encode import BOOK_RMS, SCALE_STEPS
from ..ccq2.rows import GROUP
from .hessian import BLOCK, GroupHessian
from .kernels import CODE_BYTES, LANES, LARGEST_SCALE, Codebooks, RowGroup


class TorchKernels:
    """See Kernels for what each method does."""

    def feedback_group(
        self, rows: RowGroup, target: torch.Tensor, hessian: GroupHessian, codebooks: Codebooks, cost: torch.Tensor
    ) -> None:
        """See Kernels. All S scales are tried side by side: the rows stand there S times, [B, ..., S*N]."""
        tables, tries = codebooks.tables(hessian.block_root), len(SCALE_STEPS)
        b, _, n = target.shape
        rms = target.square().mean(1).sqrt()
        steps = torch.tensor(SCALE_STEPS, device=target.device)[:, None]
        guess = (rms / (BOOK_RMS * rows.d)).clamp(0, 100).round()
        scale = (guess[:, None] + steps).clamp(0, LARGEST_SCALE).flatten(1)
        w, d, map_index = (a.repeat(*[1] * (a.ndim - 1), tries) for a in (rows.w, rows.d, rows.map_index))
        unit, step = (d * scale.clamp(min=1))[:, None], (d * scale)[:, None]
        fed = target.repeat(1, 1, tries)  # the targets, with the errors fed in so far
        error, total = torch.empty_like(fed), torch.zeros_like(scale)
        code = torch.empty(b, CODE_BYTES, tries * n, dtype=torch.uint8, device=target.device)
        for q in range(CODE_BYTES):
            block, rest = slice(BLOCK * q, BLOCK * (q + 1)), slice(BLOCK * (q + 1), GROUP)
            root = hessian.block_root[:, q].mT  # from the left
            code[:, q] = found = self.search(root @ fed[:, block] / unit, tables[:, :, q], map_index)
            value = step * codebooks.words(found[:, None], map_index)[:, 0]
            torch.sub(w[:, block], value, out=error[:, block])
            total += (root @ (fed[:, block] - value)).square().sum(1)
            if q < CODE_BYTES - 1:
                fed[:, rest].baddbmm_(hessian.feedback[:, block, rest].mT, error[:, block])
        best = total.unflatten(1, (tries, n)).argmin(1)  # [B, N]
        at = best * n + torch.arange(n, device=best.device)
        cost += total.gather(1, at)
        rows.scales.copy_(scale.gather(1, at))
        rows.codes.copy_(code.gather(2, at[:, None].expand(-1, CODE_BYTES, -1)))
        rows.e.copy_(error.gather(2, at[:, None].expand(-1, GROUP, -1)))

    def descend_group(
        self, rows: RowGroup, eh: torch.Tensor, hessian: GroupHessian, codebooks: Codebooks, cost: torch.Tensor
    ) -> None:
        """See Kernels."""
        tables = codebooks.tables(hessian.diag_root)
        h, e = hessian.h, rows.e
        v = codebooks.words(rows.codes, rows.map_index).flatten(1, 2)  # [B, 64, N]
        vh = h.mT @ v
        old = rows.scales.float()
        slope, bend = (eh * v).sum(1), (vh * v).sum(1)
        scale = (old + slope / (rows.d * bend)).clamp(0, LARGEST_SCALE).round()
        moved = ((scale - old) * rows.d)[:, None]
        cost += moved[:, 0] * (moved[:, 0] * bend - 2 * slope)
        e -= moved * v
        eh = eh - moved * vh
        rows.scales.copy_(scale)
        unit, step = (rows.d * scale.clamp(min=1))[:, None], (rows.d * scale)[:, None]
        for q in range(CODE_BYTES):
            block = slice(BLOCK * q, BLOCK * (q + 1))
            others = eh[:, block] - h[:, block, block].mT @ e[:, block]
            y = hessian.diag_root[:, q].mT @ (rows.w[:, block] + hessian.diag_inverse[:, q].mT @ others) / unit
            rows.codes[:, q] = found = self.search(y, tables[:, :, q], rows.map_index)
            moved = step * (codebooks.words(found[:, None], rows.map_index)[:, 0] - v[:, block])
            e[:, block] -= moved
            before = eh[:, block].clone()
            eh.baddbmm_(h[:, block].mT, moved, alpha=-1)
            cost -= (moved * (before + eh[:, block])).sum(1)

    def search(self, y: torch.Tensor, tables: torch.Tensor, map_index: torch.Tensor) -> torch.Tensor:
        """The bytes with the greatest scores [B, n], for targets y [B, 4, n] in the metric.

        map_index [B, n/16] are the lane blocks' maps; tables [B, P, 256, 5] those of one block of columns, whose last
        two dimensions are contiguous.
        """
        b, _, n = y.shape
        lanes = torch.nn.functional.pad(y, (0, 0, 0, 1), value=1)  # [B, 5, n]: times a table entry gives a score
        lanes = lanes.unflatten(2, (-1, LANES)).permute(0, 2, 3, 1).flatten(0, 1)  # [B*n/16, 16, 5]
        table = tables.gather(1, map_index.long()[:, :, None, None].expand(-1, -1, *tables.shape[2:])).flatten(0, 1)
        scores = lanes @ table.mT  # [B*n/16, 16, 256]
        return scores.argmax(2).reshape(b, n).to(torch.uint8)
