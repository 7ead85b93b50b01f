"""The metric: what its parts are to H, and what it does with an H that says little or nothing."""

import pytest

pytest.importorskip("torch", reason="torch is not installed (extra `quantize`): the encoder needs it")

import torch
from ernie_gguf.quantize.metric import GroupMetric, Metric, damped, diagonal_blocks, make_metric, plain_metric

from quantize.problems import KINDS, moments_of, truth_of

K = 128


def spread_out(blocks: torch.Tensor) -> torch.Tensor:
    """[B, K/4, 4, 4] -> block diagonal [B, K, K]."""
    return torch.stack([torch.block_diag(*each) for each in blocks])


@pytest.fixture(params=KINDS)
def h(request: pytest.FixtureRequest) -> torch.Tensor:
    return moments_of(request.param, 2, K)


def test_g_is_feed_times_forward(h: torch.Tensor) -> None:
    metric = make_metric(h)
    g = (metric.feed @ spread_out(metric.forward)).double()
    want = damped(h)
    assert (g @ g.mT - want).abs().max() < 1e-5 * want.abs().max()


def test_feed_adds_the_errors_of_the_columns_before(h: torch.Tensor) -> None:
    """U = G D⁻¹ is upper triangular and each 4x4 block on its diagonal the identity: no byte feeds itself."""
    feed = make_metric(h).feed
    assert feed.tril(-1).abs().max() < 1e-6
    assert (diagonal_blocks(feed, 4) - torch.eye(4)).abs().max() < 1e-6
    want = torch.from_numpy(truth_of(h[1]).unit_upper())
    assert (feed[1] - want).abs().max() < 1e-5


def test_forward_is_upper_triangular(h: torch.Tensor) -> None:
    """The diagonal of G is positive, which makes G unique."""
    forward = make_metric(h).forward
    assert forward.tril(-1).abs().max() == 0
    assert forward.diagonal(dim1=2, dim2=3).min() > 0


def test_around_and_inverse(h: torch.Tensor) -> None:
    metric = make_metric(h)
    blocks = diagonal_blocks(damped(h), 4)
    around = metric.around.double()
    assert (around @ around.mT - blocks).abs().max() < 1e-6 * blocks.abs().max()
    assert (metric.inverse.double() @ blocks - torch.eye(4)).abs().max() < 1e-4


def test_h_is_scaled_then_damped() -> None:
    h = torch.tensor([[[6.0, 2.0], [2.0, 2.0]]])  # mean diagonal 4
    assert damped(h).flatten().tolist() == pytest.approx([1.8, 0.5, 0.5, 0.8])
    assert damped(h, 0.5).tolist() == [[[2.0, 0.5], [0.5, 1.0]]]
    assert make_metric(moments_of("white", 1, K), damping=2).h.diagonal(dim1=1, dim2=2).mean() == pytest.approx(3)


def test_the_size_of_h_does_not_matter(h: torch.Tensor) -> None:
    """A power of two rounds nothing."""
    ours, larger = make_metric(h), make_metric(h * 2.0**40)
    for name in ("h", "feed", "forward", "around", "inverse"):
        assert torch.equal(getattr(ours, name), getattr(larger, name)), name


def test_matrices_do_not_see_each_other() -> None:
    h = torch.cat([moments_of("correlated", 1, K), torch.zeros(1, K, K), moments_of("loud", 1, K)])
    together = make_metric(h)
    for b in range(3):
        alone = make_metric(h[b : b + 1])
        assert torch.allclose(alone.feed[0], together.feed[b], atol=1e-6)


def test_no_moments_are_the_identity() -> None:
    metric = make_metric(torch.zeros(1, K, K))
    eye = torch.eye(K)[None]
    assert torch.equal(metric.feed, eye)
    assert torch.allclose(metric.h, 1.3 * eye)
    assert torch.allclose(metric.inverse, torch.eye(4) / 1.3)


def test_everything_is_finite_and_float32(h: torch.Tensor) -> None:
    for h_of_size in (h, h * 1e-30, h * 1e30):
        metric = make_metric(h_of_size)
        for name in ("h", "feed", "forward", "around", "inverse"):
            part = getattr(metric, name)
            assert part.dtype == torch.float32, name
            assert bool(torch.isfinite(part).all()), name


def test_one_repeated_token_is_damped_to_full_rank() -> None:
    """H = xxᵀ has one eigenvalue K at mean diagonal 1, the others are 0; damping lifts all by 0.3."""
    values = torch.linalg.eigvalsh(damped(moments_of("one token", 1, K)))[0]
    assert values[:-1].tolist() == pytest.approx([0.3] * (K - 1), abs=1e-4)
    assert float(values[-1]) == pytest.approx(K + 0.3, rel=1e-5)


def test_blocks_of_the_diagonal() -> None:
    a = torch.arange(2 * 16.0).reshape(2, 4, 4)
    assert diagonal_blocks(a, 2).tolist() == [
        [[[0, 1], [4, 5]], [[10, 11], [14, 15]]],
        [[[16, 17], [20, 21]], [[26, 27], [30, 31]]],
    ]


def test_a_group_is_a_part() -> None:
    metric = make_metric(moments_of("correlated", 2, K))
    group = metric.group(1)
    assert torch.equal(group.h, metric.h[:, 64:, 64:])
    assert torch.equal(group.feed, metric.feed[:, 64:, 64:])
    for name in ("forward", "around", "inverse"):
        assert torch.equal(getattr(group, name), getattr(metric, name)[:, 16:]), name


def test_plain_is_squared_error() -> None:
    plain = plain_metric(2, torch.device("cpu"))
    want = Metric(*(torch.eye(64)[None],) * 2, *(torch.eye(4).expand(1, 16, 4, 4),) * 3).group(0)
    assert isinstance(plain, GroupMetric)
    for name in ("h", "feed", "forward", "around", "inverse"):
        part = getattr(plain, name)
        assert torch.equal(part, getattr(want, name).expand_as(part)), name
        assert part.shape[0] == 2
