"""Log probabilities of tokens, and their shape in the result of a completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._engine.model import Model
from ..llama_types import CompletionLogprobs

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class TokenLogprobs:
    """A token, where it starts in the text, and the likeliest tokens at its position.

    `logprob` is None for the first token of a prompt.
    """

    token: bytes
    offset: int
    logprob: float | None
    top: list[tuple[bytes, float]]


def log_softmax(logits: npt.NDArray[np.float32], axis: int = -1) -> npt.NDArray[np.float32]:
    """Log probabilities along an axis."""
    import numpy as np  # see Context.logits

    shifted = logits - logits.max(axis=axis, keepdims=True)
    result: npt.NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))
    return result


def top(model: Model, logprobs: npt.NDArray[np.float32], n: int) -> list[tuple[bytes, float]]:
    """The `n` likeliest tokens, likeliest first; control tokens as they are spelled."""
    n = min(n, len(logprobs))
    best: Sequence[int] = logprobs.argpartition(-n)[-n:].tolist() if n else []
    ordered = sorted(((float(logprobs[i]), i) for i in best), key=lambda pair: (-pair[0], pair[1]))
    return [(model.token_to_piece(token, special=True), logprob) for logprob, token in ordered]


def as_lists(entries: Sequence[TokenLogprobs], offset: int) -> CompletionLogprobs:
    """`entries` in the shape of a completion; `offset` is added to theirs."""
    return {
        "tokens": [each.token.decode(errors="replace") for each in entries],
        "text_offset": [offset + each.offset for each in entries],
        "token_logprobs": [each.logprob for each in entries],
        "top_logprobs": [_top_dictionary(each) for each in entries],
    }


def _top_dictionary(entry: TokenLogprobs) -> dict[str, float] | None:
    """The likeliest tokens and the chosen one, by text: tokens with the same text share an entry."""
    if entry.logprob is None:
        return None
    likeliest = {token.decode(errors="replace"): logprob for token, logprob in entry.top}
    return {**likeliest, entry.token.decode(errors="replace"): entry.logprob}


def joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    """The log probabilities of a prompt and of what follows it."""
    return {
        "tokens": first["tokens"] + second["tokens"],
        "text_offset": first["text_offset"] + second["text_offset"],
        "token_logprobs": first["token_logprobs"] + second["token_logprobs"],
        "top_logprobs": first["top_logprobs"] + second["top_logprobs"],
    }
