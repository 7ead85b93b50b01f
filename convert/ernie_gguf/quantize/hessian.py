"""The Hessian that weighs a row's error, and what the search needs of it.

A row W that decodes to Ŵ costs E H Eᵀ, with E = W - Ŵ and H the sum of x xᵀ over the inputs x of its matrix: GPTQ's
Hessian, up to a factor. H = G Gᵀ with G upper triangular turns the cost into a sum over columns; each term depends on
the errors up to its own column only. So columns are encoded one after another, and each error is fed into the columns
that follow: LDLQ, here in blocks of four columns, the weights of one code byte.

GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, https://arxiv.org/abs/2210.17323
QuIP: 2-Bit Quantization of Large Language Models With Guarantees (LDLQ), https://arxiv.org/abs/2307.13304
"""

from dataclasses import dataclass

import torch

from ..ccq2.rows import GROUP

BLOCK = 4  # weights of a code byte of ccq2


@dataclass(frozen=True)
class Hessian:
    """Of B matrices, float32: h, feedback [B, K, K]; block_root, diag_root, diag_inverse [B, K/4, 4, 4].

    Blocks of four are those of ccq2; other types have blocks of 1 or 8, see `factor`.

    h is damped; h = G Gᵀ with G upper triangular, and D are G's diagonal blocks.

    feedback = G D⁻¹: column block k says how errors in the columns before it move its target.
    block_root = D: maps an error of block k, measured from that target, to the root of its cost.
    diag_root = chol(h_kk), diag_inverse = h_kk⁻¹: the same for block k when all other columns are fixed.
    """

    h: torch.Tensor
    feedback: torch.Tensor
    block_root: torch.Tensor
    diag_root: torch.Tensor
    diag_inverse: torch.Tensor

    def group(self, group: int) -> "GroupHessian":
        """The part between the 64 columns of one group."""
        columns, block = slice(group * GROUP, (group + 1) * GROUP), self.block_root.shape[-1]
        blocks = slice(columns.start // block, columns.stop // block)
        small = (a[:, blocks] for a in (self.block_root, self.diag_root, self.diag_inverse))
        return GroupHessian(self.h[:, columns, columns], self.feedback[:, columns, columns], *small)


@dataclass(frozen=True)
class GroupHessian:
    """A Hessian between the columns of one group: h, feedback [B, 64, 64]; the others [B, 16, 4, 4]."""

    h: torch.Tensor
    feedback: torch.Tensor
    block_root: torch.Tensor
    diag_root: torch.Tensor
    diag_inverse: torch.Tensor


def diagonal_blocks(a: torch.Tensor, size: int) -> torch.Tensor:
    """[B, K, K] -> [B, K/size, size, size]."""
    b, k, _ = a.shape
    blocks = a.reshape(b, k // size, size, k // size, size).diagonal(dim1=1, dim2=3)  # [B, size, size, K/size]
    return blocks.permute(0, 3, 1, 2).contiguous()


def damped(h: torch.Tensor, percdamp: float) -> torch.Tensor:
    """Scale [B, K, K] to mean diagonal 1 and add `percdamp` to the diagonal, in float64. Zeros become the identity."""
    h = h.double()
    level = h.diagonal(dim1=1, dim2=2).mean(1)  # [B]
    scaled = h / torch.where(level > 0, level, 1)[:, None, None]
    scaled.diagonal(dim1=1, dim2=2).add_(torch.where(level > 0, percdamp, 1 + percdamp)[:, None])
    return scaled


def factor(h: torch.Tensor, percdamp: float, block: int = BLOCK) -> Hessian:
    """Damp and factor sums of x xᵀ [B, K, K] for codewords of `block` weights."""
    h = damped(h, percdamp)
    lower = torch.linalg.cholesky(h.flip(1, 2))
    g = lower.flip(1, 2)  # upper triangular, h = g gᵀ
    block_root = diagonal_blocks(g, block)
    b, k, _ = h.shape
    columns = g.float().reshape(b, k, k // block, 1, block)
    feedback = (columns @ torch.linalg.inv(block_root).float()[:, None]).reshape(b, k, k)
    diagonal = diagonal_blocks(h, block)
    diag_root, diag_inverse = torch.linalg.cholesky(diagonal), torch.linalg.inv(diagonal)
    return Hessian(h.float(), feedback, block_root.float(), diag_root.float(), diag_inverse.float())


def identity(b: int, device: torch.device, block: int = BLOCK) -> GroupHessian:
    """H = I in every group: the cost is the squared error, and nothing is fed back."""
    eye = torch.eye(GROUP, device=device).expand(b, GROUP, GROUP)
    small = torch.eye(block, device=device).expand(b, GROUP // block, block, block)
    return GroupHessian(eye, eye, small, small, small)
