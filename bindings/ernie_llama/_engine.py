"""Evaluates, samples and generates with one model and one context, one caller at a time."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import _structs
from ._context import Context
from ._lock import ContextLock
from ._model import Model
from ._sampler import Sampler, Sampling

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# A shorter shared prefix is evaluated again. Together with the rest of the prompt that costs next to nothing, and the
# text stays exactly that of a fresh start (llama.cpp uses other kernels for other batch sizes).
MIN_KEPT_PREFIX = 32


@dataclass(frozen=True)
class LlamaState:
    """What `Llama.save_state` returns: the KV cache, and what is needed to continue from it.

    Attributes:
        input_ids: the evaluated tokens.
        llama_state: the cache, as llama.cpp writes it.
        seed: seed of the next draw.
    """

    input_ids: tuple[int, ...]
    llama_state: bytes
    seed: int

    @property
    def n_tokens(self) -> int:
        """Number of evaluated tokens."""
        return len(self.input_ids)

    @property
    def llama_state_size(self) -> int:
        """Size of the cache in bytes."""
        return len(self.llama_state)


class Engine:
    """The model, the context and the evaluated tokens of a `Llama`.

    Methods marked "needs a lease" use the context; their callers must hold a lease of `lock`.

    Attributes:
        tokens: the evaluated tokens, which are in the KV cache.
        lock: leases the context.
    """

    def __init__(
        self, library: ctypes.CDLL, model: Model, context: Context, *, logits_all: bool, cache_prompt: bool
    ) -> None:
        self.model = model
        self.context = context
        self.logits_all = logits_all
        self.lock = ContextLock()
        self.tokens: list[int] = []
        self._library = library
        self._cache_prompt = cache_prompt
        self._scores: npt.NDArray[np.float32] | None = None
        self._last_rows = 0

    def close(self) -> None:
        """Free the context and the model as soon as no thread computes. Open streams end."""
        lease = self.lock.acquire_now()
        try:
            self.context.close()
            self.model.close()
        finally:
            lease.release()

    def keep(self, n: int) -> None:
        """Forget all but the first `n` tokens; needs a lease."""
        self.context.keep(n)
        del self.tokens[n:]
        self._last_rows = 0

    def eval(self, tokens: Sequence[int]) -> None:
        """As `Llama.eval`; needs a lease."""
        n_ctx = self.context.n_ctx
        if len(self.tokens) + len(tokens) > n_ctx:
            raise ValueError(f"Requested tokens ({len(self.tokens) + len(tokens)}) exceed context window of {n_ctx}")
        for start in range(0, len(tokens), self.context.n_batch):
            batch = tokens[start : start + self.context.n_batch]
            try:
                self.context.decode(batch, len(self.tokens), self.logits_all)
            except BaseException:
                self._last_rows = 0
                self.context.keep(len(self.tokens))  # drop the part of this batch that was evaluated
                raise
            if self.logits_all:
                self._store_scores(len(self.tokens), self.context.logits(len(batch)))
            self.tokens += batch
            self._last_rows = len(batch) if self.logits_all else 1

    def _store_scores(self, start: int, rows: npt.NDArray[np.float32]) -> None:
        """Store `rows` from position `start` on; the array doubles in size as needed."""
        import numpy as np  # see Context.logits

        end = start + len(rows)
        if self._scores is None or len(self._scores) < end:
            grown = np.empty((min(max(2 * end, 64), self.context.n_ctx), rows.shape[1]), np.float32)
            if self._scores is not None:
                grown[:start] = self._scores[:start]
            self._scores = grown
        self._scores[start:end] = rows

    def scores(self) -> npt.NDArray[np.float32] | None:
        """A view of the logits after each evaluated token, [n_tokens, n_vocab]; None before the first evaluation."""
        return None if self._scores is None else self._scores[: len(self.tokens)]

    def has_logits(self) -> bool:
        """Whether llama.cpp holds the logits of the last evaluated token."""
        return self._last_rows > 0

    def last_logits(self) -> npt.NDArray[np.float32]:
        """A copy of the logits after the last evaluated token, [n_vocab]; needs a lease."""
        last: npt.NDArray[np.float32] = self.context.logits(self._last_rows)[-1]
        return last

    def sampler(self, sampling: Sampling, seed: int) -> Sampler:
        """A new sampler whose penalties have seen the evaluated tokens."""
        sampler = Sampler(self._library, self.model, sampling, seed)
        sampler.accept_prompt(self.tokens)
        return sampler

    def sample(self, sampler: Sampler) -> int:
        """Choose the token that follows the last evaluated one; needs a lease.

        Raises:
            RuntimeError: nothing has been evaluated yet.
        """
        if not self.has_logits():
            raise RuntimeError("there is nothing to sample from before eval()")
        if sampler.needs_logits:
            return sampler.choose(self.last_logits(), self.tokens)
        return sampler.sample(self.context.pointer)

    def generate(self, prompt: Sequence[int], sampling: Sampling, seed: int, reset: bool) -> Generator[int, None, None]:
        """As `Llama.generate`; acquires the lock when the first token is asked for."""
        lease = self.lock.acquire()
        sampler = None
        try:
            with lease:
                self.eval(self._begin(prompt, reset))
                sampler = self.sampler(sampling, seed)
                token = self.sample(sampler)
            while True:
                yield token
                with lease:
                    self.eval([token])
                    token = self.sample(sampler)
        finally:
            if sampler is not None:
                sampler.close()
            lease.release()

    def _begin(self, prompt: Sequence[int], reset: bool) -> Sequence[int]:
        """Keep what the cache shares with `prompt`, and return the tokens that are still to be evaluated."""
        if not prompt and (reset or not self.tokens):
            raise ValueError("the prompt holds no tokens, and the model's metadata asks for no BOS token")
        if reset:
            n_kept = self._shared_prefix(prompt) if self._cache_prompt else 0
            self.keep(n_kept)
            return prompt[n_kept:]
        if not prompt and not self.has_logits():  # after load_state
            prompt = self.tokens[-1:]
            self.keep(len(self.tokens) - 1)
        return prompt

    def _shared_prefix(self, prompt: Sequence[int]) -> int:
        """Length of the prefix of `prompt` to keep in the cache; 0 if it is short, or if the cache holds all of it.

        A repeated prompt is evaluated afresh, so that the same seed gives the same text.
        """
        n = 0
        for cached, wanted in zip(self.tokens, prompt, strict=False):
            if cached != wanted:
                break
            n += 1
        return n if MIN_KEPT_PREFIX <= n < len(prompt) else 0

    def embed(self, tokens: Sequence[int], normalize: bool) -> list[float] | list[list[float]]:
        """The embedding of `tokens` if the context pools, else one embedding per token; acquires the lock.

        Args:
            tokens: the text's tokens, at most `n_batch`.
            normalize: scale each embedding to length 1.
        """
        with self.lock.one_step():
            self.keep(0)
            try:
                self.context.decode(tokens, 0, True)
                if self.context.pooling_type == _structs.LLAMA_POOLING_TYPE_NONE:
                    rows = self.context.embeddings(len(tokens))
                    return [_unit(row) for row in rows] if normalize else rows
                pooled = self.context.pooled_embedding()
                return _unit(pooled) if normalize else pooled
            finally:
                self.keep(0)

    def set_state(self, tokens: Sequence[int], state: bytes) -> None:
        """Restore a saved state; needs a lease."""
        self.keep(0)
        self.context.set_state(state)
        self.tokens = list(tokens)


def _unit(vector: list[float]) -> list[float]:
    """`vector` scaled to length 1; a zero vector stays zero."""
    length = math.hypot(*vector)
    return [each / length for each in vector] if length else vector
