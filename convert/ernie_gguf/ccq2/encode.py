"""The plain encoder of ccq2: float32 rows -> ccq2 rows, by squared error, without running the model.

Every row takes the code map (M, Z) of the pool that suits it best, tried with estimated group scales. Then, for each of
four super scales, the group scales are searched around their estimates and the code bytes exhaustively; the cheapest
wins. Columns may count differently, by how large what they are multiplied with is.

This module states what is computed, slowly. ggml-ccq-encode.cpp does the work and gives the same bytes: sums have a
fixed order in both, and without importance all scores are integers below 2^24, exact in any order.
"""

from dataclasses import dataclass

import numpy as np

from ..arrays import F32, F64, U8
from ..errors import EncodeError
from . import native
from .code_maps import CODE_MAPS
from .rows import GROUP, Ccq2Rows, ccq2_row_size, codebook, pack_rows

BOOK_RMS = 16.5  # a group of rms r is met best with r/16.5 per codebook step
# The group scale that the loudest group of a row is given, of 15. Four of them have half a percent less squared error
# than the first alone.
TOP_SCALES = (13.5, 14.25, 12.75, 12.0)
SCALE_STEPS = (-2, -1, 0, 1, 2)  # tried around the estimate

D_LIMIT = float(np.finfo(np.float32).max) / (15 * 32)  # above it a decoded weight could overflow float32

_GRID = 256  # targets are integers in units of 1/256 codebook step
_CLIP = 128 * _GRID  # four times the largest codeword; keeps scores below 2^24
_QUADS_AT_ONCE = 192  # below the size from which OpenBLAS starts threads, which would get in the way of our own


@dataclass(frozen=True)
class Book:
    """A code map and its codewords c float32 [256, 4]; halves float32 [256, 4] are -c²/2 in grid units."""

    m: int
    z: int
    words: F32
    halves: F32


def _book(m: int, z: int) -> Book:
    words = codebook(m, z).astype(np.float32)
    return Book(m, z, words, -words * words * np.float32(_GRID / 2))


BOOKS = tuple(_book(m, z) for m, z in CODE_MAPS)


def encode_rows(w: F32, importance: F32 | None = None) -> U8:
    """Encode float32 [N, K] as ccq2 rows, uint8 [N, row_size(K)].

    `importance` [K] says how much the errors of the columns matter: finite, not negative, such as the mean squares of
    what they are multiplied with. A group of zeros gets scale 0, a row of zeros d = 0. Raises EncodeError for NaN and
    infinity, naming the place.
    """
    finite = np.isfinite(w)
    if not finite.all():
        row, column = (int(i) for i in np.argwhere(~finite)[0])
        raise EncodeError(row, column, f"{w[row, column]:g} does not fit ccq2, which holds finite values only")
    out = np.empty((len(w), ccq2_row_size(w.shape[1])), np.uint8)
    if (compiled := native.library()) is None:
        encode_rows_in_numpy(w, importance, out)
    else:
        native.encode_rows(compiled, w, importance, out)
    return out


def encode_rows_in_numpy(w: F32, importance: F32 | None, out: U8) -> None:
    """The same without the compiled library; the rows go to `out`."""
    weight = column_weights(importance, w.shape[1]).reshape(-1, GROUP)
    for row, place in zip(w, out, strict=True):
        place[:] = _encode_row(row.astype(np.float64).reshape(-1, GROUP), weight)


def column_weights(importance: F32 | None, k: int) -> F32:
    """How much the squared errors of the columns count, float32 [K]: two parts all alike, one part by importance.

    Of a small ERNIE that makes a KL divergence of .185; half by importance makes .186, none .187.
    """
    if importance is None or not importance.any():
        return np.ones(k, np.float32)
    wide = importance.astype(np.float64)
    weights: F32 = ((2 + wide / (_in_turn(wide) / k)) / 3).astype(np.float32)
    return weights


@dataclass(frozen=True)
class _Encoding:
    """A row with super scale d: scales uint8 [G], codes uint8 [G, 16], value [G, 64] in units of d, its cost."""

    d: float
    scales: U8
    codes: U8
    value: F64
    cost: float


