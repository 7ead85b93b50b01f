"""The calibrated encoder as a whole: what it promises for any matrix and any inputs, down to the bytes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch", reason="torch is not installed (extra `quantize`): the encoder needs it")

import torch
from ernie_gguf.ccq2.rows import dequantize_rows, unpack_rows
from ernie_gguf.quantize.encoder import Encoded, Pipeline, _inverse_order, _lane_order
from ernie_gguf.quantize.hessian import GroupHessian
from ernie_gguf.quantize.kernels import Codebooks, Kernels, RowGroup, make_codebooks
from ernie_gguf.quantize.kernels_torch import TorchKernels
from ernie_gguf.quantize.settings import PERCDAMP

from quantize.problems import F64, KERNELS, KINDS, THREE_MAPS, hessian_of, kernels_of, truth_of, weights_of

K = 256


def pipeline(maps: int = 3, passes: int = 5, kernels: Kernels | None = None, percdamp: float = PERCDAMP) -> Pipeline:
    return Pipeline(make_codebooks(THREE_MAPS[:maps]), kernels or TorchKernels(), passes, percdamp)


def errors(w: torch.Tensor, encoded: Encoded) -> F64:
    """W - Ŵ [B, N, K], decoded from the bytes."""
    values = np.stack([dequantize_rows(data, w.shape[2]) for data in encoded.data])
    e: F64 = w.double().numpy() - values
    return e


def row_costs(w: torch.Tensor, h: torch.Tensor, encoded: Encoded, percdamp: float = PERCDAMP) -> F64:
    """E H Eᵀ of every row [B, N], with Ŵ decoded from the bytes and H damped."""
    costs: F64 = np.stack([truth_of(m, percdamp).cost(e) for m, e in zip(h, errors(w, encoded), strict=True)])
    return costs


def plain_bytes(w: torch.Tensor) -> list[npt.NDArray[np.uint8]]:
    """The plain encoder's bytes with its one code map: encoding with H = I and no descent is the same."""
    eye = torch.eye(w.shape[2]).expand(len(w), -1, -1)
    return pipeline(maps=1, passes=0).encode(w, eye).data


