"""The experts of a layer: their Hessians, the errors for damaged ones, and what they add to the layer."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch", reason="torch is not installed (extra `quantize`): the encoder needs it")

import torch
from ernie_gguf.ccq2.rows import dequantize_rows, unpack_rows
from ernie_gguf.errors import ActivationError, EncodeError
from ernie_gguf.quantize.encoder import Encoded, Pipeline
from ernie_gguf.quantize.experts import (
    ENOUGH_TOKENS,
    PRIOR_TOKENS,
    SAMPLE,
    EncodedExpert,
    ExpertEncoder,
    LayerInput,
    hessian,
)
from ernie_gguf.quantize.kernels import make_codebooks
from ernie_gguf.quantize.model import Weights
from ernie_gguf.quantize.settings import kernels_for

from quantize.problems import F64, THREE_MAPS, inputs_of, weights_of

HIDDEN, WIDTH, EXPERTS, TOKENS = 256, 512, 4, 300
LAYER = 3


class Matrices(Weights):
    """Experts' matrices [E, N, K] by projection, of one layer."""

    def __init__(self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> None:
        self.of = {"gate": gate, "up": up, "down": down}

    def expert(self, name: str, expert: int) -> torch.Tensor:
        match = re.fullmatch(rf"blk\.{LAYER}\.ffn_(gate|up|down)_exps\.weight", name)
        assert match, name
        return self.of[match[1]][expert]


@pytest.fixture
def matrices() -> Matrices:
    shapes = ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
    return Matrices(*(weights_of(EXPERTS, *shape, seed=i) for i, shape in enumerate(shapes)))


@pytest.fixture
def inputs() -> LayerInput:
    """Two experts per token, with unequal weights; expert 3 gets none."""
    rng = np.random.default_rng(0)
    experts = np.stack([rng.permutation(3)[:2] for _ in range(TOKENS)])
    share = rng.uniform(0.1, 0.9, (TOKENS, 1)).astype(np.float32)
    weights = torch.from_numpy(np.concatenate([share, 1 - share], 1))
    return LayerInput(inputs_of("correlated", TOKENS, HIDDEN, 1), torch.from_numpy(experts), weights, "cpu")


def encoder(matrices: Matrices, inputs: LayerInput) -> ExpertEncoder:
    kernels, _ = kernels_for("cpu")
    pipeline = Pipeline(make_codebooks(THREE_MAPS[:2]), kernels, passes=1)
    return ExpertEncoder(matrices, LAYER, inputs, dict.fromkeys(("gate", "up", "down"), pipeline))


def encode(matrices: Matrices, inputs: LayerInput, *experts: int) -> list[EncodedExpert]:
    return encoder(matrices, inputs).encode(experts)


def average(sample: torch.Tensor) -> torch.Tensor:
    return sample.T @ sample / len(sample)


def test_routed() -> None:
    inputs = LayerInput(
        h=torch.zeros(3, 4),
        experts=torch.tensor([[5, 1], [2, 5], [1, 2]]),
        weights=torch.tensor([[0.75, 0.25], [0.875, 0.125], [0.5, 0.5]]),
        device="cpu",
    )
    tokens, share = inputs.routed(5)
    assert (tokens.tolist(), share.tolist()) == ([0, 1], [0.75, 0.125])
    tokens, share = inputs.routed(0)
    assert (tokens.tolist(), share.tolist()) == ([], [])


@pytest.mark.parametrize(("tokens", "step"), [(1, 1), (SAMPLE, 1), (SAMPLE + 1, 2), (5 * SAMPLE, 5)])
def test_the_sample_is_spread_over_all_tokens(tokens: int, step: int) -> None:
    h = torch.arange(tokens, dtype=torch.float32)[:, None]
    inputs = LayerInput(h, torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1), "cpu")
    assert inputs.sample()[:, 0].tolist() == list(range(0, tokens, step))


def test_hessian_by_hand() -> None:
    """Two tokens of weights 1/2 and 1/4; the sample's average counts as 1024 tokens of their mean weight 3/8."""
    x, share = torch.tensor([[2.0, 0.0], [4.0, 4.0]]), torch.tensor([0.5, 0.25])
    sample = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])  # its average is I/2
    assert hessian(x, share, sample).tolist() == [[2 + 4 + 192, 4.0], [4.0, 4 + 192]]


