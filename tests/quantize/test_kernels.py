"""The inner loops in torch and compiled: groups written by hand, then every choice against all 256 in float64."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed (extra `quantize`): the encoder needs it")

import torch
from ernie_gguf.ccq2 import native
from ernie_gguf.quantize.hessian import GroupHessian, Hessian, factor, identity
from ernie_gguf.quantize.kernels import Codebooks, Kernels, RowGroup, make_codebooks
from ernie_gguf.quantize.kernels_torch import TorchKernels
from ernie_gguf.quantize.settings import PERCDAMP, kernels_for

from quantize.problems import (
    F64,
    KERNELS,
    KINDS,
    THREE_MAPS,
    Truth,
    codewords_of,
    hessian_of,
    kernels_of,
    truth_of,
    try_all,
    weights_of,
)

# Codewords of the first map: b*M + Z, its upper 15 bits, windows of 6 bits, minus 32.
WORDS = {0: [-30, -13, -5, -7], 255: [30, 21, 10, -11], 128: [0, -27, 10, -12], 183: [13, 13, 10, -16]}
CLOSE = 1e-6  # of the costliest byte: what rounding to float32 may hide


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return kernels_of(request.param)


@dataclass(frozen=True)
class Problem:
    """Rows being encoded: w, e [B, K, N], d, cost [B, N], codes [B, K/4, N], scales [B, K/64, N].

    map_index [B, N/16] are the maps of the lane blocks.
    """

    hessian: Hessian
    codebooks: Codebooks
    truths: list[Truth]
    w: torch.Tensor
    e: torch.Tensor
    d: torch.Tensor
    cost: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    map_index: torch.Tensor

    @property
    def groups(self) -> int:
        return int(self.scales.shape[1])

    def views(self, group: int) -> RowGroup:
        here, quads = slice(64 * group, 64 * (group + 1)), slice(16 * group, 16 * (group + 1))
        parts = self.w[:, here], self.e[:, here], self.d, self.codes[:, quads], self.scales[:, group], self.map_index
        return RowGroup(*parts)

    def feed_back(self, kernels: Kernels, group: int) -> None:
        here = slice(64 * group, 64 * (group + 1))
        target = self.w[:, here] + self.hessian.feedback[:, : here.start, here].mT @ self.e[:, : here.start]
        kernels.feedback_group(self.views(group), target, self.hessian.group(group), self.codebooks, self.cost)

    def descend(self, kernels: Kernels, group: int) -> None:
        eh = self.hessian.h[:, 64 * group : 64 * (group + 1)] @ self.e
        kernels.descend_group(self.views(group), eh, self.hessian.group(group), self.codebooks, self.cost)

    def words(self, b: int) -> F64:
        """The codewords of each row of a matrix, [N, 256, 4]."""
        maps = tuple((int(m), int(z)) for m, z in self.codebooks.code_maps)
        return codewords_of(maps, self.map_index[b].numpy().repeat(16))

    def true_costs(self) -> F64:
        """E H Eᵀ [B, N], with E from codes, scales and d instead of e."""
        costs: F64 = np.stack([truth.cost(self.errors(b)) for b, truth in enumerate(self.truths)])
        return costs

    def errors(self, b: int) -> F64:
        """W - Ŵ [N, K]."""
        n, words = self.w.shape[2], self.words(b)
        chosen = words[np.arange(n)[:, None], self.codes[b].T.numpy()]  # [N, K/4, 4]
        steps = (self.scales[b].double() * self.d[b].double()).T.numpy()  # [N, K/64]
        e: F64 = self.w[b].T.double().numpy() - steps.repeat(64, 1) * chosen.reshape(n, -1)
        return e

    def copy(self) -> Problem:
        return replace(self, **{name: getattr(self, name).clone() for name in ("e", "cost", "codes", "scales")})


def pose(w: torch.Tensor, h: torch.Tensor, pool: tuple[tuple[int, int], ...] = THREE_MAPS) -> Problem:
    """Rows [B, N, K] not encoded yet; their lane blocks alternate between the maps.

    The loudest group's scale is first guessed at 13.6: the product's 13.5 may be rounded up or down.
    """
    b, n, k = w.shape
    d = w.unflatten(2, (-1, 64)).square().mean(3).sqrt().amax(2) / 16.5 / 13.6
    return Problem(
        hessian=factor(h, PERCDAMP),
        codebooks=make_codebooks(pool),
        truths=[truth_of(each) for each in h],
        w=w.mT.contiguous(),
        e=w.mT.contiguous(),
        d=torch.where(d > 0, d, 1),
        cost=torch.zeros(b, n),
        codes=torch.zeros(b, k // 4, n, dtype=torch.uint8),
        scales=torch.zeros(b, k // 64, n, dtype=torch.uint8),
        map_index=(torch.arange(b * n // 16, dtype=torch.int32) % len(pool)).reshape(b, n // 16),
    )


def row_by_hand(codes: list[int], step: float) -> torch.Tensor:
    """A group of four bytes, repeated four times: [64]."""
    return torch.tensor([WORDS[code] for code in codes * 4], dtype=torch.float32).flatten() * step


def pose_by_hand(row: torch.Tensor, d: float) -> Problem:
    problem = pose(row.expand(1, 16, 64), torch.zeros(1, 64, 64), THREE_MAPS[:1])
    problem.d.fill_(d)
    return problem


def plain() -> GroupHessian:
    return identity(1, torch.device("cpu"))


BYTES = [0, 255, 128, 183]


def test_codewords_by_hand() -> None:
    words = make_codebooks(THREE_MAPS).codewords[0]
    assert {code: words[code].tolist() for code in WORDS} == WORDS


def test_a_group_of_codewords_by_hand(kernels: Kernels) -> None:
    """w = 4 * 0.5 * v: rms / (16.5 d) = 4.1, so scale 4 is tried; it is exact."""
    problem = pose_by_hand(row_by_hand(BYTES, 2.0), d=0.5)
    problem.cost.fill_(7.0)
    kernels.feedback_group(problem.views(0), problem.w, plain(), problem.codebooks, problem.cost)
    assert problem.scales[0, 0].tolist() == [4] * 16
    assert problem.codes[0, :, 3].tolist() == BYTES * 4
    assert problem.e.abs().max() == 0
    assert problem.cost[0].tolist() == [7.0] * 16  # what it costs is added


def test_a_rounding_error_by_hand(kernels: Kernels) -> None:
    """1.5 off in one weight and 2 in another: 6.25 by squared error."""
    row = row_by_hand(BYTES, 2.0)
    row[5] += 1.5
    row[63] -= 2.0
    problem = pose_by_hand(row, d=0.5)
    kernels.feedback_group(problem.views(0), problem.w, plain(), problem.codebooks, problem.cost)
    assert problem.codes[0, :, 0].tolist() == BYTES * 4
    assert problem.e[0, :, 0].nonzero()[:, 0].tolist() == [5, 63]
    assert problem.e[0, [5, 63], 0].tolist() == [1.5, -2.0]
    assert problem.cost[0].tolist() == [6.25] * 16


def test_an_error_is_fed_into_a_later_column_by_hand(kernels: Kernels) -> None:
    """Column 0 is 7 steps above its codeword, column 4 fourteen below: with U_04 = 2 the next byte hits its target."""
    hessian = plain()
    feedback = hessian.feedback.clone()
    feedback[0, 0, 4] = 2.0
    fed = GroupHessian(hessian.h, feedback, hessian.block_root, hessian.diag_root, hessian.diag_inverse)
    row = row_by_hand(BYTES, 2.0)
    row[0] += 7 * 2.0
    row[4] -= 14 * 2.0
    for hessian, second, costs in ((fed, 255, 196.0), (plain(), 183, 196.0 + 4 * (3**2 + 8**2 + 5**2))):
        problem = pose_by_hand(row, d=0.5)
        kernels.feedback_group(problem.views(0), problem.w, hessian, problem.codebooks, problem.cost)
        assert problem.codes[0, :2, 0].tolist() == [0, second]
        assert problem.cost[0].tolist() == [costs] * 16
    assert problem.e[0, 4, 0] == (16 - 13) * 2.0


def test_the_error_is_that_against_w_not_against_the_target(kernels: Kernels) -> None:
    """The target is met exactly, so the cost is 0, and e = w - ŵ is how far the target was moved."""
    problem = pose_by_hand(row_by_hand(BYTES, 2.0) - 3.0, d=0.5)
    kernels.feedback_group(problem.views(0), problem.w + 3.0, plain(), problem.codebooks, problem.cost)
    assert problem.e[0, :, 0].tolist() == [-3.0] * 64
    assert problem.cost[0].tolist() == [0.0] * 16


def test_descent_puts_a_wrong_scale_and_a_wrong_byte_right_by_hand(kernels: Kernels) -> None:
    problem = pose_by_hand(row_by_hand(BYTES, 2.0), d=0.5)
    problem.codes[:] = torch.tensor(BYTES * 4, dtype=torch.uint8)[:, None]
    problem.codes[0, 9] = 254
    problem.scales[:] = 6
    problem.e[0] = torch.from_numpy(problem.errors(0).T).float()
    problem.cost.copy_(problem.e.square().sum(1))
    kernels.descend_group(problem.views(0), problem.e.clone(), plain(), problem.codebooks, problem.cost)
    assert problem.scales[0, 0].tolist() == [4] * 16
    assert problem.codes[0, :, 5].tolist() == BYTES * 4
    assert problem.e.abs().max() == 0
    assert problem.cost[0].tolist() == pytest.approx([0.0] * 16, abs=1e-2)  # of 14000 before


def test_of_equal_bytes_the_lowest(kernels: Kernels) -> None:
    """A map of M = 2^24 repeats its codewords: (b << 24) >> 17 has 256 values, but M = 0 has one for all bytes."""
    problem = pose(weights_of(1, 16, 64), torch.zeros(1, 64, 64), ((0, 162772864),))
    problem.feed_back(kernels, 0)
    assert problem.codes.max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_choice_is_the_best_of_all(kernels: Kernels, kind: str) -> None:
    """The scale is the cheapest of five, each byte the best of 256 given those before it; the cost is their sum."""
    problem = pose(weights_of(1, 16, 64, seed=1), hessian_of(kind, 1, 64, seed=2))
    problem.feed_back(kernels, 0)
    check_group(problem, 0)
    assert problem.cost[0].numpy() == pytest.approx(problem.true_costs()[0], rel=1e-5)


def test_every_choice_of_later_groups_too(kernels: Kernels) -> None:
    """Errors are fed from group to group; each matrix has its own Hessian and maps."""
    h = torch.cat([hessian_of("correlated", 1, 256), hessian_of("loud", 1, 256)])
    problem = pose(weights_of(2, 48, 256, seed=3), h)
    for group in range(problem.groups):
        problem.feed_back(kernels, group)
        check_group(problem, group)
    assert problem.cost.numpy() == pytest.approx(problem.true_costs(), rel=1e-5)
    for b in range(2):
        assert problem.e[b].T.numpy() == pytest.approx(problem.errors(b), abs=1e-6)


def check_group(problem: Problem, group: int) -> None:
    """Check a group; it and all before it have been encoded."""
    here = slice(64 * group, 64 * (group + 1))
    for b, truth in enumerate(problem.truths):
        w, e, d = problem.w[b].T.double().numpy(), problem.errors(b), problem.d[b].double().numpy()
        scale, words = problem.scales[b, group].numpy(), problem.words(b)
        codes = problem.codes[b, 16 * group : 16 * (group + 1)].T.numpy()
        costs = try_all(truth, w, e, group, (d * scale, words), codes)
        chosen = np.take_along_axis(costs, codes[:, :, None].astype(np.int64), 2)[:, :, 0]
        live = scale > 0
        assert (chosen - costs.min(2) <= CLOSE * costs.max(2))[live].all()

        target = w[:, here] + e[:, : here.start] @ truth.unit_upper()[: here.start, here]
        guess = np.rint(np.sqrt((target**2).mean(1)) / (16.5 * d))
        totals = []
        for step in (-2, -1, 0, 1, 2):
            tried = np.clip(guess + step, 0, 15)
            totals.append(try_all(truth, w, e, group, (d * tried, words), None).min(2).sum(1))
        assert (np.abs(scale - guess) <= 2).all()
        assert chosen.sum(1) == pytest.approx(np.min(totals, 0), rel=1e-5)


SHAPES = ((1, 16, 64), (3, 16, 128), (1, 80, 256), (2, 112, 64))  # rows: multiples of 16, not all of 64


@pytest.mark.parametrize("width", native.WIDTHS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_equals_torch(kind: str, shape: tuple[int, int, int], width: int) -> None:
    """Feedback from left to right, then descent: the same choices but for ties within rounding.

    A tie changes what comes after it, so rows are compared one group at a time, from the same start.
    """
    torch_kernels, compiled = kernels_of("torch"), kernels_of("compiled", width)
    b, n, k = shape
    problem = pose(weights_of(*shape, seed=n), hessian_of(kind, b, k, seed=k))
    if n > 16:  # also runs of one map, longer than the four lane blocks that descend together
        problem.map_index[:] = torch.arange(n // 16, dtype=torch.int32) // 6
    for group in range(problem.groups):
        other = problem.copy()
        problem.feed_back(torch_kernels, group)
        other.feed_back(compiled, group)
        for b, row in compare(problem, other):
            check_tie(problem, other, group, b, row)
    for group in range(problem.groups):
        other = problem.copy()
        problem.descend(torch_kernels, group)
        other.descend(compiled, group)
        for b, row in compare(problem, other):
            assert problem.cost[b, row] == pytest.approx(float(other.cost[b, row]), rel=0.02)


def compare(found: Problem, other: Problem) -> list[tuple[int, int]]:
    """The rows that differ, which must be few."""
    same = (found.codes == other.codes).all(1) & (found.scales == other.scales).all(1)  # [B, N]
    rows = same[:, None].expand_as(found.e)
    assert other.e[rows].numpy() == pytest.approx(found.e[rows].numpy(), abs=1e-6)
    assert other.cost[same].numpy() == pytest.approx(found.cost[same].numpy(), rel=1e-4)
    different = [(int(b), int(row)) for b, row in (~same).nonzero()]
    assert len(different) <= 0.02 * same.numel()
    return different


def check_tie(found: Problem, other: Problem, group: int, b: int, row: int) -> None:
    """Check that two encodings of a group diverge at bytes, or at scales, of equal cost."""
    if found.scales[b, group, row] != other.scales[b, group, row]:
        assert found.cost[b, row] == pytest.approx(float(other.cost[b, row]), rel=1e-4)
        return
    ours, theirs = (p.codes[b, 16 * group : 16 * (group + 1), row : row + 1].T.numpy() for p in (found, other))
    step = (found.d[b, row] * found.scales[b, group, row]).double().numpy()[None]
    w, e = found.w[b, :, row : row + 1].T.double().numpy(), found.errors(b)[row : row + 1]
    costs = try_all(found.truths[b], w, e, group, (step, found.words(b)[row : row + 1]), ours)
    first = int((ours != theirs).argmax())
    a, b = costs[0, first, ours[0, first]], costs[0, first, theirs[0, first]]
    assert abs(a - b) <= CLOSE * costs[0, first].max()


def fed_back(kernels: Kernels, kind: str, n: int = 48, k: int = 256) -> Problem:
    problem = pose(weights_of(1, n, k, seed=4), hessian_of(kind, 1, k, seed=5))
    for group in range(problem.groups):
        problem.feed_back(kernels, group)
    return problem


@pytest.mark.parametrize("kind", KINDS)
def test_descent_never_raises_the_cost(kernels: Kernels, kind: str) -> None:
    problem = fed_back(kernels, kind)
    first = before = problem.true_costs()
    for step in range(3 * problem.groups):
        problem.descend(kernels, step % problem.groups)
        after = problem.true_costs()
        assert (after <= before * (1 + 1e-6)).all()
        before = after
    assert problem.cost.numpy() == pytest.approx(before, rel=1e-4)  # its change is added
    assert problem.e[0].T.numpy() == pytest.approx(problem.errors(0), abs=1e-6)
    if kind not in ("white", "zeros"):  # otherwise only scales are left to improve
        assert before.sum() < 0.999 * first.sum()


@pytest.mark.parametrize("kind", ["correlated", "loud", "one token"])
def test_descent_ends_where_no_byte_and_no_scale_can_be_improved_alone(kernels: Kernels, kind: str) -> None:
    problem = fed_back(kernels, kind, n=16)
    for _ in range(60):
        old = problem.codes.clone(), problem.scales.clone()
        for group in range(problem.groups):
            problem.descend(kernels, group)
        if torch.equal(old[0], problem.codes) and torch.equal(old[1], problem.scales):
            break
    else:
        pytest.fail("the descent does not end")
    ((h, e, w),) = ((t.h, problem.errors(b), problem.w[b].T.double().numpy()) for b, t in enumerate(problem.truths))
    p, words, d = e @ h, problem.words(0), problem.d[0].double().numpy()
    slack = 1e-5 * problem.true_costs()[0]
    for quad in range(64):
        here = slice(4 * quad, 4 * quad + 4)
        step = problem.scales[0, quad // 16].double().numpy() * d
        moved = w[:, None, here] - step[:, None, None] * words - e[:, None, here]  # [N, 256, 4]
        change = (moved * (2 * p[:, None, here] + moved @ h[here, here])).sum(2)
        assert (change.min(1) >= -slack).all()
    for group in range(4):
        here = slice(64 * group, 64 * (group + 1))
        other = np.arange(16) - problem.scales[0, group, :, None].double().numpy()  # [N, 16]
        v = (w - e)[:, here] / (problem.scales[0, group].double().numpy() * d)[:, None]  # none of these scales is 0
        moved = -other[:, :, None] * d[:, None, None] * v[:, None]  # [N, 16, 64]
        change = (moved * (2 * p[:, None, here] + moved @ h[here, here])).sum(2)
        assert (change.min(1) >= -slack).all()


def test_zeros_cost_nothing_and_stay(kernels: Kernels) -> None:
    """A group of zeros in a row of others, and a row of zeros; nothing is fed into the first group."""
    w = weights_of(1, 16, 128)
    w[0, :, :64] = 0
    w[0, 5] = 0
    problem = pose(w, hessian_of("correlated", 1, 128))
    problem.feed_back(kernels, 0)
    assert problem.scales[0, 0].tolist() == [0] * 16
    assert problem.cost.abs().max() == 0
    problem.feed_back(kernels, 1)
    assert problem.scales[0, 1].nonzero()[:, 0].tolist() == [row for row in range(16) if row != 5]
    for _ in range(2):
        for group in (0, 1):
            problem.descend(kernels, group)
    assert problem.scales[0, :, 5].tolist() == [0, 0]
    assert problem.e[0, :, 5].abs().max() == 0
    for part in (problem.e, problem.cost):
        assert bool(torch.isfinite(part).all())
    assert problem.cost.numpy() == pytest.approx(problem.true_costs(), rel=1e-4)


def test_descent_can_wake_a_silent_group(kernels: Kernels) -> None:
    """Scale 0, but the others' errors ask for half a group of codewords: the best scale is 4."""
    problem = pose_by_hand(row_by_hand(BYTES, 2.0), d=0.5)
    problem.codes[:] = torch.tensor(BYTES * 4, dtype=torch.uint8)[:, None]
    problem.cost.copy_(problem.e.square().sum(1))
    kernels.descend_group(problem.views(0), problem.e.clone(), plain(), problem.codebooks, problem.cost)
    assert problem.scales[0, 0].tolist() == [4] * 16
    assert problem.e.abs().max() == 0


