"""One completion: from prompt tokens to text, with log probabilities."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ._engine import Engine
from ._model import Model
from ._sampling import Sampling
from ._text import TextStream
from .llama_types import CompletionLogprobs, CompletionUsage, CreateCompletionResponse

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


@dataclass(frozen=True)
class TextPiece:
    """Text that is final, with the tokens that end in it; the last piece has a finish reason."""

    text: str
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None


@dataclass
class Completion:
    """A request, and what is known of its result while `pieces` runs.

    Attributes:
        prompt: token ids.
        limit: maximum number of tokens to generate.
        stop: strings that end the text.
        logprobs: number of likeliest tokens to report; None for no log probabilities at all.
        visible: control tokens that are part of the text.
        echo: whether to report the prompt's log probabilities too, which needs an engine that keeps all logits.
        completion_tokens: number of tokens generated so far.
        prompt_logprobs: log probabilities of the prompt, available once the first token is chosen.
    """

    engine: Engine
    prompt: Sequence[int]
    sampling: Sampling
    seed: int
    limit: int
    stop: Sequence[str]
    logprobs: int | None = None
    visible: frozenset[int] = frozenset()
    echo: bool = False
    completion_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    def pieces(self) -> Iterator[TextPiece]:
        """Generate: one piece for each token that makes text final, and one at the end."""
        model = self.engine.model
        stream = TextStream(self.stop)
        waiting: list[TokenLogprobs] = []
        released = 0
        finished = False
        tokens = self.engine.generate(self.prompt, self.sampling, self.seed, reset=True)
        with contextlib.closing(tokens):  # so that the Llama is free before the last piece is yielded
            for token in tokens:
                if self.echo and not self.completion_tokens and self.logprobs is not None:
                    self.prompt_logprobs = self._prompt_logprobs()
                finished = model.is_eog(token)
                if finished:
                    break
                self.completion_tokens += 1
                piece = model.token_to_piece(token, special=token in self.visible)
                if self.logprobs is not None:
                    waiting.append(self._token_logprobs(token, piece, stream.n_decoded))
                text = stream.feed(piece)
                if text:
                    released += len(text)
                    yield TextPiece(text, [each for each in waiting if each.offset < released])
                    waiting = [each for each in waiting if each.offset >= released]
                finished = stream.stopped
                if finished or self.completion_tokens == self.limit:
                    break
            else:
                finished = True  # a stopping criterion has ended generation
        yield TextPiece(stream.flush(), [] if stream.stopped else waiting, "stop" if finished else "length")

    def usage(self) -> CompletionUsage:
        """The token counts so far."""
        return {
            "prompt_tokens": len(self.prompt),
            "completion_tokens": self.completion_tokens,
            "total_tokens": len(self.prompt) + self.completion_tokens,
        }

    def _token_logprobs(self, token: int, piece: bytes, offset: int) -> TokenLogprobs:
        with self.engine.lock.between_steps():  # another thread may be closing the Llama
            logprobs = log_softmax(self.engine.last_logits())
        return TokenLogprobs(
            piece, offset, float(logprobs[token]), top(self.engine.model, logprobs, self.logprobs or 0)
        )

    def _prompt_logprobs(self) -> list[TokenLogprobs]:
        scores = self.engine.scores()
        if scores is None:
            raise ValueError("echo with logprobs needs the logits of the prompt: Llama(..., logits_all=True)")
        model, stream = self.engine.model, TextStream()
        entries = []
        for i, token in enumerate(self.prompt):
            hidden = i == 0 and token == model.token_bos()  # added by tokenize(), not part of the text
            piece, offset = model.token_to_piece(token, special=not hidden), stream.n_decoded
            stream.feed(piece)
            if i == 0:
                entries.append(TokenLogprobs(piece, offset, None, []))
                continue
            logprobs = log_softmax(scores[i - 1])
            best = top(model, logprobs, self.logprobs or 0)
            entries.append(TokenLogprobs(piece, offset, float(logprobs[token]), best))
        return entries


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


class Results:
    """Makes the result dictionaries of a completion."""

    def __init__(self, completion: Completion, model_name: str, prompt: str) -> None:
        """`prompt` is the prompt's text, which an echoing completion puts first."""
        self._completion = completion
        self._prompt = prompt
        self._id = f"cmpl-{uuid.uuid4()}"
        self._created = int(time.time())
        self._model_name = model_name

    def response(self) -> CreateCompletionResponse:
        """The complete result."""
        pieces = list(self._completion.pieces())
        text = "".join(piece.text for piece in pieces)
        entries = [each for piece in pieces for each in piece.logprobs]
        result = self._response(text, self._lists(entries), pieces[-1].finish_reason)
        if self._completion.echo:
            result["choices"][0]["text"] = self._prompt + text
            if logprobs := result["choices"][0]["logprobs"]:
                result["choices"][0]["logprobs"] = _joined(as_lists(self._completion.prompt_logprobs, 0), logprobs)
        result["usage"] = self._completion.usage()
        return result

    def chunks(self) -> Iterator[CreateCompletionResponse]:
        """One chunk per piece; the last has text only if some was held back."""
        for i, piece in enumerate(self._completion.pieces()):
            if i == 0 and self._completion.echo:
                entries = None if self._completion.logprobs is None else as_lists(self._completion.prompt_logprobs, 0)
                yield self._response(self._prompt, entries, None)
            yield self._response(piece.text, self._lists(piece.logprobs), piece.finish_reason)

    def _lists(self, entries: Sequence[TokenLogprobs]) -> CompletionLogprobs | None:
        return None if self._completion.logprobs is None else as_lists(entries, len(self._prompt))

    def _response(
        self, text: str, logprobs: CompletionLogprobs | None, finish_reason: Literal["stop", "length"] | None
    ) -> CreateCompletionResponse:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model_name,
            "choices": [{"text": text, "index": 0, "logprobs": logprobs, "finish_reason": finish_reason}],
        }


def _joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    return {
        "tokens": first["tokens"] + second["tokens"],
        "text_offset": first["text_offset"] + second["text_offset"],
        "token_logprobs": first["token_logprobs"] + second["token_logprobs"],
        "top_logprobs": first["top_logprobs"] + second["top_logprobs"],
    }
