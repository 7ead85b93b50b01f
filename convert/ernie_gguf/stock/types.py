"""llama.cpp's quantized types as one table: what the calibrated encoder has to know of each.

A row is cut into blocks of 256 weights (q4_0: 32, q2_0: 64) with a float16 `d`. Runs of `sub` weights in a block share
an integer scale s, hence a step d*(a*s + c); q2_K, q4_K and q5_K subtract a minimum dmin*m as well. `dim` weights next
to each other are a codeword: a level of a list, or an entry of a grid with a sign for each weight.

The layouts are ggml-common.h's; grids come from gguf-py. Its dequantize is the truth for decoded values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from ..arrays import F32

IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
NO_SIGNS, FREE, EVEN = 0, 1, 2  # signs of a codeword: none, one per weight, an even number of minus signs in eight


@dataclass(frozen=True)
class ScaleRule:
    """step = d * (a*s + c) for integers s from `low` to `high`; `bits` is how they are spelled in `pack`."""

    a: float
    c: float
    low: int
    high: int


@dataclass(frozen=True)
class Trials:
    """The steps that LDLQ tries for a run of `sub` weights, around step = guess * rms.

    Each trial is (factor, delta, shift): the guess times `factor`, `delta` more on the integer scale; of types with a
    minimum, zero lies `shift` steps off the middle of the levels.
    """

    guess: float
    each: tuple[tuple[float, int, float], ...]


@dataclass(frozen=True)
class StockType:
    """See the module. `levels` are those of scalar types (dim 1). Without a `rule` a block is one run, its step d.

    `pair`: a codeword of eight is two entries of a grid of four that share the parity of their signs.
    """

    name: str
    dim: int
    sub: int
    block: int
    rule: ScaleRule | None
    trials: Trials
    levels: tuple[int, ...] = ()
    signs: int = NO_SIGNS
    min_high: int = 0  # the largest minimum; 0 if the type has none
    pair: bool = False

    @property
    def has_min(self) -> bool:
        """Whether a minimum is subtracted."""
        return self.min_high > 0

    @property
    def top(self) -> float:
        """a*s + c of the scale that the loudest run of a block is given: some room is left above."""
        if self.rule is None:
            return 1.0
        return self.rule.a * self.rule.high * 0.9 + self.rule.c

    def codewords(self) -> F32:
        """[C, 1] levels, or the grid [C, dim] (of a pair [C, 4]), without signs."""
        return np.array(self.levels, np.float32)[:, None] if self.levels else _grid(self.name)


@cache
def _grid(name: str) -> F32:
    from gguf import quants

    kind = getattr(quants, name.upper())
    kind.init_grid()
    grid: F32 = kind.grid.reshape(kind.grid_shape).astype(np.float32)
    return grid


def _steps(*factors: float, both_signs: bool = True) -> tuple[tuple[float, int, float], ...]:
    signs = (1, -1) if both_signs else (1,)
    return tuple((sign * factor, 0, 0.0) for factor in factors for sign in signs)


# Scales of four bits are a few per cent apart: the neighbours of the estimate are tried.
_NEIGHBOURS = tuple((1.0, delta, 0.0) for delta in (0, -1, 1, -2, 2))
_WIDE = _steps(1.0, 0.85, 1.15, 0.7, 1.3, 1.5)
_SHIFTED = tuple((f, 0, shift) for f in (1.0, 0.85, 1.15, 1.35) for shift in (0.0, -0.3, 0.3))


def _levels(low: int, high: int) -> tuple[int, ...]:
    return tuple(range(low, high + 1))


_ALL = (
    StockType("iq2_xxs", 8, 32, 256, ScaleRule(0.25, 0.125, 0, 15), Trials(0.0430, _NEIGHBOURS), signs=EVEN),
    StockType("iq2_xs", 8, 16, 256, ScaleRule(0.25, 0.125, 0, 15), Trials(0.0430, _NEIGHBOURS), signs=EVEN),
    StockType("iq2_s", 8, 16, 256, ScaleRule(0.25, 0.125, 0, 15), Trials(0.0430, _NEIGHBOURS), signs=FREE),
    StockType("iq3_xxs", 8, 32, 256, ScaleRule(0.5, 0.25, 0, 15), Trials(0.0419, _NEIGHBOURS), signs=EVEN, pair=True),
    StockType("iq3_s", 4, 32, 256, ScaleRule(2, 1, 0, 15), Trials(0.1675, _NEIGHBOURS), signs=FREE),
    StockType("iq4_xs", 1, 32, 256, ScaleRule(1, 0, -32, 31), Trials(0.0228, _WIDE), IQ4_LEVELS),
    StockType("q2_0", 1, 64, 64, None, Trials(0.9957, _WIDE), _levels(-1, 2)),
    StockType("q2_k", 1, 16, 256, ScaleRule(1, 0, 0, 15), Trials(0.9957, _SHIFTED), _levels(0, 3), min_high=15),
    StockType("q3_k", 1, 16, 256, ScaleRule(1, 0, -32, 31), Trials(0.5860, _WIDE), _levels(-4, 3)),
    StockType("q4_0", 1, 32, 32, None, Trials(0.3352, _WIDE), _levels(-8, 7)),
    StockType("q4_k", 1, 32, 256, ScaleRule(1, 0, 0, 63), Trials(0.3352, _SHIFTED), _levels(0, 15), min_high=63),
    StockType("q5_k", 1, 32, 256, ScaleRule(1, 0, 0, 63), Trials(0.1881, _SHIFTED), _levels(0, 31), min_high=63),
    StockType("q6_k", 1, 16, 256, ScaleRule(1, 0, -128, 127), Trials(0.1041, _WIDE), _levels(-32, 31)),
)
STOCK_TYPES: dict[str, StockType] = {each.name: each for each in _ALL}
