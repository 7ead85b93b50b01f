"""The metric of the encoder: what an error in a row costs, and the small matrices that the search needs of it.

An error E = W - Ŵ of a row costs E H Eᵀ, with H the second moments of the inputs. H = G Gᵀ with G upper triangular
turns that into a sum over columns in which each term depends on the errors up to its own column only, so that columns
can be encoded one after another; here in blocks of four, the weights of one code byte.
"""

from dataclasses import dataclass

import torch

from ..ccq2.rows import GROUP

QUAD = 4  # weights of a code byte
DAMPING = 0.3  # added to the diagonal of H, whose mean is 1


@dataclass(frozen=True)
class Metric:
    """Of B matrices, all float32: h, feed [B, K, K]; the 4x4 blocks forward, around, inverse [B, K/4, 4, 4].

    With D the diagonal blocks of G: feed = G D⁻¹ (column block k says what error of the columns before it to add to the
    target), forward = D (turns an error of block k into its cost), around = chol(H_kk) and inverse = H_kk⁻¹ (the same
    when all other columns are fixed).
    """

    h: torch.Tensor
    feed: torch.Tensor
    forward: torch.Tensor
    around: torch.Tensor
    inverse: torch.Tensor

    def group(self, group: int) -> "GroupMetric":
        """What belongs to one group of 64 columns alone."""
        here = slice(group * GROUP, (group + 1) * GROUP)
        quads = slice(here.start // QUAD, here.stop // QUAD)
        small = (blocks[:, quads] for blocks in (self.forward, self.around, self.inverse))
        return GroupMetric(self.h[:, here, here], self.feed[:, here, here], *small)


@dataclass(frozen=True)
class GroupMetric:
    """The part of a Metric between the columns of one group: h, feed [B, 64, 64]; the others [B, 16, 4, 4]."""

    h: torch.Tensor
    feed: torch.Tensor
    forward: torch.Tensor
    around: torch.Tensor
    inverse: torch.Tensor


def diagonal_blocks(a: torch.Tensor, size: int) -> torch.Tensor:
    """[B, K, K] -> [B, K/size, size, size]."""
    b, k, _ = a.shape
    blocks = a.reshape(b, k // size, size, k // size, size).diagonal(dim1=1, dim2=3)  # [B, size, size, K/size]
    return blocks.permute(0, 3, 1, 2).contiguous()


def damped(h: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """Scale [B, K, K] to mean diagonal 1 and add `damping` to it, in float64; all zeros become the identity."""
    h = h.double()
    level = h.diagonal(dim1=1, dim2=2).mean(1)  # [B]
    scaled = h / torch.where(level > 0, level, 1)[:, None, None]
    scaled.diagonal(dim1=1, dim2=2).add_(torch.where(level > 0, damping, 1 + damping)[:, None])
    return scaled


def make_metric(h: torch.Tensor, damping: float = DAMPING) -> Metric:
    """The metric of second moments [B, K, K]."""
    h = damped(h, damping)
    lower = torch.linalg.cholesky(h.flip(1, 2))
    g = lower.flip(1, 2)  # upper triangular, h = g gᵀ
    forward = diagonal_blocks(g, QUAD)
    b, k, _ = h.shape
    columns = g.float().reshape(b, k, k // QUAD, 1, QUAD)
    feed = (columns @ torch.linalg.inv(forward).float()[:, None]).reshape(b, k, k)
    blocks = diagonal_blocks(h, QUAD)
    around, inverse = torch.linalg.cholesky(blocks), torch.linalg.inv(blocks)
    return Metric(h.float(), feed, forward.float(), around.float(), inverse.float())


def plain_metric(b: int, device: torch.device) -> GroupMetric:
    """H = I at every group: squared error, nothing fed back."""
    eye = torch.eye(GROUP, device=device).expand(b, GROUP, GROUP)
    small = torch.eye(QUAD, device=device).expand(b, GROUP // QUAD, QUAD, QUAD)
    return GroupMetric(eye, eye, small, small, small)
