"""The calibrated encoder of llama.cpp's types: every choice against all others in float64, and what it promises."""

from __future__ import annotations

from dataclasses import dataclass, replace

import gguf
import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch", reason="torch is not installed (extra `quantize`): the encoder needs it")

import torch
from ernie_gguf.ccq2 import native
from ernie_gguf.quantize.encoder import Encoded
from ernie_gguf.quantize.hessian import factor
from ernie_gguf.quantize.settings import PERCDAMP
from ernie_gguf.quantize.stock_cpu import CpuStockKernels
from ernie_gguf.quantize.stock_encoder import State, StockPipeline, _fresh, _groups, _start
from ernie_gguf.quantize.stock_kernels import StockKernels
from ernie_gguf.quantize.stock_torch import TorchStockKernels
from ernie_gguf.stock.pack import SIGNS
from ernie_gguf.stock.types import EVEN, STOCK_TYPES, StockType
from ernie_gguf.verify import decode

from quantize.problems import F64, hessian_of, kernels_of, truth_of, weights_of

K = 256
TYPES = sorted(STOCK_TYPES)
CLOSE = 2e-5  # of the costliest choice: what rounding to float32 may hide


def compiled(width: int | None = None) -> CpuStockKernels:
    kernels_of("compiled", width)  # skips or fails as it does
    library = native.library()
    assert library is not None
    return CpuStockKernels(library, width)


@pytest.fixture
def kernels() -> StockKernels:
    return compiled()


def kernels_width() -> int:
    library = native.library()
    return native.vector_width(library) if library else 0


def words_of(kind: StockType, codes: npt.NDArray[np.int32]) -> F64:
    """Codewords of codes [...] with their signs, by the definition: [..., dim]."""
    grid, index = kind.codewords().astype(np.float64), codes & (1 << SIGNS) - 1
    found = np.concatenate([grid[index & 255], grid[index >> 8]], -1) if kind.pair else grid[index]
    bits = (codes[..., None] >> SIGNS) >> np.arange(kind.dim) & 1
    return np.where(bits, -found, found) if kind.signs else found


def all_codes(kind: StockType, y: F64) -> npt.NDArray[np.int32]:
    """Every code that the rule of signs allows for a target y [dim]; of a pair those of its first half, for a start."""
    entries = np.arange(len(kind.codewords()), dtype=np.int32)
    if not kind.signs:
        return entries
    natural = sum(int(value < 0) << j for j, value in enumerate(y))
    odd = kind.signs == EVEN and bin(natural).count("1") % 2
    patterns = [natural ^ 1 << j for j in range(kind.dim)] if odd else [natural]
    return np.concatenate([entries | sign << SIGNS for sign in patterns])


@dataclass
class Problem:
    """Rows of one type being encoded, with the truth about their Hessian."""

    kind: StockType
    state: State
    h: torch.Tensor
    hessian: object

    @property
    def e(self) -> F64:
        """W - Ŵ [B, N, K] from codes, steps and minima instead of e."""
        kind, s = self.kind, self.state
        words = words_of(kind, s.codes.numpy())  # [B, K/dim, N, dim]
        b, _, n, _ = words.shape
        values = words.transpose(0, 1, 3, 2).reshape(b, -1, n)
        step, minimum = (np.repeat(a.double().numpy(), kind.sub, 1) for a in (s.step, s.minimum))
        errors: F64 = s.w.double().numpy() - (step * values - minimum)
        return errors.transpose(0, 2, 1)


def pose(name: str, inputs: str = "correlated", n: int = 16, b: int = 1) -> Problem:
    kind, h, w = STOCK_TYPES[name], hessian_of(inputs, b, K, seed=3), weights_of(b, n, K, seed=4)
    hessian = factor(h, PERCDAMP, kind.dim)
    first, _ = _start(kind, w, hessian.h)
    return Problem(kind, _fresh(first), h, hessian)


def feed(problem: Problem, kernels: StockKernels) -> None:
    """LDLQ of all columns."""
    hessian, state = factor(problem.h, PERCDAMP, problem.kind.dim), problem.state
    for group, columns, views in _groups(problem.kind, state):
        target = views.w + hessian.feedback[:, : columns.start, columns].mT @ state.e[:, : columns.start]
        kernels.feedback_group(problem.kind, views, target, hessian.group(group), state.cost)


