"""What the KV cache holds: the ids of its cells, and the position of what comes next."""

from __future__ import annotations

from collections import abc
from typing import TYPE_CHECKING

from .context import Context
from .images import Images
from .sampler import Sampler
from .scores import Scores

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def longest_token_prefix(a: abc.Sequence[int], b: abc.Sequence[int]) -> int:
    """Number of tokens that `a` and `b` have in common at their start."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


class Sequence:
    """Sequence 0 of a context, the only one but for scoring. Whoever else evaluates calls `keep` or `replaced` then.

    Its methods use the context: callers hold a lease of it.

    Attributes:
        ids: what is in the cache, one id for each cell: tokens, and negative ids for images.
        position: the position of what comes next; images take fewer positions than cells.
        row: the row of the last batch's logits to choose the next token from, counted from the end: -1 is the last;
            None if there are no logits.
        scores: the logits after each cell, if they are kept.
    """

    def __init__(self, context: Context, images: Images, scores: Scores | None) -> None:
        self._context = context
        self._images = images
        self.ids: list[int] = []
        self.position = 0
        self.row: int | None = None
        self.scores = scores

    def __len__(self) -> int:
        return len(self.ids)

    def extend(self, ids: abc.Sequence[int], n_outputs: int = 1) -> None:
        """Evaluate `ids`, with logits for the last `n_outputs` tokens of each batch, or for all if scores are kept.

        Raises:
            ValueError: they do not fit into the context, or an image cannot be evaluated.
            RuntimeError: llama.cpp fails.
        """
        n_ctx = self._context.n_ctx
        if len(self.ids) + len(ids) > n_ctx:
            raise ValueError(f"Requested tokens ({len(self.ids) + len(ids)}) exceed context window of {n_ctx}")
        if min(ids, default=0) >= 0:
            self._add_tokens(ids, n_outputs)
            return
        for run in self._images.runs(ids):
            if run[0] < 0:
                self._add_image(run)
            else:
                self._add_tokens(run, n_outputs)

    def _add_tokens(self, tokens: abc.Sequence[int], n_outputs: int) -> None:
        for start in range(0, len(tokens), self._context.n_batch):
            batch = tokens[start : start + self._context.n_batch]
            n_rows = len(batch) if self.scores is not None else min(n_outputs, len(batch))
            try:
                self._context.decode(batch, self.position, n_rows)
            except BaseException:
                self._undo()
                raise
            if self.scores is not None:
                self.scores.store(len(self.ids), self._context.logits(n_rows))
            self.ids += batch
            self.position += len(batch)
            self.row = -1

    def _add_image(self, cells: abc.Sequence[int]) -> None:
        try:
            n_positions = self._images.decode(cells[0], self._context, self.position)
        except BaseException:
            self._undo()
            raise
        if self.scores is not None:
            self.scores.store_nan(len(self.ids), len(cells))
        self.ids += cells
        self.position += n_positions
        self.row = None

    def _undo(self) -> None:
        """Forget the part of a batch that was evaluated."""
        self.row = None
        self._context.keep(self.position)

    def keep(self, n: int) -> None:
        """Forget all but the first `n` cells, and the logits."""
        self.cut(n)
        self.row = None

    def cut(self, n: int) -> None:
        """Forget all but the first `n` cells, but not the logits, which are still those of the last batch."""
        self.position = self._images.n_positions(self.ids[:n])
        self._context.keep(self.position)
        del self.ids[n:]

    def sample(self, sampler: Sampler, before: abc.Sequence[int]) -> int:
        """Choose the token that follows the ids `before`, which the logits are for.

        Raises:
            RuntimeError: nothing has been evaluated yet.
        """
        if self.row is None:
            raise RuntimeError("there is nothing to sample from before eval()")
        if sampler.needs_logits:
            return sampler.choose(self.logits(), before)
        return sampler.sample(self._context.pointer, self.row)

    def logits(self) -> npt.NDArray[np.float32]:
        """A copy of the logits to choose the next token from, [n_vocab].

        Raises:
            RuntimeError: there are none.
        """
        if self.row is None:
            raise RuntimeError("there are no logits before eval()")
        return self._context.logits_row(self.row)

    def replaced(self, ids: abc.Sequence[int]) -> None:
        """Record that the context now holds `ids`, and the logits of the last one."""
        self.ids, self.position, self.row = list(ids), self._images.n_positions(ids), -1

    def restore(self, ids: list[int], state: bytes) -> None:
        """Put a saved cache, whose cells are `ids`, in place of this one.

        Raises:
            ValueError: it belongs to another model or to other options, or does not hold `ids`.
        """
        self.keep(0)
        try:
            self._context.set_state(state)
            position = self._images.n_positions(ids)
            if self._context.n_positions() != position:
                raise ValueError(f"the state does not hold the {len(ids)} tokens that it names")
        except BaseException:
            self.keep(0)
            raise
        self.ids, self.position = ids, position