def test_scales_end_at_15(kernels: Kernels) -> None:
    """Codewords times 20 d: four bits hold at most 15."""
    problem = pose_by_hand(row_by_hand(BYTES, 2.0), d=0.1)
    kernels.feedback_group(problem.views(0), problem.w, plain(), problem.codebooks, problem.cost)
    assert problem.scales[0, 0].tolist() == [15] * 16
    kernels.descend_group(problem.views(0), problem.e.clone(), plain(), problem.codebooks, problem.cost)
    assert problem.scales[0, 0].tolist() == [15] * 16


def test_rows_far_too_loud_for_their_super_scale(kernels: Kernels) -> None:
    """A million times d: scale 15, no overflow."""
    problem = pose_by_hand(row_by_hand(BYTES, 1e6), d=1.0)
    kernels.feedback_group(problem.views(0), problem.w, plain(), problem.codebooks, problem.cost)
    assert problem.scales[0, 0].tolist() == [15] * 16
    assert bool(torch.isfinite(problem.cost).all())


def test_only_its_own_rows_are_written(kernels: Kernels) -> None:
    """The other groups in the same arrays do not change."""
    problem = pose(weights_of(2, 16, 192), hessian_of("correlated", 2, 192))
    problem.codes.fill_(77)
    problem.scales.fill_(9)
    before = problem.copy()
    problem.feed_back(kernels, 1)
    problem.descend(kernels, 1)
    for group in (0, 2):
        for name in ("e", "codes", "scales"):
            assert torch.equal(getattr(problem.views(group), name), getattr(before.views(group), name)), (group, name)
    for name in ("e", "codes", "scales"):
        assert not torch.equal(getattr(problem.views(1), name), getattr(before.views(1), name)), name
    assert torch.equal(problem.w, before.w)


def test_without_triton_a_gpu_has_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "ernie_gguf.quantize.kernels_triton", raising=False)
    kernels, note = kernels_for("cuda")
    assert type(kernels) is TorchKernels
    assert note.startswith("Triton does not work here (")


def test_without_the_compiled_search_a_cpu_has_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    kernels, note = kernels_for("cpu")
    assert type(kernels) is TorchKernels
    assert note.startswith("the compiled search is missing; ")
