"""A model with one context, used by one caller at a time."""

from __future__ import annotations

import ctypes
import weakref
from collections import abc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .context import Context
from .images import Images
from .lock import ContextLock
from .model import Model
from .sampler import Sampler
from .sampling import Sampling
from .scores import Scores
from .sequence import Sequence
from .state import LlamaState, StateCache
from .vision import VisionEncoder

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

DraftModel = Callable[..., Any]  # llama_speculative.LlamaDraftModel, or any function of the same arguments


class Engine:
    """The model, the context and what it has evaluated.

    Methods marked "needs a lease" use the context; their callers must hold a lease of `lock`.

    Attributes:
        images: what the negative ids of a sequence stand for.
        sequence: what is evaluated, and in the KV cache.
        lock: leases the context.
        cache: states of earlier prompts to continue from, if any.
        cache_prompt: whether a prompt continues from what it shares with the sequence.
        draft_model: guesses the tokens that follow, if any.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        model: Model,
        context: Context,
        *,
        logits_all: bool,
        cache_prompt: bool,
        draft_model: DraftModel | None = None,
        encoder: VisionEncoder | None = None,
    ) -> None:
        self.model = model
        self.context = context
        self.images = Images(encoder)
        self.sequence = Sequence(context, self.images, Scores(context.n_ctx, model.n_vocab()) if logits_all else None)
        self.lock = ContextLock(_unowned(self._suspend), _unowned(self._resume))
        self.cache: StateCache | None = None
        self.cache_prompt = cache_prompt
        self.draft_model = draft_model
        self._library = library

    def close(self) -> None:
        """Free the context and the model as soon as no thread computes. Open streams end."""
        lease = self.lock.close()
        try:
            self.context.close()
            if self.images.encoder is not None:
                self.images.encoder.close()
            self.model.close()
        finally:
            lease.release()

    def check_ids(self, ids: abc.Sequence[int], images: bool = True) -> None:
        """Check that ids are in the vocabulary, or `images`; ValueError if one is not."""
        n_vocab = self.model.n_vocab()
        if ids and (min(ids) < 0 or max(ids) >= n_vocab):
            for each in ids:
                if each >= n_vocab or (each < 0 and not (images and each in self.images)):
                    raise ValueError(f"token {each} is not in the vocabulary of {n_vocab} tokens")

    def eval(self, ids: abc.Sequence[int], n_outputs: int = 1) -> None:
        """As `Llama.eval`, with logits for the last `n_outputs` tokens of each batch; needs a lease."""
        self.check_ids(ids)
        self.sequence.extend(ids, n_outputs)

    @property
    def logits_all(self) -> bool:
        """Whether the logits of all tokens are kept."""
        return self.sequence.scores is not None

    def scores(self, n: int) -> npt.NDArray[np.float32]:
        """A view of the logits after each of the first `n` cells of the sequence, [n, n_vocab].

        Raises:
            ValueError: they are not kept.
        """
        if self.sequence.scores is None:
            raise ValueError("scores are kept only by Llama(..., logits_all=True); `logits` holds the last token's")
        return self.sequence.scores.first(n)

    def sampler(self, sampling: Sampling, seed: int) -> Sampler:
        """A new sampler whose penalties have seen what is evaluated."""
        sampler = Sampler(self._library, self.model, sampling, seed)
        sampler.accept_prompt(self.sequence.ids)
        return sampler

    def state(self, seed: int) -> LlamaState:
        """The state to restore later; needs a lease."""
        ids = self.sequence.ids
        return LlamaState(tuple(ids), self.context.state(), seed, self.images.sizes(ids), self.model.fingerprint)

    def set_state(self, state: LlamaState) -> None:
        """Restore a saved state; needs a lease.

        Raises:
            ValueError: it belongs to another model or to other options, or its parts do not belong together.
        """
        if state.model and state.model != self.model.fingerprint:
            raise ValueError("the state belongs to another model: it was saved by a Llama of another file")
        ids = self.images.restore(state.input_ids, state.pictures)
        self.check_ids(ids)
        self.sequence.restore(ids, state.llama_state)

    def _suspend(self) -> tuple[LlamaState, npt.NDArray[np.float32] | None]:
        """What `_resume` needs to continue from here after others have used the context; needs a lease."""
        scores = self.sequence.scores
        return self.state(0), None if scores is None else scores.first(len(self.sequence)).copy()

    def _resume(self, suspended: tuple[LlamaState, npt.NDArray[np.float32] | None]) -> None:
        state, rows = suspended
        self.set_state(state)
        if rows is not None and self.sequence.scores is not None:
            self.sequence.scores.store(0, rows)


def _unowned(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method` without keeping its object alive, which holds what will call it."""
    reference = weakref.WeakMethod(method)

    def call(*arguments: Any) -> Any:  # noqa: ANN401 - as the method's
        bound = reference()
        return None if bound is None else bound(*arguments)

    return call
