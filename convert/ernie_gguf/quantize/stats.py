"""Statistics of each encoded matrix: measured during encoding, shown by `report`, kept for a resumed run.

Errors of several experts are averaged, weighted by their numbers of weights. A ratio of errors is the ratio of the
averages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True)
class MatrixStats:
    """One projection of one expert. Errors are relative: 0 is exact, 1 is as bad as zeros.

    `error` is |W - Ŵ|² / |W|². `metric_error` is the same in the calibration metric, tr(E H Eᵀ) / tr(W H Wᵀ) with
    E = W - Ŵ and H the Hessian of the inputs. `plain_metric_error` is that of the plain encoder, with one code map for
    all rows. `tokens` counts the calibration tokens routed to the expert, `scales` how many groups have scale 0 … 15.
    """

    layer: int
    projection: str  # gate, up or down
    expert: int
    weights: int
    tokens: int
    error: float
    metric_error: float
    plain_metric_error: float
    scales: tuple[int, ...]

    @property
    def tensor(self) -> str:
        """The GGUF tensor that holds the matrix."""
        return f"blk.{self.layer}.ffn_{self.projection}_exps.weight"


@dataclass(frozen=True)
class Group:
    """Matrices that are summed up together: the experts of one tensor, or one projection in all layers."""

    matrices: tuple[MatrixStats, ...]

    @property
    def layer(self) -> int:
        """The layer of the first matrix; a tensor's matrices share it."""
        return self.matrices[0].layer

    @property
    def projection(self) -> str:
        """gate, up or down."""
        return self.matrices[0].projection

    @property
    def tensor(self) -> str:
        """The GGUF tensor."""
        return self.matrices[0].tensor

    @property
    def weights(self) -> int:
        """The number of weights in all matrices."""
        return sum(matrix.weights for matrix in self.matrices)

    @property
    def error(self) -> float:
        """Mean of |W - Ŵ|² / |W|²."""
        return self._mean([matrix.error for matrix in self.matrices])

    @property
    def metric_error(self) -> float:
        """Mean error in the calibration metric."""
        return self._mean([matrix.metric_error for matrix in self.matrices])

    @property
    def plain_metric_error(self) -> float:
        """The plain encoder's mean error in the calibration metric."""
        return self._mean([matrix.plain_metric_error for matrix in self.matrices])

    @property
    def ratio(self) -> float | None:
        """`metric_error` over `plain_metric_error`; None where the plain encoder makes no error."""
        return self.metric_error / self.plain_metric_error if self.plain_metric_error else None

    @property
    def tokens_least(self) -> int:
        """Tokens of the expert that got the fewest."""
        return min(matrix.tokens for matrix in self.matrices)

    @property
    def tokens_median(self) -> float:
        """Median of the matrices' tokens."""
        return median(matrix.tokens for matrix in self.matrices)

    @property
    def unseen(self) -> int:
        """Matrices of experts that got no token."""
        return sum(1 for matrix in self.matrices if matrix.tokens == 0)

    @property
    def worse(self) -> int:
        """Matrices whose error in the calibration metric exceeds the plain encoder's."""
        return sum(1 for matrix in self.matrices if matrix.metric_error > matrix.plain_metric_error)

    @property
    def scales(self) -> list[int]:
        """Groups with scale 0 … 15."""
        return [sum(counts) for counts in zip(*(matrix.scales for matrix in self.matrices), strict=True)]

    def _mean(self, values: Sequence[float]) -> float:
        weighted = zip(self.matrices, values, strict=True)
        return sum(matrix.weights * value for matrix, value in weighted) / self.weights


def by_tensor(matrices: Sequence[MatrixStats]) -> list[Group]:
    """One group per tensor, in order of layer and projection, experts in order."""
    tensors: dict[tuple[int, int], list[MatrixStats]] = {}
    for matrix in sorted(matrices, key=lambda matrix: matrix.expert):
        tensors.setdefault((matrix.layer, PROJECTIONS.index(matrix.projection)), []).append(matrix)
    return [Group(tuple(experts)) for _, experts in sorted(tensors.items(), key=lambda item: item[0])]


def by_projection(matrices: Sequence[MatrixStats]) -> list[Group]:
    """One group per projection that occurs."""
    groups = (tuple(m for m in matrices if m.projection == projection) for projection in PROJECTIONS)
    return [Group(group) for group in groups if group]