def test_a_dead_expert_has_the_average_alone() -> None:
    sample = inputs_of("correlated", 500, 64, 0)
    found = hessian(sample[:0], torch.zeros(0), sample)
    assert found.numpy() == pytest.approx((1024 * average(sample)).numpy(), rel=1e-4, abs=4e-3)


def test_few_tokens_blend_with_the_average_many_do_not() -> None:
    """The more tokens, the nearer to their own average; from ENOUGH_TOKENS on the sample does not count at all."""
    own, sample = inputs_of("correlated", ENOUGH_TOKENS, 64, 0), inputs_of("loud", 500, 64, 1)

    def distances(n: int) -> tuple[float, float]:
        every = hessian(own[:n], torch.ones(n), sample), average(own), average(sample)
        found, near, far = (each / each.trace() for each in every)
        return float((found - near).norm()), float((found - far).norm())

    by_count = [distances(n) for n in (0, 32, PRIOR_TOKENS, 2048, ENOUGH_TOKENS - 1, ENOUGH_TOKENS)]
    assert [mine for mine, _ in by_count] == sorted((mine for mine, _ in by_count), reverse=True)
    assert [theirs for _, theirs in by_count] == sorted(theirs for _, theirs in by_count)
    assert by_count[0][1] < 1e-6
    assert by_count[-2][0] > 1e-3
    assert by_count[-1][0] < 1e-6


def test_shares_weigh() -> None:
    """A token of twice the weight counts as two, and only ratios matter when blending."""
    x, sample = inputs_of("correlated", 50, 64, 0), inputs_of("white", 50, 64, 1)
    doubled = hessian(torch.cat([x, x[:10]]), torch.ones(60), sample[:0].new_zeros(1, 64))
    weighed = hessian(x, torch.tensor([2.0] * 10 + [1.0] * 40), sample[:0].new_zeros(1, 64))
    assert weighed.numpy() == pytest.approx(doubled.numpy(), rel=1e-4, abs=1e-3)
    halved = hessian(x, torch.full((50,), 0.5), sample)
    assert (2 * halved).numpy() == pytest.approx(hessian(x, torch.ones(50), sample).numpy(), rel=1e-5)


def decoded(expert: EncodedExpert) -> tuple[F64, F64, F64]:
    gate, up, down = (
        dequantize_rows(expert.data[name], k).astype(np.float64)
        for name, k in (("gate", HIDDEN), ("up", HIDDEN), ("down", WIDTH))
    )
    return gate, up, down


def hidden_of(x: F64, gate: F64, up: F64) -> F64:
    """silu(x gateᵀ) * (x upᵀ)."""
    g = x @ gate.T
    hidden: F64 = g / (1 + np.exp(-g)) * (x @ up.T)
    return hidden


def test_what_the_encoded_experts_give_to_the_layer(matrices: Matrices, inputs: LayerInput) -> None:
    """y = share * down(silu(gate h) * up h) with the decoded matrices, for the routed tokens in order."""
    for found in encode(matrices, inputs, 0, 2):
        tokens, place = np.nonzero(inputs.experts.numpy() == found.expert)
        assert found.tokens.tolist() == tokens.tolist()
        gate, up, down = decoded(found)
        h, share = inputs.h.double().numpy()[tokens], inputs.weights.double().numpy()[tokens, place]
        want = share[:, None] * (hidden_of(h, gate, up) @ down.T)
        assert found.y.numpy() == pytest.approx(want, rel=1e-4, abs=1e-4 * float(want.std()))
        assert float(found.y.abs().max()) > 0


def test_each_matrix_is_encoded_into_its_own_rows(matrices: Matrices, inputs: LayerInput) -> None:
    """gate and up are encoded one below the other: they come apart at the right row."""
    for found in encode(matrices, inputs, 2, 1):
        for name, value in zip(("gate", "up", "down"), decoded(found), strict=True):
            w = matrices.of[name][found.expert].double().numpy()
            assert value.shape == w.shape
            assert ((value - w) ** 2).sum() < 0.2 * (w**2).sum()


