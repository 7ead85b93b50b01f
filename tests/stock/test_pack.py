"""Bytes of llama.cpp's types: gguf-py decodes them to what the codes and scales say; llama.cpp's library agrees."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from ernie_gguf.gguf_file.types import GgmlType, row_size
from ernie_gguf.stock.pack import PACKERS, SIGNS, StockRows, pack_stock_rows
from ernie_gguf.stock.types import EVEN, FREE, STOCK_TYPES, StockType

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
K = 512


def random_rows(kind: StockType, n: int, seed: int = 0) -> StockRows:
    """Every field over its whole range."""
    rng = np.random.default_rng(seed)
    entries = 2**16 if kind.pair else len(kind.codewords())
    index = rng.integers(0, entries, (n, K // kind.dim))
    signs = np.zeros_like(index)
    if kind.signs:
        bits = rng.integers(0, 2, (n, K // kind.dim, kind.dim))
        if kind.signs == EVEN:
            bits[..., -1] = bits[..., :-1].sum(-1) % 2
        signs = (bits << np.arange(kind.dim)).sum(-1)
    low, high = (kind.rule.low, kind.rule.high) if kind.rule else (0, 0)
    runs = (n, K // kind.sub)
    d, dmin = rng.uniform(0.001, 0.02, (2, n, K // kind.block)).astype(np.float16)
    return StockRows(
        (index | signs << SIGNS).astype(np.int32),
        rng.integers(low, high, runs, endpoint=True).astype(np.int32),
        rng.integers(0, kind.min_high, runs, endpoint=True).astype(np.int32),
        d,
        dmin,
    )


def decoded(kind: StockType, rows: StockRows) -> npt.NDArray[np.float64]:
    """What the fields stand for, by the definition."""
    words = kind.codewords().astype(np.float64)
    index, signs = rows.codes & 65535, rows.codes >> SIGNS
    found = np.concatenate([words[index & 255], words[index >> 8]], -1) if kind.pair else words[index]
    if kind.signs:
        found = np.where(signs[..., None] >> np.arange(kind.dim) & 1, -found, found)
    rule = kind.rule
    step = rows.d.astype(np.float64).repeat(kind.block // kind.sub, 1)
    if rule:
        step = step * (rule.a * rows.scales + rule.c)
    minimum = rows.dmin.astype(np.float64).repeat(kind.block // kind.sub, 1) * rows.mins if kind.has_min else 0.0 * step
    values: npt.NDArray[np.float64] = found.reshape(len(step), K) * step.repeat(kind.sub, 1)
    return values - minimum.repeat(kind.sub, 1)


def ggml_decoded(kind: StockType, data: U8) -> F32:
    """The same rows decoded by llama.cpp's library."""
    import ernie_llama

    base = ctypes.CDLL(str(Path(ernie_llama.library_path()).with_name("libggml-base.so")))
    out = np.empty((len(data), K), np.float32)
    function = getattr(base, f"dequantize_row_{kind.name.replace('_k', '_K')}")
    function(data.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(out.size))
    return out


def test_every_type_has_a_packer_and_a_size() -> None:
    assert PACKERS.keys() == STOCK_TYPES.keys()
    assert {name.upper() for name in STOCK_TYPES} <= set(GgmlType.__members__)


@pytest.mark.parametrize("name", [name for name in STOCK_TYPES if name != "q2_0"])  # gguf-py 0.19 does not know it
def test_bytes_decode_to_what_the_fields_say(name: str) -> None:
    kind = STOCK_TYPES[name]
    rows = random_rows(kind, 5)
    data = pack_stock_rows(kind, rows)
    assert data.shape == (5, row_size(GgmlType[name.upper()], K))
    found = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name.upper()])
    assert found == pytest.approx(decoded(kind, rows), rel=1e-5, abs=1e-7)


@pytest.mark.build
@pytest.mark.parametrize("name", STOCK_TYPES)
def test_llama_cpp_decodes_the_same(name: str) -> None:
    kind = STOCK_TYPES[name]
    rows = random_rows(kind, 3, seed=1)
    data = pack_stock_rows(kind, rows)
    assert ggml_decoded(kind, data) == pytest.approx(decoded(kind, rows), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", [name for name, kind in STOCK_TYPES.items() if kind.signs == FREE])
def test_free_signs_need_no_parity(name: str) -> None:
    signs = random_rows(STOCK_TYPES[name], 5).codes >> SIGNS
    assert {bin(sign).count("1") % 2 for sign in signs.ravel()} == {0, 1}