@pytest.mark.parametrize("name", TYPES)
def test_the_summed_costs_equal_the_quadratic_form(name: str, kernels: StockKernels) -> None:
    problem = pose(name)
    feed(problem, kernels)
    want = np.stack([truth_of(h).cost(e) for h, e in zip(problem.h, problem.e, strict=True)])
    assert problem.state.cost.numpy() == pytest.approx(want, rel=2e-3)
    assert problem.state.e.mT.numpy() == pytest.approx(problem.e, abs=1e-5)


@pytest.mark.parametrize("name", [name for name in TYPES if not STOCK_TYPES[name].pair])
def test_every_codeword_is_the_nearest_after_the_choices_before_it(name: str, kernels: StockKernels) -> None:
    problem = pose(name, n=16, b=1)
    feed(problem, kernels)
    kind, truth, e, w = problem.kind, truth_of(problem.h[0]), problem.e[0], problem.state.w[0].T.double().numpy()
    steps, minima = (a[0].double().numpy() for a in (problem.state.step, problem.state.minimum))
    worse = []
    for row in (0, 7, 15):
        for q in range(0, K // kind.dim, 3):
            start, here = q * kind.dim, slice(q * kind.dim, (q + 1) * kind.dim)
            run = start // kind.sub
            step, minimum = steps[run, row], minima[run, row]
            root = truth.g[here, here]
            pull = e[row, :start] @ truth.g[:start, here]  # what earlier errors cost here
            target = w[row, here] + pull @ np.linalg.inv(root)
            codes = all_codes(kind, (target + minimum) / step)
            tried = target - (step * words_of(kind, codes) - minimum)
            costs = ((tried @ root) ** 2).sum(1)
            own = (((pull @ np.linalg.inv(root) + e[row, here]) @ root) ** 2).sum()
            worse.append((own - costs.min()) / costs.max())
    assert max(worse) < CLOSE
    assert min(worse) > -CLOSE


def test_a_pair_is_no_worse_than_its_halves_chosen_alone() -> None:
    problem = pose("iq3_xxs", n=16)
    feed(problem, TorchStockKernels())
    codes = problem.state.codes.numpy()
    signs = codes >> SIGNS
    assert not any(bin(int(sign)).count("1") % 2 for sign in signs.ravel())


@pytest.mark.parametrize("name", TYPES)
def test_compiled_finds_what_torch_finds(name: str) -> None:
    """But for choices that cost the same. `width`: of the registers, those that the machine has."""
    w, h = weights_of(1, 16, K, seed=5), hessian_of("correlated", 1, K, seed=6)
    truth = StockPipeline(STOCK_TYPES[name], TorchStockKernels(), passes=1).encode(w, h)
    for width in native.WIDTHS:
        if width > kernels_width():
            continue
        found = StockPipeline(STOCK_TYPES[name], compiled(width), passes=1).encode(w, h)
        assert float(found.cost.sum()) == pytest.approx(float(truth.cost.sum()), rel=0.02)
        same = np.mean(truth.data[0] == found.data[0])
        assert same > 0.7  # bytes; one choice made otherwise moves those that follow


@pytest.mark.parametrize("name", TYPES)
def test_descent_never_raises_the_cost(name: str, kernels: StockKernels) -> None:
    problem = pose(name)
    feed(problem, kernels)
    hessian, kind = factor(problem.h, PERCDAMP, problem.kind.dim), problem.kind
    for group, columns, views in _groups(kind, problem.state):
        before = np.stack([truth_of(h).cost(e) for h, e in zip(problem.h, problem.e, strict=True)])
        kernels.descend_group(kind, views, hessian.h[:, columns] @ problem.state.e, hessian.group(group))
        after = np.stack([truth_of(h).cost(e) for h, e in zip(problem.h, problem.e, strict=True)])
        assert (after <= before * (1 + 1e-4)).all()
        assert after.sum() < before.sum()
        assert problem.state.e.mT.numpy() == pytest.approx(problem.e, abs=1e-5)


def decoded(name: str, data: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    if name == "q2_0":
        return decode.gguf_rows(data, name, K)
    values: npt.NDArray[np.float32] = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name.upper()])
    return values