def test_down_is_measured_by_what_the_encoded_gate_and_up_give(
    matrices: Matrices, inputs: LayerInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[npt.NDArray[np.float32]] = []
    original = Pipeline.encode

    def watched(self: Pipeline, w: torch.Tensor, h: torch.Tensor) -> Encoded:
        seen.extend(each.numpy() for each in h)
        return original(self, w, h)

    monkeypatch.setattr(Pipeline, "encode", watched)
    (found,) = encode(matrices, inputs, 1)
    outer, inner = seen
    tokens, place = np.nonzero(inputs.experts.numpy() == 1)
    h, share = inputs.h.double(), inputs.weights.double()[tokens, place]
    gate, up, _ = decoded(found)
    hidden = torch.from_numpy(hidden_of(h.numpy(), gate, up))
    bare = torch.from_numpy(hidden_of(h.numpy(), *(matrices.of[name][1].double().numpy() for name in ("gate", "up"))))
    assert outer == pytest.approx(hessian(h[tokens], share, h).numpy(), rel=1e-4, abs=1e-2)
    want, unwanted = (hessian(each[tokens], share, each).numpy() for each in (hidden, bare))
    assert np.abs(inner - want).max() < 1e-4 * want.max()
    assert np.abs(inner - unwanted).max() > 1e-2 * want.max()


def test_statistics(matrices: Matrices, inputs: LayerInput) -> None:
    for found in encode(matrices, inputs, 0, 3):
        assert [s.tensor for s in found.stats] == [f"blk.3.ffn_{name}_exps.weight" for name in ("gate", "up", "down")]
        for stats, value in zip(found.stats, decoded(found), strict=True):
            w = matrices.of[stats.projection][found.expert].double().numpy()
            assert (stats.layer, stats.expert, stats.weights) == (LAYER, found.expert, w.size)
            assert stats.tokens == len(found.tokens)
            assert stats.error == pytest.approx(((value - w) ** 2).sum() / (w**2).sum(), rel=1e-4)
            assert stats.metric_error < stats.plain_metric_error
            scales = unpack_rows(found.data[stats.projection], w.shape[1]).scales
            assert stats.scales == tuple(np.bincount(scales.flatten(), minlength=16).tolist())


def test_a_dead_expert_is_encoded_and_gives_nothing(matrices: Matrices, inputs: LayerInput) -> None:
    """By the Hessian of the layer's average: better there than by squared error."""
    (found,) = encode(matrices, inputs, 3)
    assert found.tokens.tolist() == []
    assert found.y.shape == (0, HIDDEN)
    assert [stats.tokens for stats in found.stats] == [0, 0, 0]
    assert all(0 < stats.metric_error < 0.9 * stats.plain_metric_error for stats in found.stats)


def test_experts_do_not_depend_on_each_other(matrices: Matrices, inputs: LayerInput) -> None:
    """In any order and any company. A row may differ where bytes cost the same."""
    together = encode(matrices, inputs, 2, 3, 0)
    assert [found.expert for found in together] == [2, 3, 0]
    for found in together:
        (alone,) = encode(matrices, inputs, found.expert)
        for name in ("gate", "up"):
            assert (found.data[name] == alone.data[name]).all(1).mean() > 0.9


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_inputs_that_are_not_finite_are_an_error(matrices: Matrices, inputs: LayerInput, value: float) -> None:
    inputs.h[7, 5] = value
    with pytest.raises(ActivationError, match=r"^layer 3, expert 2: the inputs of gate_proj are not finite"):
        encode(matrices, inputs, 2)


def test_the_expert_that_overflows_is_named(matrices: Matrices, inputs: LayerInput) -> None:
    """Its gate times its up overflows float32; the others' do not."""
    matrices.of["gate"][1] *= 1e19
    matrices.of["up"][1] *= 1e19
    with pytest.raises(ActivationError, match=r"^layer 3, expert 1: the inputs of down_proj are not finite"):
        encode(matrices, inputs, 0, 1, 2)


@pytest.mark.parametrize("projection", ["gate", "up", "down"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_weights_that_are_not_finite_are_named(
    matrices: Matrices, inputs: LayerInput, projection: str, value: float
) -> None:
    matrices.of[projection][2, 200, 17] = value
    with pytest.raises(EncodeError) as caught:
        encode(matrices, inputs, 0, 2)
    assert (caught.value.row, caught.value.column) == (200, 17)
    assert str(caught.value) == (
        f"tensor blk.3.ffn_{projection}_exps.weight, expert 2: "
        f"row 200, column 17: {value:g} does not fit ccq2, which holds finite values only"
    )