@dataclass(frozen=True)
class Watched(TorchKernels):
    """Records each group after feedback: w, e [B, 64, N], and the sum of the costs so far [B, N]."""

    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def feedback_group(
        self, rows: RowGroup, target: torch.Tensor, hessian: GroupHessian, codebooks: Codebooks, cost: torch.Tensor
    ) -> None:
        super().feedback_group(rows, target, hessian, codebooks, cost)
        self.keep(rows, cost)

    def keep(self, rows: RowGroup, cost: torch.Tensor) -> None:
        """Record a group."""
        self.seen.append((rows.w.clone(), rows.e.clone(), cost.clone()))

    def last(self) -> tuple[F64, F64]:
        """The last encoding of all columns: E [B, N, K] and the costs [B, N]."""
        groups = self.seen[-K // 64 :]
        e: F64 = torch.cat([e for _, e, _ in groups], 1).mT.double().numpy()
        return e, groups[-1][2].double().numpy()


class FeedsBackTheTarget(Watched):
    """A known mistake: feed back t - Ŵ instead of W - Ŵ."""

    def feedback_group(
        self, rows: RowGroup, target: torch.Tensor, hessian: GroupHessian, codebooks: Codebooks, cost: torch.Tensor
    ) -> None:
        TorchKernels.feedback_group(self, replace(rows, w=target), target, hessian, codebooks, cost)
        value = target - rows.e
        self.keep(replace(rows, e=rows.w - value), cost)


def feedback_costs(kernels: Watched, kind: str) -> tuple[F64, F64]:
    """The summed costs of feedback, and E H Eᵀ. Weights are of size 1, so that no row is scaled."""
    w, h = weights_of(2, 32, K, seed=1), hessian_of(kind, 2, K, seed=2)
    w *= 0.75 / w.abs().amax(2, keepdim=True)
    pipeline(maps=1, passes=0, kernels=kernels).encode(w, h)
    e, cost = kernels.last()
    return cost, np.stack([truth_of(m).cost(each) for m, each in zip(h, e, strict=True)])


@pytest.mark.parametrize("kind", KINDS)
def test_the_summed_costs_equal_the_quadratic_form(kind: str) -> None:
    summed, want = feedback_costs(Watched(), kind)
    assert summed == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("kind", ["correlated", "loud", "few tokens", "one token"])
def test_feeding_back_the_error_against_the_target_is_found_out(kind: str) -> None:
    summed, want = feedback_costs(FeedsBackTheTarget(), kind)
    assert abs(summed / want - 1).max() > 0.002  # 20 times what the test above allows


@pytest.mark.parametrize("kind", ["correlated", "loud", "few tokens", "one token"])
def test_each_part_of_the_method_helps(kind: str) -> None:
    """The total cost: plain, with LDLQ, five passes of coordinate descent, three code maps instead of one."""
    w, h = weights_of(1, 64, K, seed=3), hessian_of(kind, 1, K, seed=4)
    eye = torch.eye(K)[None]
    plain = row_costs(w, h, pipeline(1, 0).encode(w, eye)).sum()
    fed = row_costs(w, h, pipeline(1, 0).encode(w, h)).sum()
    descended = row_costs(w, h, pipeline(1, 5).encode(w, h)).sum()
    best_map = row_costs(w, h, pipeline(3, 5).encode(w, h)).sum()
    assert fed < 0.9 * plain
    assert descended < 0.998 * fed
    assert best_map < 0.99 * descended


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_row_is_worse_than_with_the_plain_encoder(kind: str, name: str) -> None:
    w, h = weights_of(1, 64, K, seed=5), hessian_of(kind, 1, K, seed=6)
    found = row_costs(w, h, pipeline(kernels=kernels_of(name)).encode(w, h))
    plain = truth_of(h[0]).cost(w[0].double().numpy() - dequantize_rows(plain_bytes(w)[0], K))
    assert (found <= plain * (1 + 1e-4)).all()


class Spoils(TorchKernels):
    """A descent that ruins half of the rows."""

    def descend_group(
        self, rows: RowGroup, eh: torch.Tensor, hessian: GroupHessian, codebooks: Codebooks, cost: torch.Tensor
    ) -> None:
        super().descend_group(rows, eh, hessian, codebooks, cost)
        half = slice(0, rows.w.shape[2] // 2)
        rows.e[:, :, half] = 10 * rows.w[:, :, half]
        cost[:, half] += 1e6


def test_a_row_on_which_the_plain_encoder_does_better_is_taken_from_there() -> None:
    w, h = weights_of(2, 32, K), hessian_of("correlated", 2, K)
    found = pipeline(maps=1, kernels=Spoils()).encode(w, h)
    for data, plain, value in zip(found.data, plain_bytes(w), found.value, strict=True):
        same = (data == plain)[:, 16:].all(1)  # codes and scales; d is rounded differently
        assert same.tolist() == [True] * 16 + [False] * 16
        assert unpack_rows(data, K).d[:16] == pytest.approx(unpack_rows(plain, K).d[:16], rel=1e-5)
        assert value.numpy() == pytest.approx(dequantize_rows(data, K), rel=1e-5, abs=1e-8)


def test_the_plain_encoder_of_gaussian_weights() -> None:
    """.109 by the first code map, +.003 by the scale correction; d by least squares would be .107."""
    w = torch.randn(1, 64, 1024, generator=torch.Generator().manual_seed(0))
    (data,) = plain_bytes(w)
    e = w[0].double().numpy() - dequantize_rows(data, 1024)
    assert 0.105 < (e**2).sum() / float(w.square().sum()) < 0.115
    assert set(unpack_rows(data, 1024).m.tolist()) == {15853988}


@pytest.mark.parametrize("name", KERNELS)
def test_the_rows_decode_to_the_value(name: str) -> None:
    w, h = weights_of(2, 48, 512, seed=7), hessian_of("correlated", 2, 512, seed=8)
    encoded = pipeline(kernels=kernels_of(name)).encode(w, h)
    for data, value in zip(encoded.data, encoded.value, strict=True):
        assert data.shape == (48, 160)  # 16 of header, 128 codes, 16 of scales
        assert value.numpy() == pytest.approx(dequantize_rows(data, 512), rel=1e-5, abs=1e-8)
        maps = set(zip(*(part.tolist() for part in (unpack_rows(data, 512).m, unpack_rows(data, 512).z)), strict=True))
        assert 2 <= len(maps) <= 3
        assert maps <= set(THREE_MAPS)


@pytest.mark.parametrize("kind", [*KINDS, "aligned"])
def test_measured_errors_are_those_of_the_bytes(kind: str) -> None:
    """Directly, in float64, undamped: |E|²/|W|² and tr(E H Eᵀ)/tr(W H Wᵀ); the plain encoder's from its own bytes.

    "aligned": inputs with a large mean, weights that are all positive; W H Wᵀ is ten thousand times E H Eᵀ.
    """
    w, h = weights_of(2, 32, K, seed=9), hessian_of("white" if kind == "aligned" else kind, 2, K, seed=10)
    if kind == "aligned":
        w, h = w + 0.03, h + 30
    encoded = pipeline().encode(w, h)
    flat = [np.eye(K) if kind == "zeros" else m.double().numpy() for m in h]
    for b, m in enumerate(flat):
        for rows in (slice(0, 32), slice(16, 32)):
            found = encoded.measure(b, rows.start, rows.stop)
            wide, e = w[b, rows].double().numpy(), errors(w, encoded)[b, rows]
            plain = wide - dequantize_rows(plain_bytes(w)[b], K)[rows]
            power = np.trace(wide @ m @ wide.T)
            assert found.rows == rows.stop - rows.start
            assert found.error == pytest.approx((e**2).sum() / (wide**2).sum(), rel=1e-4)
            assert found.metric_error == pytest.approx(np.trace(e @ m @ e.T) / power, rel=2e-3, abs=1e-6)
            assert found.plain_metric_error == pytest.approx(np.trace(plain @ m @ plain.T) / power, rel=2e-3, abs=1e-6)


def test_scales_are_counted() -> None:
    w, h = weights_of(2, 32, K), hessian_of("correlated", 2, K)
    w[1, :, 64:128] = 0
    w[1, 20] = 0
    encoded = pipeline().encode(w, h)
    for b in range(2):
        scales = unpack_rows(encoded.data[b], K).scales
        for start, end in ((0, 32), (16, 32)):
            histogram = encoded.measure(b, start, end).scales
            assert histogram == tuple(int((scales[start:end] == s).sum()) for s in range(16))
            assert sum(histogram) == (end - start) * 4
    assert encoded.measure(1, 20, 21).scales == (4, *[0] * 15)


def test_scale_correction_leaves_half_of_the_shrinkage() -> None:
    """The slope (W H Ŵᵀ)/(W H Wᵀ) becomes its square root."""
    w, h = weights_of(1, 64, K, seed=11), hessian_of("correlated", 1, K, seed=12)
    w *= 0.75 / w.abs().amax(2, keepdim=True)  # so that no row is scaled
    watched = Watched()
    encoded = pipeline(maps=1, passes=0, kernels=watched).encode(w, h)
    wide = w[0].double().numpy()
    hw = wide @ truth_of(h[0]).h

    def slope(e: F64) -> F64:
        slopes: F64 = (hw * (wide - e)).sum(1) / (hw * wide).sum(1)
        return slopes

    before, after = slope(watched.last()[0][0]), slope(errors(w, encoded)[0])
    assert before.max() < 1
    assert before.mean() < 0.95
    assert after == pytest.approx(np.sqrt(before), rel=1e-5)


@dataclass(frozen=True)
class WatchedDescent(TorchKernels):
    """Records w and e [B, 64, N] of each group before its descent, which changes no other group's."""

    seen: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def descend_group(
        self, rows: RowGroup, eh: torch.Tensor, hessian: GroupHessian, codebooks: Codebooks, cost: torch.Tensor
    ) -> None:
        self.seen.append((rows.w.clone(), rows.e.clone()))
        super().descend_group(rows, eh, hessian, codebooks, cost)


def test_super_scales_are_refitted_before_each_pass() -> None:
    """By least squares: the error is orthogonal to the value, Ŵ H Eᵀ = 0."""
    w, h = weights_of(1, 32, K, seed=15), hessian_of("correlated", 1, K, seed=16)
    watched = WatchedDescent()
    pipeline(maps=1, passes=3, kernels=watched).encode(w, h)
    assert len(watched.seen) == 3 * K // 64
    for i in range(0, len(watched.seen), K // 64):
        wide, e = (torch.cat(parts, 1)[0].T.double().numpy() for parts in zip(*watched.seen[i : i + 4], strict=True))
        value_h = (wide - e) @ truth_of(h[0]).h
        assert (value_h * e).sum(1) / (value_h * wide).sum(1) == pytest.approx(np.zeros(32), abs=1e-5)


def test_a_power_of_two_changes_super_scales_alone() -> None:
    w, h = weights_of(1, 32, K), hessian_of("loud", 1, K)
    size = (2.0 ** torch.arange(-16, 16))[:, None]
    (found,), (scaled,) = (pipeline().encode(each, h).data for each in (w, w * size))
    assert np.array_equal(found[:, :8], scaled[:, :8])  # M, Z
    assert np.array_equal(found[:, 16:], scaled[:, 16:])  # codes and scales
    assert (unpack_rows(scaled, K).d / unpack_rows(found, K).d).tolist() == size[:, 0].tolist()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("size", [1e38, -1e38, 1e25, 1e-25, 1e-38])
def test_rows_at_the_ends_of_float32(size: float, name: str) -> None:
    """Among other rows they are encoded as well as rows of any size."""
    w, h = weights_of(1, 16, K), hessian_of("correlated", 1, K)
    w[0, 3:5] *= np.sign(size) / w[0, 3:5].abs().amax(1, keepdim=True)
    usual = errors(w, pipeline().encode(w, h))[0, 3:5]
    w[0, 3:5] *= abs(size)
    encoded = pipeline(kernels=kernels_of(name)).encode(w, h)
    found = errors(w, encoded)[0, 3:5] / abs(size)
    assert np.square(found).sum() == pytest.approx(np.square(usual).sum(), rel=0.05)
    assert np.isfinite(dequantize_rows(encoded.data[0], K)).all()
    assert encoded.value[0, 3:5].numpy() / size == pytest.approx(
        dequantize_rows(encoded.data[0], K)[3:5] / size, rel=1e-3, abs=1e-7
    )


@pytest.mark.parametrize("name", KERNELS)
def test_zeros(name: str) -> None:
    """A row of zeros has d = 0, a group of zeros scale 0, and the codes of both are 0; the error of zeros is 0."""
    w, h = weights_of(2, 32, K), hessian_of("zeros", 2, K)
    w[0, 7] = 0
    w[0, 9, :64] = 0
    w[1] = 0
    encoded = pipeline(kernels=kernels_of(name)).encode(w, h)
    assert encoded.data[0][7, 8:].tolist() == [0] * 88
    assert not encoded.data[1][:, 8:].any()
    row = unpack_rows(encoded.data[0], K)
    assert row.codes[9, :16].tolist() == [0] * 16
    assert row.scales[9].tolist()[0] == 0
    assert row.scales[9, 1:].all()
    measured = encoded.measure(1, 0, 32)
    assert (measured.error, measured.metric_error, measured.plain_metric_error) == (0, 0, 0)
    assert encoded.value[1].abs().max() == 0


def test_a_quiet_group_beside_a_loud_one() -> None:
    """A group far below a step of the row's scale vanishes, unless the others' errors want it."""
    w = weights_of(1, 16, K)
    w[0, :, 64:128] *= 1e-5
    for kind, silent in (("zeros", True), ("correlated", False)):
        encoded = pipeline().encode(w, hessian_of(kind, 1, K))
        assert unpack_rows(encoded.data[0], K).scales[:, 1].any() != silent


@pytest.mark.parametrize("name", KERNELS)
def test_matrices_do_not_see_each_other(name: str) -> None:
    """A matrix alone, and among others with other maps and zeros. A row may differ where bytes cost the same."""
    w, h = weights_of(3, 48, K, seed=13), torch.cat([hessian_of(kind, 1, K) for kind in ("loud", "zeros", "one token")])
    w[1, :20] = 0
    together = pipeline(kernels=kernels_of(name)).encode(w, h)
    for b in range(3):
        here = slice(b, b + 1)
        alone = pipeline(kernels=kernels_of(name)).encode(w[here], h[here])
        same = (alone.data[0] == together.data[b]).all(1)
        assert same.mean() > 0.9
        costs = row_costs(w, h, together)[b]
        assert row_costs(w[here], h[here], alone)[0] == pytest.approx(costs, rel=0.02)


@pytest.mark.parametrize("name", KERNELS)
def test_the_same_input_gives_the_same_bytes(name: str) -> None:
    w, h = weights_of(2, 32, K), hessian_of("few tokens", 2, K)
    first, second = (pipeline(kernels=kernels_of(name)).encode(w, h) for _ in range(2))
    assert [data.tobytes() for data in first.data] == [data.tobytes() for data in second.data]


def test_inputs_are_not_written_to() -> None:
    w, h = weights_of(1, 16, K), hessian_of("correlated", 1, K)
    before = w.clone(), h.clone()
    pipeline().encode(w, h)
    assert torch.equal(w, before[0])
    assert torch.equal(h, before[1])


def test_percdamp_is_a_setting() -> None:
    """With much of it the cost is close to squared error: that shrinks, and the error in the metric grows."""
    w, h = weights_of(1, 64, K), hessian_of("loud", 1, K)
    little, much = (pipeline(percdamp=percdamp).encode(w, h).measure(0, 0, 64) for percdamp in (0.1, 100))
    assert little.metric_error < 0.9 * much.metric_error
    assert much.error < 0.9 * little.error


def test_lanes_share_a_map_and_every_row_has_one() -> None:
    rng = np.random.default_rng(0)
    few = torch.from_numpy(rng.choice([0, 2, 3], (5, 48), p=[0.1, 0.2, 0.7]))
    few[1] = 4  # one map alone, and 16 rows of each
    few[2] = torch.arange(48) // 16
    few[3, :] = 0
    few[3, 47] = 4
    order, blocks = _lane_order(few.int(), 5)
    assert blocks.dtype == torch.int32
    assert order.shape == (5, 16 * blocks.shape[1])
    for map_index, rows, maps in zip(few, order, blocks, strict=True):
        assert sorted(set(rows.tolist())) == list(range(48))
        assert torch.equal(map_index[rows], maps.repeat_interleave(16).long())
    back = _inverse_order(order, 48)
    assert torch.equal(order.gather(1, back), torch.arange(48).expand(5, -1))


def test_rows_are_not_repeated_without_need() -> None:
    order, blocks = _lane_order((torch.arange(48) // 16)[None].int(), 3)
    assert order.tolist() == [list(range(48))]
    assert blocks.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("size", [3e38, 1.75e38])
def test_the_largest_rows_are_encoded_too(size: float) -> None:
    w, h = weights_of(1, 16, K), hessian_of("correlated", 1, K)
    w[0, 3] = w[0, 3] / w[0, 3].abs().amax() * size
    got = dequantize_rows(pipeline().encode(w, h).data[0], K)[3] / size
    want = w[0, 3].numpy() / size
    assert np.square(got - want).sum() < 0.2 * np.square(want).sum()


def test_no_row_decodes_to_infinity() -> None:
    w, h = torch.full((1, 16, K), 3.4e38), hessian_of("correlated", 1, K)
    encoded = pipeline().encode(w, h)
    got = dequantize_rows(encoded.data[0], K)
    assert np.isfinite(got).all()
    assert np.allclose(got, encoded.value[0].numpy(), rtol=1e-5)


@pytest.mark.parametrize("size", [1e38, 1e25, 1e-25, 1e-38])
def test_errors_do_not_depend_on_the_size_of_the_weights(size: float) -> None:
    w, h = weights_of(1, 16, K), hessian_of("correlated", 1, K)
    w /= w.abs().amax()
    want, found = (pipeline().encode(each, h).measure(0, 0, 16) for each in (w, w * size))
    for name in ("error", "metric_error", "plain_metric_error"):
        assert getattr(found, name) == pytest.approx(getattr(want, name), rel=0.01), name
