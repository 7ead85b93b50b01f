"""The calibrated encoder: matrices and the Hessians of their inputs -> ccq2 rows.

`Pipeline.encode` from top to bottom: fix a super scale per row; encode the columns one after another and feed each
error into the columns that follow (LDLQ), once per code map; then revisit every code with the full quadratic form
(coordinate descent) and refit the super scales in between. Rows lie side by side in the last dimension: arrays are
[B, columns, N].

The code is Baidu's (CCQ). LDLQ in blocks as wide as a codeword is as in QTIP, but without incoherence processing: the
format has no room for rotations.

CCQ: Convolutional Code for Extreme Low-bit Quantization in LLMs, https://arxiv.org/abs/2507.07145
QTIP: Quantization with Trellises and Incoherence Processing, https://arxiv.org/abs/2406.11235
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from ..arrays import U8
from ..ccq2.encode import BOOK_RMS, D_LIMIT, TOP_SCALES
from ..ccq2.rows import GROUP, Ccq2Rows, pack_rows
from .hessian import BLOCK, Hessian, factor, identity
from .kernels import CODE_BYTES, LANES, Codebooks, Kernels, RowGroup
from .settings import PASSES, PERCDAMP


@dataclass(frozen=True)
class Rows:
    """Rows and their encoding, [B, K, N] and the like.

    w, hw = H Wᵀ, e = w - ŵ float32 [B, K, N]; d, cost = E H Eᵀ [B, N]; codes uint8 [B, K/4, N]; scales uint8
    [B, K/64, N]; map_index int32 [B, N], the row's code map.
    """

    w: torch.Tensor
    hw: torch.Tensor
    e: torch.Tensor
    d: torch.Tensor
    cost: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    map_index: torch.Tensor

    def take(self, order: torch.Tensor) -> "Rows":
        """The rows `order` [B, N'] of each matrix."""

        def pick(a: torch.Tensor) -> torch.Tensor:
            index = order if a.ndim == 2 else order[:, None].expand(-1, a.shape[1], -1)
            return a.gather(-1, index)

        return Rows(*(pick(getattr(self, field.name)) for field in fields(self)))

    def better(self, other: "Rows") -> "Rows":
        """Row by row the cheaper of two encodings of the same rows."""
        wins = self.cost <= other.cost

        def pick(name: str) -> torch.Tensor:
            a, b = getattr(self, name), getattr(other, name)
            return torch.where(wins if a.ndim == 2 else wins[:, None], a, b)

        return replace(self, **{name: pick(name) for name in _ENCODING})


_ENCODING = ("e", "d", "cost", "codes", "scales", "map_index")  # the fields of Rows that an encoder chooses


def _lane_order(map_index: torch.Tensor, maps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An order of rows in which each block of 16 has one code map: rows [B, N'] and the blocks' maps [B, N'/16].

    Each map's rows are padded to a multiple of 16 by repeating one of them, and all matrices to the same N'.
    """
    orders, blocks = [], []
    for each in map_index:
        parts = [(each == m).nonzero()[:, 0] for m in range(maps)]
        padded = [torch.cat([part, part[:1].expand(-len(part) % LANES)]) for part in parts]
        orders.append(torch.cat(padded))
        counts = torch.tensor([len(part) // LANES for part in padded], device=map_index.device)
        blocks.append(torch.arange(maps, dtype=torch.int32, device=map_index.device).repeat_interleave(counts))
    longest = max(map(len, orders))
    for b, order in enumerate(orders):  # repeat the last row up to the longest order
        missing = longest - len(order)
        orders[b] = torch.cat([order, order[-1:].expand(missing)])
        blocks[b] = torch.cat([blocks[b], blocks[b][-1:].expand(missing // LANES)])
    return torch.stack(orders), torch.stack(blocks)


def _inverse_order(order: torch.Tensor, n: int) -> torch.Tensor:
    """Where each of the n rows is in `order` [B, N']: [B, n]."""
    at = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty(len(order), n, dtype=torch.int64, device=order.device).scatter_(1, order, at)


def _groups(rows: Rows, blocks: torch.Tensor) -> Iterator[tuple[int, slice, RowGroup]]:
    """The groups from left to right: number, columns, views."""
    for group in range(rows.scales.shape[1]):
        columns = slice(group * GROUP, (group + 1) * GROUP)
        codes = rows.codes[:, group * CODE_BYTES : (group + 1) * CODE_BYTES]
        views = RowGroup(rows.w[:, columns], rows.e[:, columns], rows.d, codes, rows.scales[:, group], blocks)
        yield group, columns, views


def _ldlq(rows: Rows, blocks: torch.Tensor, hessian: Hessian, codebooks: Codebooks, kernels: Kernels) -> None:
    """LDLQ: encode all columns from left to right. Fills codes, scales and e; adds to cost, which must be zero."""
    for group, columns, views in _groups(rows, blocks):
        target = views.w + hessian.feedback[:, : columns.start, columns].mT @ rows.e[:, : columns.start]
        kernels.feedback_group(views, target, hessian.group(group), codebooks, rows.cost)


def _coordinate_descent(
    rows: Rows, blocks: torch.Tensor, hessian: Hessian, codebooks: Codebooks, kernels: Kernels
) -> None:
    """One pass over all groups: each scale, then each byte, with everything else fixed."""
    for group, columns, views in _groups(rows, blocks):
        kernels.descend_group(views, hessian.h[:, columns] @ rows.e, hessian.group(group), codebooks, rows.cost)


def _products(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """W H Wᵀ and W H Ŵᵀ of each row, [B, N]."""
    return (rows.hw * rows.w).sum(1), (rows.hw * (rows.w - rows.e)).sum(1)


def _scaled(rows: Rows, factors: torch.Tensor, power: torch.Tensor, cross: torch.Tensor) -> Rows:
    """All super scales times `factors` [B, N]; `power` and `cross` are the rows' products."""
    decoded_power = rows.cost + 2 * cross - power  # Ŵ H Ŵᵀ
    e = rows.w - (rows.w - rows.e) * factors[:, None]
    return replace(rows, d=rows.d * factors, e=e, cost=power - 2 * factors * cross + factors * factors * decoded_power)


def _refit(rows: Rows) -> Rows:
    """Super scales by least squares in H, everything else fixed."""
    power, cross = _products(rows)
    decoded_power = rows.cost + 2 * cross - power
    usual = (cross > 0) & (decoded_power > 0)
    return _scaled(rows, torch.where(usual, cross / torch.where(usual, decoded_power, 1), 1), power, cross)


def _correct_scale(rows: Rows) -> Rows:
    """Scale correction: undo half of least squares' shrinkage. d / sqrt(slope), slope = (W H Ŵᵀ) / (W H Wᵀ)."""
    power, cross = _products(rows)
    slope = torch.where(power > 0, cross / torch.where(power > 0, power, 1), 1).clamp(0.25, 1)
    return _scaled(rows, slope.rsqrt(), power, cross)


def start(w: torch.Tensor, hessian: Hessian) -> tuple[Rows, torch.Tensor]:
    """Rows of w [B, N, K] with their first super scale, not encoded yet; and the unit [B, N] they were divided by.

    The unit is a power of two: no square overflows, and nothing is rounded.
    """
    largest = w.abs().amax(2)
    exponent = torch.where(largest > 0, largest, 1).frexp().exponent
    unit = exponent.clamp(max=127).float().exp2()  # 2^128 overflows float32
    columns = (w / unit[:, :, None]).mT.contiguous()
    b, k, n = columns.shape
    rms = columns.reshape(b, k // GROUP, GROUP, n).square().mean(2).sqrt()  # [B, K/64, N]
    d = rms.amax(1) / BOOK_RMS / TOP_SCALES[0]
    rows = Rows(
        w=columns,
        hw=hessian.h @ columns,
        e=columns,
        d=torch.where(d > 0, d, 1),
        cost=torch.zeros_like(d),
        codes=torch.zeros(b, k // BLOCK, n, dtype=torch.uint8, device=w.device),
        scales=torch.zeros(b, k // GROUP, n, dtype=torch.uint8, device=w.device),
        map_index=torch.zeros(b, n, dtype=torch.int32, device=w.device),
    )
    return rows, unit


def _fresh(rows: Rows, map_index: int) -> tuple[Rows, torch.Tensor]:
    """The same rows, not encoded, all with one code map; and the lane blocks' maps [B, N/16] for that map alone: 0."""
    empty = {name: torch.empty_like(getattr(rows, name)) for name in ("e", "codes", "scales")}
    out = replace(rows, **empty, cost=torch.zeros_like(rows.cost), map_index=torch.full_like(rows.map_index, map_index))
    return out, torch.zeros_like(out.map_index[:, ::LANES])


def encode_plain(rows: Rows, hessian: Hessian, codebooks: Codebooks, kernels: Kernels) -> Rows:
    """Encode by squared error with the first code map. `cost` is E H Eᵀ all the same."""
    out, blocks = _fresh(rows, 0)
    plain = identity(len(rows.w), rows.w.device)
    for _, _, views in _groups(out, blocks):
        kernels.feedback_group(views, views.w, plain, codebooks.only(0), out.cost)
    corrected = _correct_scale(replace(out, hw=rows.w))  # by squared error: H = I
    return replace(corrected, hw=rows.hw, cost=((hessian.h @ corrected.e) * corrected.e).sum(1))


def encode_calibrated(
    rows: Rows, hessian: Hessian, codebooks: Codebooks, kernels: Kernels, passes: int = PASSES
) -> Rows:
    """Encode by E H Eᵀ, each row with its best code map."""
    best: Rows | None = None
    for map_index in range(len(codebooks.code_maps)):
        tried, blocks = _fresh(rows, map_index)
        _ldlq(tried, blocks, hessian, codebooks.only(map_index), kernels)
        best = tried if best is None else best.better(tried)
    assert best is not None  # noqa: S101 - there is at least one code map
    order, blocks = _lane_order(best.map_index, len(codebooks.code_maps))
    lanes = best.take(order)
    for _ in range(passes):
        lanes = _refit(lanes)
        _coordinate_descent(lanes, blocks, hessian, codebooks, kernels)
    return _correct_scale(lanes.take(_inverse_order(order, rows.w.shape[2])))


@dataclass(frozen=True)
class Measured:
    """Some rows of a matrix: the fields of MatrixStats."""

    rows: int
    error: float
    metric_error: float
    plain_metric_error: float
    scales: tuple[int, ...]


@dataclass(frozen=True)
class Encoded:
    """B encoded matrices: ccq2 rows data [B][N, row size], their decoded value float32 [B, N, K], sums per row [B, N].

    The sums are |W|², |E|², W H Wᵀ, E H Eᵀ, and E H Eᵀ of the plain encoder. H is not damped in them.
    """

    data: list[U8]
    value: torch.Tensor
    scales: torch.Tensor  # [B, K/64, N]
    square: torch.Tensor
    square_error: torch.Tensor
    power: torch.Tensor
    cost: torch.Tensor
    plain_cost: torch.Tensor

    def measure(self, b: int, row: int, end: int) -> Measured:
        """Sum up rows `row` … `end` of a matrix. The error of zeros is 0."""

        def ratio(part: torch.Tensor, whole: torch.Tensor) -> float:
            total = float(whole[b, row:end].double().sum())
            return float(part[b, row:end].double().sum()) / total if total > 0 else 0.0

        return Measured(
            end - row,
            ratio(self.square_error, self.square),
            ratio(self.cost, self.power),
            ratio(self.plain_cost, self.power),
            tuple(torch.bincount(self.scales[b, :, row:end].flatten().int(), minlength=16).tolist()),
        )


def _pack(rows: Rows, d: torch.Tensor, codebooks: Codebooks) -> list[U8]:
    """ccq2 rows with super scales d [B, N]. 64 zeros are spelled scale 0 and codes 0, a row of zeros d = 0."""
    codes = torch.where(rows.scales.repeat_interleave(CODE_BYTES, 1) > 0, rows.codes, 0)
    d = torch.where((rows.scales > 0).any(1), d, 0)
    maps = codebooks.code_maps[rows.map_index.long()].cpu().numpy().astype(np.uint32)  # [B, N, 2]
    fields_ = (d.cpu().numpy(), codes.mT.cpu().numpy(), rows.scales.mT.cpu().numpy())
    return [pack_rows(Ccq2Rows(m[:, 0], m[:, 1], *each)) for m, *each in zip(maps, *fields_, strict=True)]


@dataclass(frozen=True)
class Pipeline:
    """The encoder and its parameters."""

    codebooks: Codebooks
    kernels: Kernels
    passes: int = PASSES
    percdamp: float = PERCDAMP
    name = "ccq2"

    def encode(self, w: torch.Tensor, h: torch.Tensor) -> Encoded:
        """Encode w [B, N, K], N a multiple of 16, for inputs with the Hessians h [B, K, K].

        If the plain encoding has the lower damped error, the row keeps it.
        """
        hessian = factor(h, self.percdamp)
        first, unit = start(w, hessian)
        plain = encode_plain(first, hessian, self.codebooks, self.kernels)
        rows = encode_calibrated(first, hessian, self.codebooks, self.kernels, self.passes).better(plain)
        size = unit.double().square()  # overflows float32 for weights that do not
        d = (rows.d * unit).clamp(max=D_LIMIT)
        square, square_error = rows.w.square().sum(1), rows.e.square().sum(1)

        def undamped(cost: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
            return (cost - self.percdamp * squares).clamp(min=0) * size  # rounding can make the difference negative

        return Encoded(
            _pack(rows, d, self.codebooks),
            ((rows.w - rows.e) * (d / rows.d)[:, None]).mT.contiguous(),
            rows.scales,
            square * size,
            square_error * size,
            undamped((rows.hw * rows.w).sum(1), square),
            undamped(rows.cost, square_error),
            undamped(plain.cost, plain.e.square().sum(1)),
        )