def row_costs(w: torch.Tensor, h: torch.Tensor, name: str, encoded: Encoded, percdamp: float = PERCDAMP) -> F64:
    """E H Eᵀ of every row [B, N], decoded from the bytes."""
    costs = [
        truth_of(m, percdamp).cost(each.double().numpy() - decoded(name, data))
        for m, each, data in zip(h, w, encoded.data, strict=True)
    ]
    return np.stack(costs)


@pytest.mark.parametrize("name", TYPES)
def test_gguf_py_decodes_the_bytes_to_the_values(name: str, kernels: StockKernels) -> None:
    w, h = weights_of(2, 16, K, seed=7), hessian_of("loud", 2, K, seed=8)
    encoded = StockPipeline(STOCK_TYPES[name], kernels).encode(w, h)
    values = np.stack([decoded(name, data) for data in encoded.data])
    assert values == pytest.approx(encoded.value.numpy(), rel=1e-5, abs=1e-8)
    measured = encoded.measure(0, 0, 16)
    error = np.square(w[0].numpy() - values[0]).sum() / np.square(w[0].numpy()).sum()
    assert measured.error == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("inputs", ["loud", "few tokens", "zeros"])
def test_no_row_is_worse_than_with_the_plain_encoder(name: str, inputs: str) -> None:
    kernels = compiled()
    w, h = weights_of(1, 16, K, seed=9), hessian_of(inputs, 1, K, seed=10)
    pipeline = StockPipeline(STOCK_TYPES[name], kernels)
    plain = pipeline.round(w[0].numpy())
    costs = row_costs(w, h, name, pipeline.encode(w, h))[0]
    before = truth_of(h[0]).cost(w[0].double().numpy() - decoded(name, plain))
    assert (costs <= before * (1 + 1e-3)).all()
    if inputs != "zeros":
        assert costs.sum() < 0.75 * before.sum()


@pytest.mark.parametrize("name", ["iq2_s", "iq3_s", "q3_k"])
def test_each_part_of_the_method_helps(name: str) -> None:
    kernels, w, h = compiled(), weights_of(1, 64, K, seed=11), hessian_of("correlated", 1, K, seed=12)
    totals = [
        row_costs(w, h, name, StockPipeline(STOCK_TYPES[name], kernels, passes).encode(w, h)).sum() for passes in (0, 3)
    ]
    one = replace(STOCK_TYPES[name], trials=replace(STOCK_TYPES[name].trials, each=STOCK_TYPES[name].trials.each[:1]))
    assert totals[1] < 0.99 * totals[0]
    alone = StockPipeline(one, compiled(), 3).encode(w, h)
    assert totals[1] < 0.99 * row_costs(w, h, name, alone).sum()


@pytest.mark.parametrize("name", TYPES)
def test_zeros_and_sizes_at_the_ends_of_float16(name: str) -> None:
    """A row of zeros is exact; scales that float16 cannot hold are clamped, and nothing becomes NaN."""
    w = weights_of(1, 16, K, seed=13)
    w[0, 0] = 0
    w[0, 1] *= 1e30
    w[0, 2] *= 1e-30
    encoded = StockPipeline(STOCK_TYPES[name], compiled()).encode(w, hessian_of("white", 1, K, seed=14))
    values = decoded(name, encoded.data[0])
    assert np.isfinite(values).all()
    assert not values[0].any()
    assert not values[2].any()
    assert np.abs(values[1]).max() > 1e3


@pytest.mark.parametrize("n", [1, 5, 16, 33])
def test_rounding_takes_any_number_of_rows(n: int) -> None:
    w = weights_of(1, 48, K, seed=15)[0].numpy()
    pipeline = StockPipeline(STOCK_TYPES["q6_k"], compiled())
    assert np.array_equal(pipeline.round(w[:n]), pipeline.round(w)[:n])


def test_the_same_input_gives_the_same_bytes() -> None:
    w, h = weights_of(2, 32, K, seed=16), hessian_of("correlated", 2, K, seed=17)
    pipeline = StockPipeline(STOCK_TYPES["iq3_s"], compiled())
    together = pipeline.encode(w, h).data
    alone = [pipeline.encode(w[b : b + 1], h[b : b + 1]).data[0] for b in range(2)]
    assert [np.array_equal(a, b) for a, b in zip(together, alone, strict=True)] == [True, True]
