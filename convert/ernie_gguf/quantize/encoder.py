"""The calibrated encoder: matrices and the second moments of their inputs -> ccq2 rows.

Top to bottom: `Pipeline.encode` fixes a super scale per row, encodes the columns one after another and feeds each error
into the columns to come (`_feed_back`), once per code map of the pool, then revisits every code with the full quadratic
form (`_descend`), the super scales refitted in between. Rows lie side by side in the last dimension: arrays are
[B, columns, N].
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt
import torch

from ..ccq2.encode import BOOK_RMS, D_LIMIT, TOP_SCALE
from ..ccq2.rows import GROUP, Ccq2Rows, pack_rows
from .kernels import LANES, QUADS, Books, Kernels, RowGroup
from .metric import DAMPING, QUAD, Metric, make_metric, plain_metric

PASSES = 5  # of coordinate descent; more gained nothing


@dataclass(frozen=True)
class Rows:
    """Encoded rows: w, hw = H wᵀ, e = w - ŵ float32 [B, K, N]; d, cost = e H eᵀ [B, N]; codes uint8 [B, K/4, N]; scales
    uint8 [B, K/64, N]; member int32 [B, N], the row's code map in the pool.
    """

    w: torch.Tensor
    hw: torch.Tensor
    e: torch.Tensor
    d: torch.Tensor
    cost: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    member: torch.Tensor

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


_ENCODING = ("e", "d", "cost", "codes", "scales", "member")  # the fields of Rows that an encoder chooses


def _lane_order(member: torch.Tensor, members: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An order of rows in which each block of 16 has one code map: rows [B, N'] and members of the blocks [B, N'/16].

    Each map's rows are filled up to a multiple of 16 by repeating one of them, and all matrices to the same N'.
    """
    orders, blocks = [], []
    for each in member:
        parts = [(each == m).nonzero()[:, 0] for m in range(members)]
        padded = [torch.cat([part, part[:1].expand(-len(part) % LANES)]) for part in parts]
        orders.append(torch.cat(padded))
        counts = torch.tensor([len(part) // LANES for part in padded], device=member.device)
        blocks.append(torch.arange(members, dtype=torch.int32, device=member.device).repeat_interleave(counts))
    longest = max(map(len, orders))
    for b, order in enumerate(orders):  # the last row once more, as often as the longest needs
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
        here = slice(group * GROUP, (group + 1) * GROUP)
        codes = rows.codes[:, group * QUADS : (group + 1) * QUADS]
        views = RowGroup(rows.w[:, here], rows.e[:, here], rows.d, codes, rows.scales[:, group], blocks)
        yield group, here, views


def _feed_back(rows: Rows, blocks: torch.Tensor, metric: Metric, books: Books, kernels: Kernels) -> None:
    """Encode all columns, left to right; fills codes, scales, e and cost, which is zero before."""
    for group, here, views in _groups(rows, blocks):
        target = views.w + metric.feed[:, : here.start, here].mT @ rows.e[:, : here.start]
        kernels.feedback_group(views, target, metric.group(group), books, rows.cost)


def _descend(rows: Rows, blocks: torch.Tensor, metric: Metric, books: Books, kernels: Kernels) -> None:
    """One pass over all groups: each scale, then each byte, everything else fixed."""
    for group, here, views in _groups(rows, blocks):
        kernels.descend_group(views, metric.h[:, here] @ rows.e, metric.group(group), books, rows.cost)


def _products(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """W H Wᵀ and W H Ŵᵀ of each row, [B, N]."""
    return (rows.hw * rows.w).sum(1), (rows.hw * (rows.w - rows.e)).sum(1)


def _grown(rows: Rows, grow: torch.Tensor, power: torch.Tensor, cross: torch.Tensor) -> Rows:
    """All super scales times `grow` [B, N]; `power` and `cross` are the rows' products."""
    whole = rows.cost + 2 * cross - power  # Ŵ H Ŵᵀ
    e = rows.w - (rows.w - rows.e) * grow[:, None]
    return replace(rows, d=rows.d * grow, e=e, cost=power - 2 * grow * cross + grow * grow * whole)


def _refit(rows: Rows) -> Rows:
    """Super scales by least squares in the metric, everything else fixed."""
    power, cross = _products(rows)
    whole = rows.cost + 2 * cross - power
    usual = (cross > 0) & (whole > 0)
    return _grown(rows, torch.where(usual, cross / torch.where(usual, whole, 1), 1), power, cross)


def _half_shrink(rows: Rows) -> Rows:
    """Undo half of least squares' shrinkage: d / sqrt(slope), slope = (W H Ŵᵀ) / (W H Wᵀ)."""
    power, cross = _products(rows)
    slope = torch.where(power > 0, cross / torch.where(power > 0, power, 1), 1).clamp(0.25, 1)
    return _grown(rows, slope.rsqrt(), power, cross)


def start(w: torch.Tensor, metric: Metric) -> tuple[Rows, torch.Tensor]:
    """Rows [B, N, K] with their first super scale, nothing encoded yet; and the unit [B, N] they were divided by.

    The unit is a power of two, so that no square overflows and nothing is rounded.
    """
    largest = w.abs().amax(2)
    exponent = torch.where(largest > 0, largest, 1).frexp().exponent
    unit = exponent.clamp(max=127).float().exp2()  # 2^128 is no float32
    columns = (w / unit[:, :, None]).mT.contiguous()
    b, k, n = columns.shape
    rms = columns.reshape(b, k // GROUP, GROUP, n).square().mean(2).sqrt()  # [B, K/64, N]
    d = rms.amax(1) / BOOK_RMS / TOP_SCALE
    rows = Rows(
        w=columns,
        hw=metric.h @ columns,
        e=columns,
        d=torch.where(d > 0, d, 1),
        cost=torch.zeros_like(d),
        codes=torch.zeros(b, k // QUAD, n, dtype=torch.uint8, device=w.device),
        scales=torch.zeros(b, k // GROUP, n, dtype=torch.uint8, device=w.device),
        member=torch.zeros(b, n, dtype=torch.int32, device=w.device),
    )
    return rows, unit


def _empty(rows: Rows, member: int) -> tuple[Rows, torch.Tensor]:
    """The same rows, not encoded, all with one code map; and the members [B, N/16] in a pool of that one: zeros."""
    fresh = {name: torch.empty_like(getattr(rows, name)) for name in ("e", "codes", "scales")}
    out = replace(rows, **fresh, cost=torch.zeros_like(rows.cost), member=torch.full_like(rows.member, member))
    return out, torch.zeros_like(out.member[:, ::LANES])


def encode_plain(rows: Rows, metric: Metric, books: Books, kernels: Kernels) -> Rows:
    """By plain squared error with the pool's first code map; `cost` is in the metric all the same."""
    out, blocks = _empty(rows, 0)
    plain = plain_metric(len(rows.w), rows.w.device)
    for _, _, views in _groups(out, blocks):
        kernels.feedback_group(views, views.w, plain, books.only(0), out.cost)
    shrunk = _half_shrink(replace(out, hw=rows.w))  # by squared error: H = I
    return replace(shrunk, hw=rows.hw, cost=((metric.h @ shrunk.e) * shrunk.e).sum(1))


def encode_calibrated(rows: Rows, metric: Metric, books: Books, kernels: Kernels, passes: int = PASSES) -> Rows:
    """By the metric, each row with the best of the pool's code maps."""
    best: Rows | None = None
    for member in range(len(books.maps)):
        tried, blocks = _empty(rows, member)
        _feed_back(tried, blocks, metric, books.only(member), kernels)
        best = tried if best is None else best.better(tried)
    assert best is not None  # noqa: S101 - a pool is never empty
    order, blocks = _lane_order(best.member, len(books.maps))
    lanes = best.take(order)
    for _ in range(passes):
        lanes = _refit(lanes)
        _descend(lanes, blocks, metric, books, kernels)
    return _half_shrink(lanes.take(_inverse_order(order, rows.w.shape[2])))


@dataclass(frozen=True)
class Measured:
    """Of some rows of a matrix: the fields of MatrixStats."""

    rows: int
    error: float
    metric_error: float
    plain_metric_error: float
    scales: tuple[int, ...]


@dataclass(frozen=True)
class Encoded:
    """B encoded matrices: ccq2 rows data [B][N, row size], their decoded value float32 [B, N, K], sums per row [B, N].

    The sums are squares of w and of e, and both and the plain encoder's error in the metric, undamped.
    """

    data: list[npt.NDArray[np.uint8]]
    value: torch.Tensor
    scales: torch.Tensor  # [B, K/64, N]
    square: torch.Tensor
    square_error: torch.Tensor
    power: torch.Tensor
    cost: torch.Tensor
    plain_cost: torch.Tensor

    def measure(self, b: int, row: int, end: int) -> Measured:
        """Sum up rows `row` … `end` of a matrix; a matrix of zeros has no error."""

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


def _pack(rows: Rows, d: torch.Tensor, books: Books) -> list[npt.NDArray[np.uint8]]:
    """ccq2 rows with super scales d [B, N]; 64 zeros are spelled scale 0 and codes 0, a row of zeros d = 0."""
    codes = torch.where(rows.scales.repeat_interleave(QUADS, 1) > 0, rows.codes, 0)
    d = torch.where((rows.scales > 0).any(1), d, 0)
    maps = books.maps[rows.member.long()].cpu().numpy().astype(np.uint32)  # [B, N, 2]
    fields_ = (d.cpu().numpy(), codes.mT.cpu().numpy(), rows.scales.mT.cpu().numpy())
    return [pack_rows(Ccq2Rows(m[:, 0], m[:, 1], *each)) for m, *each in zip(maps, *fields_, strict=True)]


@dataclass(frozen=True)
class Pipeline:
    """The encoder with its settings."""

    books: Books
    kernels: Kernels
    passes: int = PASSES
    damping: float = DAMPING

    def encode(self, w: torch.Tensor, h: torch.Tensor) -> Encoded:
        """Encode w [B, N, K] whose inputs have second moments h [B, K, K]; N is a multiple of 16.

        A row on which the plain encoder does better in the metric, should there be one, is taken from there.
        """
        metric = make_metric(h, self.damping)
        first, unit = start(w, metric)
        plain = encode_plain(first, metric, self.books, self.kernels)
        rows = encode_calibrated(first, metric, self.books, self.kernels, self.passes).better(plain)
        size = unit.double().square()  # beyond float32 for weights that are within
        d = (rows.d * unit).clamp(max=D_LIMIT)
        square, square_error = rows.w.square().sum(1), rows.e.square().sum(1)

        def undamped(cost: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
            return (cost - self.damping * squares).clamp(min=0) * size  # as a difference of near equals it may be < 0

        return Encoded(
            _pack(rows, d, self.books),
            ((rows.w - rows.e) * (d / rows.d)[:, None]).mT.contiguous(),
            rows.scales,
            square * size,
            square_error * size,
            undamped((rows.hw * rows.w).sum(1), square),
            undamped(rows.cost, square_error),
            undamped(plain.cost, plain.e.square().sum(1)),
        )
