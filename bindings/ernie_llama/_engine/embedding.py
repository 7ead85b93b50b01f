"""Embeddings of texts: the hidden states of a context that is made for them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .._lib import structs
from .engine import Engine


def embedding_tokens(engine: Engine, text: str | Sequence[int], truncate: bool) -> list[int]:
    """The tokens of a text to embed, which may be its tokens already.

    Raises:
        RuntimeError: the context is not made for embeddings.
        ValueError: the text is empty, or it is too long and not to be truncated.
    """
    if not engine.context.params.embeddings:
        raise RuntimeError("embeddings need Llama(..., embedding=True)")
    tokens = engine.model.tokenize(text.encode(), True, False) if isinstance(text, str) else list(text)
    engine.check_ids(tokens, images=False)
    n_batch = engine.context.n_batch
    if truncate:
        tokens = tokens[:n_batch]
    if not 0 < len(tokens) <= n_batch:
        raise ValueError(f"a text has {len(tokens)} tokens, expected 1 to {n_batch} (n_batch)")
    return tokens


def embed(engine: Engine, tokens: Sequence[int], normalize: bool) -> list[float] | list[list[float]]:
    """The embedding of `tokens` if the context pools, else one embedding per token; acquires the lock.

    Args:
        engine: its context is made for embeddings.
        tokens: the text's tokens, at most `n_batch`.
        normalize: scale each embedding to length 1.
    """
    context = engine.context
    with engine.lock.one_step():
        engine.sequence.keep(0)
        try:
            context.decode(tokens, 0, len(tokens))
            if context.pooling_type == structs.LLAMA_POOLING_TYPE_NONE:
                rows = context.embeddings(len(tokens))
                return [_unit(row) for row in rows] if normalize else rows
            pooled = context.pooled_embedding()
            return _unit(pooled) if normalize else pooled
        finally:
            engine.sequence.keep(0)


def _unit(vector: list[float]) -> list[float]:
    """`vector` scaled to length 1; a zero vector stays zero."""
    length = math.hypot(*vector)
    return [each / length for each in vector] if length else vector
