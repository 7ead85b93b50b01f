"""The factors of the Hessian: what they are to H, and how an H of few inputs, or none, is damped."""

import pytest

pytest.importorskip("torch", reason="torch is not installed (extra `quantize`): the encoder needs it")

import torch
from ernie_gguf.quantize.hessian import GroupHessian, Hessian, damped, diagonal_blocks, factor, identity
from ernie_gguf.quantize.settings import PERCDAMP

from quantize.problems import KINDS, hessian_of, truth_of

K = 128


def spread_out(blocks: torch.Tensor) -> torch.Tensor:
    """[B, K/4, 4, 4] -> block diagonal [B, K, K]."""
    return torch.stack([torch.block_diag(*each) for each in blocks])


@pytest.fixture(params=KINDS)
def h(request: pytest.FixtureRequest) -> torch.Tensor:
    return hessian_of(request.param, 2, K)


def test_g_is_feedback_times_block_root(h: torch.Tensor) -> None:
    hessian = factor(h, PERCDAMP)
    g = (hessian.feedback @ spread_out(hessian.block_root)).double()
    want = damped(h, PERCDAMP)
    assert (g @ g.mT - want).abs().max() < 1e-5 * want.abs().max()


def test_feedback_adds_the_errors_of_the_columns_before(h: torch.Tensor) -> None:
    """U = G D⁻¹ is upper triangular, its 4x4 diagonal blocks are the identity: no byte feeds itself."""
    feedback = factor(h, PERCDAMP).feedback
    assert feedback.tril(-1).abs().max() < 1e-6
    assert (diagonal_blocks(feedback, 4) - torch.eye(4)).abs().max() < 1e-6
    want = torch.from_numpy(truth_of(h[1]).unit_upper())
    assert (feedback[1] - want).abs().max() < 1e-5


def test_block_root_is_upper_triangular(h: torch.Tensor) -> None:
    """The diagonal of G is positive, which makes G unique."""
    block_root = factor(h, PERCDAMP).block_root
    assert block_root.tril(-1).abs().max() == 0
    assert block_root.diagonal(dim1=2, dim2=3).min() > 0


def test_diag_root_and_diag_inverse(h: torch.Tensor) -> None:
    hessian = factor(h, PERCDAMP)
    blocks = diagonal_blocks(damped(h, PERCDAMP), 4)
    diag_root = hessian.diag_root.double()
    assert (diag_root @ diag_root.mT - blocks).abs().max() < 1e-6 * blocks.abs().max()
    assert (hessian.diag_inverse.double() @ blocks - torch.eye(4)).abs().max() < 1e-4


def test_h_is_scaled_then_damped() -> None:
    h = torch.tensor([[[6.0, 2.0], [2.0, 2.0]]])  # mean diagonal 4
    assert damped(h, PERCDAMP).flatten().tolist() == pytest.approx([1.8, 0.5, 0.5, 0.8])
    assert damped(h, 0.5).tolist() == [[[2.0, 0.5], [0.5, 1.0]]]
    assert factor(hessian_of("white", 1, K), 2).h.diagonal(dim1=1, dim2=2).mean() == pytest.approx(3)


def test_the_size_of_h_does_not_matter(h: torch.Tensor) -> None:
    """Scaling by a power of two rounds nothing."""
    ours, larger = factor(h, PERCDAMP), factor(h * 2.0**40, PERCDAMP)
    for name in ("h", "feedback", "block_root", "diag_root", "diag_inverse"):
        assert torch.equal(getattr(ours, name), getattr(larger, name)), name


def test_matrices_do_not_see_each_other() -> None:
    h = torch.cat([hessian_of("correlated", 1, K), torch.zeros(1, K, K), hessian_of("loud", 1, K)])
    together = factor(h, PERCDAMP)
    for b in range(3):
        alone = factor(h[b : b + 1], PERCDAMP)
        assert torch.allclose(alone.feedback[0], together.feedback[b], atol=1e-6)


def test_no_inputs_give_the_identity() -> None:
    hessian = factor(torch.zeros(1, K, K), PERCDAMP)
    eye = torch.eye(K)[None]
    assert torch.equal(hessian.feedback, eye)
    assert torch.allclose(hessian.h, 1.3 * eye)
    assert torch.allclose(hessian.diag_inverse, torch.eye(4) / 1.3)


def test_everything_is_finite_and_float32(h: torch.Tensor) -> None:
    for h_of_size in (h, h * 1e-30, h * 1e30):
        hessian = factor(h_of_size, PERCDAMP)
        for name in ("h", "feedback", "block_root", "diag_root", "diag_inverse"):
            part = getattr(hessian, name)
            assert part.dtype == torch.float32, name
            assert bool(torch.isfinite(part).all()), name


def test_one_repeated_token_is_damped_to_full_rank() -> None:
    """H = xxᵀ has one eigenvalue K at mean diagonal 1, the others are 0; damping lifts all by 0.3."""
    values = torch.linalg.eigvalsh(damped(hessian_of("one token", 1, K), PERCDAMP))[0]
    assert values[:-1].tolist() == pytest.approx([0.3] * (K - 1), abs=1e-4)
    assert float(values[-1]) == pytest.approx(K + 0.3, rel=1e-5)


def test_blocks_of_the_diagonal() -> None:
    a = torch.arange(2 * 16.0).reshape(2, 4, 4)
    assert diagonal_blocks(a, 2).tolist() == [
        [[[0, 1], [4, 5]], [[10, 11], [14, 15]]],
        [[[16, 17], [20, 21]], [[26, 27], [30, 31]]],
    ]


def test_a_group_is_a_part() -> None:
    hessian = factor(hessian_of("correlated", 2, K), PERCDAMP)
    group = hessian.group(1)
    assert torch.equal(group.h, hessian.h[:, 64:, 64:])
    assert torch.equal(group.feedback, hessian.feedback[:, 64:, 64:])
    for name in ("block_root", "diag_root", "diag_inverse"):
        assert torch.equal(getattr(group, name), getattr(hessian, name)[:, 16:]), name


def test_the_identity_is_squared_error() -> None:
    found = identity(2, torch.device("cpu"))
    want = Hessian(*(torch.eye(64)[None],) * 2, *(torch.eye(4).expand(1, 16, 4, 4),) * 3).group(0)
    assert isinstance(found, GroupHessian)
    for name in ("h", "feedback", "block_root", "diag_root", "diag_inverse"):
        part = getattr(found, name)
        assert torch.equal(part, getattr(want, name).expand_as(part)), name
        assert part.shape[0] == 2
