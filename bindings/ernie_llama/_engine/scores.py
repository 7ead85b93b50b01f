"""Logits of all evaluated tokens, for `Llama(logits_all=True)`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class Scores:
    """The logits after each cell of a sequence, [n_cells, n_vocab]; NaN for the cells of images."""

    def __init__(self, n_ctx: int, n_vocab: int) -> None:
        self._n_ctx = n_ctx
        self._n_vocab = n_vocab
        self._rows: npt.NDArray[np.float32] | None = None

    def first(self, n: int) -> npt.NDArray[np.float32]:
        """A view of the first `n` rows."""
        return self._room(n)[:n]

    def store(self, start: int, rows: npt.NDArray[np.float32]) -> None:
        """Store rows from `start` on."""
        self._room(start + len(rows))[start : start + len(rows)] = rows

    def store_nan(self, start: int, n: int) -> None:
        """Store `n` rows of NaN from `start` on."""
        self._room(start + n)[start : start + n] = float("nan")

    def _room(self, n: int) -> npt.NDArray[np.float32]:
        """The array, with room for `n` rows at least; it doubles in size as needed."""
        import numpy as np  # see Context.logits

        if self._rows is None or len(self._rows) < n:
            grown = np.empty((min(max(2 * n, 64), self._n_ctx), self._n_vocab), np.float32)
            if self._rows is not None:
                grown[: len(self._rows)] = self._rows
            self._rows = grown
        return self._rows
