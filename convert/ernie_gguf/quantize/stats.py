"""What is known of each encoded matrix: measured while it is encoded, shown by `report`, kept for a resumed run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MatrixStats:
    """One projection of one expert. Errors are relative: 0 is exact, 1 is as bad as zeros.

    `error` is |W - Ŵ|² / |W|². `metric_error` is the same in the calibration metric, tr(E H Eᵀ) / tr(W H Wᵀ) with
    E = W - Ŵ and H the second moments of the inputs; `plain_metric_error` is that of the plain encoder on the same
    matrix. `tokens` counts the calibration tokens that were routed to the expert, `scales` how many groups have scale
    0 … 15.
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
        """The GGUF tensor that the matrix is a part of."""
        return f"blk.{self.layer}.ffn_{self.projection}_exps.weight"
