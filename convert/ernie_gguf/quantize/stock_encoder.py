"""The calibrated encoder of llama.cpp's own types: the steps of `encoder`, with a search per type.

A super scale per block of up to 256 weights; LDLQ with steps tried around the estimate; passes of coordinate descent,
between which the super scales are refitted; scale correction. See `encoder` for the method.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from ..arrays import F16, F32, I32, U8
from ..ccq2.rows import GROUP
from ..stock.pack import StockRows, pack_stock_rows
from ..stock.types import StockType
from .encoder import Encoded
from .hessian import Hessian, factor, identity
from .kernels import LANES
from .settings import PERCDAMP
from .stock_kernels import StockGroup, StockKernels
from .stock_torch import StockSearch, divided, estimate, middle

STOCK_PASSES = 3  # of coordinate descent
_HALF = torch.finfo(torch.float16)


@dataclass(frozen=True)
class State:
    """Rows by columns and their encoding: w, hw = H Wᵀ, e [B, K, N]; cost = E H Eᵀ [B, N]; see StockGroup."""

    w: torch.Tensor
    hw: torch.Tensor
    e: torch.Tensor
    cost: torch.Tensor
    d: torch.Tensor  # [B, K/block, N]
    dmin: torch.Tensor
    codes: torch.Tensor
    step: torch.Tensor
    minimum: torch.Tensor
    scales: torch.Tensor
    mins: torch.Tensor

    def better(self, other: "State") -> "State":
        """Row by row the cheaper of two encodings of the same rows."""
        wins = self.cost <= other.cost

        def pick(name: str) -> torch.Tensor:
            a, b = getattr(self, name), getattr(other, name)
            return torch.where(wins if a.ndim == 2 else wins[:, None], a, b)

        return State(**{field.name: pick(field.name) for field in fields(self)})


def _start(kind: StockType, w: torch.Tensor, h: torch.Tensor | None = None) -> tuple[State, torch.Tensor]:
    """Rows of w [B, N, K] with their first super scales; and the unit [B, N], a power of two, that they are divided by.

    Without h [B, K, K] it is I.
    """
    largest = w.abs().amax(2)
    unit = torch.where(largest > 0, largest, 1).frexp().exponent.clamp(max=127).float().exp2()
    columns = (w / unit[:, :, None]).mT.contiguous()
    b, k, n = columns.shape
    guess, mean = estimate(kind, columns.unflatten(1, (-1, kind.sub)))  # [B, K/sub, N]
    d = guess.unflatten(1, (-1, kind.block // kind.sub)).amax(2) / kind.top
    dmin = torch.zeros_like(d)
    if kind.has_min:
        lowest = (middle(kind) * guess - mean).unflatten(1, (-1, kind.block // kind.sub)).amax(2)
        dmin = lowest.clamp(min=0) / (0.9 * kind.min_high)
    empty = torch.zeros(b, k // kind.sub, n, device=w.device)
    codes = torch.zeros(b, k // kind.dim, n, dtype=torch.int32, device=w.device)
    runs = (empty.clone() for _ in range(4))
    hw = columns if h is None else h @ columns
    return State(columns, hw, columns.clone(), torch.zeros_like(largest), d, dmin, codes, *runs), unit


def _fresh(state: State) -> State:
    """The same rows, not encoded."""
    names = ("e", "codes", "step", "minimum", "scales", "mins", "cost")
    return replace(state, **{name: torch.zeros_like(getattr(state, name)) for name in names})


def _groups(kind: StockType, state: State) -> Iterator[tuple[int, slice, StockGroup]]:
    """The groups from left to right: number, columns, views."""
    for group in range(state.w.shape[1] // GROUP):
        columns = slice(group * GROUP, (group + 1) * GROUP)
        block = columns.start // kind.block if kind.rule else 0  # without a rule the kernels use the steps alone
        words = slice(columns.start // kind.dim, columns.stop // kind.dim)
        runs = slice(columns.start // kind.sub, columns.stop // kind.sub)
        views = (a[:, runs] for a in (state.step, state.minimum, state.scales, state.mins))
        yield (
            group,
            columns,
            StockGroup(
                state.w[:, columns],
                state.e[:, columns],
                state.d[:, block],
                state.dmin[:, block],
                state.codes[:, words],
                *views,
            ),
        )


def _ldlq(kind: StockType, state: State, hessian: Hessian, kernels: StockKernels) -> None:
    for group, columns, views in _groups(kind, state):
        target = views.w + hessian.feedback[:, : columns.start, columns].mT @ state.e[:, : columns.start]
        kernels.feedback_group(kind, views, target, hessian.group(group), state.cost)


def _descend(kind: StockType, state: State, hessian: Hessian, kernels: StockKernels) -> None:
    """One pass: each block's super scale by least squares, then its groups."""
    per_block = max(1, kind.block // GROUP)
    for group, columns, views in _groups(kind, state):
        if kind.rule and group % per_block == 0:
            _refit_block(kind, state, group // per_block, hessian)
        kernels.descend_group(kind, views, hessian.h[:, columns] @ state.e, hessian.group(group))


def _refit_block(kind: StockType, state: State, block: int, hessian: Hessian) -> None:
    """The super scales of one block by least squares in H, everything else fixed. Changes e, d, dmin, step, minimum."""
    columns = slice(block * kind.block, (block + 1) * kind.block)
    value = state.w[:, columns] - state.e[:, columns]
    slope = ((hessian.h[:, columns] @ state.e) * value).sum(1)
    bend = ((hessian.h[:, columns, columns] @ value) * value).sum(1)
    factors = 1 + divided(slope, bend)
    state.e[:, columns] -= (factors - 1)[:, None] * value
    runs = slice(columns.start // kind.sub, columns.stop // kind.sub)
    state.d[:, block] *= factors
    state.dmin[:, block] *= factors
    state.step[:, runs] *= factors[:, None]
    state.minimum[:, runs] *= factors[:, None]


def _correct_scale(state: State) -> State:
    """Scale correction: undo half of least squares' shrinkage, as for ccq2."""
    power, cross = (state.hw * state.w).sum(1), (state.hw * (state.w - state.e)).sum(1)
    slope = torch.where(power > 0, cross / torch.where(power > 0, power, 1), 1).clamp(0.25, 1)
    factors = slope.rsqrt()[:, None]
    scaled = {name: getattr(state, name) * factors for name in ("d", "dmin", "step", "minimum")}
    return replace(state, e=state.w - (state.w - state.e) * factors, **scaled)


def _stored(kind: StockType, state: State, unit: torch.Tensor) -> State:
    """Super scales as float16 holds them, in the weights' own unit; values, errors and steps with those."""

    def half(x: torch.Tensor) -> torch.Tensor:
        size = x * unit[:, None]
        return size.clamp(-_HALF.max, _HALF.max).half().float() / unit[:, None]

    per_block, rule = kind.block // kind.sub, kind.rule
    d, dmin = half(state.d if rule else state.step), half(state.dmin)
    step = d.repeat_interleave(per_block, 1)
    if rule:
        step = step * (rule.a * state.scales + rule.c)
    minimum = dmin.repeat_interleave(per_block, 1) * state.mins if kind.has_min else state.minimum
    words = StockSearch(kind, state.w.device).values(state.codes).flatten(1, 2)
    value = step.repeat_interleave(kind.sub, 1) * words - minimum.repeat_interleave(kind.sub, 1)
    return replace(state, d=d, dmin=dmin, step=step, minimum=minimum, e=state.w - value)


def _cost(state: State, hessian: Hessian) -> State:
    return replace(state, cost=((hessian.h @ state.e) * state.e).sum(1))


@dataclass(frozen=True)
class StockPipeline:
    """The encoder of one type and its parameters."""

    kind: StockType
    kernels: StockKernels
    passes: int = STOCK_PASSES
    percdamp: float = PERCDAMP

    @property
    def name(self) -> str:
        """The type's."""
        return self.kind.name

    def plain(self, first: State, unit: torch.Tensor) -> State:
        """Encode by squared error."""
        kind, state = self.kind, _fresh(first)
        none = identity(len(state.w), state.w.device, kind.dim)
        for _, _, views in _groups(kind, state):
            self.kernels.feedback_group(kind, views, views.w, none, state.cost)
        corrected = replace(_correct_scale(replace(state, hw=state.w)), hw=state.hw)  # by squared error: H = I
        return _stored(kind, corrected, unit)

    def round(self, rows: F32) -> U8:
        """The bytes of rows [N, K] encoded by squared error, without a Hessian."""
        missing = -len(rows) % LANES
        padded = np.concatenate([rows, np.repeat(rows[-1:], missing, 0)]) if missing else rows
        first, unit = _start(self.kind, torch.from_numpy(np.ascontiguousarray(padded))[None])
        return self._pack(self.plain(first, unit), unit)[0][: len(rows)]

    def calibrated(self, first: State, unit: torch.Tensor, hessian: Hessian) -> State:
        """Encode by E H Eᵀ."""
        state = _fresh(first)
        state = replace(state, d=first.d.clone(), dmin=first.dmin.clone())
        _ldlq(self.kind, state, hessian, self.kernels)
        for _ in range(self.passes):
            _descend(self.kind, state, hessian, self.kernels)
        return _cost(_stored(self.kind, _correct_scale(state), unit), hessian)

    def encode(self, w: torch.Tensor, h: torch.Tensor) -> Encoded:
        """Encode w [B, N, K], N a multiple of 16, for inputs with the Hessians h [B, K, K].

        If the plain encoding has the lower damped error, the row keeps it.
        """
        hessian = factor(h, self.percdamp, self.kind.dim)
        first, unit = _start(self.kind, w, hessian.h)
        plain = _cost(self.plain(first, unit), hessian)
        best = self.calibrated(first, unit, hessian).better(plain)
        size = unit.double().square()
        square, square_error = best.w.square().sum(1), best.e.square().sum(1)

        def undamped(cost: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
            return (cost - self.percdamp * squares).clamp(min=0) * size  # rounding can make the difference negative

        return Encoded(
            self._pack(best, unit),
            ((best.w - best.e) * unit[:, None]).mT.contiguous(),
            torch.zeros(len(w), 0, w.shape[1], dtype=torch.uint8),  # the report counts ccq2's scales alone
            square * size,
            square_error * size,
            undamped((best.hw * best.w).sum(1), square),
            undamped(best.cost, square_error),
            undamped(plain.cost, plain.e.square().sum(1)),
        )

    def _pack(self, state: State, unit: torch.Tensor) -> list[U8]:
        def integers(x: torch.Tensor) -> I32:
            found: I32 = x.mT.to(torch.int32).cpu().numpy()
            return found

        def half(x: torch.Tensor) -> F16:
            found: F16 = (x * unit[:, None]).mT.half().cpu().numpy()
            return found

        arrays = zip(
            integers(state.codes),
            integers(state.scales),
            integers(state.mins),
            half(state.d),
            half(state.dmin),
            strict=True,
        )
        return [pack_stock_rows(self.kind, StockRows(*each)) for each in arrays]
