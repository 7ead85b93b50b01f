"""Problems for the encoder, and its arithmetic a second time: numpy, float64, every choice by trying all.

This follows the definitions and shares no code with the product: H = G Gᵀ, and the square of block k of E G is what the
errors up to block k cost.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch
from ernie_gguf.ccq2 import native
from ernie_gguf.ccq2.rows import codebook
from ernie_gguf.quantize.kernels import Kernels
from ernie_gguf.quantize.kernels_cpu import CpuKernels
from ernie_gguf.quantize.kernels_torch import TorchKernels

F64 = npt.NDArray[np.float64]
U8 = npt.NDArray[np.uint8]

THREE_MAPS = ((15853988, 162772864), (1608624434, 3210067701), (15729776, 137203147))  # the second wraps around
KERNELS = ("torch", "compiled")

# Inputs: independent; correlated with their neighbours; a few loud ones among many; fewer tokens than inputs; one
# token, repeated; no tokens.
KINDS = ("white", "correlated", "loud", "few tokens", "one token", "zeros")


def kernels_of(name: str, width: int | None = None) -> Kernels:
    """The kernels "torch" or "compiled". Under `make test` the latter must be built. `width`: see CpuKernels."""
    if name == "torch":
        return TorchKernels()
    if (library := native.library()) is None:
        if os.environ.get("LLAMA_CPP_BIN"):
            pytest.fail("the compiled search is not built: run make build")
        pytest.skip("the compiled search is not built: run make search")
    if width and width > native.vector_width(library):
        pytest.skip(f"this machine has no vector registers of {width} bytes")
    return CpuKernels(library, width)


def inputs_of(kind: str, tokens: int, k: int, seed: int) -> torch.Tensor:
    """Float32 [tokens, K]; see KINDS."""
    rng = np.random.default_rng(seed)
    tokens = {"few tokens": 7, "one token": 1}.get(kind, tokens)
    x = rng.standard_normal((tokens, k))
    if kind != "white":
        mix = 0.9 ** np.abs(np.arange(k)[:, None] - rng.permutation(k)) * rng.choice([-1, 1], (k, k))
        x = x + 3 * (x @ mix) / np.sqrt(k)
        x += rng.standard_normal((tokens, k // 4)).repeat(4, 1)
        x += rng.standard_normal((tokens, 6)) @ rng.standard_normal((6, k))
    if kind == "loud":
        x[:, rng.permutation(k)[: k // 16]] *= 20
    if kind == "one token":
        x = x.repeat(30, 0)
    if kind == "zeros":
        x[:] = 0
    return torch.from_numpy(x.astype(np.float32))


def hessian_of(kind: str, b: int, k: int, seed: int = 0) -> torch.Tensor:
    """Hessians float32 [B, K, K] of inputs; see KINDS."""
    x = torch.stack([inputs_of(kind, 2 * k, k, seed + i) for i in range(b)])
    return x.mT @ x / x.shape[1]


def weights_of(b: int, n: int, k: int, seed: int = 0) -> torch.Tensor:
    """Gaussian float32 [B, N, K], groups of 64 and rows of different loudness."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((b, n, k // 64, 64)) * rng.uniform(0.5, 1, (b, n, k // 64, 1))
    return torch.from_numpy((w * rng.uniform(0.02, 0.05, (b, n, 1, 1))).reshape(b, n, k).astype(np.float32))


@dataclass(frozen=True)
class Truth:
    """The damped Hessian of one matrix: h = g gᵀ float64 [K, K], g upper triangular."""

    h: F64
    g: F64

    def cost(self, e: F64) -> F64:
        """E H Eᵀ of the rows of e [N, K]: [N]."""
        cost: F64 = ((e @ self.h) * e).sum(1)
        return cost

    def unit_upper(self) -> F64:
        """U_jk = G_jk G_kk⁻¹, by blocks of 4."""
        u = self.g.copy()
        for i in range(0, len(u), 4):
            u[:, i : i + 4] = self.g[:, i : i + 4] @ np.linalg.inv(self.g[i : i + 4, i : i + 4])
        return u


def truth_of(h: torch.Tensor, percdamp: float = 0.3) -> Truth:
    """Of a Hessian [K, K]: scaled to mean diagonal 1 (zeros: the identity), damped and factored."""
    wide: F64 = h.double().numpy()
    level = np.trace(wide) / len(wide)
    wide = wide / level if level > 0 else np.eye(len(wide))
    wide = wide + percdamp * np.eye(len(wide))
    lower = np.linalg.cholesky(np.linalg.inv(wide))  # H⁻¹ = L Lᵀ, so H = L⁻ᵀ L⁻¹
    g: F64 = np.linalg.inv(lower).T.astype(np.float64)
    return Truth(wide, g)


def codewords_of(code_maps: tuple[tuple[int, int], ...], map_index: npt.NDArray[np.int32]) -> F64:
    """The codewords of each row's map, map_index [N] -> [N, 256, 4]."""
    codewords: F64 = np.stack([codebook(m, z) for m, z in code_maps]).astype(np.float64)
    return codewords[map_index]


def try_all(truth: Truth, w: F64, e: F64, group: int, book: tuple[F64, F64], codes: U8 | None) -> F64:  # noqa: PLR0917
    """What each byte of a group costs after the choices before it, [N, 16, 256].

    w, e [N, K], of which e is used up to the group; book: step [N] = d*s and codewords [N, 256, 4]. The choices are
    `codes` [N, 16], or else the cheapest.
    """
    n = len(w)
    e = e.copy()
    step, words = book
    costs = np.empty((n, 16, 256))
    for q in range(16):
        start = 64 * group + 4 * q
        here = slice(start, start + 4)
        errors = w[:, None, here] - step[:, None, None] * words  # [N, 256, 4]
        before = e[:, :start] @ truth.g[:start, here]
        costs[:, q] = ((before[:, None] + errors @ truth.g[here, here]) ** 2).sum(2)
        best = costs[:, q].argmin(1) if codes is None else codes[:, q]
        e[:, here] = errors[np.arange(n), best]
    return costs
