"""One completion: from prompt tokens to text, with log probabilities."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .._engine import checks
from .._engine.engine import Engine
from .._engine.generation import generate
from .._engine.sampling import Sampling
from .._engine.seeds import Seeds
from ..llama_types import CompletionUsage
from .logprobs import TokenLogprobs, log_softmax, top
from .text_stream import TextStream


@dataclass(frozen=True)
class CompletionRequest:
    """What to generate.

    Attributes:
        prompt: token ids, negative ones for images.
        limit: maximum number of tokens to generate.
        stop: strings that end the text.
        logprobs: number of likeliest tokens to report; None for no log probabilities at all.
        echo: whether to report the prompt's log probabilities too, which needs an engine that keeps all logits.
        visible: control tokens that are part of the text.
    """

    prompt: Sequence[int]
    sampling: Sampling
    seed: int
    limit: int
    stop: Sequence[str]
    logprobs: int | None = None
    echo: bool = False
    visible: frozenset[int] = frozenset()

    @classmethod
    def checked(
        cls,
        engine: Engine,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        max_tokens: int | None,
        stop: str | Sequence[str] | None,
        seeds: Seeds,
        seed: int | None,
        logprobs: int | None,
        echo: bool = False,
    ) -> CompletionRequest:
        """A request of the options of a call; None for the next of the `seeds`.

        Raises:
            ValueError: the prompt leaves no room for a token in the context, or an option is out of range.
            TypeError: an option has the wrong type.
        """
        if echo and logprobs is not None and not engine.logits_all:
            raise ValueError("echo with logprobs needs the logits of the prompt: Llama(..., logits_all=True)")
        n_ctx = engine.context.n_ctx
        room = n_ctx - len(prompt)
        if room <= 0:
            raise ValueError(f"Requested tokens ({len(prompt)}) exceed context window of {n_ctx}")
        if logprobs is not None:
            logprobs = checks.integer("logprobs", logprobs, 0)
        if max_tokens is not None:
            max_tokens = checks.integer("max_tokens", max_tokens)
        limit = room if max_tokens is None or max_tokens <= 0 else min(max_tokens, room)
        stops = [stop] if isinstance(stop, str) else stop or ()
        if not isinstance(stops, Sequence) or not all(isinstance(each, str) for each in stops):
            raise TypeError(f"stop is {stop!r}, expected a string or a list of strings")
        return cls(prompt, sampling, seeds.next(seed), limit, stops, logprobs, echo)


@dataclass(frozen=True)
class TextPiece:
    """Text that is final, with the tokens that end in it; the last piece has a finish reason."""

    text: str
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None


class Completion:
    """A request, and what is known of its result while `pieces` runs.

    Attributes:
        completion_tokens: number of tokens generated so far.
        prompt_logprobs: log probabilities of the prompt, available once the first token is chosen.
    """

    def __init__(self, engine: Engine, request: CompletionRequest) -> None:
        self.request = request
        self.completion_tokens = 0
        self.prompt_logprobs: list[TokenLogprobs] = []
        self._engine = engine

    def pieces(self) -> Iterator[TextPiece]:
        """Generate: one piece for each token that makes text final, and one at the end."""
        model, request = self._engine.model, self.request
        stream = TextStream(request.stop)
        waiting: list[TokenLogprobs] = []
        released = 0
        finished = False
        tokens = generate(self._engine, request.prompt, request.sampling, request.seed, reset=True)
        with contextlib.closing(tokens):  # so that the Llama is free before the last piece is yielded
            for token in tokens:
                if request.echo and not self.completion_tokens and request.logprobs is not None:
                    self.prompt_logprobs = self._prompt_logprobs(request.logprobs)
                finished = model.is_eog(token)
                if finished:
                    break
                self.completion_tokens += 1
                piece = model.token_to_piece(token, special=token in request.visible)
                if request.logprobs is not None:
                    waiting.append(self._token_logprobs(token, piece, stream.n_decoded, request.logprobs))
                text = stream.feed(piece)
                if text:
                    released += len(text)
                    yield TextPiece(text, [each for each in waiting if each.offset < released])
                    waiting = [each for each in waiting if each.offset >= released]
                finished = stream.stopped
                if finished or self.completion_tokens == request.limit:
                    break
            else:
                finished = True  # a stopping criterion has ended generation
        yield TextPiece(stream.flush(), [] if stream.stopped else waiting, "stop" if finished else "length")

    def usage(self) -> CompletionUsage:
        """The token counts so far."""
        n_prompt = len(self.request.prompt)
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": self.completion_tokens,
            "total_tokens": n_prompt + self.completion_tokens,
        }

    def _token_logprobs(self, token: int, piece: bytes, offset: int, n: int) -> TokenLogprobs:
        with self._engine.lock.between_steps():  # another thread may be closing the Llama
            logprobs = log_softmax(self._engine.sequence.logits())
        return TokenLogprobs(piece, offset, float(logprobs[token]), top(self._engine.model, logprobs, n))

    def _prompt_logprobs(self, n: int) -> list[TokenLogprobs]:
        rows = self._engine.scores(len(self.request.prompt))
        model, stream = self._engine.model, TextStream()
        entries = []
        for i, token in enumerate(self.request.prompt):
            hidden = i == 0 and token == model.token_bos()  # added by tokenize(), not part of the text
            piece, offset = model.token_to_piece(token, special=not hidden), stream.n_decoded
            stream.feed(piece)
            if i == 0:
                entries.append(TokenLogprobs(piece, offset, None, []))
                continue
            logprobs = log_softmax(rows[i - 1])
            entries.append(TokenLogprobs(piece, offset, float(logprobs[token]), top(model, logprobs, n)))
        return entries
