"""Evaluates, samples and generates with one model and one context, one caller at a time."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from . import _structs
from ._context import Context
from ._lock import ContextLock, Lease
from ._model import Model
from ._mtmd import Eyes
from ._pictures import Pictures
from ._sampler import Sampler
from ._sampling import Sampling
from ._state import LlamaState
from .llama_cache import longest_token_prefix

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ._scoring import Request, Score, Wave
    from .llama_cache import BaseLlamaCache
    from .llama_speculative import LlamaDraftModel

# A shorter shared prefix is evaluated again. Together with the rest of the prompt that costs next to nothing, and the
# text stays exactly that of a fresh start (llama.cpp uses other kernels for other batch sizes).
MIN_KEPT_PREFIX = 32


class Engine:
    """The model, the context and the evaluated tokens of a `Llama`.

    Methods marked "needs a lease" use the context; their callers must hold a lease of `lock`.

    Attributes:
        tokens: the evaluated tokens, which are in the KV cache; negative ids are pictures.
        pictures: what the negative ids stand for.
        lock: leases the context.
        cache: states of earlier prompts to continue from, if any.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        model: Model,
        context: Context,
        *,
        logits_all: bool,
        cache_prompt: bool,
        draft_model: LlamaDraftModel | None = None,
        eyes: Eyes | None = None,
    ) -> None:
        self.model = model
        self.context = context
        self.logits_all = logits_all
        self.lock = ContextLock(_unowned(self._suspend), _unowned(self._resume))
        self.tokens: list[int] = []
        self.pictures = Pictures(eyes)
        self._spared = 0  # positions that the tokens do not take, see Pictures.spared
        self._library = library
        self._cache_prompt = cache_prompt
        self._draft_model = draft_model
        self._scores: npt.NDArray[np.float32] | None = None
        self.cache: BaseLlamaCache | None = None
        self._n_rows = 0  # rows of logits that llama.cpp holds
        self._row = 0  # the row, counted from the end, of the token to be chosen: -1 is the last

    def close(self) -> None:
        """Free the context and the model as soon as no thread computes. Open streams end."""
        lease = self.lock.close()
        try:
            self.context.close()
            if self.pictures.eyes is not None:
                self.pictures.eyes.close()
            self.model.close()
        finally:
            lease.release()

    def keep(self, n: int) -> None:
        """Forget all but the first `n` tokens; needs a lease."""
        spared = self.pictures.spared(self.tokens[:n])
        self.context.keep(n - spared)
        del self.tokens[n:]
        self._n_rows, self._spared = 0, spared

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """Check that tokens are in the vocabulary, or pictures; ValueError if one is not."""
        n_vocab = self.model.n_vocab()
        if tokens and (min(tokens) < 0 or max(tokens) >= n_vocab):
            for token in tokens:
                if token >= n_vocab or (token < 0 and token not in self.pictures):
                    raise ValueError(f"token {token} is not in the vocabulary of {n_vocab} tokens")

    def eval(self, tokens: Sequence[int], n_outputs: int = 1) -> None:
        """As `Llama.eval`, with logits for the last `n_outputs` tokens of each batch; needs a lease."""
        self.check_tokens(tokens)
        n_ctx = self.context.n_ctx
        if len(self.tokens) + len(tokens) > n_ctx:
            raise ValueError(f"Requested tokens ({len(self.tokens) + len(tokens)}) exceed context window of {n_ctx}")
        for run in self.pictures.runs(tokens):
            if run[0] < 0:
                self._eval_picture(run)
            else:
                self._eval_text(run, n_outputs)

    def _eval_picture(self, cells: Sequence[int]) -> None:
        """Evaluate a picture; it leaves no logits."""
        eyes, n_past = self.pictures.eyes, len(self.tokens) - self._spared
        if eyes is None:
            raise ValueError("the prompt holds a picture: pass Llama(mmproj_path=...)")
        picture = self.pictures.pixels(cells[0])
        self._n_rows = 0
        try:
            eyes.decode(picture, self.context.pointer, n_past, self.context.n_batch)
        except BaseException:
            self.context.keep(n_past)
            raise
        if self.logits_all:
            import numpy as np  # see Context.logits

            rows = np.full((len(cells), self.model.n_vocab()), np.nan, np.float32)
            self._store_scores(len(self.tokens), rows)
        self.tokens += cells
        self._spared += picture.tokens - picture.positions

    def _eval_text(self, tokens: Sequence[int], n_outputs: int) -> None:
        for start in range(0, len(tokens), self.context.n_batch):
            batch = tokens[start : start + self.context.n_batch]
            n_past = len(self.tokens) - self._spared
            n_rows = len(batch) if self.logits_all else min(n_outputs, len(batch))
            try:
                self.context.decode(batch, n_past, n_rows)
            except BaseException:
                self._n_rows = 0
                self.context.keep(n_past)  # drop the part of this batch that was evaluated
                raise
            if self.logits_all:
                self._store_scores(len(self.tokens), self.context.logits(n_rows))
            self.tokens += batch
            self._n_rows, self._row = n_rows, -1

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
        return self._n_rows > 0

    def last_logits(self) -> npt.NDArray[np.float32]:
        """A copy of the logits after the last evaluated token, [n_vocab]; needs a lease."""
        return self.context.logits_row(self._row)

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
        return self._sample(sampler, self.tokens)

    def _sample(self, sampler: Sampler, before: Sequence[int]) -> int:
        """Choose the token that follows the tokens `before`, which is what the current row of logits is for."""
        if not self.has_logits():
            raise RuntimeError("there is nothing to sample from before eval()")
        if sampler.needs_logits:
            return sampler.choose(self.last_logits(), before)
        return sampler.sample(self.context.pointer, self._row)

    def generate(self, prompt: Sequence[int], sampling: Sampling, seed: int, reset: bool) -> Generator[int, None, None]:
        """As `Llama.generate`; acquires the lock when the first token is asked for."""
        lease = self.lock.acquire()
        sampler = None
        try:
            with lease:
                self._restore_from_cache(prompt)
                self.eval(self._begin(prompt, reset))
                sampler = self.sampler(sampling, seed)
                drafted: list[int] = []
                chosen = self._choose(sampler, drafted)
            while chosen:
                for i, token in enumerate(chosen):
                    self._row = i - 1 - len(drafted)
                    yield token
                with lease:
                    drafted = self._draft(chosen[-1])
                    self.eval([chosen[-1], *drafted], 1 + len(drafted))
                    chosen = self._choose(sampler, drafted)
        finally:
            if sampler is not None:
                sampler.close()
                self._save_to_cache(lease)
            lease.release()

    def _draft(self, token: int) -> list[int]:
        """The draft model's guess what follows the evaluated tokens and `token`."""
        if self._draft_model is None:
            return []
        import numpy as np  # see Context.logits

        room = min(self.context.n_batch, self.context.n_ctx - len(self.tokens)) - 1
        guess = self._draft_model(np.array([*self.tokens, token], np.intc))
        drafted = [int(each) for each in guess[: max(room, 0)]]
        n_vocab = self.model.n_vocab()
        return list(itertools.takewhile(lambda each: 0 <= each < n_vocab, drafted))  # a picture is no guess

    def _choose(self, sampler: Sampler, drafted: Sequence[int]) -> list[int]:
        """Choose the tokens that follow the evaluated ones before `drafted`, up to the first that was not drafted.

        All but the last of the result are evaluated then; rejected drafts are forgotten. A stopping criterion makes
        the result shorter, or empty.
        """
        n = len(self.tokens) - len(drafted)
        chosen: list[int] = []
        for i, guess in enumerate([*drafted, None]):
            self._row = i - 1 - len(drafted)
            before = self.tokens[: n + i] if drafted else self.tokens
            if sampler.stops is not None and sampler.stops(before, self.last_logits()):
                break
            chosen.append(self._sample(sampler, before))
            if chosen[-1] != guess:
                break
        n_kept = n + max(len(chosen) - 1, 0)
        if n_kept < len(self.tokens):
            self.context.keep(n_kept - self._spared)  # not self.keep: the logits are still needed
            del self.tokens[n_kept:]
        return chosen

    def _restore_from_cache(self, prompt: Sequence[int]) -> None:
        """Load the cached state that shares more of `prompt` than the evaluated tokens do."""
        if self.cache is None or not prompt or prompt not in self.cache:
            return
        state = self.cache[prompt]
        if longest_token_prefix(state.input_ids, prompt) > longest_token_prefix(self.tokens, prompt):
            self.set_state(state)

    def _save_to_cache(self, lease: Lease) -> None:
        """Cache the current state, unless another call uses the context now, or it is closed."""
        if self.cache is not None and self.lock.holds(lease):
            with contextlib.suppress(RuntimeError), lease:
                self.cache[self.tokens] = self.state(0)

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
        n = longest_token_prefix(self.tokens, prompt)
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
                self.context.decode(tokens, 0, len(tokens))
                if self.context.pooling_type == _structs.LLAMA_POOLING_TYPE_NONE:
                    rows = self.context.embeddings(len(tokens))
                    return [_unit(row) for row in rows] if normalize else rows
                pooled = self.context.pooled_embedding()
                return _unit(pooled) if normalize else pooled
            finally:
                self.keep(0)

    def score(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[Score]]]:
        """The scores of each request's targets by its index, as they are done; acquires the lock when first asked."""
        from . import _scoring  # imports numpy, see Context.logits

        limits = _scoring.Limits(self.context.n_ctx, self.context.n_seq_max, self.context.n_batch)
        lease = self.lock.acquire()
        try:
            for wave in _scoring.waves(requests, self.tokens, limits):
                with lease:
                    scores = self._score(wave)
                yield from scores.items()
        finally:
            lease.release()

    def _score(self, wave: Wave) -> dict[int, list[Score]]:
        """The scores of a wave; needs a lease."""
        from . import _scoring

        scores: dict[int, list[Score]] = {}
        self.keep(wave.kept[0])
        try:
            for index, score in _scoring.evaluate(self.context, wave):
                scores.setdefault(index, []).append(score)
        except BaseException:
            self.keep(0)  # any part of the wave may have been evaluated
            raise
        self.tokens = list(wave.path)
        self._n_rows, self._row = 1, -1  # the last token has logits
        if self.logits_all:
            self.keep(0)  # `scores` has no rows for these tokens
        return scores

    def _suspend(self) -> tuple[LlamaState, npt.NDArray[np.float32] | None]:
        """What `_resume` needs to continue from here after others have used the context; needs a lease."""
        scores = self.scores() if self.logits_all else None
        return self.state(0), None if scores is None else scores.copy()

    def _resume(self, suspended: tuple[LlamaState, npt.NDArray[np.float32] | None]) -> None:
        state, scores = suspended
        self.set_state(state)
        if scores is not None:
            self._store_scores(0, scores)

    def state(self, seed: int) -> LlamaState:
        """The state to restore later; needs a lease."""
        sizes = self.pictures.sizes(self.tokens)
        return LlamaState(tuple(self.tokens), self.context.state(), seed, sizes, self.model.fingerprint)

    def set_state(self, state: LlamaState) -> None:
        """Restore a saved state; needs a lease.

        Raises:
            ValueError: it belongs to another model or to other options, or its parts do not belong together.
        """
        if state.model and state.model != self.model.fingerprint:
            raise ValueError("the state belongs to another model: it was saved by a Llama of another file")
        tokens = self.pictures.restore(state.input_ids, state.pictures)
        self.check_tokens(tokens)
        self.keep(0)
        try:
            self.context.set_state(state.llama_state)
            spared = self.pictures.spared(tokens)
            if self.context.n_positions() != len(tokens) - spared:
                raise ValueError(f"the state does not hold the {len(tokens)} tokens that it names")
        except BaseException:
            self.keep(0)
            raise
        self.tokens, self._spared = tokens, spared


def _unowned(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method` without keeping its object alive, which holds what will call it."""
    reference = weakref.WeakMethod(method)

    def call(*arguments: Any) -> Any:  # noqa: ANN401 - as the method's
        bound = reference()
        return None if bound is None else bound(*arguments)

    return call


def _unit(vector: list[float]) -> list[float]:
    """`vector` scaled to length 1; a zero vector stays zero."""
    length = math.hypot(*vector)
    return [each / length for each in vector] if length else vector