def _encode_row(w: F64, weight: F32) -> U8:
    """Encode a row [G, 64], whose squares do not overflow float64, with weights of its columns [G, 64]."""
    rms = np.sqrt(_in_eights(weight * (w * w)) / _in_eights(weight.astype(np.float64)))
    supers = [_super_scale(float(rms.max()), top) for top in TOP_SCALES]
    supers = supers[: supers.index(0)] if 0 in supers else supers
    if not supers:
        return _pack(BOOKS[0], 0, np.zeros(w.size // 4, np.uint8), np.zeros(len(w), np.uint8))
    book = _choose_book(w / supers[0], _guess(rms, supers[0]), weight)
    best = min((_try_super_scale(w, weight, rms, d, book) for d in supers), key=lambda tried: tried.cost)
    return _pack(book, _undo_half_of_the_shrinkage(w, weight, best), best.codes.reshape(-1), best.scales)


def _pack(book: Book, d: float, codes: U8, scales: U8) -> U8:
    m, z = np.array([[book.m], [book.z]], np.uint32)
    row: U8 = pack_rows(Ccq2Rows(m, z, np.array([d], np.float32), codes[None], scales[None]))[0]
    return row


def _super_scale(loudest: float, top: float) -> float:
    """The super scale that gives the loudest group of a row the scale `top`; 0 if it is too small for float32."""
    return float(np.float32(min(loudest / BOOK_RMS / top, D_LIMIT)))


def _guess(rms: F64, d: float) -> F64:
    return np.rint(np.clip(rms / (BOOK_RMS * d), 0, 100))


def _choose_book(unit: F64, guess: F64, weight: F32) -> Book:
    """The book that meets a row [G, 64], in units of d, best with the estimated scales [G]."""
    scale = np.clip(guess, 1, 15)
    targets = on_grid(unit / scale[:, None])
    # The targets' own squares are the same for all books: the greatest sum of scores has the least squared error.
    totals = [_in_turn(scale * scale * _in_eights(nearest(targets, weight, book)[1])) for book in BOOKS]
    return BOOKS[int(np.argmax(totals))]


def _try_super_scale(w: F64, weight: F32, rms: F64, d: float, book: Book) -> _Encoding:
    """Search scales and codes of a row [G, 64] with super scale d. Scale 0 competes too: it stands for 64 zeros."""
    unit, guess = w / d, _guess(rms, d)
    tried = []
    for step in SCALE_STEPS:
        scale = np.clip(guess + step, 0, 15)
        codes, _ = nearest(on_grid(unit / np.maximum(scale, 1)[:, None]), weight, book)
        value = scale[:, None] * book.words[codes].reshape(-1, GROUP)
        error = unit - value
        tried.append((scale, np.where(scale[:, None] > 0, codes, 0), value, _in_eights(weight * (error * error))))
    scales, codes, value, cost = (np.stack(each) for each in zip(*tried, strict=True))
    at = cost.argmin(0), np.arange(len(w))  # of equals the smallest scale
    return _Encoding(
        d, scales[at].astype(np.uint8), codes[at].astype(np.uint8), value[at], _in_turn(cost[at]) * (d * d)
    )


def _undo_half_of_the_shrinkage(w: F64, weight: F32, encoding: _Encoding) -> float:
    """The super scale divided by the root of least squares' slope, (W·Ŵ)/(W·W).

    Costs .003 of relative squared error and lowers the KL divergence of a model of a small ERNIE from .237 to .203.
    """
    power = _in_turn(_in_eights(weight * (w * w)))
    dot = _in_turn(_in_eights(weight * (w * encoding.value)))
    slope = dot * encoding.d / power if power > 0 else 1.0
    return float(min(encoding.d / np.sqrt(np.clip(slope, 0.25, 1.0)), D_LIMIT))


def on_grid(y: F64) -> F32:
    """Targets in codebook steps -> in grid units, clipped at ±128 steps."""
    grid: F32 = np.rint(np.clip(y * _GRID, -_CLIP, _CLIP)).astype(np.float32)
    return grid


def nearest(targets: F32, weight: F32, book: Book) -> tuple[U8, F64]:
    """Bytes uint8 [G, 16] of the codewords c nearest to targets t on the grid [G, 64], ties go to the lowest; scores.

    The score [G, 16] is the sum over four of a·t·c - a·c²/2 in grid units, a being the weights [G, 64]: the weighted
    squared distance is that of 0 less twice the score.
    """
    y, a = (weight * targets).reshape(-1, 4), weight.reshape(-1, 4)
    parts = [_nearest_quads(y[i : i + _QUADS_AT_ONCE], a[i : i + _QUADS_AT_ONCE], book) for i in _starts(len(y))]
    codes, scores = (np.concatenate(each).reshape(len(targets), -1) for each in zip(*parts, strict=True))
    return codes, scores.astype(np.float64)


def _starts(n: int) -> range:
    return range(0, n, _QUADS_AT_ONCE)


def _nearest_quads(y: F32, a: F32, book: Book) -> tuple[U8, F32]:
    def product(x: F32, c: F32) -> F32:  # [n, 4], [256, 4] -> [n, 256], in the order of ggml-ccq-encode.cpp
        p: list[F32] = [x[:, j, None] * c[:, j] for j in range(4)]
        return (p[0] + p[1]) + (p[2] + p[3])

    if (a == 1).all():  # all scores are integers: the same in any order, and 15 times as fast
        scores: F32 = y @ book.words.T + book.halves.sum(1)
    else:
        scores = product(y, book.words) + product(a, book.halves)
    codes = scores.argmax(1)
    return codes.astype(np.uint8), scores[np.arange(len(y)), codes]


def _in_eights(x: F32 | F64) -> F64:
    """Sums along the last dimension, a multiple of 8: eight partial sums, which are added pair by pair."""
    part = x[..., :8].astype(np.float64)
    for i in range(8, x.shape[-1], 8):
        part = part + x[..., i : i + 8]
    while part.shape[-1] > 1:
        part = part[..., 0::2] + part[..., 1::2]
    return part[..., 0]


def _in_turn(x: F64) -> float:
    """The sum of a vector, from the first to the last."""
    return float(np.cumsum(x)[-1])
